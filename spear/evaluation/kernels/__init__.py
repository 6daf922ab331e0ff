"""Dynamic time warping as a compiled loop for a CPU (see `spear.native`)."""

from __future__ import annotations

import ctypes
import functools
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from spear.native import load


class DtwLoop:
    """The function of the built library."""

    def __init__(self, library: ctypes.CDLL) -> None:
        pointer, count = ctypes.c_void_p, ctypes.c_int64
        self._dtw = library["spear_dtw"]
        self._dtw.argtypes = [pointer, count, pointer, pointer, pointer, count, ctypes.c_int32, pointer]
        self._dtw.restype = None

    def __call__(
        self, frames: NDArray[np.float32], starts: NDArray[np.int64], lens: NDArray[np.int64], pairs: NDArray[np.int64], *, angular: bool
    ) -> NDArray[np.float32]:
        """Distances (P,) of pairs (P, 2) of items; all arrays contiguous, frames (M, D), see `spear.evaluation.dtw`."""
        out = np.empty(len(pairs), np.float32)
        arrays = [array.ctypes.data for array in (frames, starts, lens, pairs, out)]
        self._dtw(arrays[0], frames.shape[1], *arrays[1:4], len(pairs), int(angular), arrays[4])
        return out


def dtw_loop() -> DtwLoop | None:
    """The compiled loop, or None where there is none."""
    library = load(Path(__file__).with_name("dtw.cpp"), "ABX distances are computed")
    return None if library is None else _wrap(library)


@functools.cache
def _wrap(library: ctypes.CDLL) -> DtwLoop:
    return DtwLoop(library)
