"""One codebook of cluster centres, fitted by mini-batch k-means."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from spear.errors import ConfigError, DataError
from spear.files import seed_from
from spear.quantizers.base import Quantizer, QuantizerConfig, check_fit_frames, take_normalizer
from spear.quantizers.normalize import Normalizer

_BLOCK_VALUES = 1 << 24
_ROW_MULTIPLE = 32
MAX_ENTRIES = 65536


class KMeans(Quantizer):
    """A frame's code is its nearest centre.

    Args:
        centers: (K, D) float32, in the normalised domain. normalizer: channel normalisation, or None.
    """

    kind: ClassVar[str] = "kmeans"
    centers: Tensor

    def __init__(self, centers: Tensor, normalizer: Normalizer | None = None) -> None:
        super().__init__(centers.shape[1], 1, centers.shape[0], normalizer)
        self.register_buffer("centers", centers.float().clone())

    @torch.no_grad()
    def search(self, frames: Tensor) -> Tensor:
        """Nearest centre, (M, 1) int64, of normalised frames (M, D)."""
        shift = self.centers.mean(dim=0)
        centres = self.centers - shift
        norms = centres.square().sum(dim=1)
        step = max(_ROW_MULTIPLE, _BLOCK_VALUES // self.codebook_size // _ROW_MULTIPLE * _ROW_MULTIPLE)
        found = []
        for block in frames.split(step):
            padded = functional.pad(block, (0, 0, 0, -len(block) % _ROW_MULTIPLE))
            found.append(torch.addmm(norms, padded - shift, centres.T, alpha=-2.0)[: len(block)].argmin(dim=1, keepdim=True))
        return torch.cat(found) if found else torch.empty(0, 1, dtype=torch.int64, device=frames.device)

    def encode(self, frames: Tensor) -> Tensor:
        """Codes (..., 1) of teacher frames (..., D): uint8 up to 256 entries, int16 up to 32768, else int32.

        Raises:
            DataError: the width is not D, or a value is not finite.
        """
        return self.search(self.normalize(frames)).view(*frames.shape[:-1], 1).to(self.code_dtype)

    def reconstruct(self, codes: Tensor) -> Tensor:
        """Centres (M, D) of codes (M, 1) int64, in the normalised domain."""
        return self.centers[codes[:, 0]]

    def settings(self) -> dict[str, Any]:
        """Nothing beyond the sizes."""
        return {}

    @classmethod
    def from_state(cls, config: dict[str, Any], state: dict[str, Tensor]) -> KMeans:
        """See `Quantizer.from_state`."""
        quantizer = cls(state["centers"], take_normalizer(config, state))
        if (quantizer.codebook_size, quantizer.dim, 1) != (config["codebook_size"], config["dim"], config["num_codebooks"]):
            raise ValueError(f"`centers` has shape {tuple(state['centers'].shape)}")
        return quantizer


@dataclass(frozen=True, kw_only=True, slots=True)
class KMeansConfig(QuantizerConfig):
    """Mini-batch k-means, the targets of HuBERT (arXiv:2106.07447) and DELULU."""

    codebook_size: int = 500
    """K, number of clusters, 2 to 65536."""
    normalize: bool = False
    """Whether channels are normalised before clustering."""
    batch_frames: int = 10000
    """Frames per mini-batch."""
    epochs: int = 20
    """Most passes over the frames."""
    patience: int = 100
    """Mini-batches without a better smoothed inertia before stopping."""
    restarts: int = 1
    """k-means++ initialisations tried; the best on a sample is kept."""

    def __post_init__(self) -> None:
        if not 2 <= self.codebook_size <= MAX_ENTRIES:
            raise ConfigError(f"`codebook_size` must be between 2 and {MAX_ENTRIES}, but is {self.codebook_size}")
        for name in ("batch_frames", "epochs", "patience", "restarts"):
            if getattr(self, name) < 1:
                raise ConfigError(f"`{name}` must be 1 or more, but is {getattr(self, name)}")

    def fit(self, train: Tensor, heldout: Tensor, *, seed: int, checkpoint: Path | None = None) -> KMeans:
        """See `QuantizerConfig.fit`; a fit is short and is not resumed.

        Raises:
            DataError: fewer frames than clusters, or non-finite ones.
        """
        from sklearn.cluster import MiniBatchKMeans

        check_fit_frames(train, heldout)
        if len(train) < self.codebook_size:
            raise DataError(f"k-means needs at least `codebook_size` {self.codebook_size} frames, but has {len(train)}", cause="too_few")
        normalizer = Normalizer.fit(train) if self.normalize else None
        frames = (train if normalizer is None else normalizer.apply_to(train)).numpy()
        solver = MiniBatchKMeans(
            n_clusters=self.codebook_size,
            init="k-means++",
            n_init=self.restarts,
            batch_size=self.batch_frames,
            max_iter=self.epochs,
            max_no_improvement=self.patience,
            reassignment_ratio=0.0,
            random_state=seed_from(seed, "kmeans") & 0x7FFFFFFF,
        ).fit(frames)
        return KMeans(torch.from_numpy(np.asarray(solver.cluster_centers_, dtype=np.float32)), normalizer)
