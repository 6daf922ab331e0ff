"""The plan of batches: complete, weighted, bounded, and a pure function of its number."""

from __future__ import annotations

import time
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from spear.data.sampler import BatchPlan, Lengths, SamplingConfig, repeats, valid_batches
from spear.errors import ConfigError


def corpus(name: str, size: int, weight: float = 1.0, seed: int = 0, low: float = 1.0, high: float = 12.0) -> Lengths:
    samples = np.random.default_rng((seed, size)).integers(int(low * 16000), int(high * 16000), size)
    return Lengths(name, samples, weight)


def plan_of(*corpora: Lengths, seed: int = 0, **given_settings: object) -> BatchPlan:
    return BatchPlan(corpora, SamplingConfig(**{"max_batch_s": 60.0, "num_buckets": 6, **given_settings}), seed)  # type: ignore[arg-type]


def epoch_of(plan: BatchPlan, epoch: int) -> Counter[tuple[int, int]]:
    first = epoch * plan.batches_per_epoch
    return Counter(row for g in range(first, first + plan.batches_per_epoch) for row in plan.batch(g))


def test_plan_of_weight_one_has_every_cut_once_in_every_epoch() -> None:
    plan = plan_of(corpus("a", 83), corpus("b", 40))
    everything = Counter({(0, i): 1 for i in range(83)} | {(1, i): 1 for i in range(40)})
    assert epoch_of(plan, 0) == epoch_of(plan, 1) == epoch_of(plan, 7) == everything


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 60), st.integers(1, 8), st.floats(0.2, 3.0), st.integers(0, 5))
def test_plan_keeps_the_number_of_batches_and_the_bound(size: int, buckets: int, weight: float, seed: int) -> None:
    lengths = [corpus("a", size, 1.0, seed), corpus("b", 17, weight, seed)]
    plan = plan_of(*lengths, seed=seed, num_buckets=buckets, max_batch_s=30.0)
    for epoch in (0, 3):
        drawn = epoch_of(plan, epoch)
        assert sum(n for (c, _), n in drawn.items() if c == 0) == size
    for g in range(plan.batches_per_epoch):
        rows = plan.batch(g)
        assert rows
        assert len(rows) * max(lengths[c].samples[i] for c, i in rows) <= 30.0 * 16000


@pytest.mark.parametrize(("growth_s", "most"), [(0.0, 10), (1.5, 7), (30.0, 5)])
def test_plan_leaves_room_for_what_mixing_adds(growth_s: float, most: int) -> None:
    """Cuts of 4 s and 40 s per batch; a mixture lasts 4 s + growth, and 8 s at most. A corpus that mixing leaves alone needs no room."""
    growing, plain = Lengths("a", np.full(60, 64000), 1.0, growth_s), Lengths("b", np.full(40, 80000))
    plan = plan_of(growing, plain, num_buckets=2, max_batch_s=40.0)
    sizes = {c: max(len(rows) for g in range(plan.batches_per_epoch) if (rows := plan.batch(g))[0][0] == c) for c in (0, 1)}
    assert sizes == {0: most, 1: 8}
    assert epoch_of(plan, 0) == Counter({(c, i): 1 for c, size in ((0, 60), (1, 40)) for i in range(size)})


def test_plan_is_a_function_of_the_batch_number_and_the_seed() -> None:
    lengths = corpus("a", 50), corpus("b", 30, 1.7)
    numbers = [5, 0, 412, 7, 3]
    straight = {g: plan_of(*lengths).batch(g) for g in numbers}
    shared = plan_of(*lengths)
    assert {g: shared.batch(g) for g in reversed(numbers)} == straight
    assert plan_of(*lengths, seed=1).batch(5) != straight[5]
    order = [[sorted(shared.batch(e * shared.batches_per_epoch + g)) for g in range(shared.batches_per_epoch)] for e in (0, 1)]
    assert order[0] != order[1]


def test_plan_hears_a_corpus_as_often_as_its_weight_says() -> None:
    plan = plan_of(corpus("a", 40), corpus("b", 40, 2.5, seed=1), num_buckets=1)
    drawn = epoch_of(plan, 0) + epoch_of(plan, 1)
    shares = [sum(n for (c, _), n in drawn.items() if c == i) for i in (0, 1)]
    assert shares == [80, 200]
    assert {drawn[1, i] for i in range(40)} == {5}  # 2.5 an epoch: all cuts alike over two epochs


def test_plan_of_weight_below_one_hears_everything_after_some_epochs() -> None:
    plan = plan_of(corpus("a", 40, 0.25), num_buckets=1)
    assert epoch_of(plan, 0).total() == 10
    drawn = epoch_of(plan, 0) + epoch_of(plan, 1) + epoch_of(plan, 2) + epoch_of(plan, 3)
    assert drawn == Counter({(0, i): 1 for i in range(40)})


@pytest.mark.parametrize(("weight", "draws"), [(0.05, 3), (0.1, 6), (0.5, 30), (0.001, 1)])
def test_plan_keeps_a_small_weight_of_a_small_corpus(weight: float, draws: int) -> None:
    """60 cuts in 20 buckets: less than one draw a bucket; all the same, every cut is heard after some epochs."""
    plan = plan_of(corpus("a", 400), corpus("b", 60, weight), num_buckets=20)
    drawn = epoch_of(plan, 0)
    assert sum(n for (c, _), n in drawn.items() if c == 1) == draws
    assert sum(n for (c, _), n in drawn.items() if c == 0) == 400
    if draws > 1:
        heard = {i for epoch in range(round(2 / weight)) for (c, i) in epoch_of(plan, epoch) if c == 1}
        assert heard == set(range(60))


def test_repeats_raises_config_error_when_hours_are_taken_for_factors() -> None:
    rule = r"must be at most 100, but is 5000 \(corpus b\); for hours set `sampling.weights: hours`"
    with pytest.raises(ConfigError, match=rule):
        repeats([corpus("a", 5), corpus("b", 5, 5000.0)], SamplingConfig())
    assert len(repeats([corpus("a", 5), corpus("b", 5, 5000.0)], SamplingConfig(weights="hours"))) == 2
    assert repeats([corpus("a", 5, 100.0)], SamplingConfig()) == pytest.approx([100.0])


def test_repeats_follow_factors_hours_temperature_and_epoch_hours() -> None:
    long, short = Lengths("a", np.full(90, 16000 * 40)), Lengths("b", np.full(10, 16000 * 40), 3.0)  # 1 h and 1/9 h
    assert repeats([long, short], SamplingConfig()) == pytest.approx([1.0, 3.0])
    hours = repeats([long, short], SamplingConfig(weights="hours"))
    assert hours == pytest.approx([1.0, 27.0])
    flat = repeats([long, short], SamplingConfig(temperature=0.0, epoch_hours=4.0))
    assert flat == pytest.approx([2.0, 18.0])
    half = repeats([long, short], SamplingConfig(temperature=0.5))
    assert half[0] * 1.0 + half[1] / 9 == pytest.approx(1 + 3 / 9)
    assert (half[0] * 1.0) / (half[1] / 9) == pytest.approx((1 / (3 / 9)) ** 0.5)


def test_plan_without_shuffle_goes_through_the_shards_in_order() -> None:
    plan = plan_of(corpus("a", 20), num_buckets=1, shuffle=False)
    rows = [row for g in range(plan.batches_per_epoch) for row in plan.batch(g)]
    assert rows == [(0, i) for i in range(20)]


def test_plan_starts_far_away_at_once() -> None:
    plan = plan_of(corpus("a", 20000))
    plan.batch(0)
    start = time.process_time()
    plan.batch(10**12 + 17)
    assert time.process_time() - start < 0.5


def test_plan_raises_config_error_when_a_cut_is_longer_than_a_batch() -> None:
    with pytest.raises(ConfigError, match=r"`max_batch_s` must be at least the longest cut, 20 s, but is 10"):
        plan_of(Lengths("a", np.array([320000])), max_batch_s=10.0)


def test_plan_raises_config_error_when_nothing_is_to_be_drawn() -> None:
    with pytest.raises(ConfigError, match="`weight` must be more than 0 for at least one corpus, but is 0 for a, b"):
        plan_of(corpus("a", 3, 0.0), corpus("b", 3, 0.0))
    with pytest.raises(ConfigError, match="at least one training cut"):
        plan_of(Lengths("a", np.zeros(0, np.int64)))
    assert {c for c, _ in epoch_of(plan_of(corpus("a", 3, 0.0), corpus("b", 3)), 0)} == {1}


@pytest.mark.parametrize(
    ("key", "value", "rule"),
    [("max_batch_s", 0, "more than 0"), ("temperature", 2, "between 0 and 1"), ("num_buckets", 0, "at least 1"), ("num_workers", -1, "at least 0")],
)
def test_sampling_config_raises_config_error_when_a_value_breaks_its_rule(key: str, value: float, rule: str) -> None:
    with pytest.raises(ConfigError, match=f"`{key}` must be {rule}, but is {value}"):
        SamplingConfig(**{key: value})  # type: ignore[arg-type]


def test_valid_batches_have_every_cut_once_within_the_bound() -> None:
    lengths = [corpus("a", 30).samples, corpus("b", 11).samples]
    batches = valid_batches(lengths, 40.0)
    assert Counter(row for batch in batches for row in batch) == Counter([(0, i) for i in range(30)] + [(1, i) for i in range(11)])
    assert all(len(batch) * max(lengths[c][i] for c, i in batch) <= 40.0 * 16000 for batch in batches)
