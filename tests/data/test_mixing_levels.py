"""Mixing: the ratios that are heard, where an utterance is taken from and put, and the colour of synthetic noise."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from spear.data.audio import Audio
from spear.data.mixing import DomainMixing, Mixer, MixingConfig, coloured_noise, mix_tokens, mix_utterance
from spear.data.shards import Item
from tests.data.test_mixing import SPECS, item, rng


def ratio_db(one: Audio, other: Audio) -> float:
    return float(10 * np.log10(np.square(one, dtype=np.float64).mean() / np.square(other, dtype=np.float64).mean()))


@pytest.mark.parametrize(("loudness", "other_loudness"), [(0.1, 0.01), (0.01, 0.1)])
@pytest.mark.parametrize("snr_db", [6.0, -3.0])
def test_mix_utterance_meets_the_ratio_whatever_the_loudness_of_both(loudness: float, other_loudness: float, snr_db: float) -> None:
    a, b = item("a", 2.0, 1, gain=loudness).audio, item("b", 2.0, 2, gain=other_loudness).audio
    added = mix_utterance(a, b, snr_db, (0.5, 0.5), rng()) - a
    stretch = added[added != 0]
    assert len(stretch) == pytest.approx(16000, abs=20)
    assert ratio_db(a, stretch) == pytest.approx(snr_db, abs=0.1)


@pytest.mark.parametrize(
    ("p_noise", "other", "snr_db"), [(1.0, "tokens", 40.0), (0.0, "tokens", -40.0), (0.0, "soft", -40.0), (0.0, "utterance", -40.0)]
)
def test_mixer_takes_each_ratio_from_the_key_of_its_kind(p_noise: float, other: Any, snr_db: float) -> None:
    rule = DomainMixing(
        p=1.0, p_noise=p_noise, other=other, noise_snr_db=(40.0, 40.0), other_snr_db=(-40.0, -40.0), max_offset_s=0.0, overlap=(1.0, 1.0)
    )
    items = [item("a", 1.0, 1, gain=0.1), item("b", 1.0, 2, gain=0.02)]
    for old, new in zip(items, Mixer(MixingConfig(domains={"speech": rule}), SPECS)(items, 0, 0)):
        assert ratio_db(old.audio, new.audio - old.audio) == pytest.approx(snr_db, abs=0.1)


def half_silent(cut: Item) -> Item:
    cut.audio[: len(cut.audio) // 2] = 0.0
    return cut


@pytest.mark.parametrize("silent", ["item", "other"])
def test_mix_tokens_counts_the_silence_of_a_cut_in_its_power(silent: str) -> None:
    a, b = item("a", 2.0, 1, gain=0.1), item("b", 2.0, 2, gain=0.3)
    a, b = (half_silent(a), b) if silent == "item" else (a, half_silent(b))
    out = mix_tokens(a, b, snr_db=6.0, offset_s=0.0, specs=SPECS, rng=rng(), soft=True)
    assert ratio_db(a.audio, out.audio - a.audio) == pytest.approx(6.0, abs=0.01)
    assert out.second_share == pytest.approx(1 / (1 + 10**0.6), rel=1e-4)


def test_mix_utterance_takes_its_stretch_from_anywhere_and_puts_it_anywhere() -> None:
    audio, other = np.full(4000, 0.1, np.float32), np.arange(1, 6001, dtype=np.float32)
    sources, targets = [], []
    for seed in range(50):
        added = (mix_utterance(audio, other, 0.0, (0.25, 0.25), rng(seed)) - audio).astype(np.float64)
        changed = np.flatnonzero(added)
        assert len(changed) == 1000
        slope = (added[changed[-1]] - added[changed[0]]) / 999
        sources.append(added[changed[0]] / slope - 1)  # `other` rises by one per sample, from 1
        targets.append(changed[0])
    for starts, last in ((sources, 5000), (targets, 3000)):
        assert -1 <= min(starts) < 0.15 * last
        assert 0.85 * last < max(starts) <= last + 1
        assert np.mean(starts) == pytest.approx(last / 2, abs=0.15 * last)


def test_coloured_noise_falls_between_white_and_brown_evenly() -> None:
    slopes = []
    for seed in range(50):
        power = np.square(np.abs(np.fft.rfft(coloured_noise(rng(seed), 4096).astype(np.float64))))[1:-1]
        slopes.append(np.polyfit(np.log(np.arange(1, len(power) + 1)), np.log(power), 1)[0])
    assert -2.15 < min(slopes) < -1.7
    assert -0.3 < max(slopes) < 0.15
    assert np.mean(slopes) == pytest.approx(-1.0, abs=0.25)
    assert np.std(slopes) == pytest.approx(2 / 12**0.5, rel=0.25)
