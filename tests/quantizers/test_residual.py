"""Residual vector quantization."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from spear.errors import ConfigError, DataError
from spear.quantizers import Residual
from spear.quantizers.card import card
from spear.quantizers.residual import ResidualConfig, beam_search
from tests.quantizers.frames import clustered


def random_centers(num: int, size: int, dim: int) -> Tensor:
    return torch.randn(num, size, dim, generator=torch.Generator().manual_seed(0)) + 3.0


def test_beam_of_one_subtracts_the_nearest_centre_stage_by_stage() -> None:
    centers, frames = random_centers(4, 16, 6), clustered(100, 6)
    left, expected = frames.double(), []
    for book in centers.double():
        expected.append(torch.cdist(left, book).argmin(dim=1))
        left = left - book[expected[-1]]
    codes = beam_search(frames, centers, 1)
    assert torch.equal(codes, torch.stack(expected, dim=1))
    torch.testing.assert_close(Residual(centers).reconstruct(codes), (frames.double() - left).float(), atol=1e-4, rtol=1e-5)


def test_beam_as_wide_as_all_sums_finds_the_best_one() -> None:
    centers, frames = random_centers(3, 4, 5), clustered(50, 5)
    sums = torch.stack([sum(centers[n, k] for n, k in enumerate(choice)) for choice in itertools.product(range(4), repeat=3)])
    best = torch.cdist(frames.double(), sums.double()).argmin(dim=1)
    assert torch.equal(beam_search(frames, centers, 16), torch.stack([best // 16, best // 4 % 4, best % 4], dim=1))


def test_residual_wider_beams_and_more_stages_lose_less() -> None:
    train, heldout = clustered(3000, 8), clustered(500, 8, seed=1)
    quantizer = ResidualConfig(num_codebooks=4, codebook_size=16, epochs=5, batch_frames=500).fit(train, heldout, seed=0)
    losses = [float((quantizer.decode(quantizer.encode(heldout, beam_size=width)) - heldout).square().sum()) for width in (1, 4, 16)]
    assert losses[0] > losses[1] > losses[2]
    short = ResidualConfig(num_codebooks=2, codebook_size=16, epochs=5, batch_frames=500).fit(train, heldout, seed=0)
    torch.testing.assert_close(short.centers, quantizer.centers[:2])
    assert card(quantizer, heldout)["relative_loss"] < card(short, heldout)["relative_loss"]


def test_residual_raises_when_sizes_do_not_fit() -> None:
    with pytest.raises(ConfigError, match="`beam_size` must be at least 1, but is 0"):
        ResidualConfig(beam_size=0)
    with pytest.raises(ConfigError, match="`codebook_size` must be between 2 and 65536, but is 1"):
        ResidualConfig(codebook_size=1)
    frames = clustered(20, 4)
    with pytest.raises(DataError, match="at least `codebook_size` 256 frames, but has 20"):
        ResidualConfig().fit(frames, frames, seed=0)
