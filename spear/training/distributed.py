"""The processes of one run: who this process is, and the few collectives that training needs."""

from __future__ import annotations

import datetime
import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from spear.errors import ConfigError, SpearError, StopRequested

Device = Literal["auto", "cpu", "cuda"]
Value = TypeVar("Value")
TIMEOUT = datetime.timedelta(minutes=30)
"""How long a process waits for another, e.g. while one of them writes a checkpoint."""
PATIENCE = datetime.timedelta(days=7)
"""How long it waits in `World.main_first`."""


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

    @contextmanager
    def main_first(self) -> Iterator[None]:
        """Around what rank 0 alone does, for days if need be; the others wait at the end, no longer than rank 0 is alive."""
        group = dist.new_group(backend="gloo", timeout=PATIENCE) if self.size > 1 else None
        yield
        if group is not None:
            dist.barrier(group)


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

    After an error this process stays joined: to leave is a collective of NCCL, in which it would wait for processes that wait for it. It must
    end then, without the destructors of the group, as `spear.cli` does; that ends the others, too.

    Args:
        device: of the training; CUDA uses NCCL, the CPU gloo.
    Raises:
        SpearError: an environment variable of torchrun is not a number. ConfigError: there is no GPU for this process.
    """
    world = this_process()
    if world.size == 1:
        yield world
        return
    own = pick_device(device, world)
    if own.type == "cuda":
        torch.cuda.set_device(own)
    dist.init_process_group("cpu:gloo,cuda:nccl" if own.type == "cuda" else "gloo", timeout=TIMEOUT)
    if own.type == "cuda":
        check_one_each(world.gather((platform.node(), str(torch.cuda.get_device_properties(own).uuid))))
    try:
        yield world
    except StopRequested:  # all processes stop together
        dist.destroy_process_group()
        raise
    dist.destroy_process_group()


def check_one_each(gpus: list[tuple[str, str]]) -> None:
    """Make sure that every process has a GPU of its own.

    Args:
        gpus: machine and GPU of every process, in the order of their ranks.
    Raises:
        ConfigError: two processes share one.
    """
    for rank, gpu in enumerate(gpus):
        if gpus.index(gpu) < rank:
            raise ConfigError(f"processes {gpus.index(gpu)} and {rank} share a GPU of {gpu[0]}: start one process per GPU")


def pick_device(device: Device, world: World) -> torch.device:
    """The device of this process, unless the CPU is asked for: the GPU of its local rank, or the only one that it sees.

    Raises:
        ConfigError: CUDA is asked for and there is no such device.
    """
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if device == "cpu" or (device == "auto" and count == 0):
        return torch.device("cpu")
    index = 0 if count == 1 else world.local_rank  # a launcher may show every process its own GPU alone
    if index >= count:
        raise ConfigError(f"`device` {device} needs a CUDA device for local rank {world.local_rank}, but this machine has {count}")
    return torch.device("cuda", index)


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
