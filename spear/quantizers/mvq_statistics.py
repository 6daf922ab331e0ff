"""What a fit of MVQ needs to know of frames and their codes: sums per entry and how often entries occur together."""

from __future__ import annotations

from functools import cached_property

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

    @cached_property
    def axes(self) -> tuple[Tensor, Tensor]:
        """Variances (D,), rising, along the principal directions, the columns of (D, D); float64."""
        variances, directions = torch.linalg.eigh(self.covariance)
        return variances.clamp(min=0.0), directions


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

    def solve(self, previous: Tensor, ridge: float, moments: Moments | None = None) -> Tensor:
        """Centres (C, K, D) that minimise the squared error of the frames for their codes, plus ridge * |change from previous|^2.

        Normal equations of the one-hot design matrix: counts of pairs on the left, sums of frames on the right, float64. With the
        frames' moments, what is found is then shrunk for the sake of other frames, see `_shrunk`.
        """
        if self._pairs is None:
            raise ValueError("the pairs of entries were not counted")
        matrix = self._pairs.double()
        matrix.diagonal().add_(ridge)
        right = (self.sums + ridge * previous.double()).flatten(0, 1)
        factor = torch.linalg.cholesky(matrix)
        centers = torch.cholesky_solve(right, factor)
        if moments is not None:
            identity = torch.eye(len(factor), dtype=factor.dtype)
            inverse_trace = float(torch.linalg.solve_triangular(factor, identity, upper=False).square().sum())
            centers = self._shrunk(centers, len(factor) - ridge * inverse_trace, moments)
        return centers.float().view(previous.shape)

    def _shrunk(self, centers: Tensor, freedom: float, moments: Moments) -> Tensor:
        """Centres (C*K, D) drawn to the mean of their codebook, along each principal direction of the frames by a factor of its own.

        With n frames, p = `freedom` less one per codebook, explained sum of squares E and variance v along a direction, the factor is
        1 - p (n v - E) / (n - p) / E: James and Stein's, where p times the residual variance is what least squares fits by chance.
        """
        variances, directions = moments.axes
        frames = float(self.counts[0].sum())
        free = max(freedom - self.num, 0.0)
        shares = (self.counts / frames)[..., None]
        grouped = centers.view(self.num, self.size, -1)
        middle = (shares * grouped).sum(dim=1, keepdim=True)
        along = (grouped - middle).flatten(0, 1) @ directions
        right = (self.sums - self.counts[..., None] * moments.mean).flatten(0, 1) @ directions
        explained = (along * right).sum(dim=0).clamp(min=1e-30)
        chance = free * (frames * variances - explained).clamp(min=0.0) / max(frames - free, 1.0)
        factors = (1.0 - chance / explained).clamp(min=0.0)
        return ((along * factors) @ directions.T).view_as(grouped).add(middle).flatten(0, 1)

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
