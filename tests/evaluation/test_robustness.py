"""Edit distances of tokens."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from spear.evaluation.robustness import changed_share, edit_distances, frame_shift, robustness, token_error, without_repeats
from spear.quantizers import KMeans


def by_definition(a: list[int], b: list[int]) -> int:
    table = [[i + j if i * j == 0 else 0 for j in range(len(b) + 1)] for i in range(len(a) + 1)]
    for i in range(1, len(a) + 1):
        for j in range(1, len(b) + 1):
            table[i][j] = min(table[i - 1][j] + 1, table[i][j - 1] + 1, table[i - 1][j - 1] + (a[i - 1] != b[j - 1]))
    return table[-1][-1]


def test_edit_distances_are_levenshtein_s() -> None:
    rng = np.random.default_rng(0)
    first, second = ([rng.integers(4, size=rng.integers(0, 14)) for _ in range(600)] for _ in range(2))
    expected = [by_definition(a.tolist(), b.tolist()) for a, b in zip(first, second)]
    assert edit_distances(first, second).tolist() == expected
    assert edit_distances([], []).tolist() == []


def test_without_repeats_cuts_runs() -> None:
    assert without_repeats(np.array([3, 3, 1, 1, 1, 3, 2])).tolist() == [3, 1, 3, 2]
    assert without_repeats(np.array([], dtype=np.int64)).tolist() == []


def test_token_error_is_over_the_clean_tokens_of_all_cuts_and_codebooks() -> None:
    clean = [torch.tensor([[1, 5], [1, 6], [2, 6]], dtype=torch.uint8), torch.tensor([[0, 0]], dtype=torch.uint8)]
    changed = [torch.tensor([[1, 5], [2, 5], [2, 5], [2, 5]], dtype=torch.uint8), torch.tensor([[0, 1]], dtype=torch.uint8)]
    # 1 2 -> 1 2, 5 6 -> 5, 0 -> 0, 0 -> 1: two edits of six tokens
    assert token_error(clean, changed) == pytest.approx(2 / 6)
    assert changed_share(clean, [clean[0].flip(0), clean[1]]) == pytest.approx(4 / 8)


def test_frame_shift_is_relative_to_the_spread() -> None:
    clean = [torch.tensor([[0.0], [2.0]])]
    assert frame_shift(clean, [torch.tensor([[1.0], [2.0]])]) == pytest.approx(1 / 2)


def test_robustness_tells_a_small_change_from_another_cut() -> None:
    generator = torch.Generator().manual_seed(0)
    quantizer = KMeans(torch.randn(32, 4, generator=generator))
    clean = [torch.randn(40, 4, generator=generator) for _ in range(3)]
    changed = {"noise": [x + 0.05 * torch.randn(x.shape, generator=generator) for x in clean], "speed": [x[::2] for x in clean]}
    found = robustness(quantizer, clean, changed)
    assert set(found["token_error"]) == {"noise", "speed", "other_cut"}
    assert set(found["changed_share"]) == {"noise"}
    assert found["token_error"]["noise"] < 0.3 < found["token_error"]["speed"] < found["token_error"]["other_cut"]
    assert robustness(quantizer, clean, {"gain": clean})["token_error"]["gain"] == 0.0
