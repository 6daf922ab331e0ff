"""Compact relative positional encoding: fine near zero, coarse far away, no limit on the length."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from spear.models.tracing import is_tracing
from spear.models.zipformer.chance import keep_mask

DROPOUT = 0.15


def relative_encoding(offsets: Tensor, dim: int) -> Tensor:
    """Encoding of relative positions (Zipformer, arXiv 2310.11230, appendix).

    Args:
        offsets: (R,) key minus query position in frames. dim: D, even.
    Returns:
        (R, D) float32: cosines and sines of multiples of an angle that grows with the logarithm of the offset; the last is 1.
    """
    root = dim**0.5
    n = offsets.float()
    compressed = root * n.sign() * torch.log1p(n.abs() / root)
    angle = torch.atan(compressed * (2.0 * math.pi / dim))
    angles = angle[:, None] * torch.arange(1, dim // 2 + 1, device=offsets.device)
    encoding = torch.stack((angles.cos(), angles.sin()), dim=-1).flatten(1)
    return torch.cat((encoding[:, :-1], torch.ones_like(encoding[:, :1])), dim=1)


class RelativePositions(nn.Module):
    """Table of `relative_encoding` for all offsets between queries and keys, with dropout in training.

    The table of the longest input so far is kept, outside the state dict.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.dim = dim
        self._reach = 0
        self._table: Tensor | None = None

    def _lookup(self, past: int, future: int, device: torch.device) -> Tensor:
        if is_tracing():
            return relative_encoding(torch.arange(-past, future + 1, device=device), self.dim)
        if self._table is None or self._table.device != device or self._reach < max(past, future):
            self._reach = max(past, future, 2 * self._reach)
            with torch.inference_mode(False), torch.no_grad():
                self._table = relative_encoding(torch.arange(-self._reach, self._reach + 1, device=device), self.dim)
        return self._table[self._reach - past : self._reach + future + 1]

    def forward(self, num_queries: int, num_keys: int, device: torch.device) -> Tensor:
        """Encodings of the offsets -(num_keys - 1) .. num_queries - 1, where the queries are the last of the keys.

        Returns:
            (num_queries + num_keys - 1, D) float32.
        """
        table = self._lookup(num_keys - 1, num_queries - 1, device)
        if self.training and torch.is_grad_enabled():
            return table * (keep_mask((table.shape[0], self.dim), DROPOUT, table) / (1.0 - DROPOUT))
        return table
