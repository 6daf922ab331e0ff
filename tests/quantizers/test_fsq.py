"""Finite scalar quantization."""

from __future__ import annotations

import math

import pytest
import torch

from spear.errors import ConfigError
from spear.quantizers.fsq import FSQConfig, level_values, round_to_levels
from tests.quantizers.frames import clustered


@pytest.mark.parametrize("levels", [2, 3, 5, 8])
def test_round_to_levels_follows_the_formula(levels: int) -> None:
    z = torch.linspace(-4, 4, 401)
    expected = [round((levels - 1) / 2 * (1 + math.tanh(1.5 * value))) for value in z.tolist()]
    found = round_to_levels(z[:, None], [levels], 1.5)[:, 0]
    off_ties = (z.abs() > 1e-6) | torch.tensor(levels % 2 == 1)
    assert torch.equal(found[off_ties], torch.tensor(expected)[off_ties])
    assert sorted(set(found.tolist())) == list(range(levels))
    assert torch.equal(found[z > 0.001], levels - 1 - found[z < -0.001].flip(0))


def test_fsq_codes_are_the_levels_in_mixed_radix() -> None:
    train = clustered(2000, 9)
    quantizer = FSQConfig(num_codebooks=2, levels=[4, 3]).fit(train, train, seed=0)
    rounded = round_to_levels(quantizer.components(quantizer.normalize(train)), [4, 3], quantizer.scale)
    codes = quantizer.encode(train).long()
    assert torch.equal(codes[:, 0], rounded[:, 0] + 4 * rounded[:, 1])
    assert torch.equal(codes[:, 1], rounded[:, 2] + 4 * rounded[:, 3])
    again = quantizer.components(quantizer.reconstruct(codes))
    torch.testing.assert_close(again, quantizer.values.gather(1, rounded.T).T, atol=1e-4, rtol=1e-4)


def test_fsq_deals_the_strongest_components_to_the_groups_in_turn() -> None:
    train = clustered(2000, 9)
    quantizer = FSQConfig(num_codebooks=2, levels=[4, 3]).fit(train, train, seed=0)
    first, third, second, fourth = quantizer.deviations.tolist()
    assert first > second > third > fourth
    components = quantizer.components(quantizer.normalize(train))
    torch.testing.assert_close(components.T @ components / len(train), torch.eye(4), atol=1e-3, rtol=0)


def test_level_values_are_means_and_middles_where_there_is_none() -> None:
    components = torch.tensor([[-3.0], [-2.0], [0.1]])
    values = level_values(components, torch.tensor([[0], [0], [1]]), [3], 1.0)
    assert values[0, :2].tolist() == pytest.approx([-2.5, 0.1])
    assert float(values[0, 2]) == pytest.approx(math.atanh(1 - 0.5 / 3))


def test_fsq_raises_config_error_when_levels_do_not_fit() -> None:
    for levels in ([], [8, 1], [256, 257]):
        with pytest.raises(ConfigError, match="`levels` must be numbers of at least 2 with a product of at most 65536"):
            FSQConfig(levels=levels)
    with pytest.raises(ConfigError, match="`scale` must be above 0, but is 0"):
        FSQConfig(scale=0.0)
    frames = clustered(100, 11)
    with pytest.raises(ConfigError, match="`num_codebooks` times 3 levels must be at most 11, the width of the frames, but is 4"):
        FSQConfig().fit(frames, frames, seed=0)
