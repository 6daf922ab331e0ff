"""Residual vector quantization: each codebook clusters what the codebooks before it leave over."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from spear.bounds import at_least
from spear.quantizers.base import Quantizer, check_fit_frames, take_normalizer
from spear.quantizers.clusters import ClusterConfig, in_blocks
from spear.quantizers.normalize import Normalizer


class Residual(Quantizer):
    """A frame is the sum of one centre per codebook, chosen one codebook after the other.

    Args:
        centers: (C, K, D) float32, in the normalised domain. beam_size: partial sums kept in the search; 1 is greedy.
    """

    kind: ClassVar[str] = "residual"
    centers: Tensor

    def __init__(self, centers: Tensor, beam_size: int = 1, normalizer: Normalizer | None = None) -> None:
        super().__init__(centers.shape[2], centers.shape[0], centers.shape[1], normalizer)
        self.beam_size = beam_size
        self.register_buffer("centers", centers.float().clone())

    def encode(self, frames: Tensor, beam_size: int | None = None) -> Tensor:
        """Codes (..., C) of `code_dtype` for teacher frames (..., D).

        Args:
            beam_size: takes the place of the one the quantizer was made with.
        Raises:
            DataError: the width is not D, or a value is not finite.
        """
        codes = beam_search(self.normalize(frames), self.centers, beam_size or self.beam_size)
        return codes.view(*frames.shape[:-1], self.num_codebooks).to(self.code_dtype)

    def reconstruct(self, codes: Tensor) -> Tensor:
        """Sums (M, D) of centres for codes (M, C) int64, in the normalised domain."""
        return sum_of_entries(self.centers, codes)

    def settings(self) -> dict[str, Any]:
        """``beam_size``."""
        return {"beam_size": self.beam_size}

    @classmethod
    def from_state(cls, config: dict[str, Any], state: dict[str, Tensor]) -> Residual:
        """See `Quantizer.from_state`."""
        shape = tuple(state["centers"].shape)
        if shape != (config["num_codebooks"], config["codebook_size"], config["dim"]):
            raise ValueError(f"`centers` has shape {shape}")
        return cls(state["centers"], int(config["beam_size"]), take_normalizer(config, state))


def sum_of_entries(tables: Tensor, codes: Tensor) -> Tensor:
    """(M, D): for codes (M, C) int64 the sum over codebooks of the chosen rows of tables (C, K, D)."""
    total = torch.zeros(len(codes), tables.shape[2], dtype=tables.dtype, device=tables.device)
    for table, column in zip(tables, codes.T):
        total += table[column]
    return total


@torch.no_grad()
def beam_search(frames: Tensor, centers: Tensor, beam_size: int) -> Tensor:
    """Codes (M, C) int64 whose centres, chosen from the first codebook to the last, add up to nearly each frame.

    After every codebook the `beam_size` best partial sums are kept. With e the error of a partial sum s of frame x,
    |x - s - c|^2 = e - 2 x.c + 2 s.c + |c|^2: everything but x.c comes from the products of centres with each other.

    Args:
        frames: (M, D). centers: (C, K, D).
    """
    num, size, _ = centers.shape
    shift = centers[0].mean(dim=0)  # near the origin, float32 products stay exact
    moved = torch.cat([centers[:1] - shift, centers[1:]]).flatten(0, 1)
    gram = moved @ moved.T
    norms = gram.diagonal()

    def search(block: Tensor) -> Tensor:
        dots = (block - shift) @ moved.T  # (B, C K)
        codes = torch.empty(len(block), 1, 0, dtype=torch.int64, device=block.device)
        error = dots.new_zeros(len(block), 1)
        for book in range(num):
            here = slice(book * size, (book + 1) * size)
            total = error[:, :, None] + (norms[here] - 2 * dots[:, here])[:, None]  # (B, partial sums, K)
            for earlier in range(book):
                total = total + 2 * gram[earlier * size + codes[:, :, earlier], here]
            keep = 1 if book == num - 1 else min(beam_size, total.shape[1] * size)
            error, best = total.flatten(1).topk(keep, dim=1, largest=False)
            parents = codes.gather(1, (best // size)[:, :, None].expand(-1, -1, book))
            codes = torch.cat([parents, (best % size)[:, :, None]], dim=2)
        return codes[:, 0]

    return in_blocks(frames, size * (num + 2 * beam_size), search)


@dataclass(frozen=True, kw_only=True, slots=True)
class ResidualConfig(ClusterConfig):
    """Residual VQ (Chen, Guan and Wang, Sensors 2010, doi:10.3390/s101211259): k-means on what is left over."""

    num_codebooks: int = 4
    """C, stages."""
    beam_size: int = 4
    """Partial sums kept in the search, in fitting and encoding; 1 is the greedy search of neural codecs."""

    def __post_init__(self) -> None:
        ClusterConfig.__post_init__(self)
        at_least("num_codebooks", self.num_codebooks, 1)
        at_least("beam_size", self.beam_size, 1)

    def fit(self, train: Tensor, heldout: Tensor, *, seed: int, checkpoint: Path | None = None) -> Residual:
        """See `QuantizerConfig.fit`; not resumed. Stage n clusters what the search leaves over with the n - 1 stages before it.

        Raises:
            DataError: fewer frames than clusters, or non-finite ones.
        """
        check_fit_frames(train, heldout)
        self.check_frames(train)
        normalizer = Normalizer.fit(train) if self.normalize else None
        frames = train if normalizer is None else normalizer.apply_to(train)
        centers, left = torch.empty(0, self.codebook_size, frames.shape[1]), frames
        for stage in range(self.num_codebooks):
            centers = torch.cat([centers, self.cluster(left, seed, "residual", stage)[None]])
            if stage + 1 < self.num_codebooks:
                left = frames - sum_of_entries(centers, beam_search(frames, centers, self.beam_size))
        return Residual(centers, self.beam_size, normalizer)
