"""k-means."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from spear.errors import ConfigError, DataError
from spear.quantizers import KMeans, load_quantizer
from spear.quantizers.kmeans import KMeansConfig
from tests.quantizers.frames import clustered


def test_kmeans_gives_the_nearest_centre() -> None:
    generator = torch.Generator().manual_seed(0)
    quantizer = KMeans(torch.randn(40, 6, generator=generator) + 10)
    frames = torch.randn(3, 50, 6, generator=generator) + 10
    codes = quantizer.encode(frames)
    assert codes.dtype == torch.uint8
    assert torch.equal(codes[..., 0].long(), torch.cdist(frames.double(), quantizer.centers.double()).argmin(-1))
    assert torch.equal(quantizer.decode(codes), quantizer.centers[codes[..., 0].long()])
    assert quantizer.encode(frames[:, :0]).shape == (3, 0, 1)


@pytest.mark.parametrize(
    ("size", "dtype"), [(256, torch.uint8), (257, torch.int16), (32768, torch.int16), (32769, torch.int32), (65536, torch.int32)]
)
def test_kmeans_codes_have_the_smallest_integer_type(size: int, dtype: torch.dtype) -> None:
    places = torch.arange(size)
    quantizer = KMeans(torch.stack([places // 256, places % 256], dim=1).float())
    frames = quantizer.centers[[0, size - 1]] + torch.tensor([0.3, -0.3])
    codes = quantizer.encode(frames)
    assert codes.dtype == dtype
    assert codes.tolist() == [[0], [size - 1]]
    assert torch.equal(quantizer.decode(codes), quantizer.centers[[0, size - 1]])


@pytest.mark.parametrize("normalize", [False, True])
def test_kmeans_fit_finds_clusters_and_repeats_itself(tmp_path: Path, normalize: bool) -> None:
    train, heldout = clustered(3000, 8), clustered(300, 8, seed=1)
    config = KMeansConfig(codebook_size=32, normalize=normalize, epochs=10, batch_frames=500)
    first, second = (config.fit(train, heldout, seed=3) for _ in range(2))
    assert first.fingerprint() == second.fingerprint()
    assert config.fit(train, heldout, seed=4).fingerprint() != first.fingerprint()
    error = (first.decode(first.encode(heldout)) - heldout).square().sum()
    assert float(error / (heldout - heldout.mean(0)).square().sum()) < 0.4
    first.save(tmp_path)
    again = load_quantizer(tmp_path)
    assert isinstance(again, KMeans)
    assert torch.equal(again.encode(heldout), first.encode(heldout))
    assert (again.normalizer is not None) == normalize


def test_kmeans_codes_do_not_depend_on_the_company_of_a_frame() -> None:
    quantizer = KMeans(clustered(500, 12))
    frames = clustered(700, 12, seed=1)
    assert torch.equal(quantizer.encode(frames), torch.cat([quantizer.encode(piece) for piece in frames.split([1, 33, 266, 400])]))


def test_kmeans_raises_when_sizes_do_not_fit() -> None:
    with pytest.raises(ConfigError, match="`codebook_size` must be between 2 and 65536, but is 70000"):
        KMeansConfig(codebook_size=70000)
    with pytest.raises(ConfigError, match="`epochs` must be at least 1, but is 0"):
        KMeansConfig(epochs=0)
    frames = clustered(20, 4)
    with pytest.raises(DataError, match="at least `codebook_size` 32 frames, but has 20"):
        KMeansConfig(codebook_size=32).fit(frames, frames, seed=0)
    with pytest.raises(DataError, match="non-finite"):
        KMeans(frames).encode(frames / 0)
