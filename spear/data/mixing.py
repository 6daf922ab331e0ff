"""Mixing of noise and of other cuts into a cut: audio and its tokens change together, and what is not drawn stays as it is.

Utterance mixing follows WavLM (arXiv:2110.13900, section IV-A), token mixing the second version of SPEAR (arXiv:2510.25955).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import numpy as np
import scipy.fft

from spear.bounds import within
from spear.data.audio import Audio
from spear.data.fbank import SAMPLE_RATE
from spear.data.shards import Codes, Item
from spear.errors import ConfigError
from spear.files import seed_from
from spear.types import IGNORE, TokenSpec

Range = tuple[float, float]
NoiseDraw = Callable[[np.random.Generator, int], Audio]
"""(generator, samples) -> (samples,) float32 noise."""

ACTIVE_BLOCK, ACTIVE_DB = 400, -40.0


@dataclass(frozen=True, kw_only=True, slots=True)
class DomainMixing:
    """What is mixed into the cuts of one domain."""

    p: float = 0.5
    """Probability that a cut is mixed with anything."""
    p_noise: float = 0.8
    """Of those, the share that gets noise; the rest gets another cut of the batch, of the same domain."""
    other: Literal["tokens", "soft", "utterance"] = "tokens"
    """``tokens``: the mixture carries tokens of both cuts, drawn cell by cell; ``soft``: every cell carries both with their probabilities, which
    is the mean over all draws; ``utterance``: those of the first cut only."""
    noise_snr_db: Range = (10.0, 20.0)
    """Signal-to-noise ratio of noise, uniform in dB."""
    other_snr_db: Range = (-5.0, 5.0)
    """Ratio of the cut to the other cut, uniform in dB."""
    max_offset_s: float = 2.0
    """Token mixing: the whole other cut starts up to this much later, and never after the first has ended."""
    overlap: Range = (0.2, 0.5)
    """Utterance mixing: share of the cut that the other one covers."""

    def __post_init__(self) -> None:
        for key, value in (("p", self.p), ("p_noise", self.p_noise)):
            within(key, value, 0, 1)
        if self.other not in ("tokens", "soft", "utterance"):
            raise ConfigError(f"`other` must be one of tokens, soft, utterance, but is {self.other!r}")
        for key, pair in (("noise_snr_db", self.noise_snr_db), ("other_snr_db", self.other_snr_db), ("overlap", self.overlap)):
            if len(pair) != 2 or not -100 <= pair[0] <= pair[1] <= 100:
                raise ConfigError(f"`{key}` must be two numbers, the smaller first, but is {list(pair)}")
        if not 0 < self.overlap[0] <= self.overlap[1] <= 1:
            raise ConfigError(f"`overlap` must lie in 0 to 1, but is {list(self.overlap)}")
        if not 0 <= self.max_offset_s < float("inf"):
            raise ConfigError(f"`max_offset_s` must be 0 or more, but is {self.max_offset_s}")

    @property
    def growth_s(self) -> float:
        """Most seconds by which a mixture may outlast the longer of its two cuts; only token mixing takes the whole other cut, delayed."""
        return self.max_offset_s if self.other != "utterance" and self.p > 0 and self.p_noise < 1 else 0.0


def _paper() -> dict[str, DomainMixing]:
    return {"speech": DomainMixing(), "audio": DomainMixing(p_noise=1.0)}


@dataclass(frozen=True, kw_only=True, slots=True)
class MixingConfig:
    """What is mixed into training cuts."""

    domains: dict[str, DomainMixing] = field(default_factory=_paper)
    """Domain -> what is mixed into its cuts; cuts of other domains stay as they are."""
    noise_domains: list[str] = field(default_factory=lambda: ["noise"])
    """Corpora of these domains give the noise. Where the recipe has no other use for such a domain its corpora get no tokens.
    Without any such corpus the noise is synthetic, with a random colour between white and brown."""

    def growth_s(self, domain: str) -> float:
        """Most seconds by which mixing may make a cut of `domain` longer than the longest cut of its batch and domain."""
        return self.domains[domain].growth_s if domain in self.domains else 0.0


class Mixer:
    """Applies a MixingConfig to the items of a batch.

    Args:
        config: what to mix. specs: teacher -> rate of its tokens. noise: draws noise; None for synthetic noise.
    """

    def __init__(self, config: MixingConfig, specs: dict[str, TokenSpec], noise: NoiseDraw | None = None) -> None:
        self.config, self.specs, self.noise = config, specs, noise or coloured_noise

    @property
    def soft(self) -> bool:
        """Whether a mixture may carry both cuts' tokens."""
        return any(rule.other == "soft" for rule in self.config.domains.values())

    def __call__(self, items: Sequence[Item], seed: int, g: int) -> list[Item]:
        """Mix batch `g`; an item that is not drawn is returned as the object it is.

        Every choice about an item depends on seed, g and its id; partners are always taken unmixed.
        """
        return [self._mix(item, items, np.random.default_rng(seed_from(seed, "mix", g, item.id))) for item in items]

    def _mix(self, item: Item, items: Sequence[Item], rng: np.random.Generator) -> Item:
        rule = self.config.domains.get(item.domain)
        if rule is None or rng.random() >= rule.p:
            return item
        if rng.random() < rule.p_noise:
            noise = self.noise(rng, len(item.audio))
            return replace(item, audio=add_noise(item.audio, noise, rng.uniform(*rule.noise_snr_db)))
        partners = [other for other in items if other.id != item.id and other.domain == item.domain]
        if not partners:
            return item
        other = partners[int(rng.integers(len(partners)))]
        snr_db = rng.uniform(*rule.other_snr_db)
        if rule.other == "utterance":
            return replace(item, audio=mix_utterance(item.audio, other.audio, snr_db, rule.overlap, rng))
        offset_s = rng.uniform(0.0, min(rule.max_offset_s, len(item.audio) / SAMPLE_RATE))
        return mix_tokens(item, other, snr_db=snr_db, offset_s=offset_s, specs=self.specs, rng=rng, soft=rule.other == "soft")


def add_noise(audio: Audio, noise: Audio, snr_db: float) -> Audio:
    """Add noise (S,) to all of the audio (S,) at a ratio of the powers of their active parts; silence on either side adds nothing."""
    gain = _gain(active_power(audio), active_power(noise), snr_db)
    return audio if gain == 0 else audio + np.float32(gain) * noise


def mix_utterance(audio: Audio, other: Audio, snr_db: float, overlap: Range, rng: np.random.Generator) -> Audio:
    """Add a random stretch of `other` at a random place of `audio`; the length stays.

    Args:
        audio: (S,). other: (S2,). snr_db: ratio of the powers of their active parts.
        overlap: least and most share of S that the stretch covers; less where `other` is shorter.
    """
    length = min(round(rng.uniform(*overlap) * len(audio)), len(other))
    source = int(rng.integers(len(other) - length + 1))
    target = int(rng.integers(len(audio) - length + 1))
    stretch = other[source : source + length]
    gain = _gain(active_power(audio), active_power(stretch), snr_db)
    if gain == 0:
        return audio
    mixed = audio.copy()
    mixed[target : target + length] += np.float32(gain) * stretch
    return mixed


def mix_tokens(
    item: Item, other: Item, *, snr_db: float, offset_s: float, specs: dict[str, TokenSpec], rng: np.random.Generator, soft: bool = False
) -> Item:
    """Add all of `other`, delayed, and interleave the tokens in proportion to the powers.

    Where both sound, each (frame, codebook) cell takes the other's token with probability
    beta = g^2 P_other / (P_item + g^2 P_other); after the item's end all tokens are the other's. Powers are mean squares of the whole
    cuts. With a silent cut on either side nothing changes.

    Args:
        snr_db: ratio of the item to the scaled other. offset_s: delay in seconds, at most the item's duration.
        specs: teacher -> token rate; the tokens' delay is the whole frames of `offset_s`. rng: draws the cells.
        soft: draw none, but keep both tokens of every cell and beta beside them.
    Returns:
        An item as long as the mixture.
    Source: arXiv:2510.25955, token mixing.
    """
    power, other_power = _power(item.audio), _power(other.audio)
    gain = _gain(power, other_power, snr_db)
    if gain == 0:
        return item
    start = min(int(offset_s * SAMPLE_RATE), len(item.audio))
    mixed = np.zeros(max(len(item.audio), start + len(other.audio)), np.float32)
    mixed[: len(item.audio)] = item.audio
    mixed[start : start + len(other.audio)] += np.float32(gain) * other.audio
    beta = gain**2 * other_power / (power + gain**2 * other_power + 1e-8)
    tokens: dict[str, Codes] = {}
    second: dict[str, Codes] = {}
    for teacher, codes in item.tokens.items():
        rate = specs[teacher].frame_rate_hz
        frames = int(len(mixed) * rate / SAMPLE_RATE) if len(mixed) > len(item.audio) else len(codes)
        place = int(offset_s * rate), frames
        if soft:
            tokens[teacher], second[teacher] = overlay(codes, other.tokens.get(teacher), *place)
        else:
            tokens[teacher] = interleave(codes, other.tokens.get(teacher), beta, *place, rng)
    return replace(item, audio=mixed, tokens=tokens, second=second, second_share=beta if soft else 0.0)


def interleave(codes: Codes, other: Codes | None, beta: float, offset: int, frames: int, rng: np.random.Generator) -> Codes:
    """Tokens of a mixture, those of the overlap drawn cell by cell.

    Args:
        beta: probability of a cell to be replaced in the overlap. rng: draws. The rest: see `overlay`.
    Returns:
        (T', C) int16 or wider. A gap between the two, if any, is IGNORE.
    """
    mixed, second = overlay(codes, other, offset, frames)
    both = slice(offset, offset + int((second != IGNORE).any(axis=1).sum()))
    taken = rng.random(second[both].shape) < beta
    mixed[both][taken] = second[both][taken]
    return mixed


def overlay(codes: Codes, other: Codes | None, offset: int, frames: int) -> tuple[Codes, Codes]:
    """Tokens of two cuts on one axis of time.

    Args:
        codes: (T, C). other: (T2, C), None where the other cut has no such tokens: then nothing is replaced and the tail has no tokens.
        offset: frames before `other` starts. frames: the mixture's own length in frames; the result is never longer than this and both
            cuts' tokens allow.
    Returns:
        (T', C) int16 or wider: `codes`, then what of `other` outlasts them, and IGNORE in a gap between the two; and (T', C) `other` where
        both sound, else IGNORE.
    """
    if other is None:
        other = np.full((0, codes.shape[1]), 0, codes.dtype)
    length = max(len(codes), min(offset + len(other), frames))
    first = np.full((length, codes.shape[1]), IGNORE, np.promote_types(codes.dtype, np.int16))
    second = first.copy()
    first[: len(codes)] = codes
    other = other[: max(length - offset, 0)]
    both = max(min(len(codes) - offset, len(other)), 0)
    second[offset : offset + both] = other[:both]
    first[offset + both : offset + len(other)] = other[both:]
    return first, second


def coloured_noise(rng: np.random.Generator, samples: int) -> Audio:
    """(samples,) float32 Gaussian noise whose power falls as 1 / f^a, a uniform in 0 (white) to 2 (brown); mean square about 1."""
    size = scipy.fft.next_fast_len(samples, real=True)
    spectrum = scipy.fft.rfft(rng.standard_normal(size, np.float32))
    frequency = np.arange(len(spectrum), dtype=np.float32)
    frequency[0] = np.inf
    noise: Audio = scipy.fft.irfft(spectrum * frequency ** np.float32(-rng.uniform(0.0, 2.0) / 2), size)[:samples]
    return noise / np.float32(max(float(noise.std()), 1e-12))


def active_power(audio: Audio) -> float:
    """Mean square of the 25 ms blocks that are within 40 dB of the loudest one; 0 for silence."""
    whole = len(audio) // ACTIVE_BLOCK * ACTIVE_BLOCK
    blocks = audio[:whole].reshape(-1, ACTIVE_BLOCK) if whole else audio[None]
    powers = np.square(blocks, dtype=np.float64).mean(axis=1)
    loudest = float(powers.max(initial=0.0))
    return float(powers[powers >= loudest * 10 ** (ACTIVE_DB / 10)].mean()) if loudest > 0 else 0.0


def _power(audio: Audio) -> float:
    return float(np.square(audio, dtype=np.float64).mean())


def _gain(power: float, other_power: float, snr_db: float) -> float:
    """Factor on the other signal that gives the ratio; 0 where either signal is silent."""
    if power <= 0 or other_power <= 0:
        return 0.0
    return float(np.sqrt(power * 10 ** (-snr_db / 10) / other_power))
