"""Learning-rate schedules and AdamW."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import draccus
import pytest
import torch
from torch import nn

from spear.errors import ConfigError
from spear.training.config import TrainingConfig
from spear.training.optim.adamw import AdamWConfig
from spear.training.optim.base import OptimizerConfig, Schedule, ScheduleConfig
from spear.training.optim.eden import Eden2Config, EdenConfig
from spear.training.optim.tristage import TristageConfig
from spear.training.optim.warmup import ConstantConfig, CosineConfig, LinearConfig

NAMES = {"lr_batches": "lr_steps", "lr_epochs": "lr_hours", "warmup_batches": "warmup_steps", "warmup_start": "warmup_start"}


def ours(kind: Any, kwargs: dict[str, float]) -> Schedule:
    return kind(**{NAMES[name]: float(value) for name, value in kwargs.items()}).build(1)


@pytest.mark.parametrize(("name", "kind"), [("eden", EdenConfig), ("eden2", Eden2Config)])
def test_eden_equals_the_reference(fixtures: Path, name: str, kind: Any) -> None:
    cases = json.loads((fixtures / "eden.json").read_text())[name]
    checked = 0
    for case in cases:
        schedule = ours(kind, case["kwargs"])
        for value in case["values"]:
            if value["batch"] is not None:
                factor = schedule.lr_factor(value["batch"], value["epoch"] or 0)
                assert case["base_lr"] * factor == pytest.approx(value["lr"], rel=1e-14)
                checked += 1
    assert checked > 20


def test_eden_follows_the_reference_trace(fixtures: Path) -> None:
    """The schedule is a function of progress, so every point of a recorded run must follow from its batch and epoch alone."""
    case = json.loads((fixtures / "eden.json").read_text())["eden_trace"]
    schedule = ours(EdenConfig, case["kwargs"])
    assert len(case["trace"]) > 3
    for entry in case["trace"]:
        assert case["base_lr"] * schedule.lr_factor(entry["batch"], entry["epoch"]) == pytest.approx(entry["lr"], rel=1e-14)


def test_eden_gives_the_worked_values_of_spear() -> None:
    """Base 0.045, B 7500, H 75k, 16 GPUs of 400 s."""
    schedule = EdenConfig()
    for step, expected in ((0, 0.0225), (500, 0.0449), (7500, 0.0375), (50_000, 0.0139), (100_000, 0.0077), (500_000, 0.0016)):
        assert 0.045 * schedule.lr_factor(step, step * 400 * 16 / 3600) == pytest.approx(expected, abs=6e-5)


def test_eden2_ignores_hours() -> None:
    assert Eden2Config().lr_factor(100, 0.0) == Eden2Config().lr_factor(100, 1e6)


def test_tristage_rises_holds_and_decays() -> None:
    schedule = TristageConfig(warmup=0.1, hold=0.4, start=0.2, final=0.05).build(1000)
    factors = {step: schedule.lr_factor(step, 0.0) for step in (0, 50, 100, 500, 750, 1000, 2000)}
    assert factors == pytest.approx({0: 0.2, 50: 0.6, 100: 1.0, 500: 1.0, 750: math.sqrt(0.05), 1000: 0.05, 2000: 0.05})


def test_tristage_without_decay_stays_at_the_base_rate() -> None:
    assert TristageConfig(warmup=0.5, hold=0.5).build(10).lr_factor(10, 0.0) == 1.0


def test_constant_linear_and_cosine_warm_up_and_end() -> None:
    constant = ConstantConfig(warmup_steps=10).build(100)
    assert [constant.lr_factor(step, 0.0) for step in (1, 10, 100)] == pytest.approx([0.1, 1.0, 1.0])
    assert ConstantConfig().lr_factor(1, 0.0) == 1.0
    linear = LinearConfig(warmup=0.2, final=0.1).build(100)
    assert [linear.lr_factor(step, 0.0) for step in (10, 20, 60, 100, 200)] == pytest.approx([0.5, 1.0, 0.55, 0.1, 0.1])
    cosine = CosineConfig(warmup=0.2).build(100)
    assert [cosine.lr_factor(step, 0.0) for step in (10, 20, 40, 60, 100)] == pytest.approx(
        [0.5, 1.0, 0.5 + 0.5 * math.cos(math.pi / 4), 0.5, 0.0], abs=1e-12
    )


@pytest.mark.parametrize("tag", sorted(ScheduleConfig.TABLE))
def test_schedules_are_in_the_table_and_positive(tag: str) -> None:
    schedule = ScheduleConfig.get_choice_class(tag)().build(1000)
    assert all(0 < schedule.lr_factor(step, step / 10) <= 1 for step in range(1, 1000, 37))


@pytest.mark.parametrize("tag", sorted(OptimizerConfig.TABLE))
def test_optimizers_are_in_the_table_and_minimise(tag: str) -> None:
    torch.manual_seed(0)
    module = nn.Linear(4, 1)
    x = torch.randn(64, 4)
    y = x @ torch.tensor([[1.0], [-2.0], [0.5], [0.0]]) + 0.3
    optimizer = OptimizerConfig.get_choice_class(tag)(lr=0.05).build(module)
    losses = []
    for _ in range(200):
        loss = (module(x) - y).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.1 * losses[0]


def test_training_config_round_trips_through_draccus() -> None:
    config = TrainingConfig(optimizer=AdamWConfig(lr=1e-3, clip_norm=None), schedule=TristageConfig(hold=0.2))
    raw = draccus.encode(config)
    assert (raw["optimizer"]["type"], raw["schedule"]["type"]) == ("adamw", "tristage")
    assert draccus.decode(TrainingConfig, json.loads(json.dumps(raw))) == config


def test_adamw_limits_the_gradient_norm() -> None:
    module = nn.Linear(3, 3, bias=False)
    optimizer = AdamWConfig(clip_norm=0.5).build(module)
    module.weight.grad = torch.full((3, 3), 4.0)
    optimizer.step()
    assert float(optimizer.state[module.weight]["exp_avg"].norm()) == pytest.approx(0.1 * 0.5, rel=1e-4)


def test_adamw_decays_matrices_only() -> None:
    module = nn.Sequential(nn.Linear(3, 3), nn.LayerNorm(3))
    optimizer = AdamWConfig(weight_decay=0.2).build(module)
    assert [(len(group["params"]), group["weight_decay"]) for group in optimizer.param_groups] == [(1, 0.2), (3, 0.0)]


@pytest.mark.parametrize(
    ("config", "changes", "message"),
    [
        (EdenConfig, {"lr_steps": 0.0}, "`lr_steps` must be above 0"),
        (EdenConfig, {"lr_hours": -1.0}, "`lr_hours` must be above 0"),
        (EdenConfig, {"warmup_start": 1.5}, "`warmup_start` must be between 0 and 1, but is 1.5"),
        (Eden2Config, {"warmup_steps": -1.0}, "`warmup_steps` must be at least 0"),
        (TristageConfig, {"warmup": 0.7, "hold": 0.7}, r"`warmup` \+ `hold` must be at most 1, but is 1.4"),
        (TristageConfig, {"final": 0.0}, "`final` must be above 0"),
        (ConstantConfig, {"warmup_steps": -1}, "`warmup_steps` must be at least 0"),
        (LinearConfig, {"warmup": 2.0}, "`warmup` must be between 0 and 1"),
        (CosineConfig, {"final": -0.1}, "`final` must be between 0 and 1"),
        (AdamWConfig, {"weight_decay": -0.1}, "`weight_decay` must be at least 0"),
        (AdamWConfig, {"clip_norm": 0.0}, "`clip_norm` must be above 0"),
    ],
)
def test_config_raises_config_error_when_a_value_is_out_of_bounds(config: Any, changes: dict[str, float], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        config(**changes)
