"""Log-mels and cepstra against recorded outputs, Lhotse and formulas."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from lhotse import Fbank, FbankConfig, Mfcc, MfccConfig
from safetensors.torch import load_file

from spear.data import fbank as module
from spear.data.fbank import fbank, fbank_batch, mfcc, num_fbank_frames
from spear.errors import DataError
from spear.types import LOG_EPSILON


def sound(samples: int, seed: int = 0) -> torch.Tensor:
    return 0.1 * torch.randn(samples, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("name", ["0", "1", "2", "3", "zeros"])
def test_fbank_matches_recorded_features(fixtures: Path, name: str) -> None:
    found = load_file(fixtures / "fbank.safetensors")
    assert torch.allclose(fbank(found[f"wav.{name}"]), found[f"fbank.{name}"], rtol=0, atol=1e-3)


@pytest.mark.parametrize("samples", [240, 400, 401, 5000, 16001, 96079, 96080])
@pytest.mark.parametrize("bins", [80, 128])
def test_fbank_matches_lhotse_also_at_the_edges(samples: int, bins: int) -> None:
    expected = Fbank(FbankConfig(num_mel_bins=bins)).extract(sound(samples, samples), 16000)
    found = fbank(sound(samples, samples), bins)
    assert found.shape == expected.shape
    assert torch.allclose(found, torch.as_tensor(expected), rtol=0, atol=1e-3)


@pytest.mark.parametrize(("samples", "frames"), [(79, 0), (80, 1), (239, 1), (240, 2), (16000, 100)])
def test_num_fbank_frames_rounds_to_the_nearest_hop(samples: int, frames: int) -> None:
    assert num_fbank_frames(samples) == frames


def test_fbank_of_silence_is_the_floor_and_shifts_with_gain() -> None:
    assert torch.equal(fbank(torch.zeros(800)), torch.full((5, 128), math.log(2.0**-23)))
    x = sound(3200)
    louder = fbank(2 * x) - fbank(x)
    heard = fbank(x) > -15
    assert torch.allclose(louder[heard], torch.tensor(2 * math.log(2.0)), atol=1e-3)


def test_fbank_mirrors_audio_shorter_than_the_padding() -> None:
    short = fbank(sound(80))
    assert short.shape == (1, 128)
    assert torch.isfinite(short).all()


def test_fbank_batch_equals_single_utterances_and_pads() -> None:
    audio = torch.stack([sound(4000), sound(4000, 1)])
    audio[1, 1600:] = 5.0  # padding must not be heard
    features, lens = fbank_batch(audio, torch.tensor([4000, 1600]))
    assert lens.tolist() == [25, 10]
    assert torch.equal(features[0], fbank(audio[0]))
    assert torch.equal(features[1, :10], fbank(audio[1, :1600]))
    assert (features[1, 10:] == LOG_EPSILON).all()


def test_fbank_stays_in_single_precision_under_autocast() -> None:
    x = sound(4000)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(fbank(x), fbank(x.clone()))
        half = fbank(x)
    assert torch.equal(half, fbank(x))


def test_fbank_raises_data_error_when_too_short_or_not_flat() -> None:
    with pytest.raises(DataError, match="at least 80 samples at 16 kHz, but has 79"):
        fbank(torch.zeros(79))
    with pytest.raises(DataError, match=r"shape \(S,\), but has \(1, 800\)"):
        fbank(torch.zeros(1, 800))


def test_mfcc_matches_lhotse_and_has_regression_deltas() -> None:
    x = sound(20000)
    found = mfcc(x)
    expected = torch.as_tensor(Mfcc(MfccConfig(high_freq=0.0)).extract(x, 16000))
    assert found.shape == (125, 39)
    assert torch.allclose(found[:, :13], expected, rtol=0, atol=2e-3)
    c = found[:, :13]
    assert torch.allclose(found[60, 13:26], (c[61] - c[59] + 2 * (c[62] - c[58])) / 10, atol=1e-5)
    d = found[:, 13:26]
    assert torch.allclose(found[60, 26:], (d[61] - d[59] + 2 * (d[62] - d[58])) / 10, atol=1e-5)


def test_fbank_in_large_blocks_gives_the_same_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    x = sound(160 * 1300)
    small = fbank(x)
    monkeypatch.setattr(module, "BLOCK_FRAMES", module.DEVICE_BLOCK_FRAMES)
    torch.testing.assert_close(fbank(x), small, atol=1e-4, rtol=0)
