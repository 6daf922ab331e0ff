"""Regulariser settings that change linearly with the number of batches seen."""

from __future__ import annotations

import bisect
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True, slots=True)
class Schedule:
    """A piecewise linear function of the batch count, constant outside its points.

    points: (batch count, value) with rising counts. default: the value in eval mode and before any batch count is known.
    """

    points: tuple[tuple[float, float], ...]
    default: float = 0.0

    def __call__(self, batch_count: float) -> float:
        """The value at a batch count."""
        right = bisect.bisect_right(self.points, batch_count, key=_count)
        if right == 0:
            return self.points[0][1]
        if right == len(self.points):
            return self.points[-1][1]
        (x0, y0), (x1, y1) = self.points[right - 1 : right + 1]
        return y0 + (y1 - y0) * (batch_count - x0) / (x1 - x0)


def _count(point: tuple[float, float]) -> float:
    return point[0]


def schedule(*points: tuple[float, float], default: float = 0.0) -> Schedule:
    """Shorthand: ``schedule((0, 0.3), (20000, 0.1))``."""
    return Schedule(tuple(points), default)


class ScheduledModule(nn.Module):
    """A module whose settings may be schedules; `set_batch_count` moves them."""

    batch_count: float | None = None
    handle: Tensor | None = None
    """Number by which compiled code finds the module when it runs, see `spear.models.zipformer.compiled`."""

    def value(self, setting: Schedule | float) -> float:
        """What `setting` is now: its default in eval mode and while the batch count is unknown."""
        if not isinstance(setting, Schedule):
            return setting
        return setting.default if self.batch_count is None or not self.training else setting(self.batch_count)

    def deferred(self, x: Tensor) -> Tensor:
        """x, whose gradient goes through `pull`; for compiled code, in which nothing may be decided by a draw."""
        result: Tensor = _Deferred.apply(x, self.handle)
        return result

    def pull(self, x: Tensor, grad: Tensor) -> Tensor:
        """The gradient of x in place of `grad`; may draw whether it changes anything."""
        raise NotImplementedError

    def later(self, name: str, x: Tensor, width: int = 1, *, rescaled: bool = False) -> Tensor:
        """A mask (N, 1, width) in the type of x (N, T, C), drawn when compiled code runs; `name` is the attribute with its rate."""
        mask: Tensor = torch.ops.spear.keep(x.detach(), self.handle, name, width, rescaled)
        return mask


class _Deferred(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, handle: Tensor) -> Tensor:
        ctx.save_for_backward(x, handle)
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return torch.ops.spear.pull(grad, *ctx.saved_tensors), None


def set_batch_count(module: nn.Module, count: float) -> None:
    """Write `count` to every scheduled module inside `module`."""
    for child in module.modules():
        if isinstance(child, ScheduledModule):
            child.batch_count = count
