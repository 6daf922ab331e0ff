"""Mixing: powers, places, tokens, and what must stay untouched."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from spear.data.mixing import (
    DomainMixing,
    Mixer,
    MixingConfig,
    active_power,
    add_noise,
    coloured_noise,
    interleave,
    mix_tokens,
    mix_utterance,
    overlay,
)
from spear.data.shards import Item
from spear.errors import ConfigError
from spear.types import IGNORE, TokenSpec

RATE, C = 50.0, 8
SPECS = {"t": TokenSpec(num_codebooks=C, codebook_size=16, frame_rate_hz=RATE, first_frame_s=0.01)}


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def item(name: str, seconds: float, code: int, *, domain: str = "speech", gain: float = 0.1, extra_frames: int = 0) -> Item:
    """White noise with one code everywhere, so that the origin of every token can be told."""
    audio = (gain * rng(code).standard_normal(round(seconds * 16000))).astype(np.float32)
    return Item(name, domain, audio, {"t": np.full((int(seconds * RATE) + extra_frames, C), code, np.uint8)})


def mixed(a: Item, b: Item, snr_db: float = 0.0, offset_s: float = 0.0, seed: int = 0, *, soft: bool = False) -> Item:
    return mix_tokens(a, b, snr_db=snr_db, offset_s=offset_s, specs=SPECS, rng=rng(seed), soft=soft)


def share(codes: Any, code: int) -> float:
    return float((codes == code).mean())


def test_token_mixing_of_the_same_length_at_offset_zero_keeps_the_shape() -> None:
    a, b = item("a", 4.0, 1), item("b", 4.0, 2)
    out = mixed(a, b)
    assert out.tokens["t"].shape == (200, C)
    assert len(out.audio) == 64000
    assert set(np.unique(out.tokens["t"])) == {1, 2}


@pytest.mark.parametrize(("snr_db", "beta"), [(5.0, 0.2403), (0.0, 0.5), (-5.0, 0.7597)])
@pytest.mark.parametrize("loudness", [0.5, 0.01])
def test_token_mixing_replaces_cells_in_proportion_to_the_powers(snr_db: float, beta: float, loudness: float) -> None:
    a, b = item("a", 40.0, 1, gain=loudness), item("b", 40.0, 2, gain=0.2)
    out = mixed(a, b, snr_db)
    assert beta == pytest.approx(1 / (1 + 10 ** (snr_db / 10)), abs=1e-4)
    cells = 2000 * C
    assert share(out.tokens["t"], 2) == pytest.approx(beta, abs=4 * (beta * (1 - beta) / cells) ** 0.5)
    added = out.audio - a.audio
    ratio = 10 * np.log10(np.mean(np.square(a.audio, dtype=np.float64)) / np.mean(np.square(added, dtype=np.float64)))
    assert ratio == pytest.approx(snr_db, abs=1e-2)


def test_token_mixing_draws_every_cell_alone() -> None:
    taken = mixed(item("a", 40.0, 1), item("b", 40.0, 2)).tokens["t"] == 2
    per_frame = taken.sum(axis=1)
    assert per_frame.var() == pytest.approx(C / 4, rel=0.15)  # binomial, not all or nothing
    assert np.abs(np.corrcoef(taken[:-1, 0], taken[1:, 0])[0, 1]) < 0.1


def test_token_mixing_delays_the_partner_and_gives_it_the_tail() -> None:
    a, b = item("a", 2.0, 1), item("b", 3.0, 2)
    out = mixed(a, b, snr_db=-60.0, offset_s=1.01)
    codes = out.tokens["t"]
    assert len(out.audio) == round(4.01 * 16000)
    assert codes.shape == (50 + 150, C)  # int(1.01 * 50) = 50 frames late
    assert (codes[:50] == 1).all()
    assert (codes[50:] == 2).all()  # beta is all but 1
    quiet = mixed(a, b, snr_db=60.0, offset_s=1.01).tokens["t"]
    assert (quiet[:100] == 1).mean() > 0.999  # beta is all but 0 in the overlap
    assert (quiet[100:] == 2).all()  # but the tail is the partner's
    assert np.array_equal(out.audio[:16160], a.audio[:16160])


def test_token_mixing_with_a_shorter_partner_keeps_the_length() -> None:
    a, b = item("a", 3.0, 1), item("b", 1.0, 2)
    codes = mixed(a, b, snr_db=-60.0, offset_s=0.5).tokens["t"]
    assert codes.shape == (150, C)
    assert (codes[:25] == 1).all()
    assert (codes[25:75] == 2).all()
    assert (codes[75:] == 1).all()


@pytest.mark.parametrize("extra", [-1, 1])
def test_token_mixing_bears_lengths_that_are_off_by_one(extra: int) -> None:
    a, b = item("a", 2.0, 1, extra_frames=extra), item("b", 2.0, 2, extra_frames=extra)
    assert mixed(a, b).tokens["t"].shape == (100 + extra, C)
    longer = mixed(a, item("c", 4.0, 3, extra_frames=extra), offset_s=0.5).tokens["t"]
    assert len(longer) == min(25 + 200 + extra, 225)
    assert IGNORE not in longer


def test_token_mixing_rounds_a_fractional_offset_down() -> None:
    a, b = item("a", 2.0, 1), item("b", 1.0, 2)
    assert (mixed(a, b, snr_db=-60.0, offset_s=0.0399).tokens["t"][:1] == 1).all()
    assert (mixed(a, b, snr_db=-60.0, offset_s=0.0399).tokens["t"][1:51] == 2).all()


def test_token_mixing_leaves_the_cut_alone_when_either_side_is_silent() -> None:
    a, silent = item("a", 2.0, 1), item("s", 4.0, 2, gain=0.0)
    assert mixed(a, silent) is a
    assert mixed(silent, a) is silent


def test_interleave_marks_a_gap_and_bears_a_partner_without_tokens() -> None:
    codes = np.full((3, 2), 1, np.uint8)
    gap = interleave(codes, np.full((2, 2), 7, np.uint8), 1.0, 5, 7, rng())
    assert gap[:, 0].tolist() == [1, 1, 1, IGNORE, IGNORE, 7, 7]
    assert np.array_equal(interleave(codes, None, 1.0, 2, 9, rng()), codes)
    wide = interleave(np.full((1, 1), 40000, np.uint16), np.full((1, 1), 3, np.uint16), 0.0, 0, 1, rng())
    assert wide.tolist() == [[40000]]


@pytest.mark.parametrize(("seconds", "offset_s"), [((2.0, 3.0), 1.01), ((3.0, 1.0), 0.5), ((2.0, 2.0), 0.0), ((2.0, 2.0), 2.0), ((0.5, 4.0), 0.3)])
@pytest.mark.parametrize("extra", [(0, 0), (-1, 1), (1, -1)], ids=str)
def test_soft_mixing_holds_the_two_tokens_that_a_draw_chooses_from(seconds: tuple[float, float], offset_s: float, extra: tuple[int, int]) -> None:
    a, b = (item(name, s, code, extra_frames=more) for name, s, code, more in zip("ab", seconds, (1, 2), extra))
    soft = mixed(a, b, 3.0, offset_s, soft=True)
    first, second = soft.tokens["t"], soft.second["t"]
    assert soft.second_share == pytest.approx(1 / (1 + 10**0.3), rel=1e-6)
    draws = [mixed(a, b, 3.0, offset_s, seed) for seed in range(30)]
    assert all(np.array_equal(draw.audio, soft.audio) and not draw.second for draw in draws)
    codes = np.stack([draw.tokens["t"] for draw in draws])
    assert codes.shape[1:] == first.shape == second.shape
    assert ((codes == first) | ((codes == second) & (second != IGNORE))).all()
    both = (second != IGNORE).all(axis=1)
    start, end = int(offset_s * RATE), min(len(a.tokens["t"]), int(offset_s * RATE) + len(b.tokens["t"]))
    assert np.array_equal(np.flatnonzero(both), np.arange(start, end))
    assert (first[both] == 1).all()
    tail = first[len(a.tokens["t"]) :]
    assert (tail[max(start - end, 0) :] == 2).all()
    assert (tail[: max(start - end, 0)] == IGNORE).all()  # a first cut whose tokens end before it does
    if both.any():
        cells = codes[:, both].size
        assert share(codes[:, both], 2) == pytest.approx(soft.second_share, abs=5 * (0.25 / cells) ** 0.5)


def test_soft_mixing_leaves_the_cut_alone_when_either_side_is_silent() -> None:
    a, silent = item("a", 2.0, 1), item("s", 4.0, 2, gain=0.0)
    assert mixed(a, silent, soft=True) is a
    assert mixed(silent, a, soft=True) is silent


def test_token_mixing_follows_the_rate_of_each_teacher() -> None:
    specs = {**SPECS, "slow": TokenSpec(num_codebooks=2, codebook_size=16, frame_rate_hz=25.0, first_frame_s=0.02)}
    a, b = item("a", 2.0, 1), item("b", 3.0, 2)
    a.tokens["slow"] = np.full((50, 2), 1, np.uint8)
    out = mix_tokens(a, b, snr_db=0.0, offset_s=0.99, specs=specs, rng=rng())
    assert out.tokens["t"].shape == (int(3.99 * RATE), C)
    assert np.array_equal(out.tokens["slow"], a.tokens["slow"])  # the other cut has no such tokens: none are replaced, the tail has none
    b.tokens["slow"] = np.full((75, 2), 2, np.uint8)
    both = mix_tokens(a, b, snr_db=-60.0, offset_s=0.99, specs=specs, rng=rng()).tokens["slow"]
    assert both.shape == (int(3.99 * 25), 2)  # 24 frames late, 99 frames of audio
    assert (both[:24] == 1).all()
    assert (both[24:] == 2).all()


def test_token_mixing_takes_no_tokens_that_only_the_other_cut_has() -> None:
    a, b = item("a", 1.0, 1), item("b", 1.0, 2)
    del a.tokens["t"]
    assert mixed(a, b).tokens == {}
    assert len(mixed(a, b, offset_s=0.5).audio) == 24000


def test_overlay_marks_what_is_not_there() -> None:
    first, second = overlay(np.full((3, 2), 1, np.uint8), np.full((4, 2), 7, np.uint8), 1, 4)
    assert first[:, 0].tolist() == [1, 1, 1, 7]
    assert second[:, 0].tolist() == [IGNORE, 7, 7, IGNORE]


def test_mixer_mixes_softly_by_the_same_choices_as_by_draws() -> None:
    items = [item(str(i), 1.0 + i / 10, i) for i in range(6)]
    hard, soft = (
        Mixer(MixingConfig(domains={"speech": DomainMixing(p=0.8, p_noise=0.3, other=other)}), SPECS)
        for other in ("tokens", "soft")  # type: ignore[arg-type]
    )
    assert (hard.soft, soft.soft) == (False, True)
    pairs = [pair for g in range(4) for pair in zip(hard(items, 0, g), soft(items, 0, g))]
    assert all(np.array_equal(a.audio, b.audio) for a, b in pairs)
    assert {bool(b.second) for _, b in pairs} == {True, False}


def test_mixer_returns_items_that_are_not_drawn_as_they_are() -> None:
    items = [item(str(i), 1.0, i) for i in range(4)] + [item("m", 1.0, 9, domain="music")]
    before = [x.audio.copy() for x in items]
    none = Mixer(MixingConfig(domains={"speech": DomainMixing(p=0.0)}), SPECS)(items, 0, 0)
    assert all(new is old for new, old in zip(none, items))
    half = Mixer(MixingConfig(domains={"speech": DomainMixing(p=0.5, p_noise=0.5)}), SPECS)(items, 3, 1)
    assert 0 < sum(new is old for new, old in zip(half, items[:4])) < 4
    assert half[4] is items[4]  # a domain without a rule
    assert all(np.array_equal(x.audio, y) for x, y in zip(items, before))  # mixing never writes into its input


@pytest.mark.parametrize("other", ["tokens", "utterance"])
def test_mixer_never_mixes_a_cut_with_itself_or_another_domain(other: Any) -> None:
    rule = DomainMixing(p=1.0, p_noise=0.0, other=other)
    mixer = Mixer(MixingConfig(domains={"speech": rule, "audio": rule}), SPECS)
    a, twin, stranger = item("a", 1.0, 1), item("a", 1.0, 1), item("x", 1.0, 5, domain="audio")
    for g in range(20):
        assert mixer([a], 0, g)[0] is a  # a batch of one
        assert mixer([a, twin, stranger], 0, g) == [a, twin, stranger]
        out = mixer([a, item("b", 1.0, 2), stranger], 0, g)
        assert out[0] is not a
        assert 5 not in out[0].tokens["t"]
        assert out[2] is stranger


def test_mixer_takes_partners_unmixed_and_follows_seed_batch_and_id() -> None:
    mixer = Mixer(MixingConfig(domains={"speech": DomainMixing(p=1.0, p_noise=0.0)}), SPECS)
    items = [item(str(i), 1.0 + i / 10, i) for i in range(3)]
    one, two = mixer(items, 0, 5), mixer(items[::-1], 0, 5)
    assert [len(np.unique(x.tokens["t"][x.tokens["t"] >= 0])) for x in one] == [2, 2, 2]  # never three voices
    assert all(np.array_equal(x.audio, y.audio) for x, y in zip(one, mixer(items, 0, 5)))
    assert not all(np.array_equal(x.audio, y.audio) for x, y in zip(one, mixer(items, 0, 6)))
    noise = Mixer(MixingConfig(domains={"speech": DomainMixing(p=1.0, p_noise=1.0)}), SPECS)
    assert np.array_equal(noise(items, 0, 5)[0].audio, noise(items[::-1], 0, 5)[2].audio)  # noise does not depend on the neighbours
    assert len(two) == 3


def test_mixer_draws_noise_and_partners_as_often_as_it_says() -> None:
    mixer = Mixer(MixingConfig(), SPECS)
    items = [item(f"{i}", 0.2, i % 200) for i in range(400)]
    out = mixer(items, 1, 0)
    same = sum(new is old for new, old in zip(out, items))
    noisy = sum(new is not old and new.tokens is old.tokens for new, old in zip(out, items))
    assert same / 400 == pytest.approx(0.5, abs=0.1)
    assert noisy / 400 == pytest.approx(0.4, abs=0.1)
    assert (400 - same - noisy) / 400 == pytest.approx(0.1, abs=0.06)


def test_mixer_offsets_stay_below_two_seconds_and_the_cut_itself() -> None:
    mixer = Mixer(MixingConfig(domains={"speech": DomainMixing(p=1.0, p_noise=0.0)}), SPECS)
    short, long = item("a", 0.5, 1), item("b", 6.0, 2)
    lengths = [[len(x.audio) / 16000 for x in mixer([short, long], 0, g)] for g in range(40)]
    assert all(6.0 <= a <= 6.5 and b == 6.0 for a, b in lengths)
    other = [len(mixer([long, item("c", 6.0, 3)], 0, g)[0].audio) / 16000 for g in range(40)]
    assert 7.5 < max(other) <= 8.0


def test_add_noise_meets_the_ratio_of_active_powers() -> None:
    audio = np.concatenate([np.zeros(16000), 0.1 * rng().standard_normal(16000)]).astype(np.float32)
    noise = coloured_noise(rng(1), 32000)
    added = add_noise(audio, noise, 15.0) - audio
    assert 10 * np.log10(active_power(audio) / active_power(added)) == pytest.approx(15.0, abs=0.05)
    assert active_power(audio) == pytest.approx(0.01, rel=0.05)  # the silent half does not count
    silent = np.zeros(800, np.float32)
    assert add_noise(silent, noise[:800], 10.0) is silent
    assert add_noise(audio, np.zeros(32000, np.float32), 10.0) is audio


def test_mix_utterance_changes_a_bounded_stretch_and_keeps_the_length() -> None:
    a, b = item("a", 4.0, 1).audio, item("b", 4.0, 2).audio
    for seed in range(10):
        out = mix_utterance(a, b, 0.0, (0.2, 0.5), rng(seed))
        changed = np.flatnonzero(out != a)
        assert len(out) == len(a)
        assert 0.19 * len(a) <= changed[-1] - changed[0] + 1 <= 0.5 * len(a) + 1
    tiny = item("c", 0.1, 3).audio
    assert (mix_utterance(a, tiny, 0.0, (0.2, 0.5), rng()) != a).sum() <= len(tiny)
    assert mix_utterance(a, np.zeros(16000, np.float32), 0.0, (0.2, 0.5), rng()) is a


def test_mixer_utterance_mixing_keeps_tokens() -> None:
    rule = DomainMixing(p=1.0, p_noise=0.0, other="utterance")
    items = [item("a", 1.0, 1), item("b", 2.0, 2)]
    out = Mixer(MixingConfig(domains={"speech": rule}), SPECS)(items, 0, 0)
    assert [x.tokens is y.tokens for x, y in zip(out, items)] == [True, True]
    assert not np.array_equal(out[0].audio, items[0].audio)


@pytest.mark.parametrize("samples", [1, 400, 16007])
def test_coloured_noise_has_unit_power_and_any_length(samples: int) -> None:
    noise = coloured_noise(rng(samples), samples)
    assert noise.shape == (samples,)
    assert noise.dtype == np.float32
    assert np.isfinite(noise).all()
    if samples > 1:
        assert noise.std() == pytest.approx(1.0, rel=1e-3)


@pytest.mark.parametrize(
    ("key", "value", "rule"),
    [
        ("p", 1.5, "between 0 and 1, but is 1.5"),
        ("p_noise", -0.1, "between 0 and 1, but is -0.1"),
        ("noise_snr_db", (20.0, 10.0), r"two numbers, the smaller first, but is \[20.0, 10.0\]"),
        ("overlap", (0.0, 0.5), "`overlap` must lie in 0 to 1"),
        ("max_offset_s", -1.0, "0 or more, but is -1.0"),
        ("other", "both", "one of tokens, soft, utterance, but is 'both'"),
    ],
)
def test_domain_mixing_raises_config_error_when_a_value_breaks_its_rule(key: str, value: Any, rule: str) -> None:
    with pytest.raises(ConfigError, match=rule):
        DomainMixing(**{key: value})
