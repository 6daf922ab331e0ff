"""Work ahead in other processes without a change of order."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset

from spear.errors import SpearError
from spear.types import Batch


class _Batches(Dataset[Any]):
    """Batches by their number, for torch's loader. An error a user can fix crosses the processes as a value, with its own text."""

    def __init__(self, make: Callable[[int], Batch]) -> None:
        self._make = make

    def __getitem__(self, g: int) -> Batch | SpearError:
        try:
            return self._make(g)
        except SpearError as error:
            return error


class _Numbers(torch.utils.data.Sampler[int]):
    """Numbers of the batches to make, in order; may be longer than memory."""

    def __init__(self, numbers: Iterable[int]) -> None:
        self._numbers = numbers

    def __iter__(self) -> Iterator[int]:
        return iter(self._numbers)


def ordered_loader(make: Callable[[int], Batch], numbers: Sequence[int], num_workers: int, prefetch: int) -> Iterator[Batch]:
    """Yield make(n) for every n in order.

    Args:
        make: a pure function of n; may raise a SpearError. numbers: may be a range of any length. num_workers: processes; 0 works in this one.
        prefetch: batches that each process keeps ready, in page-locked memory where this process works on a GPU.
    """
    if num_workers == 0:
        yield from map(make, numbers)
        return
    settings: dict[str, Any] = {"num_workers": num_workers, "prefetch_factor": prefetch, "collate_fn": _same}
    settings["pin_memory"] = torch.cuda.is_available() and torch.cuda.is_initialized()
    for made in DataLoader(_Batches(make), batch_size=None, sampler=_Numbers(numbers), **settings):
        if isinstance(made, SpearError):
            raise made
        yield made


def _same(batch: Batch) -> Batch:
    return batch
