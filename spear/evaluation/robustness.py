"""How much tokens change when their audio does, without labels: edit distances of token sequences."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from spear.evaluation.perturb import SAME_LENGTH

Tokens = NDArray[np.int64]
PAIRS = 512
"""Pairs of sequences compared at a time."""


def without_repeats(tokens: Tokens) -> Tokens:
    """A sequence (T,) with every run of the same token cut to one."""
    return tokens[np.concatenate([[True], tokens[1:] != tokens[:-1]])] if len(tokens) else tokens


def edit_distances(first: Sequence[Tokens], second: Sequence[Tokens]) -> NDArray[np.int64]:
    """Levenshtein distance of each pair of sequences: fewest insertions, deletions and substitutions that make one of the other."""
    found = [_edit_distances(first[start : start + PAIRS], second[start : start + PAIRS]) for start in range(0, len(first), PAIRS)]
    return np.concatenate(found) if found else np.zeros(0, dtype=np.int64)


def _edit_distances(first: Sequence[Tokens], second: Sequence[Tokens]) -> NDArray[np.int64]:
    a, b = _padded(first, -1), _padded(second, -2)
    a_lens, b_lens = (np.array([len(item) for item in items]) for items in (first, second))
    places = np.arange(b.shape[1] + 1)
    row = np.tile(places, (len(a), 1))
    found: NDArray[np.int64] = row[np.arange(len(a)), b_lens]
    for index in range(a.shape[1]):
        best = np.minimum(row[:, 1:] + 1, row[:, :-1] + (a[:, index : index + 1] != b))
        row = np.concatenate([np.full((len(a), 1), index + 1), best], axis=1)
        row = np.minimum.accumulate(row - places, axis=1) + places  # insertions: one more for every step to the right
        ends = a_lens == index + 1
        found[ends] = row[ends, b_lens[ends]]
    return found


def _padded(items: Sequence[Tokens], value: int) -> Tokens:
    padded = np.full((len(items), max((len(item) for item in items), default=0)), value, dtype=np.int64)
    for row, item in zip(padded, items):
        row[: len(item)] = item
    return padded


def token_error(clean: Sequence[Tensor], changed: Sequence[Tensor]) -> float:
    """Edit distance of tokens without repeats, over the length of the clean ones; cuts and codebooks together.

    After the unit edit distance of arXiv:2209.15483, for any number of codebooks and relative to the number of tokens without repeats.

    Args:
        clean, changed: codes (T, C) of each cut.
    """
    pairs = [(without_repeats(a), without_repeats(b)) for x, y in zip(clean, changed) for a, b in zip(_columns(x), _columns(y))]
    distances = edit_distances([a for a, _ in pairs], [b for _, b in pairs])
    return float(distances.sum() / max(1, sum(len(a) for a, _ in pairs)))


def _columns(codes: Tensor) -> Tokens:
    return codes.long().numpy().T


def changed_share(clean: Sequence[Tensor], changed: Sequence[Tensor]) -> float:
    """Share of (frame, codebook) cells whose token is another one, for codes (T, C) of the same lengths."""
    same = sum(int((x == y).sum()) for x, y in zip(clean, changed))
    return 1 - same / max(1, sum(x.numel() for x in clean))


def frame_shift(clean: Sequence[Tensor], changed: Sequence[Tensor]) -> float:
    """Squared distance of frames (T, D) from the clean ones, over the clean ones' squared distance from their mean."""
    before, after = torch.cat(list(clean)).double(), torch.cat(list(changed)).double()
    return float((after - before).square().sum() / ((before - before.mean(dim=0)).square().sum() + 1e-20))


def robustness(quantizer: Any, clean: Sequence[Tensor], changed: dict[str, list[Tensor]]) -> dict[str, Any]:
    """Figures of one quantizer.

    Args:
        clean: teacher frames (T, D) of each of at least two cuts. changed: name of a change -> frames of the same cuts after it.
    Returns:
        ``token_error`` by change, and under ``other_cut`` against the next cut: what tokens that have nothing in common give;
        ``changed_share`` of the changes that keep the number of frames.
    """
    codes = [quantizer.encode(frames).cpu() for frames in clean]
    after = {name: [quantizer.encode(frames).cpu() for frames in items] for name, items in changed.items()}
    errors = {name: round(token_error(codes, items), 4) for name, items in after.items()}
    errors["other_cut"] = round(token_error(codes, [*codes[1:], codes[0]]), 4)
    shares = {name: round(changed_share(codes, after[name]), 4) for name in after if name in SAME_LENGTH}
    return {"token_error": errors, "changed_share": shares}
