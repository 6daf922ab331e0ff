"""Checkpoints: one folder per saved update, written whole or not at all.

``checkpoints/step-00004000/`` holds ``model.safetensors``, ``average.safetensors`` (float64 running average),
``optimizer.safetensors`` and ``state.json`` (progress, settings, what each process must remember).
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, cast

from torch import Tensor, nn
from torch.optim import Optimizer

from spear.errors import ArtifactError, CheckpointError
from spear.files import make_folder, read_json, read_tensors, write_json, write_tensors, writing
from spear.training.averaging import RunningAverage, average_between
from spear.training.sharding import spread_like, whole

FOLDER = "checkpoints"
MODEL, AVERAGE, OPTIMIZER, STATE = "model.safetensors", "average.safetensors", "optimizer.safetensors", "state.json"
VERSION = 1
_NAME = re.compile(r"step-(\d{8,})")
_LATER = ("due", "skipped", "loss_scale", "flops_per_s")
"""Fields of the state that the first checkpoints of this version lack."""


@dataclass(kw_only=True)
class TrainingState:
    """Everything a run must remember beside tensors; all of it plain JSON."""

    step: int = 0
    """Updates done."""
    seconds: float = 0.0
    """Seconds of audio seen by all processes."""
    lr: float = 0.0
    """Learning rate of the first parameter group at the last update."""
    average_period: int = 0
    """P, updates between two snapshots of the running average."""
    fingerprint: str = ""
    """Of the run; another run may not continue from this checkpoint."""
    config: dict[str, Any] = field(default_factory=dict)
    """Settings of the run, for the reader."""
    optimizer: list[dict[str, Any]] = field(default_factory=list)
    """The optimiser's parameter groups, with names for parameters."""
    due: bool = True
    """Saved where `training.save_every` says, as it was then; false: saved on a signal or at the end."""
    skipped: int = 0
    """Updates left out because a loss or gradient was not finite."""
    loss_scale: list[float] = field(default_factory=list)
    """See `spear.training.precision.LossScale.state`."""
    flops_per_s: float = 0.0
    """Floating-point operations that training takes per second of audio, an estimate."""
    ranks: list[dict[str, Any]] = field(default_factory=list)
    """Per process: ``metrics``, sums since the last record, and ``modules``, training state of modules by name."""


def checkpoint_path(folder: Path, step: int) -> Path:
    """Where the checkpoint of an update lies in a run's folder."""
    return folder / FOLDER / f"step-{step:08d}"


def find_checkpoints(folder: Path) -> list[tuple[int, Path]]:
    """Complete checkpoints of a run's folder with their steps, earliest first."""
    parent = folder / FOLDER
    matches = ((_NAME.fullmatch(path.name), path) for path in parent.iterdir()) if parent.is_dir() else ()
    return sorted((int(match[1]), path) for match, path in matches if match and (path / STATE).is_file())


def save_checkpoint(
    folder: Path, state: TrainingState, module: nn.Module, average: RunningAverage | None, optimizer: Optimizer, *, writes: bool = True
) -> Path:
    """Write the checkpoint of ``state.step`` to a temporary folder, then rename it; one that exists is kept.

    Args:
        folder: of the run. state: its ``optimizer`` is filled in here. average: None writes no average.
        writes: whether this process writes; where tensors are spread over processes, all must call this, and one writes.
    Raises:
        SpearError: the disk is full or read-only.
    """
    path = checkpoint_path(folder, state.step)
    if not writes or path.exists():
        _gather(module, average, optimizer)
        return path
    temporary = path.with_name(f".{path.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    make_folder(temporary)
    write_tensors(temporary / MODEL, _owned(module.state_dict()))
    if average is not None:
        write_tensors(temporary / AVERAGE, _owned(average.values))
    tensors, state.optimizer = optimizer_state(optimizer, module)
    write_tensors(temporary / OPTIMIZER, tensors)
    write_json(temporary / STATE, {"version": VERSION, **asdict(state)})
    with writing(path):
        os.replace(temporary, path)
        handle = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
    return path


def _gather(module: nn.Module, average: RunningAverage | None, optimizer: Optimizer) -> None:
    """Take part in gathering what another process writes."""
    for tensors in (module.state_dict(), average.values if average is not None else {}, _flat_state(optimizer, module)):
        for value in tensors.values():
            whole(value.detach())


def prune_checkpoints(folder: Path, keep: int, milestones: Sequence[float] = ()) -> None:
    """Delete all but the last `keep` checkpoints and those nearest to `milestones`, and what a killed process left half written.

    An earlier checkpoint that was not due but saved on a signal goes, too, so that a run that was stopped and continued ends with the
    checkpoints of one that was not.

    Args:
        milestones: updates; of two that are equally near to one, the earlier checkpoint stays.
    """
    found = find_checkpoints(folder)
    regular = [(step, path) for step, path in found if read_state(path).due]
    kept = [*(path for _, path in regular if path != found[-1][1]), *(path for _, path in found[-1:])][-keep:]
    if regular:
        kept += [min(regular, key=lambda item: abs(item[0] - wanted))[1] for wanted in milestones]
    for path in (path for _, path in found if path not in kept):
        doomed = path.with_name(f".{path.name}.tmp")
        path.rename(doomed)
        shutil.rmtree(doomed, ignore_errors=True)
    for path in (folder / FOLDER).glob(".step-*.tmp"):
        shutil.rmtree(path, ignore_errors=True)


def read_state(path: Path) -> TrainingState:
    """The plain part of a checkpoint.

    Raises:
        CheckpointError: not a checkpoint, or one of another version of this program.
    """
    try:
        value = read_json(path / STATE)
    except ArtifactError as error:
        raise CheckpointError(str(error)) from error
    if value.get("version") != VERSION:
        raise CheckpointError(f"{path / STATE} has version {value.get('version')}, but this program reads version {VERSION}")
    missing = [item.name for item in fields(TrainingState) if item.name not in value and item.name not in _LATER]
    if missing:
        raise CheckpointError(f"{path / STATE} lacks `{missing[0]}`")
    return TrainingState(**{item.name: value[item.name] for item in fields(TrainingState) if item.name in value})


def load_checkpoint(path: Path, fingerprint: str, module: nn.Module, average: RunningAverage | None, optimizer: Optimizer) -> TrainingState:
    """Fill module, average and optimiser from a checkpoint, and return the rest.

    Raises:
        CheckpointError: made by another run, damaged, or of another module.
    """
    state = read_state(path)
    if state.fingerprint != fingerprint:
        raise CheckpointError(
            f"{path} was written by the run {state.fingerprint or 'without a fingerprint'}, but this run is {fingerprint}: "
            "go back to its recipe and data, or train in another folder"
        )
    load_weights(path, module)
    if average is not None:
        average.load(_tensors(path / AVERAGE))
    load_optimizer_state(optimizer, module, _tensors(path / OPTIMIZER), state.optimizer)
    return state


def load_weights(path: Path, module: nn.Module) -> None:
    """Fill `module` with a checkpoint's weights as they were at that update.

    Raises:
        CheckpointError: damaged, or of another module.
    """
    try:
        present = module.state_dict()
        module.load_state_dict({name: spread_like(value, present.get(name, value)) for name, value in _tensors(path / MODEL).items()})
    except RuntimeError as error:
        raise CheckpointError(f"{path / MODEL} does not fit the module: {' '.join(str(error).split())}") from error


def averaged_weights(end: Path, start: Path | None = None) -> dict[str, Tensor]:
    """Weights averaged over the updates between two checkpoints, ready for ``load_state_dict``.

    The running averages count up to the last snapshot at or before each checkpoint. Without `start`, the mean over the whole
    run. Where no snapshot lies in between, the weights at `end` as they are.

    Args:
        end: checkpoint folder. start: an earlier one of the same run.
    Returns:
        name -> tensor of the type it has in the model; entries that are not floating point come from `end`.
    Raises:
        CheckpointError: damaged, or of two runs.
    """
    model, state = _tensors(end / MODEL), read_state(end)
    period = max(state.average_period, 1)
    end_step, start_step, start_values = state.step // period * period, 0, {}
    if start is not None:
        first = read_state(start)
        if first.fingerprint != state.fingerprint:
            raise CheckpointError(f"{start} and {end} were written by two runs: {first.fingerprint} and {state.fingerprint}")
        start_step = first.step // period * period
        start_values = _tensors(start / AVERAGE)
    if end_step <= start_step or not (end / AVERAGE).exists():
        return model
    values = _tensors(end / AVERAGE)
    if start_step > 0:
        values = average_between(start_values, start_step, values, end_step)
    averaged = {name: values[name].to(value.dtype) for name, value in model.items() if name in values}
    tied = _tied(model, values)
    return {name: averaged.get(tied.get(name, name), value) for name, value in model.items()}


def optimizer_state(optimizer: Optimizer, module: nn.Module) -> tuple[dict[str, Tensor], list[dict[str, Any]]]:
    """An optimiser's state as tensors ``<parameter>/<field>`` and its groups as JSON, parameters by name."""
    names = _parameter_names(optimizer, module)
    groups = [{**group, "params": [names[index] for index in group["params"]]} for group in optimizer.state_dict()["param_groups"]]
    return _owned(_flat_state(optimizer, module)), groups


def _flat_state(optimizer: Optimizer, module: nn.Module) -> dict[str, Tensor]:
    """``<parameter>/<field>`` -> tensor."""
    names = _parameter_names(optimizer, module)
    states = optimizer.state_dict()["state"].items()
    return {f"{names[index]}/{key}": value for index, values in states for key, value in values.items()}


def load_optimizer_state(optimizer: Optimizer, module: nn.Module, tensors: Mapping[str, Tensor], groups: list[dict[str, Any]]) -> None:
    """Undo `optimizer_state`.

    Raises:
        CheckpointError: the parameters differ.
    """
    names = _parameter_names(optimizer, module)
    index_of = {name: index for index, name in enumerate(names)}
    saved_names = [name for group in groups for name in group["params"]]
    if saved_names != names:
        raise CheckpointError(f"the optimiser's state is for {len(saved_names)} parameters in another order or with other names than the module's")
    parameters = dict(module.named_parameters())
    state: dict[int, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        name, _, item = key.rpartition("/")
        alike = value.shape == parameters[name].shape
        state.setdefault(index_of[name], {})[item] = spread_like(value, parameters[name]) if alike else value
    current = optimizer.state_dict()["param_groups"]
    restored = [
        {key: tuple(value) if isinstance(now.get(key), tuple) else value for key, value in saved.items()} | {"params": now["params"]}
        for saved, now in zip(groups, current)
    ]
    optimizer.load_state_dict({"state": state, "param_groups": restored})


def module_states(module: nn.Module) -> dict[str, float]:
    """Training state that is no tensor, of every submodule with ``training_state()``, by name."""
    return {name: float(cast(Any, part).training_state()) for name, part in module.named_modules() if hasattr(part, "training_state")}


def load_module_states(module: nn.Module, states: Mapping[str, float]) -> None:
    """Undo `module_states`.

    Raises:
        CheckpointError: a submodule is not there.
    """
    parts: dict[str, Any] = dict(module.named_modules())
    for name, value in states.items():
        if not hasattr(parts.get(name), "load_training_state"):
            raise CheckpointError(f"the checkpoint has training state for {name}, which the module lacks")
        parts[name].load_training_state(value)


def _parameter_names(optimizer: Optimizer, module: nn.Module) -> list[str]:
    names = {id(parameter): name for name, parameter in module.named_parameters()}
    return [names[id(parameter)] for group in optimizer.param_groups for parameter in group["params"]]


def _owned(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copies on the CPU, as safetensors refuses tensors that share memory."""
    return {name: whole(value.detach()).to("cpu", copy=True).contiguous() for name, value in tensors.items()}


def _tied(model: Mapping[str, Tensor], values: Mapping[str, Tensor]) -> dict[str, str]:
    """Names without an average, paired with the averaged name whose weights they share."""
    alone = [name for name, value in model.items() if value.is_floating_point() and name not in values]
    return {name: other for name in alone for other in values if model[other].shape == model[name].shape and model[other].equal(model[name])}


def _tensors(path: Path) -> dict[str, Tensor]:
    try:
        return read_tensors(path)
    except ArtifactError as error:
        raise CheckpointError(str(error)) from error
