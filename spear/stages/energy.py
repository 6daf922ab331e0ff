"""Energy that this machine's processors and GPUs have used, where the system lets a program read it."""

from __future__ import annotations

import importlib
import importlib.util
import os
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

POWERCAP = Path("/sys/class/powercap")
KWH = 3.6e6
"""Joules in a kilowatt hour."""


class Counter:
    """A counter of energy that rises, and may start again at 0.

    Args:
        read: joules. wraps: joules at which it starts again, None for never.
    """

    def __init__(self, read: Callable[[], float], wraps: float | None = None) -> None:
        self._read, self._wraps = read, wraps
        self._last, self.joules = read(), 0.0

    def update(self) -> float:
        """Joules since the counter was made; must be called at least once per turn of the counter."""
        with suppress(OSError, ValueError):
            now = self._read()
            self.joules += now - self._last if now >= self._last else now + (self._wraps or 0.0) - self._last
            self._last = now
        return self.joules


def find_counters(powercap: Path = POWERCAP) -> list[Counter]:
    """Counters of this machine's processor packages, and of the GPUs that this process sees; none where they cannot be read."""
    found: list[Counter] = []
    for folder in sorted(powercap.glob("intel-rapl:*")):
        if folder.name.count(":") == 1:  # the others are parts of packages
            with suppress(OSError, ValueError):
                wraps = float((folder / "max_energy_range_uj").read_text()) / 1e6
                found.append(Counter(_file_reader(folder / "energy_uj"), wraps))
    return found + _gpu_counters()


def _file_reader(path: Path) -> Callable[[], float]:
    return lambda: float(path.read_text()) / 1e6


def _gpu_counters() -> list[Counter]:
    if not (torch.cuda.is_available() and importlib.util.find_spec("pynvml")):
        return []
    found: list[Counter] = []
    try:
        nvml: Any = importlib.import_module("pynvml")
        nvml.nvmlInit()
        for handle in visible_gpus(nvml, os.environ.get("CUDA_VISIBLE_DEVICES")):
            found.append(Counter(lambda handle=handle: nvml.nvmlDeviceGetTotalEnergyConsumption(handle) / 1e3))  # type: ignore[misc]
    except Exception:  # a driver without the counter raises errors of its own kind; the account does without
        return found
    return found


def visible_gpus(nvml: Any, names: str | None) -> Iterator[Any]:
    """Handles of the GPUs that CUDA would show, found without it: to ask CUDA starts it, which takes memory on a GPU that is not used.

    Args:
        nvml: the module pynvml. names: value of CUDA_VISIBLE_DEVICES, numbers or UUIDs; None: all.
    """
    for name in map(str, range(nvml.nvmlDeviceGetCount())) if names is None else names.split(","):
        name = name.strip()
        if name.isdigit():
            yield nvml.nvmlDeviceGetHandleByIndex(int(name))
        elif name.startswith("GPU-"):
            yield nvml.nvmlDeviceGetHandleByUUID(name)
        else:  # CUDA shows no more from the first name on that it does not know
            return
