"""What the trainer needs of batches, their sources and the module; it knows no teacher, student or corpus."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import torch

from spear.types import StepOutput


class TrainBatch(Protocol):
    """One batch; `spear.types.Batch` is one."""

    @property
    def ids(self) -> Sequence[str]:
        """Names of the items, for error messages."""

    @property
    def seconds(self) -> float:
        """Seconds of audio in the batch."""

    def to(self, device: object) -> Any:
        """A copy on `device`."""


class BatchSource(Protocol):
    """An endless stream of training batches in which batch g depends on g and the source's settings only."""

    @property
    def batches_per_epoch(self) -> int:
        """Batches after which every item was seen; epoch = g // batches_per_epoch."""

    def iterate(self, start: int, stride: int) -> Iterator[TrainBatch]:
        """Yield batch(start), batch(start + stride), batch(start + 2 stride), ... without end."""


class ValidSource(Protocol):
    """A finite set of validation batches, always the same."""

    def __len__(self) -> int:
        """Batches over all processes."""

    def iterate(self, rank: int, world: int) -> Iterator[TrainBatch]:
        """Yield the share of process `rank` of `world`; the shares are disjoint and make up the whole."""


class TrainModule(Protocol):
    """What the trained ``nn.Module`` offers beside its parameters."""

    def __call__(self, batch: Any, generator: torch.Generator | None) -> StepOutput:
        """Loss as a sum, number of targets and metrics of one batch; `generator` draws masks."""

    def set_batch_count(self, count: float) -> None:
        """Called before every update with the batches seen, in units of the reference batch size."""

    def after_step(self, step: int) -> None:
        """Called after every update with the number of updates done, e.g. to move a teacher."""

    def discard_step(self) -> None:
        """Called instead where the update was left out because its loss or gradient was not finite."""
