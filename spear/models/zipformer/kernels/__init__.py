"""Compiled loops of the Zipformer for a CPU (see `spear.native`): the Swoosh activations and a gradient of depthwise convolutions."""

from __future__ import annotations

import ctypes
import functools
import importlib.util
import logging
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor

from spear.native import load

logger = logging.getLogger(__name__)

SUFFIXES = {torch.float32: "f32", torch.bfloat16: "bf16"}


class SwooshLoops:
    """The functions of the built library; tensors are dense, of one dtype (float32 or bfloat16) and memory order, on the CPU."""

    def __init__(self, library: ctypes.CDLL) -> None:
        pointer, count, real = ctypes.c_void_p, ctypes.c_int64, ctypes.c_float
        self._forward, self._backward = {}, {}
        for dtype, suffix in SUFFIXES.items():
            forward, backward = library[f"spear_swoosh_{suffix}"], library[f"spear_swoosh_grad_{suffix}"]
            forward.argtypes, backward.argtypes = [pointer, pointer, count, real, real], [pointer, pointer, pointer, count, real]
            forward.restype = backward.restype = None
            self._forward[dtype], self._backward[dtype] = forward, backward

    def forward(self, x: Tensor, out: Tensor, shift: float, constant: float) -> None:
        """out = softplus(x - shift) - 0.08 (x - shift) - constant."""
        self._forward[x.dtype](x.data_ptr(), out.data_ptr(), x.numel(), shift, constant)

    def backward(self, x: Tensor, grad: Tensor, out: Tensor, shift: float) -> None:
        """out = grad times the derivative at x; out may be grad."""
        self._backward[x.dtype](x.data_ptr(), grad.data_ptr(), out.data_ptr(), x.numel(), shift)


def swoosh_loops() -> SwooshLoops | None:
    """The compiled loops, or None where there are none."""
    library = load(Path(__file__).with_name("swoosh.cpp"), "activations run")
    return None if library is None else _wrap(library)


@functools.cache
def _wrap(library: ctypes.CDLL) -> SwooshLoops:
    return SwooshLoops(library)


@functools.cache
def k2_kernels() -> ModuleType | None:
    """The module k2, whose Swoosh kernels run on a GPU; None where it is not installed or cannot be loaded, and nothing needs it."""
    if importlib.util.find_spec("k2") is None:
        return None
    try:
        return importlib.import_module("k2")
    except (ImportError, OSError) as error:
        logger.warning("k2 is installed, but cannot be loaded, so Swoosh runs in torch: %s", error)
        return None


class DepthwiseLoop:
    """The gradient of the weight of a depthwise convolution."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self._gradient = library["spear_depthwise_weight_grad"]
        self._gradient.argtypes = [ctypes.c_void_p] * 3 + [ctypes.c_int64] * 10
        self._gradient.restype = None

    def weight_gradient(self, x: Tensor, grad: Tensor, kernel: tuple[int, int], padding: tuple[int, int]) -> Tensor:
        """x: (N, H, W, C), grad: (N, H', W', C), both float32 and contiguous -> (kernel height, kernel width, C)."""
        out = x.new_empty(*kernel, x.shape[3])
        rows = grad.shape[1:3]
        self._gradient(x.data_ptr(), grad.data_ptr(), out.data_ptr(), *x.shape[:3], *rows, x.shape[3], *kernel, *padding)
        return out


def depthwise_loop() -> DepthwiseLoop | None:
    """The compiled loop, or None where there is none."""
    library = load(Path(__file__).with_name("depthwise.cpp"), "gradients of convolutions are computed")
    return None if library is None else _wrap_depthwise(library)


@functools.cache
def _wrap_depthwise(library: ctypes.CDLL) -> DepthwiseLoop:
    return DepthwiseLoop(library)
