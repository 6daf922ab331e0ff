"""Fewer frames, more frames, and the mix of a module's input and output."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from spear.models.tracing import first_frames, is_compiling, is_tracing
from spear.models.zipformer.chance import happens, keep_mask
from spear.models.zipformer.gradient import LIMIT_PROB, limit_parameter, limited_gradient
from spear.models.zipformer.linear import low_type
from spear.models.zipformer.scheduled_float import Schedule, ScheduledModule, schedule

BYPASS_MIN = schedule((0, 0.9), (20000, 0.2))


class Downsample(nn.Module):
    """Average of `factor` consecutive frames with learned weights, the same for all channels."""

    def __init__(self, factor: int) -> None:
        super().__init__()
        self.factor = factor
        self.bias = nn.Parameter(torch.zeros(factor))

    def forward(self, x: Tensor) -> Tensor:
        """x: (N, T, D) -> (N, ceil(T / factor), D); the last frame is repeated to fill the last group."""
        missing = -x.shape[1] % self.factor
        if is_tracing():  # what is recorded holds for every length, and `expand` would tell one frame from several
            x = x[:, torch.arange(x.shape[1] + missing, device=x.device).clamp(max=x.shape[1] - 1)]
        elif missing:
            x = torch.cat((x, x[:, -1:].expand(-1, missing, -1)), dim=1)
        weights = self.bias.softmax(dim=0)
        groups: Tensor = x.unflatten(1, (-1, self.factor)) * weights[:, None]
        return groups.sum(dim=2)


def upsample(x: Tensor, factor: int, num_frames: int) -> Tensor:
    """Repeat each frame of x (N, T, D) `factor` times and keep the first `num_frames`."""
    return first_frames(x[:, :, None].expand(-1, -1, factor, -1).flatten(1, 2), num_frames)


def _mixed(orig: Tensor, new: Tensor, scale: Tensor) -> Tensor:
    if orig.dtype == new.dtype == scale.dtype:
        return torch.lerp(orig, new, scale)
    return orig + (new - orig) * scale


class _Mix(torch.autograd.Function):
    """Keeps one tensor, the difference, in the type of the matrix products; it is only for the gradient of the scale."""

    @staticmethod
    def forward(ctx: Any, orig: Tensor, new: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
        ctx.save_for_backward((new - orig).to(dtype) if scale.requires_grad else None, scale)
        ctx.types = orig.dtype, new.dtype
        return _mixed(orig, new, scale)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor | None, None]:  # type: ignore[override]
        change, scale = ctx.saved_tensors
        grad_scale = None if change is None else (grad * change).sum_to_size(scale.shape)
        grad_new = grad * scale
        return (grad - grad_new).to(ctx.types[0]), grad_new.to(ctx.types[1]), grad_scale, None


class Bypass(ScheduledModule):
    """``orig + (new - orig) * scale`` with a learned scale per channel.

    In training the gradient keeps the scale within [scale_min, 1], and `skip_rate` is the share of items that keep `orig`.
    """

    def __init__(self, dim: int, skip_rate: Schedule | float = 0.0) -> None:
        super().__init__()
        self.bypass_scale = nn.Parameter(torch.full((dim,), 0.5))
        self.skip_rate = skip_rate
        self.scale_min: Schedule | float = BYPASS_MIN

    def forward(self, orig: Tensor, new: Tensor) -> Tensor:
        """orig, new: (N, T, D) -> (N, T, D)."""
        scale: Tensor = self.bypass_scale
        if self.training and is_compiling():
            scale = self.deferred(scale) * self.later("skip_rate", orig)
        elif self.training:
            scale = limit_parameter(scale, self.value(self.scale_min), 1.0, training=True)
            skip_rate = self.value(self.skip_rate)
            if skip_rate > 0.0:
                scale = scale * keep_mask((orig.shape[0], 1, 1), skip_rate, scale)
        if torch.is_grad_enabled() and not is_tracing() and (new.requires_grad or scale.requires_grad):
            result: Tensor = _Mix.apply(orig, new, scale, low_type(orig))
            return result
        return _mixed(orig, new, scale)

    def pull(self, x: Tensor, grad: Tensor) -> Tensor:
        """See ScheduledModule; x is the scale."""
        return limited_gradient(x, grad, self.value(self.scale_min), 1.0) if happens(LIMIT_PROB) else grad
