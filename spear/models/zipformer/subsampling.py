"""Convolutional front end: log-mels at 100 Hz to vectors at 50 Hz."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from spear.models.tracing import is_tracing
from spear.models.zipformer.balancer import Balancer
from spear.models.zipformer.chance import drop_items, shared_dropout
from spear.models.zipformer.depthwise import depthwise_conv2d
from spear.models.zipformer.gradient import ScaleGrad
from spear.models.zipformer.init import scaled
from spear.models.zipformer.norm import BiasNorm
from spear.models.zipformer.pointwise import pointwise_swoosh
from spear.models.zipformer.scheduled_float import Schedule, ScheduledModule, schedule
from spear.models.zipformer.swoosh import SwooshR, swoosh_l
from spear.models.zipformer.whiten import Whiten

MIN_FRAMES = 9
"""Shortest input, in frames at 100 Hz, that gives one output frame."""
CONVNEXT_REACH = 3
"""Frames at 50 Hz that the ConvNeXt block sees on either side."""


def output_lens(lens: Tensor) -> Tensor:
    """Frames at 50 Hz of inputs of `lens` frames at 100 Hz."""
    return ((lens - 7) // 2).clamp(min=0)


def output_width(num_mel_bins: int) -> int:
    """Width of the mel axis after the convolutions."""
    return ((num_mel_bins - 1) // 2 - 1) // 2


class ConvNeXt(ScheduledModule):
    """Residual block: depthwise 7x7, 1x1 up to three times the channels, SwooshL, 1x1 back."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.layerdrop_rate: Schedule | float = schedule((0, 0.2), (20000, 0.015))
        self.depthwise_conv = nn.Conv2d(channels, channels, 7, groups=channels, padding=CONVNEXT_REACH)
        self.pointwise_conv1 = nn.Conv2d(channels, 3 * channels, 1)
        self.pointwise_conv2 = scaled(nn.Conv2d(3 * channels, channels, 1), 0.01)
        self.hidden_balancer = Balancer(channel_dim=1, min_positive=0.3, max_positive=1.0, min_abs=0.75, max_abs=5.0)
        self.out_balancer = Balancer(channel_dim=1, min_positive=0.4, max_positive=0.6, min_abs=1.0, max_abs=6.0)
        self.out_whiten = Whiten(5.0)

    def forward(self, x: Tensor) -> Tensor:
        """x: (N, channels, T, W) -> same shape."""
        branch = self._pointwise(self._depthwise(x))
        if not self.training:
            return x + branch
        x = self.out_balancer(x + drop_items(branch, self.value(self.layerdrop_rate)))
        whitened: Tensor = self.out_whiten(x.movedim(1, -1)).movedim(-1, 1)
        return whitened

    def stream(self, x: Tensor, cached: Tensor) -> tuple[Tensor, Tensor]:
        """The middle of a signal, without padding in time.

        Args:
            x: (N, channels, T + 3, W), the last three frames being the future of the T to compute. cached: (N, channels, 3, W).
        Returns:
            (N, channels, T, W), the frames to cache.
        """
        joined = torch.cat((cached, x), dim=2)
        kernel = self.depthwise_conv
        branch = F.conv2d(joined, kernel.weight, kernel.bias, padding=(0, CONVNEXT_REACH), groups=kernel.groups)
        now = x[:, :, : x.shape[2] - CONVNEXT_REACH]
        return now + self._pointwise(branch), joined[:, :, joined.shape[2] - 2 * CONVNEXT_REACH : joined.shape[2] - CONVNEXT_REACH]

    def _depthwise(self, x: Tensor) -> Tensor:
        kernel = self.depthwise_conv
        if _is_rows(x) and kernel.weight.dtype == torch.float32 and kernel.bias is not None:
            with torch.autocast("cpu", enabled=False):
                rows = depthwise_conv2d(x.permute(0, 2, 3, 1), kernel.weight, kernel.bias, (CONVNEXT_REACH, CONVNEXT_REACH))
            return rows.permute(0, 3, 1, 2)
        out: Tensor = kernel(x)
        return out

    def _pointwise(self, x: Tensor) -> Tensor:
        wide, narrow = self.pointwise_conv1, self.pointwise_conv2
        balanced = self.hidden_balancer.drawn()
        if _is_rows(x) and not balanced and wide.bias is not None and narrow.bias is not None:
            rows = x.permute(0, 2, 3, 1)
            flat = pointwise_swoosh(rows.flatten(0, 2), wide.weight.flatten(1), wide.bias, narrow.weight.flatten(1), narrow.bias)
            image: Tensor = flat.unflatten(0, rows.shape[:3]).permute(0, 3, 1, 2)
            return image
        hidden = wide(x)
        out: Tensor = narrow(swoosh_l(self.hidden_balancer.apply_to(hidden) if balanced else hidden))
        return out


def _is_rows(x: Tensor) -> bool:
    """Whether the pixels of x (N, C, H, W) lie in memory one after the other, each with all its channels, on a CPU."""
    return x.device.type == "cpu" and not is_tracing() and x.is_contiguous(memory_format=torch.channels_last)


class Conv2dSubsampling(ScheduledModule):
    """Three convolutions, a ConvNeXt block, a linear, BiasNorm and dropout.

    Output frame t sees input frames 2t .. 2t+8 of the three convolutions. No mask is applied: padding frames are seen as they are.
    """

    def __init__(self, num_mel_bins: int, dim: int, channels: tuple[int, ...], dropout: Schedule | float) -> None:
        super().__init__()
        first, second, third = channels
        self.dropout = dropout
        self.conv = nn.Sequential(
            nn.Conv2d(1, first, 3, padding=(0, 1)),
            ScaleGrad(0.2),
            Balancer(channel_dim=1, max_abs=1.0),
            SwooshR(),
            nn.Conv2d(first, second, 3, stride=2),
            Balancer(channel_dim=1, max_abs=4.0),
            SwooshR(),
            nn.Conv2d(second, third, 3, stride=(1, 2)),
            Balancer(channel_dim=1, max_abs=4.0),
            SwooshR(),
        )
        self.convnext = ConvNeXt(third)
        self.out = nn.Linear(third * output_width(num_mel_bins), dim)
        self.out_whiten = Whiten(schedule((0, 4.0), (20000, 8.0), default=4.0), grad_scale=0.02)
        self.out_norm = BiasNorm(dim)

    def forward(self, features: Tensor, lens: Tensor) -> tuple[Tensor, Tensor]:
        """features: (N, T, F) at 100 Hz, lens: (N,) -> (N, (T - 7) // 2, D) at 50 Hz, lens (N,)."""
        x = self.finish(self.convnext(self.conv(self.image(features))))
        if self.training:
            x = shared_dropout(x, self.value(self.dropout))
        return x, output_lens(lens)

    def image(self, features: Tensor) -> Tensor:
        """features: (N, T, F) -> (N, 1, T, F), in the memory order that makes the convolutions fast on this device."""
        return features.unsqueeze(3).permute(0, 3, 1, 2) if features.device.type == "cpu" else features.unsqueeze(1)

    def finish(self, x: Tensor) -> Tensor:
        """x: (N, channels, T, W) -> (N, T, D)."""
        if x.is_contiguous(memory_format=torch.channels_last):
            # the columns of the weight are moved, which are few, not the frames
            weight = self.out.weight.unflatten(1, (x.shape[1], x.shape[3])).transpose(1, 2).flatten(1)
            out = F.linear(x.permute(0, 2, 3, 1).flatten(2), weight, self.out.bias)
        else:
            out = self.out(x.transpose(1, 2).flatten(2))
        normed: Tensor = self.out_norm(self.out_whiten(out))
        return normed
