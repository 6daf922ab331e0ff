"""One process at work on a folder: the lock that keeps others out, and what all processes that worked on it have cost."""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import platform
import resource
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch

from spear.errors import ArtifactError, SpearError
from spear.files import writing
from spear.stages.energy import KWH, find_counters

logger = logging.getLogger(__name__)

LOCK = ".lock"
NOTE_EVERY_S = 30.0
"""A killed process loses at most this much of its account."""


class BusyError(ArtifactError):
    """Another process is at work on a folder."""


@contextmanager
def locked(folder: Path, *, wait: bool = False) -> Iterator[None]:
    """Keep other processes out of a folder.

    The lock belongs to this process alone, not to its children, and goes with it however it ends. Where the file system knows no
    locks, a warning takes its place.

    Args:
        wait: until the other process is done, instead of raising.
    Raises:
        BusyError: another process is at work; names the folder and that process.
    """
    path = folder / LOCK
    with writing(path):
        handle = _take(path, wait=wait)
    try:
        yield
    finally:
        with suppress(OSError):
            path.unlink()
        os.close(handle)


def check_free(folder: Path) -> None:
    """Make sure that no other process holds the lock of a folder, without taking it.

    Raises:
        BusyError: another process is at work; names the folder and that process.
    """
    with suppress(FileNotFoundError):
        handle = os.open(folder / LOCK, os.O_RDONLY)
        try:
            fcntl.lockf(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EACCES, errno.EAGAIN):
                raise _busy(folder, handle) from error
        finally:
            os.close(handle)


def _busy(folder: Path, handle: int) -> BusyError:
    owner = os.read(handle, 200).decode(errors="replace").strip()
    return BusyError(f"{folder} is being worked on by {owner or 'another process'}: wait until it ends, or stop it and run again")


def _take(path: Path, *, wait: bool) -> int:
    """Descriptor of the locked file, with this process's number in it."""
    while True:
        handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.lockf(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except OSError as error:
            if error.errno in (errno.EACCES, errno.EAGAIN):
                busy = _busy(path.parent, handle)
                os.close(handle)
                raise busy from error
            logger.warning("%s cannot be locked (%s): make sure that no other process works on it", path.parent, error.strerror)
        # the holder before may have removed the file between our opening and our locking it
        with suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(handle), path.stat()):
                with suppress(OSError):  # a full disk; the lock holds without a name, too
                    os.ftruncate(handle, 0)
                    os.write(handle, f"process {os.getpid()} on {platform.node()}\n".encode())
                return handle
        os.close(handle)


class Cost:
    """Time and memory of a folder: those of earlier processes, and of this one up to now.

    Args:
        before: what `so_far` of the process before said; empty for the first. processes: that work side by side, each with its own GPU
            where there are any.
    """

    def __init__(self, before: Mapping[str, Any], processes: int = 1) -> None:
        self.before, self.processes, self.start = dict(before), processes, time.monotonic()
        self.energy = find_counters()

    def so_far(self) -> dict[str, Any]:
        """JSON value: ``sessions``, processes (or groups of them) one after the other; ``wall_s``, their sum; ``peak_memory_mb``, the largest
        of the first process of each; where a GPU was used ``peak_gpu_memory_mb`` and ``gpu_hours``, over all processes; and where it can be
        read ``energy_kwh``, of the processors and GPUs of the first process's machine, whatever else ran there.
        """
        spent = time.monotonic() - self.start
        found = {
            **self.before,
            "sessions": self.before.get("sessions", 0) + 1,
            "wall_s": round(self.before.get("wall_s", 0.0) + spent, 3),
            "peak_memory_mb": max(self.before.get("peak_memory_mb", 0.0), round(peak_memory_mb(), 1)),
        }
        # the current device, which is the process's own; a process that never put anything there did not use it
        peak = torch.cuda.max_memory_allocated() if torch.cuda.is_available() and torch.cuda.is_initialized() else 0
        if peak > 0:
            found["peak_gpu_memory_mb"] = max(self.before.get("peak_gpu_memory_mb", 0.0), round(peak / 2**20, 1))
            found["gpu_hours"] = round(self.before.get("gpu_hours", 0.0) + self.processes * spent / 3600, 6)
        if self.energy:
            found["energy_kwh"] = round(self.before.get("energy_kwh", 0.0) + sum(counter.update() for counter in self.energy) / KWH, 6)
        return found


def added_up(costs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What several accounts of `Cost.so_far` come to: times and sessions are added, of memory the largest is taken."""
    found: dict[str, Any] = {}
    for cost in costs:
        for key, value in cost.items():
            found[key] = max(found.get(key, 0), value) if key.startswith("peak_") else round(found.get(key, 0) + value, 6)
    return found


@contextmanager
def noting(note: Callable[[], None], every_s: float = NOTE_EVERY_S) -> Iterator[None]:
    """Call `note` now, every `every_s` seconds and, where the work inside breaks off, at its end; only the first call may fail."""
    note()
    ended = threading.Event()

    def quietly() -> None:
        with suppress(SpearError, OSError):
            note()

    def beat() -> None:
        while not ended.wait(every_s):
            quietly()

    thread = threading.Thread(target=beat, daemon=True)
    thread.start()
    broken = True
    try:
        yield
        broken = False
    finally:
        ended.set()
        thread.join()
        if broken:
            quietly()


def peak_memory_mb() -> float:
    """Largest resident memory of this process and of its finished children so far, in MiB."""
    own, children = (resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return max(own, children) / 1024
