"""Linear maps that keep little for their backward pass: parameters in their own type, activations before the activation function."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from spear.models.tracing import is_tracing
from spear.models.zipformer.swoosh import Swoosh


def low_type(x: Tensor) -> torch.dtype:
    """The type in which a matrix product of x is computed: that of autocast where it is on, else that of x."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype


def _weight_gradients(grad: Tensor, x: Tensor, weight: Tensor, needs: tuple[bool, ...]) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of weight and bias from grad (..., out) and x (..., in), in the weight's type."""
    flat = grad.flatten(0, -2)
    grad_weight = (flat.T @ x.flatten(0, -2)).to(weight.dtype) if needs[0] else None
    grad_bias = flat.sum(dim=0, dtype=weight.dtype) if needs[1] else None
    return grad_weight, grad_bias


class _Linear(torch.autograd.Function):
    """Keeps x in the type of the product and the parameter itself, which costs nothing; autograd would keep a copy in that type."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
        ctx.input_type = x.dtype
        low = x.to(dtype)
        ctx.save_for_backward(low, weight)
        with torch.autocast(x.device.type, enabled=False):
            return F.linear(low, weight.to(dtype), None if bias is None else bias.to(dtype))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, weight = ctx.saved_tensors
        with torch.autocast(grad.device.type, enabled=False):
            grad_x = (grad @ weight.to(x.dtype)).to(ctx.input_type) if ctx.needs_input_grad[0] else None
            return grad_x, *_weight_gradients(grad, x, weight, ctx.needs_input_grad[1:3]), None


class _SwooshLinear(torch.autograd.Function):
    """Keeps x alone: Swoosh of it, times the mask, is computed again in the backward pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, keep: Tensor | None, weight: Tensor, bias: Tensor, swoosh: Swoosh, dtype: torch.dtype) -> Tensor:
        ctx.save_for_backward(x, keep, weight)
        ctx.swoosh, ctx.dtype = swoosh, dtype
        with torch.autocast(x.device.type, enabled=False):
            return F.linear(_hidden(x, keep, swoosh, dtype), weight.to(dtype), bias.to(dtype))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, keep, weight = ctx.saved_tensors
        with torch.autocast(grad.device.type, enabled=False):
            hidden = _hidden(x, keep, ctx.swoosh, ctx.dtype)
            grads = _weight_gradients(grad, hidden, weight, ctx.needs_input_grad[2:4])
            del hidden
            grad_hidden = (grad @ weight.to(ctx.dtype)).to(x.dtype)
            if keep is not None:
                grad_hidden *= keep
            return ctx.swoosh.gradient(x, grad_hidden), None, *grads, None, None


def _hidden(x: Tensor, keep: Tensor | None, swoosh: Swoosh, dtype: torch.dtype) -> Tensor:
    hidden = swoosh.of(x)
    if keep is not None:
        hidden *= keep
    return hidden.to(dtype)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """As `torch.nn.functional.linear`; x: (..., in), weight: (out, in), bias: (out,) -> (..., out) in the type of autocast, or of x."""
    if is_tracing() or not torch.is_grad_enabled() or not torch.is_autocast_enabled(x.device.type) or not weight.requires_grad:
        return F.linear(x, weight, bias)
    result: Tensor = _Linear.apply(x, weight, bias, low_type(x))
    return result


def swoosh_linear(x: Tensor, keep: Tensor | None, weight: Tensor, bias: Tensor, swoosh: Swoosh) -> Tensor:
    """``linear(swoosh(x) * keep)``.

    Args:
        x: (N, T, in). keep: (N, 1, in) mask with the scale of a dropout, in the type of x; None: no dropout. weight: (out, in). bias: (out,).
    Returns:
        (N, T, out) in the type of autocast, or of x.
    """
    if is_tracing() or not torch.is_grad_enabled() or not (x.requires_grad or weight.requires_grad):
        hidden = swoosh(x)
        return F.linear(hidden if keep is None else hidden * keep, weight, bias)
    result: Tensor = _SwooshLinear.apply(x, keep, weight, bias, swoosh, low_type(x))
    return result


class Linear(nn.Linear):
    """A linear layer that keeps no copy of its weight for the backward pass."""

    def forward(self, x: Tensor) -> Tensor:
        """x: (..., in) -> (..., out)."""
        return linear(x, self.weight, self.bias)
