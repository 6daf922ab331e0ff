"""Random-projection quantizer."""

from __future__ import annotations

import pytest
import torch

from spear.errors import ConfigError
from spear.quantizers.card import card
from spear.quantizers.random_projection import PRIOR_FRAMES, RandomProjectionConfig, additive_means, project
from tests.quantizers.frames import clustered


def test_project_takes_the_nearest_direction() -> None:
    generator = torch.Generator().manual_seed(0)
    frames, projections = torch.randn(100, 10, generator=generator), torch.randn(2, 10, 4, generator=generator)
    directions = 5 * torch.randn(2, 32, 4, generator=generator)
    codes = project(frames, projections, directions)
    for book in range(2):
        units = [torch.nn.functional.normalize(x.double(), dim=1) for x in (frames @ projections[book], directions[book])]
        assert torch.equal(codes[:, book], torch.cdist(*units).argmin(dim=1))
    assert torch.equal(project(3 * frames, projections, directions), codes)


def test_random_projection_draws_nothing_from_the_frames() -> None:
    config = RandomProjectionConfig(codebook_size=64)
    first, second = (config.fit(clustered(500, 8, seed=seed), clustered(50, 8), seed=1) for seed in (0, 1))
    assert torch.equal(first.projections, second.projections)
    assert torch.equal(first.directions, second.directions)
    bound = (6 / (8 + 16)) ** 0.5
    assert 0.9 * bound < float(first.projections.abs().max()) <= bound


def test_additive_means_of_one_codebook_are_the_means_of_its_codes() -> None:
    frames = torch.tensor([[1.0], [3.0], [-4.0]])
    means = additive_means(frames, torch.tensor([[0], [0], [2]]), 4)
    assert means.flatten().tolist() == pytest.approx([4 / (2 + PRIOR_FRAMES), 0.0, -4 / (1 + PRIOR_FRAMES), 0.0])


def test_additive_means_of_several_codebooks_recover_a_sum() -> None:
    generator = torch.Generator().manual_seed(0)
    tables = torch.randn(2, 4, 3, generator=generator)
    codes = torch.randint(4, (4000, 2), generator=generator)
    frames = tables[0][codes[:, 0]] + tables[1][codes[:, 1]]
    offset = frames.mean(dim=0)
    means = additive_means(frames - offset, codes, 4)
    rebuilt = offset + means[0][codes[:, 0]] + means[1][codes[:, 1]]
    torch.testing.assert_close(rebuilt, frames, atol=0.02, rtol=0)


def test_random_projection_more_codebooks_lose_less() -> None:
    train, heldout = clustered(3000, 12), clustered(400, 12, seed=1)
    losses = [
        card(RandomProjectionConfig(num_codebooks=count, codebook_size=64).fit(train, heldout, seed=0), heldout)["relative_loss"]
        for count in (1, 2, 4)
    ]
    assert losses == sorted(losses, reverse=True)


def test_random_projection_raises_config_error_when_sizes_are_wrong() -> None:
    with pytest.raises(ConfigError, match="`projection_dim` must be at least 1, but is 0"):
        RandomProjectionConfig(projection_dim=0)
    with pytest.raises(ConfigError, match="`codebook_size` must be between 2 and 65536"):
        RandomProjectionConfig(codebook_size=1 << 17)
