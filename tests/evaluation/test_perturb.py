"""Changes of audio."""

from __future__ import annotations

import numpy as np
import pytest

from spear.evaluation.perturb import CHANGES, GAIN_DB, NOISE_DB, SAME_LENGTH, SAYS, SEMITONES, SPEED, Audio, stretch

RATE, HZ = 16000, 440.0


def tone(seconds: float = 1.0, hz: float = HZ) -> Audio:
    return (0.3 * np.sin(2 * np.pi * hz * np.arange(round(seconds * RATE)) / RATE)).astype(np.float32)


def peak_hz(audio: Audio) -> float:
    middle = audio[2000:-2000]
    spectrum = np.abs(np.fft.rfft(middle * np.hanning(len(middle)), 1 << 18))
    return float(np.argmax(spectrum)) * RATE / (1 << 18)


@pytest.mark.parametrize("name", CHANGES)
def test_changes_keep_type_and_length_and_repeat_themselves(name: str) -> None:
    audio = tone()
    before = audio.copy()
    changed = CHANGES[name](audio, RATE, 3)
    assert changed.dtype == np.float32
    assert np.isfinite(changed).all()
    assert np.array_equal(audio, before)
    assert np.array_equal(changed, CHANGES[name](audio, RATE, 3))
    assert (len(changed) == len(audio)) == (name in SAME_LENGTH)
    assert name in SAYS


def test_noise_has_the_level_it_says() -> None:
    audio = tone()
    noise = CHANGES["noise"](audio, RATE, 0) - audio
    assert 10 * np.log10(np.mean(audio**2) / np.mean(noise**2)) == pytest.approx(NOISE_DB, abs=0.2)
    assert not np.array_equal(CHANGES["noise"](audio, RATE, 1), audio + noise)


def test_gain_scales_the_audio() -> None:
    audio = tone()
    np.testing.assert_allclose(CHANGES["gain"](audio, RATE, 0), audio * 10 ** (GAIN_DB / 20), rtol=1e-6)


def test_speed_changes_length_and_pitch_together() -> None:
    changed = CHANGES["speed"](tone(), RATE, 0)
    assert len(changed) == pytest.approx(RATE / float(SPEED), abs=1)
    assert peak_hz(changed) == pytest.approx(HZ * float(SPEED), rel=2e-3)


def test_pitch_changes_frequency_and_nothing_else() -> None:
    audio = tone()
    changed = CHANGES["pitch"](audio, RATE, 0)
    assert peak_hz(changed) == pytest.approx(HZ * 2 ** (SEMITONES / 12), rel=2e-3)
    assert np.std(changed[2000:-2000]) == pytest.approx(np.std(audio), rel=0.1)


@pytest.mark.parametrize("factor", [0.8, 1.06, 1.5])
def test_stretch_changes_length_and_keeps_the_pitch(factor: float) -> None:
    longer = stretch(tone(), factor, RATE)
    assert len(longer) == round(RATE * factor)
    assert peak_hz(longer) == pytest.approx(HZ, rel=2e-3)
    assert np.std(longer[2000:-2000]) == pytest.approx(np.std(tone()), rel=0.1)


def test_changes_take_very_short_audio() -> None:
    for change in CHANGES.values():
        assert np.isfinite(change(tone(0.025), RATE, 0)).all()
