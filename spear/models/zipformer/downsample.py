"""Fewer frames, more frames, and the mix of a module's input and output."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from spear.models.zipformer.chance import keep_mask
from spear.models.zipformer.gradient import limit_parameter
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
        if missing:
            x = torch.cat((x, x[:, -1:].expand(-1, missing, -1)), dim=1)
        weights = self.bias.softmax(dim=0)
        groups: Tensor = x.unflatten(1, (-1, self.factor)) * weights[:, None]
        return groups.sum(dim=2)


def upsample(x: Tensor, factor: int, num_frames: int) -> Tensor:
    """Repeat each frame of x (N, T, D) `factor` times and keep the first `num_frames`."""
    return x[:, :, None].expand(-1, -1, factor, -1).flatten(1, 2)[:, :num_frames]


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
        if self.training:
            scale = limit_parameter(scale, self.value(self.scale_min), 1.0, training=True)
            skip_rate = self.value(self.skip_rate)
            if skip_rate > 0.0:
                scale = scale * keep_mask((orig.shape[0], 1, 1), skip_rate, scale)
        if orig.dtype == new.dtype == scale.dtype:
            return torch.lerp(orig, new, scale)
        return orig + (new - orig) * scale
