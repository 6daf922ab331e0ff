"""Sums of metrics over steps and processes, and the time that each phase of a step takes."""

from __future__ import annotations

import resource
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor

from spear.training.distributed import World


class Metrics:
    """Adds up ``[sum, count]`` pairs by name in float64, on the device, so that an average weighs every frame alike.

    A name may be missing on some steps and some processes.
    """

    def __init__(self) -> None:
        self.sums: dict[str, Tensor] = {}  # name -> (2,) float64

    def add(self, metrics: Mapping[str, Tensor]) -> None:
        """Add (2,) tensors ``[sum, count]``; gradients are dropped."""
        for name, value in metrics.items():
            value = value.detach().double()
            self.sums[name] = self.sums[name] + value if name in self.sums else value

    def reset(self) -> None:
        """Forget everything."""
        self.sums = {}

    def state(self) -> dict[str, list[float]]:
        """This process's sums as plain numbers."""
        return {name: [float(x) for x in self.sums[name].tolist()] for name in sorted(self.sums)}

    def add_state(self, state: Mapping[str, list[float]], device: torch.device) -> None:
        """Add the sums of a `state`."""
        self.add({name: torch.tensor(value, dtype=torch.float64, device=device) for name, value in state.items()})

    def averages(self, world: World) -> dict[str, float]:
        """Sum over count of all processes, by name in sorted order; names with count 0 are left out. Every process must call it."""
        totals: dict[str, list[float]] = {}
        for state in world.gather(self.state()):
            for name, (value, count) in state.items():
                total = totals.setdefault(name, [0.0, 0.0])
                total[0] += value
                total[1] += count
        return {name: totals[name][0] / totals[name][1] for name in sorted(totals) if totals[name][1] != 0}


class Stopwatch:
    """Seconds spent in named phases; on CUDA measured on the device, without waiting for it at every phase.

    Args:
        device: where the work runs.
    """

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._events: list[tuple[str, torch.cuda.Event, torch.cuda.Event]] = []
        self._seconds: dict[str, float] = {}
        self._start = time.perf_counter()

    @contextmanager
    def phase(self, name: str, *, host: bool = False) -> Iterator[None]:
        """Measure the enclosed work; `host` where it is done by the CPU whatever the device."""
        if self._cuda and not host:
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            yield
            end.record()
            self._events.append((name, start, end))
        else:
            begin = time.perf_counter()
            yield
            self._seconds[name] = self._seconds.get(name, 0.0) + time.perf_counter() - begin

    def lap(self) -> tuple[float, dict[str, float]]:
        """Wall-clock seconds since the last lap and the seconds of each phase in it; starts the next lap."""
        if self._events:
            torch.cuda.synchronize()
        for name, start, end in self._events:
            self._seconds[name] = self._seconds.get(name, 0.0) + start.elapsed_time(end) / 1000
        now = time.perf_counter()
        wall, seconds = now - self._start, self._seconds
        self._start, self._seconds, self._events = now, {}, []
        return wall, seconds


def peak_memory_gib(device: torch.device) -> float:
    """Largest memory used so far in GiB: of the GPU, or of this process on the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
