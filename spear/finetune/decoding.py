"""From CTC's frame probabilities to symbols, and from symbols to error rates."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from typing import NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

from spear.finetune.text import BLANK

Symbol = TypeVar("Symbol")
NEVER = -math.inf


def greedy(log_probs: NDArray[np.floating]) -> list[int]:
    """The best symbol of every frame (T, V), repetitions merged, blanks dropped (Graves et al., ICML 2006, section 3.2)."""
    best = log_probs.argmax(axis=1)
    kept = np.append(True, best[1:] != best[:-1]) & (best != BLANK) if len(best) else np.zeros(0, bool)
    found: list[int] = best[kept].tolist()
    return found


def prefix_beam(log_probs: NDArray[np.floating], beam: int, keep: float = -12.0) -> list[int]:
    """The most probable labelling by prefix search, summing over the alignments of each prefix (Hannun et al., arXiv:1408.2873, algorithm 1).

    Args:
        log_probs: (T, V) natural logarithms. beam: prefixes kept after each frame. keep: symbols this far below the best of a frame are not tried.
    """
    beams: dict[tuple[int, ...], tuple[float, float]] = {(): (0.0, NEVER)}  # prefix -> log probability of ending in blank, and not
    prefix: tuple[int, ...]
    for frame in np.asarray(log_probs, dtype=np.float64):
        tried = [int(v) for v in np.flatnonzero(frame >= frame.max() + keep) if v != BLANK]
        blank = float(frame[BLANK])
        new: dict[tuple[int, ...], list[float]] = defaultdict(lambda: [NEVER, NEVER])
        for prefix, (ends_blank, ends_symbol) in beams.items():
            whole = log_add(ends_blank, ends_symbol)
            new[prefix][0] = log_add(new[prefix][0], whole + blank)
            if prefix:
                new[prefix][1] = log_add(new[prefix][1], ends_symbol + float(frame[prefix[-1]]))
            for symbol in tried:
                before = ends_blank if prefix and prefix[-1] == symbol else whole
                longer: tuple[int, ...] = (*prefix, symbol)
                new[longer][1] = log_add(new[longer][1], before + float(frame[symbol]))
        best = sorted(new.items(), key=lambda item: (-log_add(*item[1]), item[0]))[:beam]
        beams = {prefix: (value[0], value[1]) for prefix, value in best}
    best_prefix: tuple[int, ...] = max(beams, key=lambda prefix: log_add(*beams[prefix]))
    return list(best_prefix)


def log_add(a: float, b: float) -> float:
    """log(exp(a) + exp(b))."""
    high, low = (a, b) if a >= b else (b, a)
    return high if low == NEVER else high + math.log1p(math.exp(low - high))


class Errors(NamedTuple):
    """Of one or many alignments. words: of the reference."""

    words: int
    substitutions: int
    insertions: int
    deletions: int

    @property
    def total(self) -> int:
        """All kinds together."""
        return self.substitutions + self.insertions + self.deletions

    @property
    def rate(self) -> float:
        """Errors per reference word."""
        return self.total / max(self.words, 1)


def align(reference: Sequence[Symbol], hypothesis: Sequence[Symbol]) -> list[tuple[Symbol | None, Symbol | None]]:
    """A shortest edit path: pairs of (reference, hypothesis), None where one side has nothing. Of equal ones the path that substitutes most."""
    rows, columns = len(reference) + 1, len(hypothesis) + 1
    cost = np.zeros((rows, columns), dtype=np.int64)
    cost[:, 0], cost[0] = np.arange(rows), np.arange(columns)
    for i in range(1, rows):
        for j in range(1, columns):
            same = reference[i - 1] == hypothesis[j - 1]
            cost[i, j] = min(cost[i - 1, j - 1] + (not same), cost[i - 1, j] + 1, cost[i, j - 1] + 1)
    i, j = rows - 1, columns - 1
    path: list[tuple[Symbol | None, Symbol | None]] = []
    while i or j:
        if i and j and cost[i, j] == cost[i - 1, j - 1] + (reference[i - 1] != hypothesis[j - 1]):
            i, j = i - 1, j - 1
            path.append((reference[i], hypothesis[j]))
        elif i and cost[i, j] == cost[i - 1, j] + 1:
            i -= 1
            path.append((reference[i], None))
        else:
            j -= 1
            path.append((None, hypothesis[j]))
    return path[::-1]


def count_errors(reference: Sequence[Symbol], hypothesis: Sequence[Symbol]) -> Errors:
    """Errors along `align`."""
    path = align(reference, hypothesis)
    substituted = sum(a is not None and b is not None and a != b for a, b in path)
    return Errors(len(reference), substituted, sum(a is None for a, _ in path), sum(b is None for _, b in path))


def sum_errors(parts: Sequence[Errors]) -> Errors:
    """Errors of several alignments together."""
    return Errors(*(sum(column) for column in zip(*parts))) if parts else Errors(0, 0, 0, 0)


def show(path: Sequence[tuple[str | None, str | None]]) -> str:
    """An alignment on one line: words that fit as they are, ``(reference->hypothesis)`` elsewhere, ``*`` for nothing."""
    return " ".join(str(a) if a == b else f"({'*' if a is None else a}->{'*' if b is None else b})" for a, b in path)
