"""Convolution module: a gated depthwise convolution over time, non-causal or chunk-causal."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from spear.models.tracing import first_frames, is_tracing
from spear.models.zipformer.balancer import Balancer
from spear.models.zipformer.depthwise import depthwise_conv1d
from spear.models.zipformer.gate import gated
from spear.models.zipformer.init import scaled
from spear.models.zipformer.linear import Linear, swoosh_linear
from spear.models.zipformer.scheduled_float import schedule
from spear.models.zipformer.swoosh import swoosh_r
from spear.models.zipformer.whiten import Whiten


class DepthwiseConv1d(nn.Module):
    """One filter per channel: the parameters of a grouped Conv1d, for frames of shape (N, T, D)."""

    def __init__(self, dim: int, kernel: int, padding: int) -> None:
        super().__init__()
        self.padding = padding
        fresh = nn.Conv1d(dim, dim, kernel, groups=dim)
        self.weight = fresh.weight
        self.bias = nn.Parameter(torch.empty(dim).uniform_(-(kernel**-0.5), kernel**-0.5))

    def forward(self, x: Tensor, chunk_size: int = -1) -> Tensor:
        """x: (N, T, D) -> (N, T + 2 padding - K + 1, D); `chunk_size` has no meaning here."""
        return depthwise_conv1d(x, self.weight, self.bias, self.padding)


class ChunkCausalDepthwiseConv1d(nn.Module):
    """Sum of a causal filter over all past frames and a filter within the chunk, the latter scaled near the chunk's edges."""

    def __init__(self, dim: int, kernel: int) -> None:
        super().__init__()
        self.kernel = kernel
        self.causal_conv = DepthwiseConv1d(dim, (kernel + 1) // 2, 0)
        self.chunkwise_conv = DepthwiseConv1d(dim, kernel, kernel // 2)
        self.chunkwise_conv_scale = nn.Parameter(torch.zeros(2, dim, kernel))
        with torch.no_grad():
            self.causal_conv.bias.uniform_(-0.1, 0.1)

    def forward(self, x: Tensor, chunk_size: int = -1) -> Tensor:
        """x: (N, T, D) -> (N, T, D); chunks of `chunk_size` frames, or one chunk where it is negative or longer than T.

        A recorded model (`is_tracing`) with chunks needs at least one whole chunk.
        """
        n, t, _ = x.shape
        size = t if chunk_size < 0 or (not is_tracing() and chunk_size > t) else chunk_size
        causal = self.causal_conv(F.pad(x, (0, 0, self.kernel // 2, 0)))
        chunks = F.pad(x, (0, 0, 0, -t % size)).unflatten(1, (-1, size)).flatten(0, 1)  # (N chunks, size, D)
        within = self.chunkwise_conv(chunks) * self._scale(size)
        out: Tensor = causal + first_frames(within.unflatten(0, (n, -1)).flatten(1, 2), t)
        return out

    def stream(self, x: Tensor, cached: Tensor) -> tuple[Tensor, Tensor]:
        """One chunk x (N, T, D) after `cached` (N, kernel // 2, D) -> (N, T, D), the frames to cache."""
        joined = torch.cat((cached, x), dim=1)
        out: Tensor = self.causal_conv(joined) + self.chunkwise_conv(x) * self._scale(x.shape[1])
        return out, joined[:, joined.shape[1] - cached.shape[1] :]

    def _scale(self, size: int) -> Tensor:
        """(size, D): one plus the learned corrections at the left and right edge of a chunk."""
        left, right = self.chunkwise_conv_scale.unbind()
        # a negative number cuts away what a short chunk has no room for
        left, right = F.pad(left, (0, size - self.kernel)), F.pad(right, (size - self.kernel, 0))
        scale: Tensor = 1.0 + (left + right)
        return scale.transpose(0, 1)


class ConvolutionModule(nn.Module):
    """Gated linear unit, depthwise convolution over time, SwooshR, linear."""

    def __init__(self, dim: int, kernel: int, *, causal: bool) -> None:
        super().__init__()
        self.in_proj = Linear(dim, 2 * dim)
        self.depthwise_conv = ChunkCausalDepthwiseConv1d(dim, kernel) if causal else DepthwiseConv1d(dim, kernel, kernel // 2)
        self.out_proj = scaled(Linear(dim, dim), 0.05)
        self.balancer1 = Balancer(
            min_positive=schedule((0, 0.05), (8000, 0.025)),
            max_positive=1.0,
            min_abs=1.5,
            max_abs=schedule((0, 5.0), (8000, 10.0), default=1.0),
        )
        self.balancer2 = Balancer(
            min_positive=schedule((0, 0.1), (8000, 0.05)), max_positive=1.0, min_abs=schedule((0, 0.2), (20000, 0.5)), max_abs=10.0
        )
        self.whiten = Whiten(schedule((0, 7.5), (20000, 15.0), default=7.5))

    def forward(self, x: Tensor, padding_mask: Tensor | None, chunk_size: int = -1) -> Tensor:
        """x: (N, T, D), padding_mask: (N, T) -> (N, T, D)."""
        return self._finish(self.depthwise_conv(self._gated(x, padding_mask), chunk_size))

    def stream(self, x: Tensor, padding_mask: Tensor, cached: Tensor) -> tuple[Tensor, Tensor]:
        """One chunk x (N, T, D) after `cached` (N, kernel // 2, D) -> (N, T, D), the frames to cache; causal modules only."""
        if not isinstance(self.depthwise_conv, ChunkCausalDepthwiseConv1d):
            raise TypeError("only a causal convolution can stream")
        out, cached = self.depthwise_conv.stream(self._gated(x, padding_mask), cached)
        return self._finish(out), cached

    def _gated(self, x: Tensor, padding_mask: Tensor | None) -> Tensor:
        value, gate = self.in_proj(x).chunk(2, dim=-1)
        frames = gated(value, self.balancer1(gate), "sigmoid")
        return frames if padding_mask is None else frames.masked_fill(padding_mask[:, :, None], 0.0)

    def _finish(self, x: Tensor) -> Tensor:
        return swoosh_linear(self.whiten(self.balancer2(x)), None, self.out_proj.weight, self.out_proj.bias, swoosh_r)
