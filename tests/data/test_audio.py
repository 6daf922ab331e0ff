"""Reading audio strictly: rates, channels, stretches, and every kind of broken file."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from lhotse import Recording
from lhotse.cut import MonoCut

from spear.data.audio import load_audio, load_audio_file, open_recording
from spear.errors import DataError
from tests.data.cuts import cut_of, save, tone


def truncated_flac(path: Path, seconds: float, keep: float) -> Path:
    save(path, np.random.default_rng(0).uniform(-0.5, 0.5, round(seconds * 16000)).astype(np.float32))
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * keep)])
    return path


def test_load_audio_returns_the_samples_of_the_file(tmp_path: Path) -> None:
    audio = tone(0.5)
    found = load_audio(cut_of(save(tmp_path / "a.wav", audio, subtype="FLOAT")))
    assert found.dtype == np.float32
    assert np.array_equal(found, audio)


@pytest.mark.parametrize("rate", [8000, 22050, 44100])
def test_load_audio_resamples_to_the_same_tone(tmp_path: Path, rate: int) -> None:
    found = load_audio_file(save(tmp_path / "a.wav", tone(1.0, rate), rate))
    assert len(found) == 16000
    assert np.abs(np.fft.rfft(found)).argmax() == 440  # 1 s, so bins are Hz
    assert abs(np.sqrt(np.mean(found**2)) - 0.3 / np.sqrt(2)) < 0.01


@pytest.mark.parametrize("suffix", ["flac", "ogg", "mp3"])
def test_load_audio_reads_compressed_files(tmp_path: Path, suffix: str) -> None:
    found = load_audio_file(save(tmp_path / f"a.{suffix}", tone(1.0)))
    assert abs(len(found) - 16000) <= 1200
    assert 0.25 < np.abs(found).max() < 0.4


def test_load_audio_averages_channels_of_a_multi_cut_and_of_listed_channels(tmp_path: Path) -> None:
    left, right = tone(0.5, hz=300), tone(0.5, hz=900)
    path = save(tmp_path / "a.wav", np.stack([left, right], axis=1), subtype="FLOAT")
    cut = Recording.from_file(path).to_cut()
    assert np.allclose(load_audio(cut), (left + right) / 2, atol=1e-7)
    one = MonoCut("x", 0.0, 0.5, 1, recording=cut.recording)
    assert np.array_equal(load_audio(one), right)
    one.custom = {"downmix": [0, 1]}
    assert np.allclose(load_audio(one), (left + right) / 2, atol=1e-7)


def test_load_audio_reads_a_stretch(tmp_path: Path) -> None:
    audio = tone(1.0)
    cut = cut_of(save(tmp_path / "a.wav", audio, subtype="FLOAT")).truncate(offset=0.25, duration=0.5)
    assert np.array_equal(load_audio(cut), audio[4000:12000])


def test_load_audio_raises_data_error_when_the_file_is_gone(tmp_path: Path) -> None:
    path = save(tmp_path / "a.wav", tone(0.5))
    cut = cut_of(path, "gone")
    path.unlink()
    with pytest.raises(DataError, match=r"cut gone \(.*a\.wav\): the file does not exist") as error:
        load_audio(cut)
    assert error.value.cause == "missing_file"


@pytest.mark.parametrize("keep", [0.3, 0.8])
def test_load_audio_raises_data_error_when_a_flac_is_truncated(tmp_path: Path, keep: float) -> None:
    cut = cut_of(save(tmp_path / "a.flac", tone(1.0)), "cut7")
    truncated_flac(tmp_path / "a.flac", 1.0, keep)
    with pytest.raises(DataError, match=r"cut cut7 \(.*a\.flac\): (cannot be decoded|must hold 16000 samples)") as error:
        load_audio(cut)
    assert error.value.cause in ("decode", "length_mismatch")


def test_load_audio_raises_data_error_when_the_file_is_shorter_than_its_manifest(tmp_path: Path) -> None:
    path = save(tmp_path / "a.wav", tone(1.0))
    cut = cut_of(path)
    save(path, tone(0.9))  # 0.1 s less: Lhotse alone would mirror what is there
    with pytest.raises(DataError, match="must hold 16000 samples at 16000 Hz, but holds 14400") as error:
        load_audio(cut)
    assert error.value.cause == "length_mismatch"


def test_load_audio_fills_a_few_missing_samples(tmp_path: Path) -> None:
    path = save(tmp_path / "a.wav", tone(1.0), subtype="FLOAT")
    cut = cut_of(path)
    save(path, tone(1.0)[:15990], subtype="FLOAT")
    assert np.array_equal(load_audio(cut), np.pad(tone(1.0)[:15990], (0, 10)))


def test_load_audio_raises_data_error_when_samples_are_not_finite(tmp_path: Path) -> None:
    audio = tone(0.5)
    audio[[3, 5]] = np.nan, np.inf
    with pytest.raises(DataError, match="2 samples are not finite") as error:
        load_audio(cut_of(save(tmp_path / "a.wav", audio, subtype="FLOAT")))
    assert error.value.cause == "not_finite"


def test_load_audio_raises_data_error_when_shorter_than_a_window(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"must last at least 0\.025 s, but lasts 0\.01 s") as error:
        load_audio(cut_of(save(tmp_path / "a.wav", tone(0.01))))
    assert error.value.cause == "too_short"


def test_open_recording_raises_data_error_when_there_is_no_audio(tmp_path: Path) -> None:
    (tmp_path / "none.wav").touch()
    save(tmp_path / "header.wav", np.zeros(0, np.float32))
    (tmp_path / "text.wav").write_text("this is no audio " * 20)
    with pytest.raises(DataError, match=r"none\.wav holds no audio: the file is empty"):
        open_recording(tmp_path / "none.wav", "x")
    with pytest.raises(DataError, match=r"header\.wav holds no audio"):
        open_recording(tmp_path / "header.wav", "x")
    with pytest.raises(DataError, match=r"text\.wav cannot be decoded"):
        open_recording(tmp_path / "text.wav", "x")
    with pytest.raises(DataError, match=r"gone\.wav does not exist"):
        open_recording(tmp_path / "gone.wav", "x")
