"""k-means shared by quantizers."""

from __future__ import annotations

import importlib.util

import pytest
import torch

from spear.errors import ConfigError
from spear.quantizers.clusters import in_blocks, nearest
from spear.quantizers.kmeans import KMeansConfig
from tests.quantizers.frames import clustered


def test_nearest_is_exact_far_from_the_origin() -> None:
    centers = clustered(50, 6) + 100
    frames = clustered(300, 6, seed=1) + 100
    assert torch.equal(nearest(frames, centers), torch.cdist(frames.double(), centers.double()).argmin(dim=1))


def test_in_blocks_joins_what_it_makes_of_multiples_of_32_rows() -> None:
    sizes = []

    def work(block: torch.Tensor) -> torch.Tensor:
        sizes.append(len(block))
        return block.sum(dim=1)

    frames = torch.arange(200.0).view(100, 2)
    assert torch.equal(in_blocks(frames, 1 << 19, work), frames.sum(dim=1))
    assert sizes == [32, 32, 32, 32]
    assert in_blocks(frames[:0], 1, work).shape == (0,)


def test_kmeans_solver_faiss_finds_the_clusters() -> None:
    pytest.importorskip("faiss")
    train, heldout = clustered(3000, 8), clustered(300, 8, seed=1)
    config = KMeansConfig(codebook_size=32, solver="faiss")
    first, second = (config.fit(train, heldout, seed=3) for _ in range(2))
    assert first.fingerprint() == second.fingerprint()
    error = (first.decode(first.encode(heldout)) - heldout).square().sum()
    assert float(error / (heldout - heldout.mean(0)).square().sum()) < 0.4


@pytest.mark.skipif(importlib.util.find_spec("faiss") is not None, reason="faiss is installed")
def test_kmeans_raises_config_error_when_faiss_is_missing() -> None:
    frames = clustered(100, 4)
    with pytest.raises(ConfigError, match="needs the package faiss-cpu"):
        KMeansConfig(codebook_size=4, solver="faiss").fit(frames, frames, seed=0)
