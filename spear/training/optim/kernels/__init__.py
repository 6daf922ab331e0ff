"""ScaledAdam's update of a large tensor as compiled loops for a CPU (see `spear.native`)."""

from __future__ import annotations

import ctypes
import functools
from pathlib import Path
from typing import NamedTuple

from torch import Tensor

from spear.native import load


class Moments(NamedTuple):
    """Sums over a tensor p and its gradient g."""

    pg: float
    gg: float
    pp: float


class ScaledAdamLoops:
    """The functions of the built library; tensors are float32, contiguous and on the CPU."""

    def __init__(self, library: ctypes.CDLL) -> None:
        pointer, count, real = ctypes.c_void_p, ctypes.c_int64, ctypes.c_float
        self._moments, self._update = library["spear_moments"], library["spear_scaled_adam"]
        self._moments.argtypes, self._update.argtypes = [pointer, pointer, count, pointer], [*[pointer] * 4, count, *[real] * 7]
        self._moments.restype = self._update.restype = None

    def moments(self, p: Tensor, grad: Tensor) -> Moments:
        """Sums of p g, g g and p p in float64."""
        sums = (ctypes.c_double * 3)()
        self._moments(p.data_ptr(), grad.data_ptr(), p.numel(), ctypes.addressof(sums))
        return Moments(*sums)

    def update(self, p: Tensor, grad: Tensor, delta: Tensor, exp_avg_sq: Tensor, settings: tuple[float, ...]) -> None:
        """Update p, delta and exp_avg_sq in place; settings: beta1, beta2, eps, correction, clip, pull, step of the source."""
        self._update(p.data_ptr(), grad.data_ptr(), delta.data_ptr(), exp_avg_sq.data_ptr(), p.numel(), *settings)


def scaled_adam_loops() -> ScaledAdamLoops | None:
    """The compiled loops, or None where there are none."""
    library = load(Path(__file__).with_name("scaled_adam.cpp"), "optimiser updates are computed")
    return None if library is None else _wrap(library)


@functools.cache
def _wrap(library: ctypes.CDLL) -> ScaledAdamLoops:
    return ScaledAdamLoops(library)
