"""Products with a gate that keep the gate before its activation function, which its neighbour already keeps, and not behind it."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from spear.models.tracing import is_tracing

Kind = Literal["sigmoid", "tanh"]


class _Gated(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor, gate: Tensor, kind: Kind) -> Tensor:
        ctx.save_for_backward(value, gate)
        ctx.kind = kind
        return _opened(gate, kind).mul_(value)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:  # type: ignore[override]
        value, gate = ctx.saved_tensors
        opened = _opened(gate, ctx.kind)
        derivative = torch.ops.aten.sigmoid_backward if ctx.kind == "sigmoid" else torch.ops.aten.tanh_backward
        return grad * opened, derivative(grad * value, opened), None


def _opened(gate: Tensor, kind: Kind) -> Tensor:
    return gate.sigmoid() if kind == "sigmoid" else gate.tanh()


def gated(value: Tensor, gate: Tensor, kind: Kind) -> Tensor:
    """``value * kind(gate)``; both of one shape and type."""
    if is_tracing() or not torch.is_grad_enabled() or not value.requires_grad or value.dtype != gate.dtype:
        return value * _opened(gate, kind)
    result: Tensor = _Gated.apply(value, gate, kind)
    return result
