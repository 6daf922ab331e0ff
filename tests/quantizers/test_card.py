"""Quantizer cards."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from spear.errors import DataError
from spear.quantizers import KMeans
from spear.quantizers.card import card, entry_counts, write_card
from spear.quantizers.normalize import Normalizer
from tests.quantizers.frames import clustered, random_mvq


def test_card_measures_what_it_says() -> None:
    heldout = torch.tensor([[0.0], [0.1], [1.0], [2.9]])
    found = card(KMeans(torch.tensor([[0.0], [1.0], [3.0], [50.0]])), heldout)
    spread = float((heldout - heldout.mean()).square().sum())
    assert found["relative_loss"] == pytest.approx((0.1**2 + 0.1**2) / spread, abs=1e-6)
    assert found["active_entries"] == [3]
    assert found["perplexity"] == [pytest.approx(2**1.5, abs=1e-3)]  # entropy of (1/2, 1/4, 1/4) is 1.5 bits
    assert found["bits_per_frame"] == 2.0
    assert "correlation" not in found


def test_card_judges_in_the_normalised_domain() -> None:
    frames = clustered(400, 8)
    quantizer = random_mvq(8, 4, 16)
    inside = Normalizer.fit(frames)
    plain = card(quantizer, inside.apply_to(frames))
    quantizer.normalizer = inside
    assert card(quantizer, frames)["relative_loss"] == pytest.approx(plain["relative_loss"], abs=1e-5)
    losses = plain["loss_by_refine_iters"]
    assert losses["5"] == plain["relative_loss"]
    assert losses["5"] < losses["0"]
    assert [row[i] for i, row in enumerate(plain["correlation"])] == [1.0] * 4


def test_entry_counts_count_per_codebook() -> None:
    codes = torch.tensor([[0, 2], [0, 1], [1, 2]])
    assert entry_counts(codes, 3).tolist() == [[2, 1, 0], [0, 1, 2]]


def test_write_card_gives_the_same_bytes_twice(tmp_path: Path) -> None:
    quantizer, heldout = random_mvq(8, 4, 16), torch.randn(200, 8, generator=torch.Generator().manual_seed(0))
    for name in ("a", "b"):
        write_card(tmp_path / name, card(quantizer, heldout), quantizer, heldout)
    names = sorted(path.name for path in (tmp_path / "a").iterdir())
    assert names == ["card.json", "card.md", "correlation.svg", "usage.svg"]
    for name in names:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    found = json.loads((tmp_path / "a" / "card.json").read_text())
    text = (tmp_path / "a" / "card.md").read_text()
    assert f"relative loss {found['relative_loss']:.4f} on 200 held-out frames" in text
    assert text.count("\n| ") == 6  # header, rule and four codebooks
    assert "<svg" in (tmp_path / "a" / "usage.svg").read_text()


def test_card_raises_data_error_when_there_are_no_frames() -> None:
    with pytest.raises(DataError, match="needs held-out frames"):
        card(random_mvq(8, 4, 16), torch.empty(0, 8))
