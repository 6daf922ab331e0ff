"""What a fit of MVQ needs to know of frames and their codes: sums per entry and how often entries occur together."""

from __future__ import annotations

import torch
from torch import Tensor

from spear.quantizers.frame_source import FrameSource, Sums

_SHRINKAGE = 0.01


class Moments:
    """Mean (D,), covariance (D, D), both float64, and root mean variance of the frames of `source`."""

    def __init__(self, source: FrameSource) -> None:
        dim, bound = source.dim, max(source.peak, 1e-15)
        sums, squares = Sums((dim,), bound, len(source)), Sums((dim, dim), bound**2, len(source))
        for rows in source.units():
            exact = rows.double()
            sums.add(exact.sum(dim=0))
            squares.add(exact.T @ exact)
        self.mean = sums.total(source) / len(source)
        self.covariance = squares.total(source) / len(source) - torch.outer(self.mean, self.mean)
        self.spread = float(self.covariance.diagonal().clamp(min=0.0).mean().sqrt())


class Statistics:
    """Sums of frames per entry, and counts of entries and of pairs of them, over all processes.

    Args:
        sizes: codebooks C, entries K. pairs: whether pairs are counted, which `solve` needs and `discriminants` does not.
    """

    def __init__(self, sizes: tuple[int, int], source: FrameSource, *, pairs: bool = True) -> None:
        self.num, self.size = sizes
        total = self.num * self.size
        self._sums = Sums((total, source.dim), source.peak, len(source))
        self._counts = torch.zeros(total, dtype=torch.int64)
        self._pairs = torch.zeros(total, total, dtype=torch.int64) if pairs else None

    def add(self, frames: Tensor, codes: Tensor) -> None:
        """Take in frames (M, D) with codes (M, C) int64."""
        places = codes + torch.arange(self.num) * self.size
        self._sums.add_at(places, frames)
        self._counts += torch.bincount(places.flatten(), minlength=len(self._counts))
        if self._pairs is not None:
            both = (places[:, :, None] * len(self._counts) + places[:, None, :]).flatten()
            self._pairs.view(-1).index_add_(0, both, torch.ones_like(both))

    def gather(self, source: FrameSource) -> None:
        """Add up what all processes have; to be called once, after the last `add`."""
        self.sums = self._sums.total(source).view(self.num, self.size, -1)
        self.counts = source.share(self._counts).double().view(self.num, self.size)
        if self._pairs is not None:
            source.share(self._pairs)

    def solve(self, previous: Tensor, ridge: float) -> Tensor:
        """Centres (C, K, D) that minimise the squared error of the frames for their codes, plus ridge * |change from previous|^2.

        Normal equations of the one-hot design matrix: counts of pairs on the left, sums of frames on the right, float64.
        """
        if self._pairs is None:
            raise ValueError("the pairs of entries were not counted")
        matrix = self._pairs.double()
        matrix.diagonal().add_(ridge)
        right = (self.sums + ridge * previous.double()).flatten(0, 1)
        return torch.cholesky_solve(right, torch.linalg.cholesky(matrix)).float().view(previous.shape)

    def discriminants(self, moments: Moments) -> tuple[Tensor, Tensor]:
        """Linear discriminant analysis of the codes of each codebook: weights (C*K, D) and biases (C*K,) of log-odds.

        Frames with the same entry are taken as Gaussian around their mean with one covariance for all entries of a codebook, its
        diagonal raised by one percent of the total variance.
        """
        mean, dim = moments.mean, len(moments.mean)
        raised = torch.diag(_SHRINKAGE * moments.covariance.diagonal().clamp(min=0.0) + 1e-8)
        weight, bias = torch.empty(self.num, self.size, dim), torch.empty(self.num, self.size)
        for codebook, (sums, counts) in enumerate(zip(self.sums, self.counts)):
            total = float(counts.sum())
            means = (sums - counts[:, None] * mean) / (counts + 1.0)[:, None]
            within = moments.covariance - (means.T * (counts / total)) @ means + raised
            rows = torch.linalg.solve(within, means.T).T
            weight[codebook] = rows.float()
            bias[codebook] = ((counts + 0.5).div(total).log() - 0.5 * (rows * means).sum(dim=1) - rows @ mean).float()
        return weight.flatten(0, 1), bias.flatten()
