"""Metrics of the evaluation: accuracy with its interval, equal error rate, detection cost, mean average precision."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.floating]


def accuracy(predicted: NDArray[np.integer], expected: NDArray[np.integer]) -> float:
    """Share of equal entries of two (M,) arrays.

    Raises:
        ValueError: the arrays differ in shape or are empty.
    """
    if predicted.shape != expected.shape or predicted.size == 0:
        raise ValueError(f"accuracy needs two equal, non-empty shapes, but got {predicted.shape} and {expected.shape}")
    return float((predicted == expected).mean())


def cluster_interval(values: Floats, groups: Sequence[str], *, resamples: int, seed: int, level: float = 0.95) -> tuple[float, float]:
    """Bootstrap interval of a mean whose items come in groups that are not independent, such as the frames of one utterance.

    Args:
        values: (M,) one number per item, e.g. 1 for a hit and 0 for a miss. groups: M names; whole groups are drawn with replacement.
        resamples: number of bootstrap draws. seed: of the draws. level: mass between the two ends.
    Returns:
        lower and upper end, percentile method (Efron and Tibshirani, 1993, section 13.3).
    """
    index = np.unique(np.asarray(groups), return_inverse=True)[1]
    totals, counts = np.bincount(index, weights=values), np.bincount(index)
    rng = np.random.default_rng(seed)
    means = np.empty(resamples)
    for i in range(resamples):
        drawn = rng.integers(0, len(counts), len(counts))
        means[i] = totals[drawn].sum() / counts[drawn].sum()
    return _percentiles(means, level)


def ratio_interval(errors: Floats, sizes: Floats, *, resamples: int, seed: int, level: float = 0.95) -> tuple[float, float]:
    """Bootstrap interval of sum(errors) / sum(sizes) over items (M,) that are drawn whole, e.g. edit distances and lengths of utterances."""
    rng = np.random.default_rng(seed)
    drawn = rng.integers(0, len(errors), (resamples, len(errors)))
    return _percentiles(errors[drawn].sum(axis=1) / sizes[drawn].sum(axis=1), level)


def error_rates(scores: Floats, targets: NDArray[np.bool_], weights: Floats | None = None) -> tuple[Floats, Floats]:
    """Miss and false-alarm rate at every threshold, from accepting all trials to accepting none.

    Args:
        scores: (M,) higher means more alike. targets: (M,) True where both sides are the same speaker. weights: (M,) how often each trial
            counts; None: once.
    Returns:
        miss rates, never falling, and false-alarm rates, never rising; trials of equal score move together.
    Raises:
        ValueError: there is no target or no non-target trial.
    """
    times = np.ones(len(targets)) if weights is None else weights
    num_targets, num_others = float(times[targets].sum()), float(times[~targets].sum())
    if num_targets == 0 or num_others == 0:
        raise ValueError(f"error rates need both kinds of trials, but got {num_targets:g} targets and {num_others:g} others")
    order = np.argsort(scores, kind="stable")
    ordered, hits, times = scores[order], targets[order], times[order]
    last_of_tie = np.append(ordered[1:] != ordered[:-1], True)
    misses = np.concatenate([[0.0], np.cumsum(times * hits)[last_of_tie] / num_targets])
    false_alarms = np.concatenate([[1.0], 1.0 - np.cumsum(times * ~hits)[last_of_tie] / num_others])
    return misses, false_alarms


def equal_error_rate(scores: Floats, targets: NDArray[np.bool_], weights: Floats | None = None) -> float:
    """Rate at which misses and false alarms are equal, by straight lines between thresholds (see `error_rates`)."""
    misses, false_alarms = error_rates(scores, targets, weights)
    gap = misses - false_alarms
    right = int(np.argmax(gap >= 0))
    left = right - 1
    share = -gap[left] / (gap[right] - gap[left])
    return float(misses[left] + share * (misses[right] - misses[left]))


def min_detection_cost(
    scores: Floats, targets: NDArray[np.bool_], *, p_target: float = 0.01, cost_miss: float = 1.0, cost_false: float = 1.0
) -> float:
    """Least detection cost over all thresholds, divided by the cost of the better constant answer (NIST SRE 2010 plan, section 3)."""
    misses, false_alarms = error_rates(scores, targets)
    costs = cost_miss * p_target * misses + cost_false * (1 - p_target) * false_alarms
    return float(costs.min() / min(cost_miss * p_target, cost_false * (1 - p_target)))


def trial_interval(
    scores: Floats, targets: NDArray[np.bool_], speakers: NDArray[np.int64], *, resamples: int, seed: int, level: float = 0.95
) -> tuple[float, float]:
    """Bootstrap interval of the equal error rate, whose trials share speakers: whole speakers are drawn with replacement.

    A trial of one speaker counts as often as that speaker is drawn, a trial of two as often as both together, the product. Draws without
    a trial of either kind are drawn again. Of fewer than three speakers, trials are drawn one by one: the interval is then too narrow.

    Args:
        scores, targets: see `error_rates`. speakers: (M, 2) number of each side's speaker.
    """
    rng = np.random.default_rng(seed)
    numbers = np.unique(speakers, return_inverse=True)[1].reshape(speakers.shape)
    count = int(numbers.max()) + 1
    rates: list[float] = []
    while count < 3 and len(rates) < resamples:
        weights = np.zeros(len(targets))
        for kind in (targets, ~targets):
            places = np.flatnonzero(kind)
            weights += np.bincount(rng.choice(places, len(places)), minlength=len(targets))
        rates.append(equal_error_rate(scores, targets, weights))
    while len(rates) < resamples:
        times = np.bincount(rng.integers(0, count, count), minlength=count).astype(np.float64)
        first, second = times[numbers].T
        weights = np.where(targets, first, first * second)
        if weights[targets].any() and weights[~targets].any():
            rates.append(equal_error_rate(scores, targets, weights))
    return _percentiles(np.array(rates), level)


def average_precision(scores: Floats, relevant: NDArray[np.bool_]) -> float:
    """Area under the precision-recall steps of one class; items of equal score enter together.

    Raises:
        ValueError: no item is relevant.
    """
    if not relevant.any():
        raise ValueError("average precision needs at least one relevant item")
    order = np.argsort(-scores, kind="stable")
    ordered, hits = scores[order], np.cumsum(relevant[order])
    last_of_tie = np.append(ordered[1:] != ordered[:-1], True)
    found, seen = hits[last_of_tie], np.flatnonzero(last_of_tie) + 1
    recall = np.concatenate([[0], found]) / hits[-1]
    return float(np.sum(np.diff(recall) * found / seen))


def mean_average_precision(scores: Floats, relevant: NDArray[np.bool_]) -> float:
    """Mean of `average_precision` over the classes that occur.

    Args:
        scores: (M, K) class scores. relevant: (M, K) True where the class belongs to the item.
    """
    present = np.flatnonzero(relevant.any(axis=0))
    if len(present) == 0:
        raise ValueError("mean average precision needs at least one relevant item")
    return float(np.mean([average_precision(scores[:, k], relevant[:, k]) for k in present]))


def _percentiles(values: Floats, level: float) -> tuple[float, float]:
    low, high = np.quantile(values, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)
