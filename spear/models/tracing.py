"""Whether the model is being recorded for export, when branches on values are not allowed."""

from __future__ import annotations

import torch
from torch import Tensor

OPERATORS_READY = [False]
"""Whether torch knows the operators that compiled code calls."""


def is_tracing() -> bool:
    """True inside torch.export, torch.compile, torch.jit.trace and ONNX export."""
    return torch.compiler.is_compiling() or bool(torch.jit._trace.is_tracing())


def is_compiling() -> bool:
    """True while torch.compile, and no exporter, reads code whose operators are registered (`spear.models.zipformer.compiled`)."""
    return OPERATORS_READY[0] and torch.compiler.is_compiling() and not torch.compiler.is_exporting()


def first_frames(x: Tensor, count: int) -> Tensor:
    """The first `count` frames of x (N, T, D); in recorded code by their indexes, as a slice would record whether it cuts anything."""
    recorded = torch.compiler.is_exporting() or bool(torch.jit._trace.is_tracing())
    return x[:, torch.arange(count, device=x.device)] if recorded else x[:, :count]
