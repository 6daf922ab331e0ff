"""Whether the model is being recorded for export, when branches on values are not allowed."""

from __future__ import annotations

import torch

OPERATORS_READY = [False]
"""Whether torch knows the operators that compiled code calls."""


def is_tracing() -> bool:
    """True inside torch.export, torch.compile, torch.jit.trace and ONNX export."""
    return torch.compiler.is_compiling() or bool(torch.jit._trace.is_tracing())


def is_compiling() -> bool:
    """True while torch.compile, and no exporter, reads code whose operators are registered (`spear.models.zipformer.compiled`)."""
    return OPERATORS_READY[0] and torch.compiler.is_compiling() and not torch.compiler.is_exporting()
