"""Similarity from sums against its definition, retrieval, and the analysis of made-up models."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch

from spear.evaluation.analysis import ChangedClips, choose_cuts, compare_layers, retrieval
from spear.evaluation.embedders import Audio, Embedder, Layers, LogMel
from spear.evaluation.similarity import CrossSums, nearest_frames, recall_at_one
from tests.evaluation.cuts import make_cut


def test_cka_from_sums_is_that_of_the_kernels() -> None:
    rng = np.random.default_rng(0)
    x = rng.normal(1, 2, size=(200, 5))
    y = x @ rng.normal(size=(5, 7)) + rng.normal(size=(200, 7))
    sums = CrossSums()
    for part in np.array_split(np.arange(200), 3):
        sums.add(torch.from_numpy(x[part]), torch.from_numpy(y[part]))
    centre = np.eye(200) - 1 / 200
    k, m = centre @ (x @ x.T) @ centre, centre @ (y @ y.T) @ centre
    assert sums.cka() == pytest.approx((k * m).sum() / np.linalg.norm(k) / np.linalg.norm(m))


def test_cka_is_one_for_turned_and_scaled_features() -> None:
    x = torch.randn(100, 4, generator=torch.Generator().manual_seed(0))
    sums = CrossSums()
    sums.add(x, 3 * x.flip(1) + 5)
    assert sums.cka() == pytest.approx(1)


def test_effective_rank_counts_equal_directions() -> None:
    sums = CrossSums()
    x = torch.zeros(6, 5)
    x[0, 0], x[1, 0], x[2, 1], x[3, 1], x[4, 2], x[5, 2] = 1, -1, 1, -1, 1, -1
    sums.add(x, x)
    assert sums.effective_rank() == pytest.approx(3, abs=1e-4)


def test_nearest_frames_takes_the_earlier_of_two_equally_near() -> None:
    assert nearest_frames(torch.tensor([0.0, 0.5, 0.6, 9.0]), torch.tensor([0.0, 1.0, 2.0])).tolist() == [0, 0, 1, 2]
    assert nearest_frames(torch.tensor([0.0, 0.5]), torch.tensor([3.0])).tolist() == [0, 0]


def test_recall_at_one_counts_queries_that_find_themselves() -> None:
    index = torch.eye(4)
    assert recall_at_one(index + 0.1, index) == 1
    assert recall_at_one(index[[1, 0, 2, 3]], index) == 0.5


class Two(Embedder):
    """The log-mel, and noise."""

    name = label = "two"
    kind = "student"
    frame_rate_hz, first_frame_s = 50.0, 0.01
    layer_names = ["noise", "log-mel"]  # noqa: RUF012

    def embed_batch(self, audios: Sequence[Audio]) -> list[Layers]:
        found = [x[0] for x in LogMel().embed_batch(audios)]
        return [[np.random.default_rng(len(x)).normal(size=(len(x), 4)).astype(np.float32), x] for x in found]


def load(cut: Any, sample_rate: int) -> Audio:
    rng = np.random.default_rng(int(cut.id[1:]))
    tones = sum(np.sin(2 * np.pi * f * np.arange(round(cut.duration * sample_rate)) / sample_rate) for f in rng.uniform(100, 7000, 4))
    return (0.1 * tones * np.linspace(0.1, 1, len(tones))).astype(np.float32)


CUTS = [make_cut(f"u{i}", duration=0.5 + 0.02 * i) for i in range(8)]


def test_compare_layers_finds_the_layer_that_is_the_teacher() -> None:
    found = compare_layers(Two(), {"mel": LogMel()}, CUTS, load, 2.0)
    assert found["cka"]["mel"]["log-mel"] == pytest.approx(1)
    assert found["cka"]["mel"]["noise"] < 0.3
    assert found["width"] == {"noise": 4, "log-mel": 128}
    assert 3.5 < found["effective_rank"]["noise"] <= 4


def test_retrieval_gets_harder_with_noise() -> None:
    found = retrieval(LogMel(), ChangedClips(CUTS, load, 0), 2.0)
    assert found["noise"]["20"] >= found["noise"]["-10"]
    assert found["noise"]["20"] > 0.5
    assert set(found["speed"]) == {"0.8", "0.9", "1.1", "1.25"}


def test_choose_cuts_does_not_depend_on_their_order() -> None:
    assert [cut.id for cut in choose_cuts(CUTS, 3, 0)] == [cut.id for cut in choose_cuts(CUTS[::-1], 3, 0)]
