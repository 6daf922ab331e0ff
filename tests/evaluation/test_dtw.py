"""Dynamic time warping against a plain recursion, compiled and not."""

from __future__ import annotations

import math

import numpy as np
import pytest

from spear.evaluation.dtw import Metric, dtw_distances
from spear.evaluation.kernels import dtw_loop

ANGULAR, MISMATCH = "angular", "mismatch"


def plain(a: np.ndarray, b: np.ndarray, metric: str) -> float:
    """The definition, one cell after the other: total and length of the best path to every pair of frames."""

    def cost(x: np.ndarray, y: np.ndarray) -> float:
        if metric == MISMATCH:
            return float((x != y).mean())
        return math.acos(float(np.clip(x @ y / np.linalg.norm(x) / np.linalg.norm(y), -1, 1))) / math.pi

    best: dict[tuple[int, int], tuple[float, int]] = {}
    for i in range(len(a)):
        for j in range(len(b)):
            before = [best[p] for p in ((i - 1, j - 1), (i, j - 1), (i - 1, j)) if p in best]
            total, length = min(before, key=lambda item: item[0]) if before else (0.0, 0)
            best[i, j] = total + cost(a[i], b[j]), length + 1
    total, length = best[len(a) - 1, len(b) - 1]
    return total / length


@pytest.mark.parametrize("metric", [ANGULAR, MISMATCH])
@pytest.mark.parametrize("compiled", [True, False])
def test_dtw_distances_are_those_of_the_recursion(metric: Metric, compiled: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not compiled:
        monkeypatch.setenv("SPEAR_KERNELS", "0")
    elif dtw_loop() is None:
        pytest.skip("there is no C++ compiler")
    rng = np.random.default_rng(0)
    lens = rng.integers(1, 9, 12)
    starts = np.concatenate([[0], np.cumsum(lens)[:-1]])
    frames = rng.normal(size=(int(lens.sum()), 5)) if metric == ANGULAR else rng.integers(0, 9, (int(lens.sum()), 4)) + 0.0
    pairs = rng.integers(0, 12, (60, 2))
    found = dtw_distances(frames.astype(np.float32), starts, lens, pairs, metric)
    items = [frames[start : start + length] for start, length in zip(starts, lens)]
    assert found == pytest.approx([plain(items[i], items[j], metric) for i, j in pairs], abs=2e-4)


def test_dtw_distance_of_a_stretched_sequence_is_zero_and_of_opposite_ones_is_one() -> None:
    frames = np.array([[1, 0], [0, 1], [1, 0], [1, 0], [0, 1], [0, 1], [-1, 0]], np.float32)
    found = dtw_distances(frames, np.array([0, 2, 0, 6]), np.array([2, 4, 1, 1]), np.array([[0, 1], [2, 3]]), ANGULAR)
    assert found == pytest.approx([0, 1], abs=1e-4)
