"""What remains of a batch whose loss or gradient is not finite: its tensors on disk and its cuts in the error."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, NoReturn

from torch import Tensor

from spear.errors import SpearError
from spear.files import write_tensors
from spear.training.distributed import World
from spear.training.protocols import TrainBatch

FOLDER = "bad_batch"
MAX_IDS = 8


def report_bad_batch(folder: Path, step: int, batches: Sequence[TrainBatch], finite: Sequence[bool], world: World) -> NoReturn:
    """Write the batches of an update to ``folder/bad_batch/`` and raise; every process must call it.

    Args:
        step: the update, counted from 1. batches: of this process. finite: whether each one's loss is.
    Raises:
        SpearError: always; names the update and the cuts of the batches with a loss that is not finite, else of all.
    """
    for part, batch in enumerate(batches):
        name = f"step-{step:08d}-rank-{world.rank}-part-{part}.safetensors"
        write_tensors(folder / FOLDER / name, dict(_tensors(batch)), {"ids": "\n".join(batch.ids)})
    told = world.gather([(list(batch.ids), good) for batch, good in zip(batches, finite)])
    parts = [part for parts in told for part in parts]
    bad = [ids for ids, good in parts if not good]
    what = "the loss" if bad else "the gradient"
    ids = [name for group in (bad or [ids for ids, _ in parts]) for name in group]
    listed = ", ".join(ids[:MAX_IDS]) + (f" and {len(ids) - MAX_IDS} more" if len(ids) > MAX_IDS else "")
    raise SpearError(f"{what} of update {step} is not finite; cuts {listed}; the batch is in {folder / FOLDER}")


def _tensors(batch: Any) -> Iterator[tuple[str, Tensor]]:
    """Tensors of a batch by name, those in dicts as ``field.key``; shared memory is copied."""
    names = [item.name for item in fields(batch)] if is_dataclass(batch) else list(vars(batch))
    for name in names:
        value = getattr(batch, name)
        if isinstance(value, Tensor):
            yield name, value.detach().clone()
        elif isinstance(value, dict):
            yield from ((f"{name}.{key}", item.detach().clone()) for key, item in value.items() if isinstance(item, Tensor))
