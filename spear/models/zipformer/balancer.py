"""Balancer: keeps each channel's share of positive values and its size within bounds, through the gradient alone."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from spear.models.tracing import is_compiling
from spear.models.zipformer.chance import happens
from spear.models.zipformer.scheduled_float import Schedule, ScheduledModule, schedule

GRAD_SCALE = 0.04
PROB = schedule((0, 0.5), (8000, 0.125), default=0.4)
_FLOOR = 1e-20
_MEAN_PER_ATANH = 0.8139535143
_RMS_PER_ABS = 1.25331413732


class Bounds(NamedTuple):
    """Allowed mean / standard deviation (low, high) and root mean square (low, high) of a channel."""

    mean_low: float
    mean_high: float
    rms_low: float
    rms_high: float


def bounds(min_positive: float, max_positive: float, min_abs: float, max_abs: float) -> Bounds:
    """Bounds on moments from bounds on the share of positive values and on the mean absolute value (of a Gaussian)."""

    def mean(positive: float) -> float:
        x = 2.0 * positive - 1.0
        return _MEAN_PER_ATANH * 0.5 * (math.log(1.0 + x + 1e-10) - math.log(1.0 - x + 1e-10))

    return Bounds(mean(min_positive), mean(max_positive), _RMS_PER_ABS * min_abs, _RMS_PER_ABS * max_abs)


class _Balance(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, limits: Bounds, grad_scale: float, channel_dim: int) -> Tensor:
        ctx.save_for_backward(x)
        ctx.settings = limits, grad_scale, channel_dim
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:  # type: ignore[override]
        (x,) = ctx.saved_tensors
        return balanced_gradient(x, grad, *ctx.settings), None, None, None


def balanced_gradient(x: Tensor, grad: Tensor, limits: Bounds, grad_scale: float, channel_dim: int) -> Tensor:
    """The gradient of x behind `balance`, given that of its output."""
    shift, slope = _penalty_gradient(x, limits, grad_scale, channel_dim)
    push = torch.addcmul(shift, slope, x.to(shift.dtype)).mul_(grad.abs())
    return push.add_(grad).to(grad.dtype)


def _penalty_gradient(x: Tensor, limits: Bounds, grad_scale: float, channel_dim: int) -> tuple[Tensor, Tensor]:
    """The penalty's gradient, affine in x per channel and scaled to rms `grad_scale`: (shift, slope), broadcastable to x.

    With mean u, standard deviation s and rms r, d(u/s)/dx = 1/s - u (x - u)/s^3 and d(ln r)/dx = x/r^2, each over the count.
    """
    channel_dim %= x.ndim
    dims = [d for d in range(x.ndim) if d != channel_dim]
    count = x.numel() // x.shape[channel_dim]
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    mean = x.mean(dims, keepdim=True, dtype=dtype)
    square = torch.linalg.vector_norm(x, dim=dims, keepdim=True, dtype=dtype).square() / count
    variance = (square - mean * mean).clamp_(min=_FLOOR)
    square = square.clamp(min=_FLOOR)
    deviation, rms = variance.sqrt(), square.sqrt()
    ratio = mean / deviation
    towards_mean = torch.sign(ratio - ratio.clamp(limits.mean_low, limits.mean_high))
    towards_rms = torch.sign(rms - rms.clamp(limits.rms_low, limits.rms_high))
    average = towards_mean / deviation + towards_rms * mean / square
    slope = towards_rms / square - towards_mean * mean / (variance * deviation)
    size = (average.square() + slope.square() * variance).sqrt().clamp_(min=_FLOOR)
    slope = slope * (grad_scale / size)
    return average * (grad_scale / size) - slope * mean, slope


def balance(x: Tensor, limits: Bounds, *, grad_scale: float = GRAD_SCALE, channel_dim: int = -1) -> Tensor:
    """Identity whose gradient g becomes g + |g| D, D the scaled gradient of the penalty on channels out of bounds."""
    result: Tensor = _Balance.apply(x, limits, grad_scale, channel_dim)
    return result


class Balancer(ScheduledModule):
    """Applies `balance` to a random share `prob` of the training calls; the identity otherwise.

    min_positive, max_positive: bounds on the share of positive values of each channel; min_abs, max_abs: on its mean absolute
    value. Any of these and `prob` may be schedules.
    """

    def __init__(
        self,
        *,
        channel_dim: int = -1,
        min_positive: Schedule | float = 0.05,
        max_positive: Schedule | float = 0.95,
        min_abs: Schedule | float = 0.2,
        max_abs: Schedule | float = 100.0,
        prob: Schedule | float = PROB,
    ) -> None:
        super().__init__()
        self.channel_dim = channel_dim
        self.min_positive, self.max_positive = min_positive, max_positive
        self.min_abs, self.max_abs = min_abs, max_abs
        self.prob = prob

    def forward(self, x: Tensor) -> Tensor:
        """Return x of any shape."""
        if is_compiling():
            return self.deferred(x) if self.training and x.requires_grad else x
        return self.apply_to(x) if x.requires_grad and self.drawn() else x

    def pull(self, x: Tensor, grad: Tensor) -> Tensor:
        """See ScheduledModule."""
        return balanced_gradient(x, grad, self._limits(), GRAD_SCALE, self.channel_dim) if happens(self.value(self.prob)) else grad

    def drawn(self) -> bool:
        """Draw whether this call balances; no draw outside training."""
        return self.training and torch.is_grad_enabled() and happens(self.value(self.prob))

    def apply_to(self, x: Tensor) -> Tensor:
        """`balance` with the bounds of the moment."""
        return balance(x, self._limits(), channel_dim=self.channel_dim)

    def _limits(self) -> Bounds:
        return bounds(*(self.value(setting) for setting in (self.min_positive, self.max_positive, self.min_abs, self.max_abs)))
