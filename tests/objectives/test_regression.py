"""Regression on the mean of the teacher's layers."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn import functional as F

from spear.errors import ConfigError
from spear.objectives.regression import Regression, RegressionConfig
from tests.objectives.students import generator, instance_norm, make_batch, make_module, zipformer


@pytest.mark.parametrize("beta", [0.0, 0.5])
def test_loss_is_the_scaled_sum_over_masked_frames(beta: float) -> None:
    module = make_module(RegressionConfig(top_layers=3, beta=beta))
    objective, batch = module.objective, make_batch(2)
    assert isinstance(objective, Regression)
    student = module.student(batch.features, batch.feature_lens, generator(1))
    step = objective(student, batch)
    heard = objective.teacher.encoder(batch.features, batch.feature_lens).hidden_states
    total = 0.0
    for n in range(3):
        length = int(student.lens[n])
        masked = (student.masked_share[n, :length] >= 0.5).nonzero()[:, 0]
        target = sum(instance_norm(heard[layer][n, :length]) for layer in (1, 2, 3))[masked] / 3
        guess = objective.head(student.features[n, masked])
        loss = F.smooth_l1_loss(guess, target, beta=beta, reduction="sum") if beta else F.mse_loss(guess, target, reduction="sum")
        total += float(loss) / 16**0.5
    assert math.isclose(float(step.loss), total, rel_tol=1e-4)
    assert step.metrics["target_std"][1] == step.count


def test_training_lowers_the_loss_and_keeps_the_targets_alive() -> None:
    module = make_module(RegressionConfig(top_layers=2))
    optimizer = torch.optim.Adam([parameter for parameter in module.parameters() if parameter.requires_grad], lr=2e-3)
    losses, last = [], {}
    for step in range(1, 61):
        out = module(make_batch(step % 4), generator(step))
        (out.loss / out.count).backward()
        optimizer.step()
        optimizer.zero_grad()
        module.after_step(step)
        losses.append(float(out.loss / out.count))
        last = {name: float(value[0] / value[1]) for name, value in out.metrics.items()}
    assert sum(losses[-10:]) < 0.9 * sum(losses[:10])
    assert last["target_std"] > 0.3


def test_regression_raises_config_error_when_layers_have_several_widths() -> None:
    with pytest.raises(ConfigError, match="must have one width, but have 16, 24"):
        make_module(RegressionConfig(top_layers=2, tap="block_output"), zipformer())
