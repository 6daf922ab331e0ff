"""Metrics against values worked out by hand."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.metrics import average_precision_score

from spear.evaluation.metrics import (
    accuracy,
    average_precision,
    cluster_interval,
    equal_error_rate,
    error_rates,
    mean_average_precision,
    min_detection_cost,
    trial_interval,
)


def trials(same: list[float], other: list[float]) -> tuple[np.ndarray, np.ndarray]:
    return np.array(same + other), np.array([True] * len(same) + [False] * len(other))


def test_accuracy_is_the_share_of_hits() -> None:
    assert accuracy(np.array([1, 2, 3, 4]), np.array([1, 2, 0, 4])) == 3 / 4


def test_accuracy_raises_value_error_when_shapes_differ() -> None:
    with pytest.raises(ValueError, match="two equal, non-empty shapes"):
        accuracy(np.array([1, 2]), np.array([1]))


def test_error_rates_move_together_on_ties() -> None:
    misses, false_alarms = error_rates(*trials([0.5, 0.9], [0.5, 0.1]))
    # thresholds below .1, after .1, after the tie at .5, after .9
    np.testing.assert_allclose(misses, [0, 0, 1 / 2, 1])
    np.testing.assert_allclose(false_alarms, [1, 1 / 2, 0, 0])


def test_error_rates_raises_value_error_when_one_kind_is_missing() -> None:
    with pytest.raises(ValueError, match="both kinds of trials"):
        error_rates(np.array([0.1, 0.2]), np.array([True, True]))


@pytest.mark.parametrize(
    ("same", "other", "expected"),
    [
        ([0.8, 0.9], [0.1, 0.2], 0.0),
        ([0.1, 0.2], [0.8, 0.9], 1.0),
        # one of four targets lies below one of four others: miss 1/4 and false alarm 1/4 at the same threshold
        ([0.9, 0.8, 0.7, 0.3], [0.6, 0.2, 0.1, 0.0], 1 / 4),
        # all tied: from (0, 1) straight to (1, 0)
        ([0.5, 0.5], [0.5, 0.5], 1 / 2),
        # after .4: miss 0, false 1/2; after .5: miss 1/3, false 1/2; after .6: miss 1/3, false 0: they meet at 1/3
        ([0.5, 0.8, 0.9], [0.4, 0.6], 1 / 3),
    ],
)
def test_equal_error_rate_matches_hand_worked_values(same: list[float], other: list[float], expected: float) -> None:
    assert equal_error_rate(*trials(same, other)) == pytest.approx(expected)


def test_min_detection_cost_matches_hand_worked_value() -> None:
    scores = trials([0.9, 0.8, 0.7, 0.3], [0.6, 0.2, 0.1, 0.0])
    # p = .01: after .6 the miss rate is 1/4 and no false alarm is left, cost .01 * 1/4 over the constant answer's .01
    assert min_detection_cost(*scores, p_target=0.01) == pytest.approx(1 / 4)
    # p = .9: after .2 there is no miss and false alarm 1/4, cost .1 * 1/4 over .1
    assert min_detection_cost(*scores, p_target=0.9) == pytest.approx(1 / 4)
    # both prices equal at p = .5: the least of .5 * 1/4 over .5
    assert min_detection_cost(*scores, p_target=0.5) == pytest.approx(1 / 4)


def test_min_detection_cost_never_exceeds_the_constant_answer() -> None:
    assert min_detection_cost(*trials([0.1, 0.2], [0.8, 0.9])) == 1.0


def test_average_precision_equals_sklearn_with_ties() -> None:
    rng = np.random.default_rng(0)
    scores, relevant = rng.integers(0, 12, 80) / 12, rng.random(80) < 0.3
    assert average_precision(scores, relevant) == pytest.approx(average_precision_score(relevant, scores))


def test_mean_average_precision_skips_absent_classes() -> None:
    scores = np.array([[0.9, 0.5], [0.8, 0.5], [0.1, 0.5]])
    relevant = np.array([[True, False], [False, False], [True, False]])
    # class 0: hits at ranks 1 and 3, (1/1 + 2/3) / 2
    assert mean_average_precision(scores, relevant) == pytest.approx((1 + 2 / 3) / 2)


def test_cluster_interval_is_wider_when_items_stick_together() -> None:
    values = np.repeat([0.0, 1.0], 200)
    alone = cluster_interval(values, [str(i) for i in range(400)], resamples=400, seed=0)
    together = cluster_interval(values, [str(i // 40) for i in range(400)], resamples=400, seed=0)
    assert alone[0] < 0.5 < alone[1]
    # deviation of a share of 400 items against that of 10 groups
    assert together[1] - together[0] > 4 * (alone[1] - alone[0])


def test_intervals_are_the_same_for_the_same_seed() -> None:
    scores = trials([0.9, 0.8, 0.7, 0.3], [0.6, 0.2, 0.1, 0.0])
    speakers = np.array([[0, 0], [1, 1], [2, 2], [3, 3], [0, 1], [1, 2], [2, 3], [3, 0]])
    assert trial_interval(*scores, speakers, resamples=50, seed=3) == trial_interval(*scores, speakers, resamples=50, seed=3)
    low, high = trial_interval(*scores, speakers, resamples=50, seed=3)
    assert 0 <= low <= 1 / 4 <= high <= 1


def test_trial_interval_of_two_speakers_is_no_point() -> None:
    scores, targets = trials([0.9, 0.8, 0.3, 0.5], [0.6, 0.2, 0.7, 0.0])
    speakers = np.array([[0, 0], [1, 1], [0, 0], [1, 1], [0, 1], [0, 1], [1, 0], [1, 0]])
    low, high = trial_interval(scores, targets, speakers, resamples=100, seed=0)
    assert low < high


def test_weights_of_trials_count_them_as_often() -> None:
    scores, targets = trials([0.9, 0.4, 0.8], [0.5, 0.2, 0.1])
    times = np.array([1, 3, 0, 2, 1, 1])
    repeated = equal_error_rate(np.repeat(scores, times), np.repeat(targets, times))
    assert equal_error_rate(scores, targets, times.astype(float)) == pytest.approx(repeated)


def test_trial_interval_covers_the_error_of_other_speakers() -> None:
    """Speakers of their own difficulty: nominal 95 % of the intervals must hold the error over very many speakers, not half of them."""

    def drawn(rng: np.random.Generator, speakers: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        ease = rng.normal(1.5, 1.0, speakers)
        numbers = np.repeat(np.arange(speakers), 20)
        same = rng.normal(ease[numbers], 0.5)
        pairs = rng.permuted(np.tile(np.arange(speakers), (20, 1)), axis=1)[:, :2].reshape(-1, 2)
        other = rng.normal(0, 0.5, len(pairs))
        sides = np.concatenate([np.stack([numbers, numbers], axis=1), pairs])
        return np.concatenate([same, other]), np.arange(len(sides)) < len(same), sides

    scores, targets, _ = drawn(np.random.default_rng(0), 20_000)
    truth, held = equal_error_rate(scores, targets), 0
    for seed in range(60):
        low, high = trial_interval(*drawn(np.random.default_rng(1 + seed), 12), resamples=100, seed=seed)
        held += low <= truth <= high
    assert held >= 0.75 * 60
