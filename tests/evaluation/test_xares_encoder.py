"""The X-ARES interface, held to the rules that the harness checks."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from spear.errors import ConfigError
from spear.evaluation import xares_encoder
from spear.export import save_encoder
from tests.export.tiny import tiny_encoder, tone


def test_xares_finds_one_encoder_in_the_module() -> None:
    assert [name for name in dir(xares_encoder) if name.endswith("Encoder")] == ["SpearEncoder"]
    assert xares_encoder.SpearEncoder.__name__.endswith("Encoder")


def test_xares_encoder_follows_the_rules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    encoder = tiny_encoder(output_downsampling_factor=2)
    save_encoder(tmp_path / "export", encoder.encoder, encoder.student)
    monkeypatch.setenv("SPEAR_EXPORT", str(tmp_path / "export"))
    model = xares_encoder.SpearEncoder()
    assert (model.sampling_rate, model.output_dim, model.hop_size_in_ms) == (16000, 48, 40.0)
    audio = torch.randn(2, 50000, generator=torch.Generator().manual_seed(0))
    frames = model(audio)
    with torch.no_grad():
        torch.testing.assert_close(frames, encoder(audio).features, rtol=0, atol=0)
    assert abs(frames.shape[1] - 50000 / 16 / 40) <= 3
    assert model(tone(8000)).shape[::2] == (1, 48)


def test_xares_encoder_raises_config_error_when_no_export_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SPEAR_EXPORT", raising=False)
    with pytest.raises(ConfigError, match="SPEAR_EXPORT"):
        xares_encoder.SpearEncoder()
