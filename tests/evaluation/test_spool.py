"""Items wait in memory or in files and come out the same."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from spear.evaluation.spool import Budget, Spool
from spear.evaluation.tasks.base import Features, Rows


def filled(folder: Path, limit_bytes: int) -> Spool:
    rng = np.random.default_rng(0)
    spool = Spool(folder, Budget(limit_bytes))
    for i in (3, 0, 2, 1, 4):
        rows = 5 * i % 7
        layers = [rng.normal(size=(rows, dim)).astype(np.float32) for dim in (2, 3)]
        spool.add(f"cut{i}", Rows([f"{i}.{j}" for j in range(rows)], layers))
    return spool


@pytest.mark.parametrize("limit_bytes", [0, 70, 200])
def test_spool_gives_the_same_items_from_files_as_from_memory(tmp_path: Path, limit_bytes: int) -> None:
    expected, found = (filled(tmp_path / str(i), limit).features(50.0, 4) for i, limit in enumerate((10**6, limit_bytes)))
    assert not (tmp_path / "0").exists()
    assert isinstance(found.layers[0], np.memmap)
    assert found.labels == expected.labels == sorted(expected.labels)
    assert found.groups == expected.groups
    for a, b in zip(found.layers, expected.layers):
        assert np.array_equal(a, b)
    assert (found.frame_rate_hz, found.codebook_size, found.discrete) == (50.0, 4, True)


def test_spool_removes_what_it_has_put_in_order(tmp_path: Path) -> None:
    filled(tmp_path / "x", 0).features()
    assert sorted(path.name for path in (tmp_path / "x").iterdir()) == ["layer0.items", "layer1.items"]


def test_features_numbers_are_those_of_the_cuts() -> None:
    features = Features(["a", "b", "c"], ["u1", "u1", "u0"], [])
    assert features.numbers().tolist() == [1, 1, 0]
