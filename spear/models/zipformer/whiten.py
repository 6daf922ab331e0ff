"""Whiten: keeps the covariance of a group of channels from collapsing, through the gradient alone."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from spear.models.zipformer.chance import happens
from spear.models.zipformer.scheduled_float import Schedule, ScheduledModule

LOW_PROB, HIGH_PROB = 0.025, 0.25
_FLOOR = 1e-20


def _covariance(x: Tensor, num_groups: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Centred frames (G, n, c), covariance (G, c, c) without the count, metric (), mean of the covariance's diagonal ()."""
    frames = x.reshape(-1, num_groups, x.shape[-1] // num_groups).transpose(0, 1).float()
    frames = frames - frames.mean(dim=1, keepdim=True)
    covariance = frames.transpose(1, 2) @ frames
    diagonal = covariance.diagonal(dim1=1, dim2=2).mean()
    metric = covariance.square().sum() / x.shape[-1] / (diagonal.square() + _FLOOR)
    return frames, covariance, metric, diagonal


def whitening_metric(x: Tensor, num_groups: int) -> Tensor:
    """How far the channels of `x` (..., C) are from white: mean of squared eigenvalues over squared mean eigenvalue, >= 1."""
    with torch.autocast(x.device.type, enabled=False):
        return _covariance(x, num_groups)[2]


class _Whitening(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, module: Whiten, limit: float) -> Tensor:
        ctx.save_for_backward(x)
        ctx.module, ctx.limit = module, limit
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        (x,) = ctx.saved_tensors
        module: Whiten = ctx.module
        with torch.autocast(x.device.type, enabled=False):
            frames, covariance, metric, diagonal = _covariance(x, module.num_groups)
            above = metric >= ctx.limit
            module.report(above)
            if x.device.type == "cpu" and not above:
                return grad, None, None
            # d metric / d frames is a positive multiple of frames @ pull
            pull = covariance - metric * diagonal * torch.eye(covariance.shape[-1], device=x.device)
            size = ((pull @ covariance) * pull).sum().clamp(min=0.0).sqrt()
            scale = module.grad_scale * torch.linalg.vector_norm(grad, dtype=torch.float32) / (size + _FLOOR)
            push = frames @ (pull * torch.where(above, scale, 0.0))
            push = push.transpose(0, 1).reshape(x.shape)
        return (grad + push).to(grad.dtype), None, None


class Whiten(ScheduledModule):
    """Applies the whitening gradient to a random share of the training calls; the identity otherwise.

    Where the metric reaches `limit`, the gradient of the metric, scaled to `grad_scale` times the norm of the gradient, is added.
    A module below its limit is visited in 2.5 % of the calls, one above it in 25 %.
    """

    def __init__(self, limit: Schedule | float, *, num_groups: int = 1, grad_scale: float = 0.01) -> None:
        super().__init__()
        self.limit, self.num_groups, self.grad_scale = limit, num_groups, grad_scale
        self._prob = HIGH_PROB
        self._above: Tensor | None = None

    @property
    def prob(self) -> float:
        """Share of the calls at present; reads the last report only now, so that the backward pass never waits for a GPU."""
        if self._above is not None:
            self._prob = HIGH_PROB if bool(self._above) else LOW_PROB
            self._above = None
        return self._prob

    def report(self, above: Tensor) -> None:
        """Take note whether the metric reached the limit; () bool."""
        self._above = above

    def training_state(self) -> float:
        """The state a checkpoint must keep."""
        return self.prob

    def load_training_state(self, value: float) -> None:
        """Continue from a checkpoint's `training_state`."""
        self._prob, self._above = value, None

    def forward(self, x: Tensor) -> Tensor:
        """Return x of shape (..., C)."""
        if not (self.training and x.requires_grad and torch.is_grad_enabled() and happens(self.prob)):
            return x
        result: Tensor = _Whitening.apply(x, self, self.value(self.limit))
        return result
