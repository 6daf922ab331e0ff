"""dMel."""

from __future__ import annotations

import pytest
import torch

from spear.errors import ConfigError
from spear.quantizers.dmel import DMelConfig


def test_dmel_takes_the_nearest_of_the_paper_s_values() -> None:
    train = torch.randn(500, 6, generator=torch.Generator().manual_seed(0)) * 4 - 9
    quantizer = DMelConfig(bits=3).fit(train, train, seed=0)
    low, high = float(train.min()), float(train.max())
    values = torch.tensor([low + j * (high - low) / 8 for j in range(8)], dtype=torch.float64)
    expected = (train.double()[:, :, None] - values).abs().argmin(dim=2)
    codes = quantizer.encode(train)
    assert codes.dtype == torch.uint8
    assert torch.equal(codes.long(), expected)
    torch.testing.assert_close(quantizer.decode(codes), values[expected].float(), atol=1e-5, rtol=1e-5)


def test_dmel_clamps_what_is_outside() -> None:
    train = torch.linspace(0.0, 16.0, 1000)[:, None]
    quantizer = DMelConfig().fit(train, train, seed=0)
    assert quantizer.encode(torch.tensor([[-5.0], [100.0]])).tolist() == [[0], [15]]


def test_dmel_tail_leaves_rare_values_outside() -> None:
    train = torch.cat([torch.full((10, 1), -100.0), torch.linspace(0.0, 1.0, 990)[:, None]])
    wide, narrow = (DMelConfig(tail=tail).fit(train, train, seed=0) for tail in (0.0, 0.02))
    assert float(wide.bounds[0]) == -100.0
    assert float(narrow.bounds[0]) > 0.0
    assert float(narrow.bounds[1]) > 0.9


def test_dmel_raises_config_error_when_settings_are_wrong() -> None:
    with pytest.raises(ConfigError, match="`bits` must be between 1 and 8, but is 9"):
        DMelConfig(bits=9)
    with pytest.raises(ConfigError, match=r"`tail` must be in \[0, 0.5\), but is 0.5"):
        DMelConfig(tail=0.5)
