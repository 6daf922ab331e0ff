"""Energy counters: differences, counters that start again, and machines without any."""

from __future__ import annotations

from pathlib import Path

import pytest

from spear.stages.energy import KWH, Counter, find_counters
from spear.stages.session import Cost


def make_package(root: Path, name: str, joules: float, wraps: float = 1000.0) -> Path:
    folder = root / name
    folder.mkdir(parents=True)
    (folder / "energy_uj").write_text(f"{int(joules * 1e6)}\n")
    (folder / "max_energy_range_uj").write_text(f"{int(wraps * 1e6)}\n")
    return folder / "energy_uj"


def test_counters_read_packages_and_bear_a_turn(tmp_path: Path) -> None:
    one, _ = make_package(tmp_path, "intel-rapl:0", 900), make_package(tmp_path, "intel-rapl:0:0", 5)
    (counter,) = find_counters(tmp_path)
    assert counter.update() == 0.0
    one.write_text("950000000")
    assert counter.update() == pytest.approx(50)
    one.write_text("30000000")
    assert counter.update() == pytest.approx(50 + 80)
    one.unlink()
    assert counter.update() == pytest.approx(130)


def test_counters_are_none_where_nothing_can_be_read(tmp_path: Path) -> None:
    assert find_counters(tmp_path / "none") == []


def test_cost_adds_energy_to_that_of_earlier_sessions() -> None:
    readings = iter([0.0, KWH / 2])
    cost = Cost({"energy_kwh": 1.25})
    cost.energy = [Counter(lambda: next(readings))]
    assert cost.so_far()["energy_kwh"] == pytest.approx(1.75)
    cost.energy = []
    assert cost.so_far()["energy_kwh"] == 1.25
