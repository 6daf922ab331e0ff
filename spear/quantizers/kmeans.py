"""One codebook of cluster centres, fitted by mini-batch k-means."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor

from spear.quantizers.base import Quantizer, check_fit_frames, take_normalizer
from spear.quantizers.clusters import ClusterConfig, nearest
from spear.quantizers.normalize import Normalizer


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

    def search(self, frames: Tensor) -> Tensor:
        """Nearest centre, (M, 1) int64, of normalised frames (M, D)."""
        return nearest(frames, self.centers)[:, None]

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
class KMeansConfig(ClusterConfig):
    """Mini-batch k-means, the targets of HuBERT (arXiv:2106.07447) and DELULU."""

    codebook_size: int = 500
    """K, number of clusters, 2 to 65536."""
    normalize: bool = False
    """Whether channels are normalised before clustering."""

    def fit(self, train: Tensor, heldout: Tensor, *, seed: int, checkpoint: Path | None = None) -> KMeans:
        """See `QuantizerConfig.fit`; a fit is short and is not resumed.

        Raises:
            DataError: fewer frames than clusters, or non-finite ones.
        """
        check_fit_frames(train, heldout)
        self.check_frames(train)
        normalizer = Normalizer.fit(train) if self.normalize else None
        frames = train if normalizer is None else normalizer.apply_to(train)
        return KMeans(self.cluster(frames, seed, "kmeans"), normalizer)
