"""Reports of a module's parts: summed over batches and processes, acted on between updates only."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from spear.models.zipformer.whiten import HIGH_PROB, LOW_PROB, Whiten
from spear.training.reports import Reports


def test_reports_are_summed_in_the_order_of_the_parts() -> None:
    module = nn.ModuleList([Whiten(5.0), nn.Linear(2, 2), Whiten(5.0), Whiten(5.0)])
    reports = Reports(module)
    module[0].report(torch.tensor(True))
    module[3].report(torch.tensor(True))
    module[3].report(torch.tensor(False))
    device = torch.device("cpu")
    assert reports.take(device).tolist() == [1, 0, 2, 1, 0, 1]
    assert reports.take(device).tolist() == [0] * 6
    assert Reports(nn.Linear(2, 2)).take(device).shape == (0,)


@pytest.mark.parametrize(("sums", "expected"), [([0.0, 0.0], HIGH_PROB), ([3.0, 0.0], LOW_PROB), ([3.0, 1.0], HIGH_PROB)])
def test_whiten_changes_its_share_between_updates_for_the_reports_of_all(sums: list[float], expected: float) -> None:
    whiten = Whiten(5.0)
    reports = Reports(whiten)
    whiten.report(torch.tensor(False))
    assert whiten.prob == HIGH_PROB  # an update is going on
    reports.settle(sums)
    assert whiten.prob == expected


def test_whiten_without_a_training_changes_its_share_at_once() -> None:
    whiten = Whiten(5.0)
    whiten.report(torch.tensor(False))
    assert whiten.prob == LOW_PROB
