"""Random-projection quantizer of BEST-RQ: nothing is learnt but what a code stands for when it is decoded."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional

from spear.bounds import at_least, within
from spear.files import seed_from
from spear.quantizers.base import Quantizer, QuantizerConfig, check_fit_frames, take_normalizer
from spear.quantizers.clusters import MAX_ENTRIES, in_blocks
from spear.quantizers.normalize import Normalizer
from spear.quantizers.residual import sum_of_entries

SWEEPS = 4
"""Passes over the codebooks that fit the decoder of several codebooks."""
PRIOR_FRAMES = 1.0
"""Frames at the overall mean that every code's mean counts in, so that a rare code is not taken at its word."""


class RandomProjection(Quantizer):
    """A frame's code is the direction of a random codebook that is nearest to the direction of its projection.

    argmin_k | c_k / |c_k| - x A / |x A| |, A (D, H) and c (K, H) drawn once; arXiv:2202.01855, section 3.1, equation 1. Several codebooks
    have projections of their own, as in USM (arXiv:2303.01037). Neither depends on the frames. To decode, each code has a mean (see `fit`):
    the relative loss is what the best sum of one vector per code loses.

    Args:
        projections: (C, D, H) float32. directions: (C, K, H) float32, any length. means: (C, K, D) float32. offset: (D,) float32.
    """

    kind: ClassVar[str] = "random_projection"
    projections: Tensor
    directions: Tensor
    means: Tensor
    offset: Tensor

    def __init__(self, projections: Tensor, directions: Tensor, means: Tensor, offset: Tensor, normalizer: Normalizer | None = None) -> None:
        super().__init__(projections.shape[1], projections.shape[0], directions.shape[1], normalizer)
        for name, tensor in (("projections", projections), ("directions", directions), ("means", means), ("offset", offset)):
            self.register_buffer(name, tensor.float().clone())

    def encode(self, frames: Tensor) -> Tensor:
        """Codes (..., C) of `code_dtype` for teacher frames (..., D).

        Raises:
            DataError: the width is not D, or a value is not finite.
        """
        codes = project(self.normalize(frames), self.projections, self.directions)
        return codes.view(*frames.shape[:-1], self.num_codebooks).to(self.code_dtype)

    def reconstruct(self, codes: Tensor) -> Tensor:
        """The overall mean plus each code's mean, (M, D), for codes (M, C) int64, in the normalised domain."""
        return self.offset + sum_of_entries(self.means, codes)

    def settings(self) -> dict[str, Any]:
        """``projection_dim``, H."""
        return {"projection_dim": self.projections.shape[2]}

    @classmethod
    def from_state(cls, config: dict[str, Any], state: dict[str, Tensor]) -> RandomProjection:
        """See `Quantizer.from_state`."""
        books, size, dim, width = (config[key] for key in ("num_codebooks", "codebook_size", "dim", "projection_dim"))
        expected = {"projections": (books, dim, width), "directions": (books, size, width), "means": (books, size, dim), "offset": (dim,)}
        for name, shape in expected.items():
            if state[name].shape != shape:
                raise ValueError(f"`{name}` has shape {tuple(state[name].shape)}")
        projections, directions, means, offset = (state[name] for name in expected)
        return cls(projections, directions, means, offset, take_normalizer(config, state))


def project(frames: Tensor, projections: Tensor, directions: Tensor) -> Tensor:
    """Codes (M, C) int64 of frames (M, D): the largest cosine is the smallest distance of unit vectors."""
    units = functional.normalize(directions, dim=2)

    def search(block: Tensor) -> Tensor:  # the length of a projection does not change which direction is nearest
        return torch.stack([((block @ matrix) @ book.T).argmax(dim=1) for matrix, book in zip(projections, units)], dim=1)

    return in_blocks(frames, units.shape[1] + projections.shape[2], search)


def additive_means(frames: Tensor, codes: Tensor, codebook_size: int) -> Tensor:
    """(C, K, D) float32: vectors whose sum over a frame's codes is close to it, for frames (M, D) of mean zero and codes (M, C).

    One codebook at a time takes the means of what the others leave over (Gauss-Seidel steps of least squares); with C = 1 that is
    the mean of the frames of each code. A code that does not occur gets zero.
    """
    num_codebooks = codes.shape[1]
    means = torch.zeros(num_codebooks, codebook_size, frames.shape[1])
    left = frames.clone()
    counts = torch.stack([torch.bincount(column, minlength=codebook_size) for column in codes.T]) + PRIOR_FRAMES
    for _ in range(SWEEPS if num_codebooks > 1 else 1):
        for book, column in enumerate(codes.T):
            left += means[book][column]
            sums = torch.zeros(codebook_size, frames.shape[1], dtype=torch.float64).index_add_(0, column, left.double())
            means[book] = (sums / counts[book][:, None]).float()
            left -= means[book][column]
    return means


@dataclass(frozen=True, kw_only=True, slots=True)
class RandomProjectionConfig(QuantizerConfig):
    """BEST-RQ (arXiv:2202.01855); for its recipe take a ``logmel`` teacher of 80 bins with ``stack: 4``."""

    num_codebooks: int = 1
    """C, independent projections and codebooks; USM takes 16."""
    codebook_size: int = 8192
    """K, random directions, 2 to 65536."""
    projection_dim: int = 16
    """H, channels that a frame is projected to."""
    normalize: bool = True
    """Whether channels are normalised first; the paper finds this essential."""

    def __post_init__(self) -> None:
        at_least("num_codebooks", self.num_codebooks, 1)
        within("codebook_size", self.codebook_size, 2, MAX_ENTRIES)
        at_least("projection_dim", self.projection_dim, 1)

    def fit(self, train: Tensor, heldout: Tensor, *, seed: int, checkpoint: Path | None = None) -> RandomProjection:
        """See `QuantizerConfig.fit`. Draws projections (Xavier uniform) and directions (normal), then fits the means for decoding.

        Raises:
            DataError: no frames, or non-finite ones.
        """
        check_fit_frames(train, heldout)
        normalizer = Normalizer.fit(train) if self.normalize else None
        frames = train if normalizer is None else normalizer.apply_to(train)
        dim = frames.shape[1]
        generator = torch.Generator().manual_seed(seed_from(seed, "random_projection"))
        bound = (6 / (dim + self.projection_dim)) ** 0.5
        projections = bound * (2 * torch.rand(self.num_codebooks, dim, self.projection_dim, generator=generator) - 1)
        directions = torch.randn(self.num_codebooks, self.codebook_size, self.projection_dim, generator=generator)
        offset = frames.double().mean(dim=0).float()
        means = additive_means(frames - offset, project(frames, projections, directions), self.codebook_size)
        return RandomProjection(projections, directions, means, offset, normalizer)
