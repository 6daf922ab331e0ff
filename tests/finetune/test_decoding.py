"""CTC decoding against enumeration, and error counts by hand."""

from __future__ import annotations

import itertools
import math
from collections import defaultdict

import numpy as np
import pytest

from spear.finetune.decoding import Errors, align, count_errors, greedy, prefix_beam, show, sum_errors


def best_labelling(log_probs: np.ndarray) -> tuple[int, ...]:
    """The labelling of the greatest probability, summed over all alignments one by one."""
    totals: dict[tuple[int, ...], float] = defaultdict(float)
    frames, symbols = log_probs.shape
    for path in itertools.product(range(symbols), repeat=frames):
        merged = [symbol for symbol, before in zip(path, (None, *path)) if symbol != before]
        totals[tuple(symbol for symbol in merged if symbol)] += math.exp(sum(log_probs[t, symbol] for t, symbol in enumerate(path)))
    return max(totals, key=lambda labels: totals[labels])


def random_log_probs(seed: int, frames: int = 5, symbols: int = 3) -> np.ndarray:
    logits = 1.5 * np.random.default_rng(seed).standard_normal((frames, symbols))
    return logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))


@pytest.mark.parametrize("seed", range(20))
def test_prefix_beam_finds_the_most_probable_labelling(seed: int) -> None:
    log_probs = random_log_probs(seed)
    assert tuple(prefix_beam(log_probs, beam=1000, keep=-math.inf)) == best_labelling(log_probs)


def test_prefix_beam_beats_greedy_where_alignments_add_up() -> None:
    # every frame prefers the blank, yet "1" in any of two frames is more probable than nothing: 1 - 0.6^2 > 0.6^2
    log_probs = np.log(np.array([[0.6, 0.4], [0.6, 0.4]]))
    assert greedy(log_probs) == []
    assert prefix_beam(log_probs, beam=4) == [1]


def test_greedy_merges_repetitions_and_keeps_those_with_a_blank_between() -> None:
    path = [1, 1, 0, 1, 2, 2, 0, 0]
    assert greedy(np.eye(3)[path]) == [1, 1, 2]
    assert greedy(np.zeros((0, 3))) == []


@pytest.mark.parametrize(
    ("reference", "hypothesis", "expected"),
    [
        ("a b c", "a b c", Errors(3, 0, 0, 0)),
        ("a b c", "a x c", Errors(3, 1, 0, 0)),
        ("a b c", "a c", Errors(3, 0, 0, 1)),
        ("a b c", "a b b c", Errors(3, 0, 1, 0)),
        ("a b c", "", Errors(3, 0, 0, 3)),
        ("", "a", Errors(0, 0, 1, 0)),
        ("one two three four", "two three five four six", Errors(4, 0, 2, 1)),
    ],
)
def test_count_errors_along_a_shortest_path(reference: str, hypothesis: str, expected: Errors) -> None:
    assert count_errors(reference.split(), hypothesis.split()) == expected


def test_errors_add_up_and_divide_by_the_reference() -> None:
    whole = sum_errors([Errors(3, 1, 0, 0), Errors(1, 0, 0, 1)])
    assert whole == Errors(4, 1, 0, 1)
    assert whole.rate == 0.5
    assert sum_errors([]).rate == 0.0


def test_show_marks_what_differs() -> None:
    assert show(align(list("abc"), list("axcd"))) == "a (b->x) c (*->d)"
