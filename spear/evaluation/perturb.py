"""Changes of audio that leave what is said as it is: noise, gain, speed and pitch, each of a fixed size."""

from __future__ import annotations

import math
from collections.abc import Callable
from fractions import Fraction

import numpy as np
from numpy.typing import NDArray

Audio = NDArray[np.float32]
NOISE_DB, GAIN_DB, SPEED, SEMITONES = 20.0, -6.0, Fraction(11, 10), 1.0
WINDOW_S, SEARCH_S = 0.04, 0.01
LARGEST_TERM = 100
"""Largest denominator of the ratio that pitch is resampled by; within 0.01 semitones of what is asked for."""


def add_noise(audio: Audio, sample_rate: int, seed: int, snr_db: float = NOISE_DB) -> Audio:
    """White noise `snr_db` below the mean power of audio (S,)."""
    del sample_rate
    noise = np.random.default_rng(seed).standard_normal(len(audio)).astype(np.float32)
    power = float(np.mean(np.square(audio, dtype=np.float64)))
    return audio + np.float32(math.sqrt(power) * 10 ** (-snr_db / 20)) * noise


def change_gain(audio: Audio, sample_rate: int, seed: int, gain_db: float = GAIN_DB) -> Audio:
    """Audio (S,), louder by `gain_db`."""
    del sample_rate, seed
    return audio * np.float32(10 ** (gain_db / 20))


def change_speed(audio: Audio, sample_rate: int, seed: int, factor: Fraction = SPEED) -> Audio:
    """Audio (S,) played `factor` times as fast, so that its pitch rises by as much: about S / factor samples."""
    from scipy.signal import resample_poly

    del sample_rate, seed
    faster: Audio = resample_poly(audio, factor.denominator, factor.numerator).astype(np.float32)
    return faster


def change_pitch(audio: Audio, sample_rate: int, seed: int, semitones: float = SEMITONES) -> Audio:
    """Audio (S,) with every frequency 2^(semitones / 12) times as high and the same length: stretched, then played faster."""
    ratio = Fraction(2 ** (semitones / 12)).limit_denominator(LARGEST_TERM)
    raised = change_speed(stretch(audio, float(ratio), sample_rate), sample_rate, seed, ratio)[: len(audio)]
    return np.pad(raised, (0, len(audio) - len(raised)))


def stretch(audio: Audio, factor: float, sample_rate: int) -> Audio:
    """Audio (S,) at the same pitch and `factor` times as long: overlapping windows laid closer together or farther apart.

    Each window is taken, up to SEARCH_S from its place, from where it continues the one before it best: WSOLA (Verhelst and Roelands, ICASSP 1993).
    """
    hop, search = round(WINDOW_S * sample_rate / 2), round(SEARCH_S * sample_rate)
    size, length = 2 * hop, round(len(audio) * factor)
    window = np.hanning(size + 1)[:-1].astype(np.float32)  # windows half a length apart add up to 1
    count = -(-length // hop) + 1
    margin = 2 * hop + search
    padded = np.pad(audio, (margin, margin + 2 * size))
    out = np.zeros((count + 1) * hop, dtype=np.float32)
    start = 0
    for index in range(count):
        first = min(round((index - 1) * hop / factor) + margin - search, len(padded) - size - hop - 2 * search)
        found = search
        if index:
            region, wanted = padded[first : first + size + 2 * search], padded[start + hop : start + hop + size]
            found = int(np.argmax(np.correlate(region, wanted, "valid")))
        start = first + found
        out[index * hop : index * hop + size] += window * padded[start : start + size]
    return out[hop : hop + length]


CHANGES: dict[str, Callable[[Audio, int, int], Audio]] = {"noise": add_noise, "gain": change_gain, "speed": change_speed, "pitch": change_pitch}
"""Name -> what makes of audio (S,) at a sample rate, with a seed, the changed audio."""
SAME_LENGTH = ("noise", "gain", "pitch")
SAYS = {
    "noise": f"white noise {NOISE_DB:g} dB below the audio",
    "gain": f"{GAIN_DB:g} dB",
    "speed": f"played {float(SPEED):g} times as fast",
    "pitch": f"{SEMITONES:g} semitone up at the same length",
}
