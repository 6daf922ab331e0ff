"""Prediction heads over a student's features."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from spear.bounds import above, at_least
from spear.registry import Registry


@dataclass(frozen=True, kw_only=True, slots=True)
class HeadConfig(Registry):
    """Family of heads that predict tokens; all turn x (N, T, D) into logits (N, T, C, K) float32."""

    TABLE: ClassVar[dict[str, str]] = {
        "linear": "spear.models.heads:LinearHeadConfig",
        "cosine": "spear.models.heads:CosineHeadConfig",
    }

    def build(self, dim: int, num_codebooks: int, codebook_size: int) -> nn.Module:
        """Make a head for features of width `dim` and C codebooks of K entries."""
        raise NotImplementedError


@dataclass(frozen=True, kw_only=True, slots=True)
class LinearHeadConfig(HeadConfig):
    """One linear to all entries of all codebooks (SPEAR)."""

    def build(self, dim: int, num_codebooks: int, codebook_size: int) -> nn.Module:
        """See HeadConfig."""
        return CodebookHead(dim, num_codebooks, codebook_size)


@dataclass(frozen=True, kw_only=True, slots=True)
class CosineHeadConfig(HeadConfig):
    """Cosines to learned vectors, one per entry (HuBERT, arXiv:2106.07447, equation 3)."""

    dim: int = 256
    """Width of the space in which the cosines are taken."""
    temperature: float = 0.1
    """The cosines are divided by it."""

    def __post_init__(self) -> None:
        at_least("dim", self.dim, 1)
        above("temperature", self.temperature, 0)

    def build(self, dim: int, num_codebooks: int, codebook_size: int) -> nn.Module:
        """See HeadConfig."""
        return CosineHead(dim, num_codebooks, codebook_size, self)


class CodebookHead(nn.Module):
    """One linear that predicts every codebook's entry of a frame."""

    def __init__(self, dim: int, num_codebooks: int, codebook_size: int) -> None:
        super().__init__()
        self.num_codebooks, self.codebook_size = num_codebooks, codebook_size
        self.proj = nn.Linear(dim, num_codebooks * codebook_size)

    def forward(self, x: Tensor) -> Tensor:
        """x: (N, T, D) -> logits (N, T, C, K) float32."""
        return self.proj(x).float().unflatten(-1, (self.num_codebooks, self.codebook_size))  # type: ignore[no-any-return]


class CosineHead(nn.Module):
    """For each codebook a projection A and a vector e_k per entry: logit k = cos(A x, e_k) / temperature.

    The vectors start as uniform numbers in [0, 1), as in HuBERT's own code.
    """

    def __init__(self, dim: int, num_codebooks: int, codebook_size: int, config: CosineHeadConfig) -> None:
        super().__init__()
        self.num_codebooks, self.temperature = num_codebooks, config.temperature
        self.proj = nn.Linear(dim, num_codebooks * config.dim)
        self.entries = nn.Parameter(torch.rand(num_codebooks, codebook_size, config.dim))

    def forward(self, x: Tensor) -> Tensor:
        """x: (N, T, D) -> logits (N, T, C, K) float32."""
        projected = self.proj(x).unflatten(-1, (self.num_codebooks, -1)).float()
        with torch.autocast(x.device.type, enabled=False):
            cosines = torch.einsum("ntch,ckh->ntck", F.normalize(projected, dim=-1), F.normalize(self.entries.float(), dim=-1))
        return cosines / self.temperature


class LayerHeads(nn.Module):
    """A linear of its own for each of L layers.

    Args:
        dims: D_l, widths of the layers. codebook_size: K.
    """

    def __init__(self, dims: list[int], codebook_size: int) -> None:
        super().__init__()
        self.projs = nn.ModuleList(nn.Linear(dim, codebook_size) for dim in dims)

    def forward(self, rows: list[Tensor]) -> Tensor:
        """rows: (M, D_l) of every layer -> logits (L, M, K) float32."""
        return torch.stack([proj(row) for proj, row in zip(self.projs, rows)]).float()
