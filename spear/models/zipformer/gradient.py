"""Functions that leave their input as it is and change only its gradient (training only)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from spear.models.zipformer.chance import happens

LIMIT_PROB = 0.6


class _Limit(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, low: float, high: float) -> Tensor:
        ctx.save_for_backward(x)
        ctx.low, ctx.high = low, high
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        (x,) = ctx.saved_tensors
        return limited_gradient(x, grad, ctx.low, ctx.high), None, None


def limited_gradient(x: Tensor, grad: Tensor, low: float, high: float) -> Tensor:
    """The gradient of x behind `limit_range`, given that of its output."""
    outwards = ((x < low) & (grad > 0)) | ((x > high) & (grad < 0))
    return torch.where(outwards, -grad, grad)


def limit_range(x: Tensor, low: float, high: float) -> Tensor:
    """Flip the gradient of elements outside [low, high] that a descent step would push further out."""
    result: Tensor = _Limit.apply(x, low, high)
    return result


def limit_parameter(x: Tensor, low: float, high: float, *, training: bool) -> Tensor:
    """`limit_range` on a parameter, in 60 % of the training calls."""
    if training and x.requires_grad and torch.is_grad_enabled() and happens(LIMIT_PROB):
        return limit_range(x, low, high)
    return x


class _Scale(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: float) -> Tensor:
        ctx.scale = scale
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return grad * ctx.scale, None


class ScaleGrad(torch.nn.Module):
    """Multiply the gradient by `scale` on its way back."""

    def __init__(self, scale: float) -> None:
        super().__init__()
        self.scale = scale

    def forward(self, x: Tensor) -> Tensor:
        """Return x of any shape."""
        if not (self.training and x.requires_grad and torch.is_grad_enabled()):
            return x
        result: Tensor = _Scale.apply(x, self.scale)
        return result


class _Penalize(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, limit: float, penalty: float) -> Tensor:
        ctx.save_for_backward(x)
        ctx.limit, ctx.penalty = limit, penalty
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        (x,) = ctx.saved_tensors
        return penalized_gradient(x, grad, ctx.limit, ctx.penalty), None, None


def penalized_gradient(x: Tensor, grad: Tensor, limit: float, penalty: float) -> Tensor:
    """The gradient of x behind `penalize_large`, given that of its output."""
    return grad + torch.where(x.abs() > limit, x.sign() * penalty, 0.0).to(grad.dtype)


def penalize_large(x: Tensor, limit: float, penalty: float) -> Tensor:
    """Add `penalty * sign(x)` to the gradient where |x| > `limit`."""
    result: Tensor = _Penalize.apply(x, limit, penalty)
    return result
