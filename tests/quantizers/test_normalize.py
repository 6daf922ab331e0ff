"""Channel normalisation."""

from __future__ import annotations

import pytest
import torch

from spear.errors import DataError
from spear.quantizers.normalize import EPSILON, Normalizer
from tests.quantizers.frames import clustered


def test_normalizer_follows_its_formula() -> None:
    frames = clustered(500, 6)
    normalizer = Normalizer.fit(frames)
    wide = frames.double()
    expected = (wide - wide.mean(0)) / (wide.std(0, correction=0) + EPSILON)
    torch.testing.assert_close(normalizer.apply_to(frames).double(), expected, atol=1e-5, rtol=0)


def test_normalizer_inverts_itself_even_where_a_channel_is_constant() -> None:
    frames = clustered(300, 4)
    frames[:, 2] = 7.0
    normalizer = Normalizer.fit(frames)
    assert normalizer.std[2] == 0
    torch.testing.assert_close(normalizer.invert(normalizer.apply_to(frames)), frames, atol=1e-5, rtol=1e-5)


def test_normalizer_is_exact_for_large_offsets() -> None:
    frames = 1e4 + torch.randn(20000, 3, generator=torch.Generator().manual_seed(0))
    normalizer = Normalizer.fit(frames)
    torch.testing.assert_close(normalizer.std.double(), frames.double().std(0, correction=0), atol=1e-6, rtol=0)


def test_normalizer_raises_data_error_when_frames_are_missing_or_not_finite() -> None:
    with pytest.raises(DataError, match="at least one frame"):
        Normalizer.fit(torch.empty(0, 3))
    with pytest.raises(DataError, match="non-finite"):
        Normalizer.fit(torch.tensor([[1.0, float("nan")]]))
