"""The processes of one run: who this process is, and the few collectives that training needs."""

from __future__ import annotations

import datetime
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from spear.errors import ConfigError, SpearError

Device = Literal["auto", "cpu", "cuda"]
Value = TypeVar("Value")
TIMEOUT = datetime.timedelta(minutes=30)
"""How long a process waits for another, e.g. while one of them writes a checkpoint."""


@dataclass(frozen=True, slots=True)
class World:
    """One process among `size`; the default is a run of one process, for which every collective is trivial."""

    rank: int = 0
    """0 .. size - 1; rank 0 writes."""
    size: int = 1
    """Processes of the run."""
    local_rank: int = 0
    """Number of the process on its machine, and of its GPU."""

    @property
    def is_main(self) -> bool:
        """Whether this process writes files and logs."""
        return self.rank == 0

    def sum_(self, tensor: Tensor) -> Tensor:
        """Sum `tensor` over the processes, in place; every process must call it with the same shape."""
        if self.size > 1:
            dist.all_reduce(tensor)
        return tensor

    def gather(self, value: Value) -> list[Value]:
        """The values of all processes in the order of their ranks, on every process; values must be plain Python."""
        if self.size == 1:
            return [value]
        values: list[Value] = [value] * self.size
        dist.all_gather_object(values, value)
        return values

    def barrier(self) -> None:
        """Wait for all processes."""
        if self.size > 1:
            dist.barrier()


def this_process() -> World:
    """Who this process is among those that ``torchrun`` started, from RANK, WORLD_SIZE and LOCAL_RANK; without them it is alone.

    Raises:
        SpearError: an environment variable of torchrun is not a number.
    """
    try:
        world = World(*(int(os.environ.get(name, default)) for name, default in (("RANK", "0"), ("WORLD_SIZE", "1"), ("LOCAL_RANK", "0"))))
    except ValueError as error:
        raise SpearError(f"RANK, WORLD_SIZE and LOCAL_RANK must be whole numbers: {error}") from error
    return world if world.size > 1 else World()


@contextmanager
def process_group(device: Device = "auto") -> Iterator[World]:
    """Join the processes that ``torchrun`` started, and leave them at the end.

    Reads RANK, WORLD_SIZE and LOCAL_RANK; without them, or with one process, the run is this process alone.

    Args:
        device: of the training; CUDA uses NCCL, the CPU gloo.
    Raises:
        SpearError: an environment variable of torchrun is not a number.
    """
    world = this_process()
    if world.size == 1:
        yield world
        return
    on_cuda = pick_device(device, world).type == "cuda"
    if on_cuda:
        torch.cuda.set_device(world.local_rank)
    dist.init_process_group("cpu:gloo,cuda:nccl" if on_cuda else "gloo", timeout=TIMEOUT)
    try:
        yield world
    finally:
        dist.destroy_process_group()


def pick_device(device: Device, world: World) -> torch.device:
    """The device of this process: the GPU of its local rank where there is one, unless the CPU is asked for.

    Raises:
        ConfigError: CUDA is asked for and there is no such device.
    """
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if device == "cpu" or (device == "auto" and count == 0):
        return torch.device("cpu")
    if world.local_rank >= count:
        raise ConfigError(f"`device` {device} needs a CUDA device for local rank {world.local_rank}, but this machine has {count}")
    return torch.device("cuda", world.local_rank)


@contextmanager
def cpu_threads(number: int | None) -> Iterator[None]:
    """Let torch use `number` CPU threads for a while; None changes nothing."""
    before = torch.get_num_threads()
    if number is not None:
        torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)
