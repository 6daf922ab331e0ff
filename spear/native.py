"""Compiled loops: C++ files of this package, built on first use with the system's compiler and kept in the user's cache.

Nothing depends on them. Without a compiler the same results come from plain torch, more slowly, and one line says so.
``SPEAR_KERNELS=0`` turns them off, ``CXX`` names another compiler, ``XDG_CACHE_HOME`` moves the cache.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import tempfile
from pathlib import Path

logger = logging.getLogger(__name__)

SWITCH = "SPEAR_KERNELS"
FLAGS = ("-O3", "-march=native", "-fno-math-errno", "-fno-trapping-math", "-std=c++17", "-shared", "-fPIC")


def load(source: Path, slower: str, flags: tuple[str, ...] = FLAGS) -> ctypes.CDLL | None:
    """The library built from `source`; None where the loops are turned off or cannot be built, which is logged once.

    Args:
        source: a C++ file; the headers beside it belong to it. slower: what is slower without it, for the log line.
    """
    return None if os.environ.get(SWITCH, "1") == "0" else _load(source, slower, flags)


@functools.cache
def _load(source: Path, slower: str, flags: tuple[str, ...]) -> ctypes.CDLL | None:
    try:
        return ctypes.CDLL(str(build(source, flags)))
    except (OSError, subprocess.SubprocessError) as error:
        said = error.stderr if isinstance(error, subprocess.CalledProcessError) else str(error)
        reason = (said if isinstance(said, str) else said.decode(errors="replace")).strip().splitlines()
        logger.warning("no compiled loops, so %s in plain torch, which is slower: %s", slower, reason[0] if reason else type(error).__name__)
        return None


def compiler() -> str | None:
    """Path of the C++ compiler that would be used."""
    return next((path for name in (os.environ.get("CXX"), "c++", "g++", "clang++") if name and (path := shutil.which(name))), None)


def build(source: Path, flags: tuple[str, ...] = FLAGS) -> Path:
    """The library for this source, its headers, the compiler and the processor in the user's cache, made where it is missing.

    Raises:
        OSError: there is no compiler, or the cache cannot be written. subprocess.SubprocessError: the compiler fails.
    """
    program = compiler()
    if program is None:
        raise FileNotFoundError("there is no C++ compiler (c++, g++ or clang++)")
    files = [source, *sorted(source.parent.glob("*.h"))]
    about = "\n".join([*(file.read_text(encoding="utf-8") for file in files), program, *flags, processor()])
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "spear"
    library = folder / f"{source.stem}-{hashlib.sha256(about.encode()).hexdigest()[:16]}.so"
    if not library.exists():
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            made = Path(scratch) / library.name
            subprocess.run([program, *flags, str(source), "-o", str(made)], check=True, capture_output=True, timeout=300)
            made.replace(library)  # whole or not at all, whoever else is building
    return library


def processor() -> str:
    """What the code is built for: machine, model and instruction sets."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    wanted = ("model name", "flags", "Features", "CPU part")
    first = [next((line for line in lines if line.startswith(name)), "") for name in wanted]
    return "\n".join([platform.machine(), platform.processor(), *first])
