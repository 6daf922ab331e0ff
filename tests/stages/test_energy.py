"""Energy counters: differences, counters that start again, and machines without any."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from spear.stages.energy import KWH, Counter, find_counters, visible_gpus
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


def pynvml() -> Any:
    """Stands for the module on a machine with three GPUs."""
    found = {"nvmlDeviceGetHandleByIndex": lambda index: f"GPU-{index}", "nvmlDeviceGetHandleByUUID": str, "nvmlDeviceGetCount": lambda: 3}
    return SimpleNamespace(**found, nvmlInit=lambda: None, nvmlDeviceGetTotalEnergyConsumption=lambda handle: 5000)


@pytest.mark.parametrize(
    ("names", "numbers"), [(None, [0, 1, 2]), ("2,0", [2, 0]), ("GPU-1, 0", [1, 0]), ("1,-1,2", [1]), ("", []), ("MIG-7", [])], ids=str
)
def test_visible_gpus_are_those_that_cuda_would_show(names: str | None, numbers: list[int]) -> None:
    assert list(visible_gpus(pynvml(), names)) == [f"GPU-{number}" for number in numbers]


def test_energy_of_gpus_is_read_without_starting_cuda(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", pynvml())
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.get_device_properties", lambda _: pytest.fail("CUDA is started"))
    assert len(find_counters(tmp_path)) == 3


def test_cost_counts_no_gpu_that_was_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.is_initialized", lambda: True)
    monkeypatch.setattr("torch.cuda.max_memory_allocated", lambda: 0)
    cost = Cost({})
    assert not {"gpu_hours", "peak_gpu_memory_mb"} & set(cost.so_far())
    monkeypatch.setattr("torch.cuda.max_memory_allocated", lambda: 2**20)
    assert {"gpu_hours", "peak_gpu_memory_mb"} <= set(cost.so_far())
