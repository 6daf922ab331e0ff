"""How alike two sets of features are, and how many directions a set uses; both from sums, so that frames need not be kept."""

from __future__ import annotations

import torch
from torch import Tensor


class CrossSums:
    """Sums over frames of x (D), y (E), x x', y y' and x y', in float64, on the CPU."""

    def __init__(self) -> None:
        self.count = 0
        self._sums: list[Tensor] = []

    def add(self, x: Tensor, y: Tensor) -> None:
        """Count frames (M, D) and (M, E) that belong together."""
        x, y = x.double(), y.double()
        found = [x.sum(0), y.sum(0), x.T @ x, y.T @ y, x.T @ y]
        self._sums = found if self.count == 0 else [a + b for a, b in zip(self._sums, found)]
        self.count += len(x)

    def _centred(self) -> tuple[Tensor, Tensor, Tensor]:
        x, y, xx, yy, xy = self._sums
        n = self.count
        return xx - torch.outer(x, x) / n, yy - torch.outer(y, y) / n, xy - torch.outer(x, y) / n

    def cka(self) -> float:
        """Linear centred kernel alignment, 0 to 1: ||X'Y||^2 / (||X'X|| ||Y'Y||) of centred X and Y (Kornblith et al., arXiv:1905.00414)."""
        xx, yy, xy = self._centred()
        return float(xy.square().sum() / (xx.norm() * yy.norm()).clamp(min=1e-30))

    def effective_rank(self) -> float:
        """Of x: e to the entropy of the shares of variance of the principal directions (Roy and Vetterli, 2007, on the covariance)."""
        shares = torch.linalg.eigvalsh(self._centred()[0]).clamp(min=0)
        shares = shares / shares.sum().clamp(min=1e-30)
        return float(torch.exp(-(shares * torch.log(shares.clamp(min=1e-30))).sum()))


def nearest_frames(times: Tensor, others: Tensor) -> Tensor:
    """Number (T,) of the frame of `others` (U,) whose centre is nearest to each of `times` (T,); both in seconds, rising."""
    places = torch.searchsorted(others, times).clamp(1, max(len(others) - 1, 1))
    if len(others) == 1:
        return torch.zeros(len(times), dtype=torch.int64)
    return torch.where(times - others[places - 1] <= others[places] - times, places - 1, places)


def recall_at_one(queries: Tensor, index: Tensor) -> float:
    """Share of queries (N, D) whose nearest row of `index` (N, D), by cosine after the mean of `index` is taken off, is their own."""
    mean = index.mean(0)
    a, b = (torch.nn.functional.normalize(x - mean, dim=1) for x in (queries, index))
    return float(((a @ b.T).argmax(1) == torch.arange(len(a))).float().mean())
