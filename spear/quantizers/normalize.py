"""Per-channel normalisation, fitted before a quantizer and kept inside it."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from spear.errors import DataError

EPSILON = 1e-5
"""Added to every standard deviation, in fitting, encoding and decoding alike."""
_ROWS = 8192


class Normalizer(nn.Module):
    """(x - mean) / (std + EPSILON) per channel, and back.

    Args:
        mean, std: (D,) float32.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, mean: Tensor, std: Tensor) -> None:
        super().__init__()
        self.register_buffer("mean", mean.float().clone())
        self.register_buffer("std", std.float().clone())

    @classmethod
    def fit(cls, frames: Tensor) -> Normalizer:
        """Mean and (population) standard deviation of frames (M, D), summed in float64.

        Raises:
            DataError: there is no frame, or a statistic is not finite.
        """
        if not len(frames):
            raise DataError("channel statistics need at least one frame, but there are 0", cause="empty")
        total = sum((rows.double().sum(dim=0) for rows in frames.split(_ROWS)), torch.zeros((), dtype=torch.float64))
        mean = total / len(frames)
        squares = sum(((rows.double() - mean).square().sum(dim=0) for rows in frames.split(_ROWS)), torch.zeros((), dtype=torch.float64))
        std = (squares / len(frames)).sqrt()
        if not (mean.isfinite().all() and std.isfinite().all()):
            raise DataError("teacher frames have non-finite values", cause="not_finite")
        return cls(mean, std)

    def apply_to(self, frames: Tensor) -> Tensor:
        """Normalise frames (..., D)."""
        return (frames - self.mean) / (self.std + EPSILON)

    def invert(self, frames: Tensor) -> Tensor:
        """Undo `apply_to` on frames (..., D)."""
        return frames * (self.std + EPSILON) + self.mean
