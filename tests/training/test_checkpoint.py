"""Checkpoints, and the weight averages in them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import nn

from spear.errors import CheckpointError
from spear.files import read_json, read_tensors, write_json
from spear.training.averaging import RunningAverage, average_between
from spear.training.checkpoint import (
    TrainingState,
    averaged_weights,
    find_checkpoints,
    load_checkpoint,
    load_module_states,
    load_optimizer_state,
    module_states,
    optimizer_state,
    prune_checkpoints,
    read_state,
    save_checkpoint,
)
from spear.training.optim.scaled_adam import ScaledAdamConfig


class Tied(nn.Module):
    """Two names for one weight, an integer buffer, and a buffer of floats."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(3, 3, bias=False)
        self.b = nn.Linear(3, 3, bias=False)
        self.b.weight = self.a.weight
        self.c = nn.Linear(3, 2)
        self.register_buffer("count", torch.tensor(5))
        self.register_buffer("mean", torch.zeros(3))


def train(module: nn.Module, optimizer: torch.optim.Optimizer, average: RunningAverage, first: int, last: int) -> list[dict[str, torch.Tensor]]:
    """Random updates; the weights after each."""
    snapshots = []
    for step in range(first, last + 1):
        generator = torch.Generator().manual_seed(step)
        for p in module.parameters():
            p.grad = torch.randn(p.shape, generator=generator)
        optimizer.step()
        module.count += 1
        average.update(step)
        snapshots.append({name: value.clone() for name, value in module.state_dict().items()})
    return snapshots


@pytest.fixture
def run(tmp_path: Path) -> tuple[Path, list[dict[str, torch.Tensor]]]:
    """A folder with checkpoints after 5, 10, 15 and 20 updates, averages every 2; and the weights after each update."""
    torch.manual_seed(1)
    module = Tied()
    optimizer = ScaledAdamConfig().build(module)
    average = RunningAverage(module, 2)
    snapshots = []
    for step in (5, 10, 15, 20):
        snapshots += train(module, optimizer, average, step - 4, step)
        save_checkpoint(tmp_path, TrainingState(step=step, fingerprint="f" * 64, average_period=2), module, average, optimizer)
    return tmp_path, snapshots


def test_running_average_equals_the_reference(fixtures: Path) -> None:
    tensors = read_tensors(fixtures / "averaging.safetensors")
    module = nn.Linear(4, 3)
    average = RunningAverage(module, 5)
    for step in range(1, 41):
        if step % 5 == 0:
            module.load_state_dict({name: tensors[f"cur.{name}.{step}"] for name in ("weight", "bias")})
        average.update(step)
        if step % 5 == 0:
            for name, value in average.values.items():
                torch.testing.assert_close(value, tensors[f"avg.{name}.{step}"], atol=1e-6, rtol=0)
    start = {name: tensors[f"avg.{name}.20"] for name in ("weight", "bias")}
    for name, value in average_between(start, 20, average.values, 40).items():
        torch.testing.assert_close(value.float(), tensors[f"between.{name}"], atol=1e-6, rtol=0)


def test_running_average_is_the_mean_of_the_snapshots(run: tuple[Path, list[dict[str, torch.Tensor]]]) -> None:
    folder, snapshots = run
    average = read_tensors(folder / "checkpoints/step-00000015/average.safetensors")
    for name in ("a.weight", "c.weight", "c.bias"):
        expected = torch.stack([snapshots[step - 1][name].double() for step in range(2, 15, 2)]).mean(0)
        torch.testing.assert_close(average[name], expected, atol=1e-14, rtol=0)
    assert "count" not in average
    assert "b.weight" not in average


def test_averaged_weights_is_the_mean_between_two_checkpoints(run: tuple[Path, list[dict[str, torch.Tensor]]]) -> None:
    folder, snapshots = run
    paths = dict(find_checkpoints(folder))
    averaged = averaged_weights(paths[20], paths[5])
    for name in ("a.weight", "b.weight", "c.weight", "c.bias"):
        expected = torch.stack([snapshots[step - 1][name].double() for step in range(6, 21, 2)]).mean(0).float()
        torch.testing.assert_close(averaged[name], expected, atol=1e-7, rtol=0)
    assert int(averaged["count"]) == 25
    Tied().load_state_dict(averaged)


def test_averaged_weights_without_a_start_covers_the_whole_run(run: tuple[Path, list[dict[str, torch.Tensor]]]) -> None:
    folder, snapshots = run
    averaged = averaged_weights(dict(find_checkpoints(folder))[10])
    expected = torch.stack([snapshots[step - 1]["c.bias"].double() for step in range(2, 11, 2)]).mean(0).float()
    torch.testing.assert_close(averaged["c.bias"], expected, atol=1e-7, rtol=0)


def test_averaged_weights_are_the_last_weights_before_the_first_snapshot(tmp_path: Path) -> None:
    module = Tied()
    optimizer, average = ScaledAdamConfig().build(module), RunningAverage(module, 100)
    snapshot = train(module, optimizer, average, 1, 3)[-1]
    path = save_checkpoint(tmp_path, TrainingState(step=3, average_period=100), module, average, optimizer)
    averaged = averaged_weights(path)
    assert all(torch.equal(averaged[name], value) for name, value in snapshot.items())


def test_average_between_raises_checkpoint_error_when_the_stretch_is_empty() -> None:
    values = {"x": torch.ones(1)}
    with pytest.raises(CheckpointError, match=r"updates \(5, 5\]"):
        average_between(values, 5, values, 5)


def test_average_between_raises_checkpoint_error_when_the_weights_differ() -> None:
    with pytest.raises(CheckpointError, match="different weights: x"):
        average_between({"x": torch.ones(1)}, 1, {"y": torch.ones(1)}, 2)


def test_averaged_weights_raises_checkpoint_error_when_the_runs_differ(run: tuple[Path, list[dict[str, torch.Tensor]]]) -> None:
    paths = dict(find_checkpoints(run[0]))
    state = read_json(paths[5] / "state.json")
    write_json(paths[5] / "state.json", {**state, "fingerprint": "other"})
    with pytest.raises(CheckpointError, match="by two runs: other and f"):
        averaged_weights(paths[20], paths[5])


def test_load_checkpoint_restores_everything(run: tuple[Path, list[dict[str, torch.Tensor]]]) -> None:
    folder, snapshots = run
    module = Tied()
    optimizer = ScaledAdamConfig().build(module)
    average = RunningAverage(module, 2)
    state = load_checkpoint(dict(find_checkpoints(folder))[10], "f" * 64, module, average, optimizer)
    assert (state.step, state.average_period) == (10, 2)
    again = train(module, optimizer, average, 11, 20)
    for ours, theirs in zip(again, snapshots[10:]):
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    saved = read_tensors(folder / "checkpoints/step-00000020/average.safetensors")
    assert all(torch.equal(value, saved[name]) for name, value in average.values.items())


def test_save_checkpoint_writes_the_same_bytes_again(run: tuple[Path, list[dict[str, torch.Tensor]]], tmp_path: Path) -> None:
    folder, _ = run
    module = Tied()
    optimizer, average = ScaledAdamConfig().build(module), RunningAverage(module, 2)
    source = dict(find_checkpoints(folder))[15]
    state = load_checkpoint(source, "f" * 64, module, average, optimizer)
    copy = save_checkpoint(tmp_path / "copy", state, module, average, optimizer)
    for path in source.iterdir():
        assert path.read_bytes() == (copy / path.name).read_bytes()


def test_save_checkpoint_keeps_one_that_exists(run: tuple[Path, list[dict[str, torch.Tensor]]]) -> None:
    folder, _ = run
    path = dict(find_checkpoints(folder))[20]
    before = (path / "model.safetensors").read_bytes()
    module = Tied()
    save_checkpoint(folder, TrainingState(step=20), module, None, ScaledAdamConfig().build(module))
    assert (path / "model.safetensors").read_bytes() == before


def test_find_checkpoints_passes_over_what_is_no_checkpoint(run: tuple[Path, list[dict[str, torch.Tensor]]]) -> None:
    parent = run[0] / "checkpoints"
    (parent / ".step-00000025.tmp").mkdir()
    (parent / "step-00000030").mkdir()
    (parent / "notes").mkdir()
    assert [step for step, _ in find_checkpoints(run[0])] == [5, 10, 15, 20]
    assert find_checkpoints(run[0] / "nowhere") == []


def test_prune_checkpoints_keeps_the_last_and_clears_what_is_half_written(run: tuple[Path, list[dict[str, torch.Tensor]]]) -> None:
    parent = run[0] / "checkpoints"
    (parent / ".step-00000025.tmp").mkdir()
    prune_checkpoints(run[0], 2)
    assert sorted(path.name for path in parent.iterdir()) == ["step-00000015", "step-00000020"]


@pytest.mark.parametrize(
    ("milestones", "kept"), [([6.0], [5, 20]), ([12.5], [10, 20]), ([13.0, 3.0], [5, 15, 20]), ([20.0], [20]), ([99.0], [20]), ([], [20])]
)
def test_prune_checkpoints_keeps_those_nearest_to_milestones(
    run: tuple[Path, list[dict[str, torch.Tensor]]], milestones: list[float], kept: list[int]
) -> None:
    prune_checkpoints(run[0], 1, milestones)
    assert [step for step, _ in find_checkpoints(run[0])] == kept


def test_prune_checkpoints_takes_no_checkpoint_of_a_signal_for_a_milestone(run: tuple[Path, list[dict[str, torch.Tensor]]]) -> None:
    parent = run[0] / "checkpoints"
    state = parent / "step-00000015" / "state.json"
    state.write_text(state.read_text().replace('"due": true', '"due": false'))
    prune_checkpoints(run[0], 1, [14.0])
    assert [step for step, _ in find_checkpoints(run[0])] == [10, 20]


def test_read_state_reads_the_first_checkpoints_of_this_version(run: tuple[Path, list[dict[str, torch.Tensor]]]) -> None:
    path = run[0] / "checkpoints" / "step-00000020"
    value = json.loads((path / "state.json").read_text())
    (path / "state.json").write_text(
        json.dumps({key: item for key, item in value.items() if key not in ("due", "skipped", "loss_scale", "flops_per_s")})
    )
    assert read_state(path).due


def test_trainer_keeps_checkpoints_of_another_save_every(tmp_path: Path) -> None:
    module = Tied()
    for step, due in ((4, True), (6, False), (8, True), (10, True)):  # every 4, a signal at 6, then every 5
        save_checkpoint(tmp_path, TrainingState(step=step, due=due), module, None, ScaledAdamConfig().build(module))
        prune_checkpoints(tmp_path, 3)
    assert [step for step, _ in find_checkpoints(tmp_path)] == [4, 8, 10]


def test_load_checkpoint_raises_checkpoint_error_when_the_run_differs(run: tuple[Path, list[dict[str, torch.Tensor]]]) -> None:
    module = Tied()
    with pytest.raises(CheckpointError, match=r"written by the run f{64}, but this run is g"):
        load_checkpoint(run[0] / "checkpoints/step-00000020", "g", module, None, ScaledAdamConfig().build(module))


def test_load_checkpoint_raises_checkpoint_error_when_the_module_differs(run: tuple[Path, list[dict[str, torch.Tensor]]]) -> None:
    module = nn.Linear(3, 2)
    with pytest.raises(CheckpointError, match=r"model.safetensors does not fit the module: .*Unexpected key") as caught:
        load_checkpoint(run[0] / "checkpoints/step-00000020", "f" * 64, module, None, ScaledAdamConfig().build(module))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["model.safetensors", "average.safetensors", "optimizer.safetensors", "state.json"])
def test_load_checkpoint_raises_checkpoint_error_when_a_file_is_damaged(run: tuple[Path, list[dict[str, torch.Tensor]]], name: str) -> None:
    path = run[0] / "checkpoints/step-00000020"
    (path / name).write_bytes((path / name).read_bytes()[:20])
    module = Tied()
    with pytest.raises(CheckpointError, match=name):
        load_checkpoint(path, "f" * 64, module, RunningAverage(module, 2), ScaledAdamConfig().build(module))


@pytest.mark.parametrize(
    ("change", "message"), [({"version": 9}, "has version 9, but this program reads version 1"), ({"step": None}, "lacks `step`")]
)
def test_load_checkpoint_raises_checkpoint_error_when_the_state_is_foreign(
    run: tuple[Path, list[dict[str, torch.Tensor]]], change: dict[str, int | None], message: str
) -> None:
    path = run[0] / "checkpoints/step-00000020"
    state = {**read_json(path / "state.json"), **change}
    write_json(path / "state.json", {name: value for name, value in state.items() if value is not None or name not in change})
    module = Tied()
    with pytest.raises(CheckpointError, match=message):
        load_checkpoint(path, "f" * 64, module, None, ScaledAdamConfig().build(module))


def test_optimizer_state_is_kept_by_parameter_name() -> None:
    module = nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(module.parameters(), lr=0.1, betas=(0.5, 0.6))
    module(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    tensors, groups = optimizer_state(optimizer, module)
    assert {"weight/exp_avg", "bias/exp_avg_sq", "bias/step"} <= set(tensors)
    other = torch.optim.AdamW(module.parameters(), lr=0.1)
    load_optimizer_state(other, module, tensors, json.loads(json.dumps(groups)))
    assert other.param_groups[0]["betas"] == (0.5, 0.6)
    assert torch.equal(other.state[module.bias]["exp_avg"], optimizer.state[module.bias]["exp_avg"])


def test_load_optimizer_state_raises_checkpoint_error_when_the_parameters_differ() -> None:
    module, other = nn.Linear(3, 2), nn.Sequential(nn.Linear(3, 2))
    tensors, groups = optimizer_state(ScaledAdamConfig().build(module), module)
    with pytest.raises(CheckpointError, match="optimiser's state is for 2 parameters"):
        load_optimizer_state(ScaledAdamConfig().build(other), other, tensors, groups)


def test_load_module_states_raises_checkpoint_error_when_a_module_is_missing() -> None:
    assert module_states(nn.Linear(1, 1)) == {}
    with pytest.raises(CheckpointError, match=r"training state for stack\.whiten"):
        load_module_states(nn.Linear(1, 1), {"stack.whiten": 0.5})
