"""Whether the model is being recorded for export, when branches on values are not allowed."""

from __future__ import annotations

import torch


def is_tracing() -> bool:
    """True inside torch.export, torch.compile, torch.jit.trace and ONNX export."""
    return torch.compiler.is_compiling() or bool(torch.jit._trace.is_tracing())
