"""k-means as several quantizers use it: its settings, the fit, and the nearest centre."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from spear.bounds import at_least, within
from spear.errors import ConfigError, DataError
from spear.files import seed_from
from spear.quantizers.base import QuantizerConfig

MAX_ENTRIES = 65536
_BLOCK_VALUES = 1 << 24
_ROW_MULTIPLE = 32


@dataclass(frozen=True, kw_only=True, slots=True)
class ClusterConfig(QuantizerConfig):
    """Settings that every quantizer made of k-means clusters shares."""

    codebook_size: int = 256
    """K, number of clusters, 2 to 65536."""
    normalize: bool = True
    """Whether channels are normalised before clustering."""
    batch_frames: int = 10000
    """minibatch: frames per mini-batch."""
    epochs: int = 20
    """Most passes over the frames."""
    patience: int = 100
    """minibatch: mini-batches without a better smoothed inertia before stopping."""
    restarts: int = 1
    """Initialisations tried; the best is kept."""
    solver: Literal["minibatch", "faiss"] = "minibatch"
    """minibatch: scikit-learn's, from k-means++. faiss: Lloyd's algorithm from random frames, several times faster; needs faiss-cpu."""

    def __post_init__(self) -> None:
        within("codebook_size", self.codebook_size, 2, MAX_ENTRIES)
        for name in ("batch_frames", "epochs", "patience", "restarts"):
            at_least(name, getattr(self, name), 1)

    def check_frames(self, train: Tensor) -> None:
        """There must be at least as many frames as clusters.

        Raises:
            DataError: there are fewer.
        """
        if len(train) < self.codebook_size:
            raise DataError(f"k-means needs at least `codebook_size` {self.codebook_size} frames, but has {len(train)}", cause="too_few")

    def cluster(self, frames: Tensor, *seed: object) -> Tensor:
        """Centres (K, D) float32 of frames (M, D), M >= K; `seed` decides every random choice.

        Raises:
            ConfigError: `solver` is faiss and there is no faiss.
        """
        number = seed_from(*seed) & 0x7FFFFFFF
        centers = SOLVERS[self.solver](self, np.ascontiguousarray(frames.numpy()), number)
        return torch.from_numpy(np.asarray(centers, dtype=np.float32))


def _minibatch(config: ClusterConfig, frames: NDArray[np.float32], seed: int) -> Any:
    from sklearn.cluster import MiniBatchKMeans

    solver = MiniBatchKMeans(
        n_clusters=config.codebook_size,
        init="k-means++",
        n_init=config.restarts,
        batch_size=config.batch_frames,
        max_iter=config.epochs,
        max_no_improvement=config.patience,
        reassignment_ratio=0.0,
        random_state=seed,
    )
    return solver.fit(frames).cluster_centers_


def _faiss(config: ClusterConfig, frames: NDArray[np.float32], seed: int) -> Any:
    try:
        faiss: Any = importlib.import_module("faiss")
    except ImportError as error:
        raise ConfigError("`solver` faiss needs the package faiss-cpu: install it, or choose minibatch") from error
    solver = faiss.Kmeans(
        frames.shape[1],
        config.codebook_size,
        niter=config.epochs,
        nredo=config.restarts,
        seed=seed,
        min_points_per_centroid=1,
        max_points_per_centroid=len(frames),
    )
    solver.train(frames)
    return solver.centroids


SOLVERS: dict[str, Callable[[ClusterConfig, NDArray[np.float32], int], Any]] = {"minibatch": _minibatch, "faiss": _faiss}


@torch.no_grad()
def in_blocks(frames: Tensor, values_per_frame: int, work: Callable[[Tensor], Tensor]) -> Tensor:
    """`work` of frames (M, D), block by block: (M, ...) from what it makes, (B, ...), of each block (B, D).

    A block's length is a multiple of 32, zero rows added, so that a frame's matrix products do not depend on its neighbours.

    Args:
        values_per_frame: float32 values that `work` makes of one frame on the way; bounds the memory of a block.
    """
    step = max(_ROW_MULTIPLE, _BLOCK_VALUES // values_per_frame // _ROW_MULTIPLE * _ROW_MULTIPLE)
    return torch.cat([work(functional.pad(block, (0, 0, 0, -len(block) % _ROW_MULTIPLE)))[: len(block)] for block in frames.split(step)])


def nearest(frames: Tensor, centers: Tensor) -> Tensor:
    """Index (M,) int64 of the centre of (K, D) that is nearest to each frame of (M, D)."""
    shift = centers.mean(dim=0)
    centres = centers - shift
    norms = centres.square().sum(dim=1)
    return in_blocks(frames, len(centers), lambda block: torch.addmm(norms, block - shift, centres.T, alpha=-2.0).argmin(dim=1))
