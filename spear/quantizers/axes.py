"""Principal axes of frames, for quantizers that turn the space before they divide it."""

from __future__ import annotations

import torch
from torch import Tensor

_ROWS = 8192


def principal_axes(frames: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Mean (D,), variances (D,) in falling order and the orthonormal axes (D, D), one per column, of frames (M, D); float64.

    The covariance is summed in float64 over blocks of rows. The sign of an axis makes its largest entry positive.
    """
    mean = sum((rows.double().sum(dim=0) for rows in frames.split(_ROWS)), torch.zeros((), dtype=torch.float64)) / len(frames)
    covariance = torch.zeros(frames.shape[1], frames.shape[1], dtype=torch.float64)
    for rows in frames.split(_ROWS):
        centred = rows.double() - mean
        covariance += centred.T @ centred
    variances, axes = torch.linalg.eigh(covariance / len(frames))
    variances, axes = variances.flip(0).clamp(min=0.0), axes.flip(1)
    largest = axes.gather(0, axes.abs().argmax(dim=0, keepdim=True))
    return torch.as_tensor(mean), variances, axes * torch.where(largest < 0, -1.0, 1.0)
