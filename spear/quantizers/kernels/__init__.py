"""The index search of MVQ as compiled loops for a CPU (see `spear.native`). They return what torch returns, number by number."""

from __future__ import annotations

import ctypes
import functools
from pathlib import Path

import torch
from torch import Tensor

from spear.native import load

FLAGS = ("-O3", "-march=native", "-ffp-contract=off", "-fno-math-errno", "-std=c++17", "-shared", "-fPIC")
"""Nothing is contracted or reordered: sums round as they do in torch."""


class SearchLoops:
    """The functions of the built library; tensors are float32 or int32, contiguous and on the CPU, with the shapes of ``search.cpp``."""

    def __init__(self, library: ctypes.CDLL) -> None:
        pointer, count, small = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int32
        self._refine, self._sweep = library["spear_refine"], library["spear_sweep"]
        self._refine.argtypes = [pointer, pointer, pointer, count, small, small, small, pointer]
        self._sweep.argtypes = [pointer, pointer, pointer, count, small, small, small, small]
        self._refine.restype = self._sweep.restype = None

    def refine(self, costs: Tensor, cross: Tensor, codes: Tensor, iters: int, keep_best: bool) -> None:
        """`spear.quantizers.search.refine`, in place on codes (B, C) int32."""
        errors = torch.empty(len(codes)) if keep_best else None
        lowest = None if errors is None else errors.data_ptr()
        self._refine(costs.data_ptr(), cross.data_ptr(), codes.data_ptr(), len(codes), codes.shape[1], cross.shape[2], iters, lowest)

    def sweep(self, costs: Tensor, cross: Tensor, codes: Tensor, sweeps: int, fresh: bool) -> None:
        """`spear.quantizers.search.sweep`, in place on codes (B, C) int32."""
        self._sweep(costs.data_ptr(), cross.data_ptr(), codes.data_ptr(), len(codes), codes.shape[1], cross.shape[2], sweeps, int(fresh))


def search_loops() -> SearchLoops | None:
    """The compiled loops, or None where there are none."""
    library = load(Path(__file__).with_name("search.cpp"), "the search of MVQ runs", FLAGS)
    return None if library is None else _wrap(library)


@functools.cache
def _wrap(library: ctypes.CDLL) -> SearchLoops:
    return SearchLoops(library)
