"""What remains of a batch that an update broke on: its tensors on disk, and its cuts in one line."""

from __future__ import annotations

import logging
import traceback
from collections.abc import Iterator, Sequence
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from spear.errors import SpearError
from spear.files import write_tensors, write_text
from spear.training.distributed import World
from spear.training.protocols import TrainBatch

logger = logging.getLogger(__name__)
FOLDER = "bad_batch"
MAX_IDS = 8
HINT = "lower `sampling.max_batch_s`, or set `training.recompute`"


def report_bad_batch(folder: Path, step: int, batches: Sequence[TrainBatch], finite: Sequence[bool], world: World) -> str:
    """Write the batches of an update whose loss or gradient is not finite to ``folder/bad_batch/``; every process must call it.

    Args:
        step: the update, counted from 1. batches: of this process. finite: whether each one's loss is.
    Returns:
        One line that names the update and the cuts of the batches with a loss that is not finite, else of all.
    """
    _save(folder, step, batches, world)
    told = world.gather([(list(batch.ids), good) for batch, good in zip(batches, finite)])
    parts = [part for parts in told for part in parts]
    bad = [ids for ids, good in parts if not good]
    what = "the loss" if bad else "the gradient"
    ids = [name for group in (bad or [ids for ids, _ in parts]) for name in group]
    return f"{what} of update {step} is not finite; cuts {_listed(ids)}; the batch is in {folder / FOLDER}"


def failed_update(folder: Path, step: int, batches: Sequence[TrainBatch], error: Exception, world: World) -> SpearError:
    """The one line for an error that nobody foresaw, such as a GPU out of memory, with the last batch's shape and cuts.

    The traceback and the batches go to ``folder/bad_batch/`` where that can be written.
    """
    try:
        where = folder / FOLDER / f"step-{step:08d}-rank-{world.rank}.txt"
        write_text(where, "".join(traceback.format_exception(error)))
        _save(folder, step, batches, world)
        kept = f"the traceback and the batch are in {folder / FOLDER}"
    except (SpearError, OSError, RuntimeError) as second:
        kept = f"nor could the batch be kept: {second}"
    text = " ".join(str(error).split())
    what = f"{type(error).__name__}: {text[:300]}"
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        what = f"out of memory ({HINT}): {text[:160]}"
    if not batches:
        return SpearError(f"update {step}: no batch could be read: {what}; {kept}")
    shapes = ", ".join(f"{name} {'x'.join(map(str, value.shape))}" for name, value in _tensors(batches[-1]) if value.ndim > 1)
    return SpearError(f"update {step} failed on process {world.rank} with a batch of {shapes}; cuts {_listed(batches[-1].ids)}: {what}; {kept}")


def _save(folder: Path, step: int, batches: Sequence[TrainBatch], world: World) -> None:
    for part, batch in enumerate(batches):
        name = f"step-{step:08d}-rank-{world.rank}-part-{part}.safetensors"
        write_tensors(folder / FOLDER / name, {key: value.clone() for key, value in _tensors(batch)}, {"ids": "\n".join(batch.ids)})


def _listed(ids: Sequence[str]) -> str:
    return ", ".join(ids[:MAX_IDS]) + (f" and {len(ids) - MAX_IDS} more" if len(ids) > MAX_IDS else "")


def _tensors(batch: Any) -> Iterator[tuple[str, Tensor]]:
    """Tensors of a batch by name, those in dicts as ``field.key``."""
    names = [item.name for item in fields(batch)] if is_dataclass(batch) else list(vars(batch))
    for name in names:
        value = getattr(batch, name)
        if isinstance(value, Tensor):
            yield name, value.detach()
        elif isinstance(value, dict):
            yield from ((f"{name}.{key}", item.detach()) for key, item in value.items() if isinstance(item, Tensor))
