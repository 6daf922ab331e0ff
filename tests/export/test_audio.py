"""Checks on waveforms, and reading of audio files."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch

from spear.data.inputs import SILENT_LOG_MEL
from spear.errors import DataError
from spear.export.audio import check_audio, check_lens, encode_features, min_samples, pad_short, read_audio, read_batch
from tests.export.tiny import tiny_encoder, tone

CPU = torch.device("cpu")


def test_check_audio_accepts_one_waveform_arrays_and_other_floats() -> None:
    wave = tone(1000)
    for value in (wave, wave.double(), wave.numpy(), wave.numpy()[::-1][::-1], wave.numpy().astype(">f8")):
        audio, lens = check_audio(value, None, CPU)
        assert audio.dtype == torch.float32
        assert lens.tolist() == [1000]
        torch.testing.assert_close(audio[0], wave)


@pytest.mark.parametrize(
    ("audio", "lens", "match"),
    [
        (torch.zeros(2, 100, dtype=torch.int16), None, r"`audio` must be floating, but is int16: divide"),
        (np.array(["a"]), None, r"`audio` must be floating, but is <U1"),
        ([0.0, 0.1], None, r"`audio` must be a tensor or an array, but is a list"),
        (torch.zeros(1, 2, 3), None, r"`audio` must have the shape \(N, S\) or \(S,\), but has \(1, 2, 3\)"),
        (torch.zeros(2, 0), None, r"must not be empty, but has the shape \(2, 0\)"),
        (torch.full((2, 9), 300.0), None, r"must lie in \[-1, 1\], but item 0 reaches 300: divide"),
        (torch.tensor([[0.0, 0.0], [0.0, float("nan")]]), None, r"`audio` must be finite, but item 1 holds NaN"),
        (torch.zeros(2, 9), torch.tensor([9]), r"`lens` must have the shape \(2,\), but has \(1,\)"),
        (torch.zeros(2, 9), torch.tensor([9, 10]), r"`lens` must lie between 1 and 9, but item 1 has 10"),
        (torch.zeros(2, 9), torch.tensor([0, 9]), r"`lens` must lie between 1 and 9, but item 0 has 0"),
        (torch.zeros(2, 9), torch.tensor([1.0, 0.5]), r"`lens` must hold whole numbers, but is float32"),
    ],
)
def test_check_audio_raises_data_error_when_a_rule_is_broken(audio: object, lens: object, match: str) -> None:
    with pytest.raises(DataError, match=match) as caught:
        check_audio(audio, lens, CPU)
    assert "\n" not in str(caught.value)


def test_check_audio_never_looks_past_the_lengths() -> None:
    audio = torch.zeros(2, 10)
    audio[0, 5:] = float("nan")
    audio[1, 8:] = 1e6
    found, lens = check_audio(audio, [5, 8], CPU)
    assert found.shape == (2, 10)
    assert lens.tolist() == [5, 8]


def test_check_lens_defaults_to_all() -> None:
    assert check_lens(None, 3, 7, CPU).tolist() == [7, 7, 7]


def test_pad_short_fills_with_silence_and_leaves_long_audio() -> None:
    audio = torch.ones(2, 20)
    padded, lens = pad_short(audio, torch.tensor([4, 20]), 10)
    assert lens.tolist() == [10, 20]
    assert padded[0].tolist() == [1.0] * 4 + [0.0] * 16
    assert pad_short(audio, torch.tensor([10, 20]), 10)[0] is audio


def test_encode_features_fills_short_input_with_the_log_mel_of_silence() -> None:
    encoder = tiny_encoder().encoder
    short = torch.randn(1, 4, 128)
    filled = torch.cat([short, torch.full((1, 5, 128), SILENT_LOG_MEL)], dim=1)
    with torch.no_grad():
        torch.testing.assert_close(encode_features(encoder, short).features, encode_features(encoder, filled).features)


def test_encode_features_ignores_what_lies_past_the_lengths() -> None:
    encoder = tiny_encoder().encoder
    features = torch.randn(2, 40, 128)
    other = features.clone()
    other[0, 20:], other[1, 31:] = 5.0, float("nan")
    lens = torch.tensor([20, 31])
    with torch.no_grad():
        first, second = encode_features(encoder, features, lens), encode_features(encoder, other, lens)
    assert torch.equal(first.features, second.features)
    assert first.lens.tolist() == [(20 - 7) // 2, (31 - 7) // 2]


@pytest.mark.parametrize(
    ("shape", "match"), [((2, 40, 80), r"shape \(N, T, 128\), but has \(2, 40, 80\)"), ((128,), r"but has \(128,\)"), ((1, 0, 128), "at least one")]
)
def test_encode_features_raises_data_error_when_shape_is_wrong(shape: tuple[int, ...], match: str) -> None:
    with pytest.raises(DataError, match=match):
        encode_features(tiny_encoder().encoder, torch.zeros(shape))


def test_min_samples_is_the_shortest_audio_with_nine_frames() -> None:
    assert min_samples(tiny_encoder().encoder) == 9 * 160 - 80


@pytest.mark.parametrize("rate", [8000, 16000, 22050, 48000])
def test_read_audio_resamples_and_averages_channels(tmp_path: Path, rate: int) -> None:
    time = np.arange(rate) / rate
    wave = 0.5 * np.sin(2 * np.pi * 440 * time)
    soundfile.write(tmp_path / "a.wav", np.stack([wave, 0.2 * wave], axis=1), rate, subtype="FLOAT")
    found = read_audio(tmp_path / "a.wav", 16000)
    expected = 0.6 * 0.5 * np.sin(2 * np.pi * 440 * np.arange(16000) / 16000)
    assert found.shape == (16000,)
    np.testing.assert_allclose(found[200:-200], expected[200:-200], atol=2e-3)


def test_read_batch_pads_with_zeros(tmp_path: Path) -> None:
    for name, samples in (("a", 300), ("b", 500)):
        soundfile.write(tmp_path / f"{name}.wav", tone(samples).numpy(), 16000, subtype="FLOAT")
    audio, lens = read_batch([tmp_path / "a.wav", str(tmp_path / "b.wav")], 16000)
    assert lens.tolist() == [300, 500]
    assert audio.shape == (2, 500)
    assert not audio[0, 300:].any()
    torch.testing.assert_close(audio[1], tone(500))


def test_read_audio_raises_data_error_when_file_is_bad(tmp_path: Path) -> None:
    (tmp_path / "text.wav").write_text("no audio")
    soundfile.write(tmp_path / "empty.wav", np.zeros(0), 16000)
    soundfile.write(tmp_path / "nan.wav", np.array([0.0, np.nan], dtype=np.float32), 16000, subtype="FLOAT")
    for name, match, cause in (
        ("none.wav", "is not a file", "missing_file"),
        ("text.wav", "cannot be decoded", "decode"),
        ("empty.wav", "no samples", "empty"),
        ("nan.wav", "NaN", "not_finite"),
    ):
        with pytest.raises(DataError, match=f"{name} .*{match}") as caught:
            read_audio(tmp_path / name, 16000)
        assert caught.value.cause == cause
    with pytest.raises(DataError, match="at least one audio file"):
        read_batch([], 16000)
