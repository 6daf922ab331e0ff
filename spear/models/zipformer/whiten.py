"""Whiten: keeps the covariance of a group of channels from collapsing, through the gradient alone."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from spear.models.tracing import is_compiling
from spear.models.zipformer.chance import happens
from spear.models.zipformer.scheduled_float import Schedule, ScheduledModule

LOW_PROB, HIGH_PROB = 0.025, 0.25
_FLOOR = 1e-20


def _centred(x: Tensor, num_groups: int) -> Tensor:
    """x (..., C) as float32 frames (G, n, c) without their mean."""
    frames = x.reshape(-1, num_groups, x.shape[-1] // num_groups).transpose(0, 1).float()
    return frames - frames.mean(dim=1, keepdim=True)


def _products(frames: Tensor) -> Tensor:
    """Products of the channels (G, c, c), or where the frames are fewer than the channels those of the frames (G, n, n).

    Both have the same trace and the same sum of squares, and ``frames @ (F' F) = (F F') @ frames``.
    """
    other = frames.transpose(1, 2)
    return frames @ other if frames.shape[1] < frames.shape[2] else other @ frames


def _metric(products: Tensor, channels: int) -> tuple[Tensor, Tensor]:
    """The metric () and the mean of the covariance's diagonal (), without the count of frames."""
    diagonal = products.diagonal(dim1=1, dim2=2).sum() / channels
    return products.square().sum() / channels / (diagonal.square() + _FLOOR), diagonal


def whitening_metric(x: Tensor, num_groups: int) -> Tensor:
    """How far the channels of `x` (..., C) are from white: mean of squared eigenvalues over squared mean eigenvalue, >= 1."""
    with torch.autocast(x.device.type, enabled=False):
        return _metric(_products(_centred(x, num_groups)), x.shape[-1])[0]


class _Whitening(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, module: Whiten, limit: float) -> Tensor:
        ctx.save_for_backward(x)
        ctx.module, ctx.limit = module, limit
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        (x,) = ctx.saved_tensors
        return whitened_gradient(x, grad, ctx.module, ctx.limit), None, None


def whitened_gradient(x: Tensor, grad: Tensor, module: Whiten, limit: float) -> Tensor:
    """The gradient of x behind `module`, given that of its output; the module hears whether the limit was reached."""
    with torch.autocast(x.device.type, enabled=False):
        frames = _centred(x, module.num_groups)
        products = _products(frames)
        metric, diagonal = _metric(products, x.shape[-1])
        above = metric >= limit
        module.report(above)
        if x.device.type == "cpu" and not above:
            return grad
        # d metric / d frames is a positive multiple of frames @ (covariance - metric * diagonal * identity)
        pull = products - metric * diagonal * torch.eye(products.shape[-1], device=x.device)
        push = pull @ frames if frames.shape[1] < frames.shape[2] else frames @ pull
        size = torch.linalg.vector_norm(push)
        push *= torch.where(above, module.grad_scale * torch.linalg.vector_norm(grad, dtype=torch.float32) / (size + _FLOOR), 0.0)
        push = push.transpose(0, 1).reshape(x.shape)
    return push.add_(grad).to(grad.dtype)


class Whiten(ScheduledModule):
    """Applies the whitening gradient to a random share of the training calls; the identity otherwise.

    Where the metric reaches `limit`, the gradient of the metric, scaled to `grad_scale` times the norm of the gradient, is added.
    A module below its limit is visited in 2.5 % of the calls, one above it in 25 %. In a training this changes between updates, for what
    the batches of all processes say (see `spear.training.reports`), so that it does not matter how they are dealt out.
    """

    def __init__(self, limit: Schedule | float, *, num_groups: int = 1, grad_scale: float = 0.01) -> None:
        super().__init__()
        self.limit, self.num_groups, self.grad_scale = limit, num_groups, grad_scale
        self._prob = HIGH_PROB
        self._above: Tensor | None = None
        self._arrived: torch.cuda.Event | None = None
        self._reports: list[Tensor] | None = None

    @property
    def prob(self) -> float:
        """Share of the calls at present; reads the last report only now, when a GPU has long sent it."""
        if self._above is not None:
            if self._arrived is not None:
                self._arrived.synchronize()
            self._prob = HIGH_PROB if bool(self._above) else LOW_PROB
            self._above = self._arrived = None
        return self._prob

    def pull(self, x: Tensor, grad: Tensor) -> Tensor:
        """See ScheduledModule."""
        return whitened_gradient(x, grad, self, self.value(self.limit)) if happens(self.prob) else grad

    def report(self, above: Tensor) -> None:
        """Take note whether the metric reached the limit; () bool. A GPU sends it on its own time."""
        if self._reports is not None:
            self._reports.append(above)
            return
        self._above, self._arrived = above, None
        if above.device.type == "cuda":
            self._above = torch.empty((), dtype=torch.bool, pin_memory=True).copy_(above, non_blocking=True)
            self._arrived = torch.cuda.Event()
            self._arrived.record()  # type: ignore[no-untyped-call]

    def take_reports(self) -> list[Tensor]:
        """The reports since the last call, () bool; from the first call on, `settle` alone changes the share of calls."""
        found, self._reports = self._reports or [], []
        return found

    def settle(self, reports: int, above: int) -> None:
        """Take the share of calls that follows from so many `reports` of an update, of which `above` reached the limit."""
        if reports:
            self._prob = HIGH_PROB if above else LOW_PROB

    def training_state(self) -> float:
        """The state a checkpoint must keep."""
        return self.prob

    def load_training_state(self, value: float) -> None:
        """Continue from a checkpoint's `training_state`."""
        self._prob, self._above, self._arrived = value, None, None

    def forward(self, x: Tensor) -> Tensor:
        """Return x of shape (..., C)."""
        if is_compiling():
            return self.deferred(x) if self.training and x.requires_grad else x
        if not (self.training and x.requires_grad and torch.is_grad_enabled() and happens(self.prob)):
            return x
        result: Tensor = _Whitening.apply(x, self, self.value(self.limit))
        return result
