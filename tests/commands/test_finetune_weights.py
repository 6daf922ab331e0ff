"""Which weights a fine-tuned model ends with."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from spear.commands.finetune import _final_weights
from spear.training.averaging import RunningAverage
from spear.training.checkpoint import TrainingState, save_checkpoint
from spear.training.optim.scaled_adam import ScaledAdamConfig


@pytest.mark.parametrize(("share", "wanted"), [(0.5, 3.5), (0.0, 4.0)])
def test_finetune_ends_with_the_mean_of_the_last_updates_where_it_is_asked_for(tmp_path: Path, share: float, wanted: float) -> None:
    module: Any = nn.Module()
    module.student = nn.Module()
    module.student.encoder = nn.Linear(2, 2)
    optimizer, average = ScaledAdamConfig().build(module), RunningAverage(module, 1)
    for step in (1, 2, 3, 4):
        with torch.no_grad():
            module.student.encoder.weight.fill_(step)
        average.update(step)
        if step in (2, 4):
            save_checkpoint(tmp_path, TrainingState(step=step, fingerprint="f", average_period=1), module, average, optimizer)
    run: Any = SimpleNamespace(exp=tmp_path, recipe=SimpleNamespace(average_share=share))
    _final_weights(run, module)
    torch.testing.assert_close(module.student.encoder.weight.detach(), torch.full((2, 2), wanted))
