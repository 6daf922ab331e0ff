"""Product quantization and the rotation before it."""

from __future__ import annotations

import pytest
import torch

from spear.errors import ConfigError, DataError
from spear.quantizers import Product
from spear.quantizers.axes import principal_axes
from spear.quantizers.card import card
from spear.quantizers.product import ProductConfig, balanced_rotation
from tests.quantizers.frames import clustered


def test_product_codes_each_part_by_itself() -> None:
    generator = torch.Generator().manual_seed(0)
    centers, frames = torch.randn(3, 16, 4, generator=generator), torch.randn(80, 12, generator=generator)
    quantizer = Product(centers)
    codes = quantizer.encode(frames).long()
    for book, part in enumerate(frames.split(4, dim=1)):
        assert torch.equal(codes[:, book], torch.cdist(part, centers[book]).argmin(dim=1))
    assert torch.equal(quantizer.decode(codes), torch.cat([centers[book][codes[:, book]] for book in range(3)], dim=1))


def test_principal_axes_are_those_of_the_covariance() -> None:
    frames = clustered(2000, 6) @ torch.randn(6, 6, generator=torch.Generator().manual_seed(1))
    mean, variances, axes = principal_axes(frames)
    torch.testing.assert_close(mean, frames.double().mean(dim=0))
    torch.testing.assert_close(axes.T @ axes, torch.eye(6, dtype=torch.float64), atol=1e-9, rtol=0)
    projected = (frames.double() - mean) @ axes
    torch.testing.assert_close(projected.T @ projected / len(frames), variances.diag(), atol=1e-6 * float(variances[0]), rtol=0)
    assert variances.tolist() == sorted(variances.tolist(), reverse=True)


def test_balanced_rotation_shares_the_variance_out() -> None:
    deviations = torch.tensor([16.0, 8.0, 4.0, 2.0])
    frames = torch.randn(20000, 4, generator=torch.Generator().manual_seed(0)) * deviations
    rotation = balanced_rotation(frames, 2)
    found = (frames @ rotation).std(dim=0).round().tolist()
    assert found == [16.0, 2.0, 8.0, 4.0]  # 16 x 2 = 8 x 4


def test_product_loses_less_with_its_rotation() -> None:
    mixing = torch.randn(12, 12, generator=torch.Generator().manual_seed(2))
    train, heldout = clustered(3000, 12) @ mixing, clustered(500, 12, seed=1) @ mixing
    losses = {
        rotation: card(ProductConfig(num_codebooks=3, codebook_size=16, rotation=rotation).fit(train, heldout, seed=0), heldout)["relative_loss"]
        for rotation in ("balanced", "none")
    }
    assert losses["balanced"] < losses["none"]


def test_product_raises_when_sizes_do_not_fit() -> None:
    frames = clustered(300, 10)
    with pytest.raises(ConfigError, match="`num_codebooks` must divide the width of the frames 10, but is 4"):
        ProductConfig().fit(frames, frames, seed=0)
    with pytest.raises(DataError, match="at least `codebook_size` 256 frames, but has 100"):
        ProductConfig(num_codebooks=5).fit(frames[:100], frames, seed=0)
    with pytest.raises(ConfigError, match="`num_codebooks` must be at least 1, but is 0"):
        ProductConfig(num_codebooks=0)
