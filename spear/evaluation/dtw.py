"""Distance of two sequences of frames: the mean cost over the cheapest monotone path that pairs them (dynamic time warping)."""

from __future__ import annotations

from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from spear.evaluation.kernels import dtw_loop

Metric = Literal["angular", "mismatch"]
Floats = NDArray[np.float32]
Indexes = NDArray[np.int64]
CHUNK = 1024
"""Pairs that torch compares at a time."""


def dtw_distances(frames: Floats, starts: Indexes, lens: Indexes, pairs: Indexes, metric: Metric) -> Floats:
    """Distances (P,) of pairs of items.

    A path starts with both first frames, ends with both last ones and moves by one frame in one or both sequences; of equally cheap steps
    the one in both is taken, then the one in the second. The distance is the path's mean cost, as in the ABX tests of the ZeroSpeech
    challenges (arXiv:2011.11588). Compiled where that is possible, else torch, with the same result but for rounding.

    Args:
        frames: (M, D), all items one after the other. starts, lens: (I,) first frame and number of frames (at least one) of each item.
        pairs: (P, 2) items to compare. metric: ``angular``: cost is the angle of two frames over pi; ``mismatch``: the share of the D
            entries that differ, for codes.
    """
    if metric == "angular":
        frames = frames / np.maximum(np.linalg.norm(frames, axis=1, keepdims=True), 1e-12)
    arrays = [np.ascontiguousarray(array, np.int64) for array in (starts, lens)]
    order = np.lexsort((pairs[:, 0], pairs[:, 1]))  # equal second items together: the loop turns each once
    wanted = np.ascontiguousarray(pairs[order], np.int64)
    frames = np.ascontiguousarray(frames, np.float32)
    loop = dtw_loop()
    found = np.empty(len(pairs), np.float32)
    if loop is not None:
        found[order] = loop(frames, arrays[0], arrays[1], wanted, angular=metric == "angular")
    else:
        found[order] = _plain(torch.from_numpy(frames), arrays[0], arrays[1], wanted, metric)
    return found


def _plain(frames: Tensor, starts: Indexes, lens: Indexes, pairs: Indexes, metric: Metric) -> Floats:
    items = [frames[start : start + length] for start, length in zip(starts, lens)]
    longest = lens[pairs].max(axis=1)
    order = np.argsort(longest, kind="stable")
    found = np.empty(len(pairs), np.float32)
    for first in range(0, len(pairs), CHUNK):
        chosen = order[first : first + CHUNK]
        a, b = (pad_sequence([items[i] for i in pairs[chosen, side]], batch_first=True) for side in (0, 1))
        if metric == "angular":
            costs = torch.einsum("pnd,pmd->pnm", a, b).clamp(-1, 1).acos() / np.pi
        else:
            costs = torch.stack([(a[:, i : i + 1] != b).float().mean(dim=2) for i in range(a.shape[1])], dim=1)
        ends = [torch.from_numpy(lens[pairs[chosen, side]]) for side in (0, 1)]
        found[chosen] = path_means(costs, ends[0], ends[1]).numpy()
    return found


def path_means(costs: Tensor, n: Tensor, m: Tensor) -> Tensor:
    """Mean cost (P,) over the cheapest path from the first cell of costs (P, N, M) to cell (n - 1, m - 1) of each."""
    total, steps = torch.empty_like(costs), torch.empty_like(costs)
    for i in range(costs.shape[1]):
        for j in range(costs.shape[2]):
            if i == 0 and j == 0:
                best, count = costs.new_zeros(len(costs)), costs.new_zeros(len(costs))
            elif i == 0 or j == 0:
                before = (i, j - 1) if i == 0 else (i - 1, j)
                best, count = total[:, before[0], before[1]], steps[:, before[0], before[1]]
            else:
                places = [(i - 1, j - 1), (i, j - 1), (i - 1, j)]
                best, which = torch.stack([total[:, x, y] for x, y in places], dim=1).min(dim=1)
                count = torch.stack([steps[:, x, y] for x, y in places], dim=1).gather(1, which[:, None])[:, 0]
            total[:, i, j] = best + costs[:, i, j]
            steps[:, i, j] = count + 1
    rows = torch.arange(len(costs))
    return total[rows, n - 1, m - 1] / steps[rows, n - 1, m - 1]
