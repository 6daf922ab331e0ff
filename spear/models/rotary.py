"""Attention with rotary positions, for encoders that keep one frame rate."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

BASE = 10000.0
"""Ratio of the slowest to the fastest rotation, times 2 pi frames (arXiv 2104.09864, section 3.4.3)."""


def rotation(num_frames: int, dim: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Cosines and sines of the angle that each pair of channels has at each frame.

    Args:
        num_frames: T. dim: width of a head, even.
    Returns:
        two (T, dim / 2) float32.
    """
    speeds = BASE ** -(torch.arange(dim // 2, device=device, dtype=torch.float32) * (2.0 / dim))
    angles = torch.arange(num_frames, device=device, dtype=torch.float32)[:, None] * speeds
    return angles.cos(), angles.sin()


def rotate(x: Tensor, cosines: Tensor, sines: Tensor) -> Tensor:
    """Turn the channels j and j + d / 2 of x (..., T, d) by the angle of their frame; same dtype."""
    first, second = x.float().chunk(2, dim=-1)
    return torch.cat((first * cosines - second * sines, first * sines + second * cosines), dim=-1).to(x.dtype)


class RotaryAttention(nn.Module):
    """Multi-head self-attention; a query and a key meet only through their distance (rotary positions, arXiv 2104.09864)."""

    def __init__(self, dim: int, num_heads: int, dropout: float) -> None:
        super().__init__()
        self.num_heads, self.dropout = num_heads, dropout
        self.in_proj = nn.Linear(dim, 3 * dim)
        self.out_proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor, positions: tuple[Tensor, Tensor], visible: Tensor | None) -> Tensor:
        """Mix frames.

        Args:
            x: (N, T, D). positions: see `rotation`. visible: bool, broadcastable to (N, H, T, T), True where a key may be seen.
        Returns:
            (N, T, D).
        """
        queries, keys, values = self.in_proj(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)  # (N, H, T, d) each
        dropout = self.dropout if self.training else 0.0
        queries, keys = rotate(queries, *positions), rotate(keys, *positions)
        mixed = F.scaled_dot_product_attention(queries, keys, values, attn_mask=visible, dropout_p=dropout)
        out: Tensor = self.out_proj(mixed.transpose(1, 2).flatten(2))
        return out
