"""ScaledAdam and its clipping."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch import nn

import spear.training.optim.scaled_adam as scaled_adam_module
from spear.errors import ConfigError, SpearError
from spear.training.optim.base import parameter_groups
from spear.training.optim.clipping import clip_factor, clip_state
from spear.training.optim.scaled_adam import ScaledAdam, ScaledAdamConfig

RUNS = {
    "clip2": ScaledAdamConfig(clipping_scale=2.0, clipping_update_period=20),
    "noclip": ScaledAdamConfig(clipping_scale=None),
    "master_clip2": ScaledAdamConfig(clipping_scale=2.0, clipping_update_period=20, variant="master"),
}
STATE = {"delta": 0, "exp_avg_sq": 0, "param_rms": 0, "scale_exp_avg_sq": 0, "scale_grads": 1}
"""Names of the state with the axis along which the fixture stacks equal shapes."""


class Replay:
    """The reference run: its gradients through our optimiser."""

    def __init__(self, fixtures: Path, run: str) -> None:
        with safe_open(fixtures / "scaled_adam.safetensors", framework="pt") as file:
            self.tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
            self.order: list[str] = json.loads(file.metadata()["param_order"])
        self.run = run
        self.params = {name: nn.Parameter(self.tensors[f"init.{name}"].clone()) for name in self.order}
        self.optimizer = self.fresh()

    def fresh(self) -> ScaledAdam:
        return ScaledAdam([{"params": list(self.params.values()), "lr": 0.045}], RUNS[self.run])

    def step(self, i: int) -> None:
        for name, p in self.params.items():
            grads = self.tensors.get(f"grad.{name}")
            p.grad = None if grads is None else grads[i].clone()
        self.optimizer.param_groups[0]["lr"] = self.tensors["lr"][i].item()
        self.optimizer.step()

    def worst(self, step: int) -> float:
        return max(float((p.detach() - self.tensors[f"{self.run}.param.{name}.step{step}"]).abs().max()) for name, p in self.params.items())


@pytest.mark.parametrize("run", RUNS)
def test_scaled_adam_follows_the_reference(fixtures: Path, run: str) -> None:
    replay = Replay(fixtures, run)
    for i in range(60):
        replay.step(i)
        if (i + 1) % 10 == 0:
            assert replay.worst(i + 1) < 2e-6


@pytest.mark.parametrize("run", RUNS)
def test_scaled_adam_clips_like_the_reference(fixtures: Path, run: str, monkeypatch: pytest.MonkeyPatch) -> None:
    replay, factors = Replay(fixtures, run), []

    def record(*args: object, **keywords: object) -> float:
        factors.append(clip_factor(*args, **keywords))  # type: ignore[arg-type]
        return factors[-1]

    monkeypatch.setattr(scaled_adam_module, "clip_factor", record)
    for i in range(60):
        replay.step(i)
    expected = replay.tensors.get(f"{run}.clip_scale", torch.ones(60))
    torch.testing.assert_close(torch.tensor([1.0, *factors] if factors else [1.0] * 60), expected, atol=1e-6, rtol=0)


def test_scaled_adam_ends_in_the_reference_state(fixtures: Path) -> None:
    replay = Replay(fixtures, "clip2")
    for i in range(60):
        replay.step(i)
    state = replay.optimizer.state
    checked = 0
    for name, p in replay.params.items():
        if f"clip2.final_state.{name}.delta" not in replay.tensors:
            continue
        mates = [q for other, q in replay.params.items() if q.shape == p.shape]
        for key, axis in STATE.items():
            expected = replay.tensors.get(f"clip2.final_state.{name}.{key}")
            if expected is not None:
                torch.testing.assert_close(torch.stack([state[q][key] for q in mates], dim=axis), expected, atol=1e-5, rtol=1e-4)
                checked += 1
    assert checked == 8 * 5 + 2 * 2  # eight shapes with sizes, two kinds of scalars
    torch.testing.assert_close(
        torch.tensor(replay.optimizer.param_groups[0]["norms"]), replay.tensors["clip2.final_state.log_scale.model_norms"], atol=1e-4, rtol=1e-5
    )


@pytest.mark.parametrize("stop", [1, 7, 30])
def test_scaled_adam_state_round_trips_through_tensors(fixtures: Path, stop: int) -> None:
    whole, resumed = Replay(fixtures, "clip2"), Replay(fixtures, "clip2")
    for i in range(60):
        whole.step(i)
        if i == stop:
            saved = resumed.optimizer.state_dict()
            state = {index: {key: value.clone() for key, value in values.items()} for index, values in saved["state"].items()}
            groups = json.loads(json.dumps(saved["param_groups"]))
            resumed.optimizer = resumed.fresh()
            resumed.optimizer.load_state_dict({"state": state, "param_groups": groups})
        resumed.step(i)
    for name in whole.order:
        assert torch.equal(whole.params[name], resumed.params[name])


def run_alone(p: nn.Parameter, grads: torch.Tensor, config: ScaledAdamConfig, lr: float = 0.01) -> torch.Tensor:
    optimizer = ScaledAdam([{"params": [p], "lr": lr}], config)
    for grad in grads:
        p.grad = grad.clone()
        optimizer.step()
    return p.detach()


def test_scaled_adam_updates_stacked_tensors_as_if_alone() -> None:
    generator = torch.Generator().manual_seed(3)
    config = ScaledAdamConfig(clipping_scale=None)
    start, grads = torch.randn(3, 4, 5, generator=generator), torch.randn(9, 3, 4, 5, generator=generator)
    alone = [run_alone(nn.Parameter(start[i].clone()), grads[:, i], config) for i in range(3)]
    together = [nn.Parameter(start[i].clone()) for i in range(3)]
    optimizer = ScaledAdam([{"params": together, "lr": 0.01}], config)
    for step in range(9):
        for i, p in enumerate(together):
            p.grad = grads[step, i].clone()
        optimizer.step()
    for a, b in zip(alone, together):
        torch.testing.assert_close(a, b.detach(), atol=1e-7, rtol=1e-6)


def test_scaled_adam_first_update_is_relative_to_the_size() -> None:
    """With v = (1 - beta2) g^2 and its correction, the first update is -lr (1 - beta1) rms(p) sign(g)."""
    start = torch.tensor([[3.0, -4.0], [0.0, 5.0]])
    grad = torch.tensor([[0.5, -2.0], [1e-3, 7.0]])
    moved = run_alone(nn.Parameter(start.clone()), grad[None], ScaledAdamConfig(), lr=0.02)
    rms = math.sqrt((9 + 16 + 25) / 4)
    torch.testing.assert_close(moved, start - 0.02 * 0.1 * rms * grad.sign(), atol=1e-6, rtol=1e-5)


def test_scaled_adam_keeps_scalars_in_bounds() -> None:
    """The fork clamps before it adds the first update of -lr * 0.1 * (1 - beta1), current icefall after."""
    moved = {
        variant: float(run_alone(nn.Parameter(torch.tensor([12.0])), torch.ones(1, 1), ScaledAdamConfig(variant=variant), lr=0.1))
        for variant in ("fork", "master")
    }
    assert moved == pytest.approx({"fork": 10.0 - 0.1 * 0.1 * 0.1, "master": 10.0}, rel=1e-7)


def test_scaled_adam_brings_large_tensors_back_to_the_limit() -> None:
    config = ScaledAdamConfig(param_max_rms=2.0, clipping_scale=None)
    p = nn.Parameter(torch.full((4, 4), 2.5))
    moved = run_alone(p, torch.full((40, 4, 4), -1e-12), config, lr=1e-6)
    assert 1.5 < float(moved.square().mean().sqrt()) < 2.2


def test_scaled_adam_does_not_move_without_gradients() -> None:
    p = nn.Parameter(torch.randn(3, 3, generator=torch.Generator().manual_seed(0)))
    before = p.detach().clone()
    optimizer = ScaledAdam([{"params": [p], "lr": 0.1}], ScaledAdamConfig())
    for _ in range(10):
        optimizer.step()
    assert torch.equal(p, before)


def test_scaled_adam_drops_gradients_of_infinite_norm() -> None:
    p = nn.Parameter(torch.ones(3, 3))
    optimizer = ScaledAdam([{"params": [p], "lr": 0.1}], ScaledAdamConfig(betas=(0.0, 0.98)))
    p.grad = torch.ones(3, 3)
    optimizer.step()
    before = p.detach().clone()
    p.grad = torch.full((3, 3), math.inf)
    optimizer.step()
    assert torch.equal(p, before)
    assert torch.isfinite(optimizer.state[p]["exp_avg_sq"]).all()


def test_clip_factor_limits_to_twice_the_median() -> None:
    group = clip_state(4)
    norms = [9.0, 1.0, 2.0, 3.0, 4.0]
    factors = [clip_factor(group, norm, step=step, clipping_scale=2.0, variant="fork") for step, norm in enumerate(norms)]
    assert factors == [1.0] * 5  # nothing is recorded at step 0, no limit before step 4
    assert group["norm_limit"] == 2.0 * 3.0  # element 2 of 1, 2, 3, 4
    assert clip_factor(group, 12.0, step=5, clipping_scale=2.0, variant="fork") == pytest.approx(0.5)
    assert clip_factor(group, 5.0, step=6, clipping_scale=2.0, variant="fork") == 1.0
    assert group["num_clipped"] == 1
    assert clip_factor(group, math.inf, step=7, clipping_scale=2.0, variant="fork") == 0.0


def test_clip_factor_ignores_zero_norms() -> None:
    group = clip_state(3)
    assert clip_factor(group, 0.0, step=1, clipping_scale=2.0, variant="fork") == 1.0
    assert group == clip_state(3)


def test_clip_factor_of_master_guesses_early() -> None:
    group = clip_state(100)
    for step in range(1, 11):
        clip_factor(group, float(step), step=step, clipping_scale=2.0, variant="master")
    assert group["norm_limit"] == 2.0 * 2.0 * 5.0  # doubled; element 4 of 1..10
    assert clip_factor(group, 40.0, step=11, clipping_scale=2.0, variant="master") == pytest.approx(0.5)


def test_clip_factor_raises_spear_error_when_the_median_is_not_finite() -> None:
    group = clip_state(2)
    clip_factor(group, math.inf, step=1, clipping_scale=2.0, variant="master")
    with pytest.raises(SpearError, match="median gradient norm is inf at update 2"):
        clip_factor(group, math.inf, step=2, clipping_scale=2.0, variant="master")


def test_parameter_groups_multiplies_scales_of_ancestors() -> None:
    module = nn.Sequential(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2, bias=False)), nn.Linear(2, 1))
    module[0].lr_scale = 0.5
    module[0][1].lr_scale = 0.1
    module[1].bias.requires_grad_(False)
    groups = parameter_groups(module, 1.0)
    assert [(len(group["params"]), group["lr"]) for group in groups] == [(2, 0.5), (1, pytest.approx(0.05)), (1, 1.0)]


def test_parameter_groups_counts_shared_parameters_once() -> None:
    module = nn.Sequential(nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False))
    module[1].weight = module[0].weight
    assert len(parameter_groups(module, 1.0)[0]["params"]) == 1


def test_parameter_groups_raises_config_error_when_nothing_is_trained() -> None:
    with pytest.raises(ConfigError, match="no parameters that need a gradient"):
        parameter_groups(nn.ReLU(), 1.0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lr": 0.0}, "`lr` must be above 0, but is 0"),
        ({"betas": (0.9, 1.0)}, "`betas` must be two numbers in"),
        ({"size_update_period": 0}, "`size_update_period` must be at least 1"),
        ({"clipping_scale": -1.0}, "`clipping_scale` must be above 0"),
        ({"variant": "new"}, "`variant` must be fork or master, but is 'new'"),
    ],
)
def test_scaled_adam_config_raises_config_error_when_a_value_is_out_of_bounds(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        ScaledAdamConfig(**changes)  # type: ignore[arg-type]
