"""Product quantization: the channels are divided among the codebooks, after a rotation that shares the variance out."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from spear.bounds import at_least
from spear.errors import ConfigError
from spear.quantizers.axes import principal_axes
from spear.quantizers.base import Quantizer, check_fit_frames, take_normalizer
from spear.quantizers.clusters import ClusterConfig, in_blocks, nearest
from spear.quantizers.normalize import Normalizer

_SMALLEST = 1e-12
"""Variances below this share of the largest count as this, so that their logarithm is finite."""


class Product(Quantizer):
    """Codebook c codes channels c D/C to (c + 1) D/C of the rotated frame.

    Args:
        centers: (C, K, D / C) float32. rotation: (D, D) float32 orthonormal, frames @ rotation is divided; None: the frames are.
    """

    kind: ClassVar[str] = "product"
    centers: Tensor
    rotation: Tensor | None

    def __init__(self, centers: Tensor, rotation: Tensor | None = None, normalizer: Normalizer | None = None) -> None:
        super().__init__(centers.shape[0] * centers.shape[2], centers.shape[0], centers.shape[1], normalizer)
        self.register_buffer("centers", centers.float().clone())
        self.register_buffer("rotation", None if rotation is None else rotation.float().clone())

    def encode(self, frames: Tensor) -> Tensor:
        """Codes (..., C) of `code_dtype` for teacher frames (..., D).

        Raises:
            DataError: the width is not D, or a value is not finite.
        """
        parts = _parts(self.normalize(frames), self.rotation, self.num_codebooks)
        codes = torch.stack([nearest(part, centers) for part, centers in zip(parts, self.centers)], dim=1)
        return codes.view(*frames.shape[:-1], self.num_codebooks).to(self.code_dtype)

    def reconstruct(self, codes: Tensor) -> Tensor:
        """Frames (M, D) of codes (M, C) int64, rotated back, in the normalised domain."""
        rotated = torch.cat([centers[column] for centers, column in zip(self.centers, codes.T)], dim=1)
        return rotated if self.rotation is None else rotated @ self.rotation.T

    def settings(self) -> dict[str, Any]:
        """``rotated``: whether there is a rotation."""
        return {"rotated": self.rotation is not None}

    @classmethod
    def from_state(cls, config: dict[str, Any], state: dict[str, Tensor]) -> Product:
        """See `Quantizer.from_state`."""
        rotation = state["rotation"] if config["rotated"] else None
        quantizer = cls(state["centers"], rotation, take_normalizer(config, state))
        if (quantizer.num_codebooks, quantizer.codebook_size, quantizer.dim) != (config["num_codebooks"], config["codebook_size"], config["dim"]):
            raise ValueError(f"`centers` has shape {tuple(state['centers'].shape)}")
        if rotation is not None and rotation.shape != (quantizer.dim, quantizer.dim):
            raise ValueError(f"`rotation` has shape {tuple(rotation.shape)}")
        return quantizer


def _parts(frames: Tensor, rotation: Tensor | None, num_codebooks: int) -> list[Tensor]:
    """C contiguous pieces (M, D / C) of rotated frames."""
    rotated = frames if rotation is None else in_blocks(frames, frames.shape[1], lambda block: block @ rotation)
    return [part.contiguous() for part in rotated.chunk(num_codebooks, dim=1)]


def balanced_rotation(frames: Tensor, num_codebooks: int) -> Tensor:
    """(D, D) float32: the principal axes of frames (M, D) in an order that gives codebooks equal products of variances.

    Eigenvalue allocation of Ge et al., "Optimized Product Quantization" (CVPR 2013): from the largest variance to the
    smallest, an axis goes to the codebook whose product so far is least and which is not full.
    """
    _, variances, axes = principal_axes(frames)
    logs = variances.clamp(min=float(variances[0]) * _SMALLEST + 1e-300).log()
    logs = logs - logs.min()
    members: list[list[int]] = [[] for _ in range(num_codebooks)]
    totals, room = [0.0] * num_codebooks, len(logs) // num_codebooks
    for axis, value in enumerate(logs.tolist()):
        book = min((b for b in range(num_codebooks) if len(members[b]) < room), key=lambda b: (totals[b], b))
        members[book].append(axis)
        totals[book] += value
    return axes[:, [axis for group in members for axis in group]].float()


@dataclass(frozen=True, kw_only=True, slots=True)
class ProductConfig(ClusterConfig):
    """Product quantization (Jegou, Douze and Schmid, TPAMI 2011, doi:10.1109/TPAMI.2010.57): one k-means per group of channels."""

    num_codebooks: int = 4
    """C, groups of channels; must divide D."""
    rotation: Literal["balanced", "none"] = "balanced"
    """balanced: principal axes, shared out so that every codebook gets the same product of variances; none: the channels as they are."""

    def __post_init__(self) -> None:
        ClusterConfig.__post_init__(self)
        at_least("num_codebooks", self.num_codebooks, 1)

    def sizes(self, dim: int) -> tuple[int, int]:
        """See `QuantizerConfig.sizes`."""
        if dim % self.num_codebooks:
            raise ConfigError(f"`num_codebooks` must divide the width of the frames {dim}, but is {self.num_codebooks}")
        return self.num_codebooks, self.codebook_size

    def fit(self, train: Tensor, heldout: Tensor, *, seed: int, checkpoint: Path | None = None) -> Product:
        """See `QuantizerConfig.fit`; not resumed.

        Raises:
            ConfigError: `num_codebooks` does not divide D. DataError: fewer frames than clusters, or non-finite ones.
        """
        check_fit_frames(train, heldout)
        self.sizes(train.shape[1])
        self.check_frames(train)
        normalizer = Normalizer.fit(train) if self.normalize else None
        frames = train if normalizer is None else normalizer.apply_to(train)
        rotation = balanced_rotation(frames, self.num_codebooks) if self.rotation == "balanced" else None
        parts = _parts(frames, rotation, self.num_codebooks)
        centers = torch.stack([self.cluster(part, seed, "product", book) for book, part in enumerate(parts)])
        return Product(centers, rotation, normalizer)
