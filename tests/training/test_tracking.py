"""Records, metrics, stopwatch and signals."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from spear.errors import ArtifactError
from spear.training.distributed import World
from spear.training.metrics import Metrics, Stopwatch
from spear.training.signals import StopSignals
from spear.training.tracking import Tracker, last_record, read_records


def write_three(folder: Path) -> Tracker:
    tracker = Tracker(folder, sinks=())
    tracker.start(0)
    for step in (2, 4, 6):
        tracker.metrics("train", step, {"loss": 1.0 / step})
    return tracker


def test_tracker_writes_one_line_a_record(tmp_path: Path) -> None:
    write_three(tmp_path).metrics("valid", 6, {"loss": float("nan"), "accuracy": 0.25})
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert lines[0] == '{"step": 2, "split": "train", "loss": 0.5}'
    assert lines[-1] == '{"step": 6, "split": "valid", "loss": null, "accuracy": 0.25}'


def test_tracker_drops_records_after_the_step_it_starts_at(tmp_path: Path) -> None:
    write_three(tmp_path)
    before = (tmp_path / "metrics.jsonl").read_text()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 8, "sp')
    tracker = Tracker(tmp_path, sinks=())
    tracker.start(4)
    assert [record["step"] for _, record in read_records(tmp_path / "metrics.jsonl")] == [2, 4]
    tracker.metrics("train", 6, {"loss": 1.0 / 6})
    assert (tmp_path / "metrics.jsonl").read_text() == before


def test_tracker_writes_tensorboard_and_goes_on_after_a_restart(tmp_path: Path) -> None:
    for start, steps in ((0, (1, 2, 3)), (2, (3, 4))):
        tracker = Tracker(tmp_path)
        tracker.start(start)
        for step in steps:
            tracker.metrics("train", step, {"loss": start + step / 8})
        tracker.timing(steps[-1], {"wall_s": 1.0})
        tracker.close()
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(event.step, event.value) for event in events.Scalars("train/loss")] == [(1, 0.125), (2, 0.25), (3, 2.375), (4, 2.5)]
    assert "timing/wall_s" in events.Tags()["scalars"]
    assert len((tmp_path / "timing.jsonl").read_text().splitlines()) == 2


def test_last_record_finds_the_split(tmp_path: Path) -> None:
    tracker = write_three(tmp_path)
    assert last_record(tmp_path / "metrics.jsonl", "valid") == {}
    tracker.metrics("valid", 6, {"loss": 0.5})
    tracker.metrics("train", 8, {"loss": 0.125})
    assert last_record(tmp_path / "metrics.jsonl", "valid") == {"step": 6, "split": "valid", "loss": 0.5}


@pytest.mark.parametrize("line", ["nonsense", "[1]", '{"loss": 1}'])
def test_read_records_raises_artifact_error_when_a_line_is_no_record(tmp_path: Path, line: str) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text(f'{{"step": 1}}\n{line}\n{{"step": 2}}\n')
    with pytest.raises(ArtifactError, match=r"metrics.jsonl line 2 is not a record"):
        read_records(path)


def test_metrics_weigh_every_frame_alike() -> None:
    metrics = Metrics()
    metrics.add({"loss": torch.tensor([6.0, 2.0]), "rare": torch.tensor([0.0, 0.0])})
    metrics.add({"loss": torch.tensor([1.0, 5.0], requires_grad=True), "accuracy": torch.tensor([3, 4])})
    assert metrics.averages(World()) == {"accuracy": 0.75, "loss": 1.0}


def test_metrics_state_round_trips_through_json() -> None:
    first, second = Metrics(), Metrics()
    for value in (0.1, 0.2, 0.3):
        first.add({"loss": torch.tensor([value, 1.0])})
    second.add_state(json.loads(json.dumps(first.state())), torch.device("cpu"))
    for metrics in (first, second):
        metrics.add({"loss": torch.tensor([0.7, 1.0])})
    assert first.averages(World()) == second.averages(World())
    first.reset()
    assert first.state() == {}


def test_stopwatch_adds_up_phases_until_the_lap() -> None:
    watch = Stopwatch(torch.device("cpu"))
    for name in ("data", "data", "forward"):
        with watch.phase(name):
            time.sleep(0.01)
    wall, phases = watch.lap()
    assert phases["data"] >= 0.02
    assert phases["forward"] >= 0.01
    assert wall >= phases["data"] + phases["forward"]
    assert watch.lap()[1] == {}


def test_stop_signals_remembers_the_first_and_obeys_the_second() -> None:
    def interrupt_twice() -> None:
        with StopSignals() as stop:
            os.kill(os.getpid(), signal.SIGINT)
            assert stop.received is signal.SIGINT
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(5)

    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # what a shell starts in the background ignores it
    try:
        with pytest.raises(KeyboardInterrupt):
            interrupt_twice()
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, before)


def test_stop_signals_restores_the_handlers() -> None:
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    with StopSignals() as stop:
        assert signal.getsignal(signal.SIGTERM) != before[0]
    assert stop.received is None
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)] == before
