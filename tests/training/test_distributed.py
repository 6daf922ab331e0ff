"""Several processes: same result as one, exact resumption, collectives."""

from __future__ import annotations

import datetime
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.multiprocessing as mp

from spear.errors import ConfigError, SpearError, StopRequested
from spear.files import read_tensors, write_json
from spear.training import distributed
from spear.training.checkpoint import find_checkpoints
from spear.training.distributed import World, check_one_each, pick_device, process_group
from spear.training.metrics import Metrics
from spear.types import Batch
from tests.training.toy import ToySource, make_batch, read_outcome, toy_trainer


def free_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return int(server.getsockname()[1])


def in_two_processes(rank: int, port: int, folder: Path) -> None:
    """Train whole, train with a stop asked of rank 1 only, and fail on rank 1 only; rank 0 writes what it saw."""
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    seen: dict[str, str] = {}

    def stop(g: int) -> None:
        if g == 11:
            os.kill(os.getpid(), signal.SIGTERM)

    def spoil(g: int) -> Batch:
        batch = make_batch(g)
        if g == 7:
            batch.features.fill_(float("nan"))
        return batch

    with process_group("cpu") as world:
        toy_trainer(folder / "whole", world=world, accumulation=1).run()
        toy_trainer(folder / "plain", world=world, accumulation=1, habit=False).run()
        try:
            toy_trainer(folder / "stopped", ToySource(stop), world=world, accumulation=1).run()
        except StopRequested as error:
            seen["stopped"] = str(error)
        toy_trainer(folder / "stopped", world=world, accumulation=1).run()
        toy_trainer(folder / "skipped", ToySource(make=spoil), world=world, accumulation=1).run()
        try:
            toy_trainer(folder / "bad", ToySource(make=spoil), world=world, accumulation=1, max_skipped=0).run()
        except SpearError as error:
            seen["bad"] = str(error)
        metrics = Metrics()
        metrics.add({"both": torch.tensor([1.0 + rank, 1.0]), f"only-{rank}": torch.tensor([6.0, 3.0])})
        averages = metrics.averages(world)
        told = world.gather({"seen": seen, "averages": averages, "rank": world.rank, "size": world.size})
    if rank == 0:
        write_json(folder / "told.json", told)


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("two")
    mp.spawn(in_two_processes, args=(free_port(), folder), nprocs=2)
    return folder


def told(folder: Path) -> list[dict[str, dict[str, object]]]:
    return json.loads((folder / "told.json").read_text())


def test_two_processes_equal_one_with_accumulation(two_processes: Path, tmp_path: Path) -> None:
    toy_trainer(tmp_path, accumulation=2, habit=False).run()
    ours = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    theirs = [json.loads(line) for line in (two_processes / "plain/metrics.jsonl").read_text().splitlines()]
    assert len(ours) == len(theirs) == 7 + 4
    for one, two in zip(ours, theirs):
        assert one.pop("split") == two.pop("split")
        assert one == pytest.approx(two, rel=1e-5)
    a, b = (read_tensors(folder / "checkpoints/step-00000020/model.safetensors") for folder in (tmp_path, two_processes / "plain"))
    for name in a:
        torch.testing.assert_close(a[name], b[name], atol=1e-5, rtol=1e-5)


def test_two_processes_end_in_the_same_bytes_after_a_signal_to_one(two_processes: Path) -> None:
    for entry in told(two_processes):
        assert "stopped after update 6 of 20" in str(entry["seen"]["stopped"])
    assert read_outcome(two_processes / "stopped") == read_outcome(two_processes / "whole")


def test_two_processes_remember_the_state_of_each(two_processes: Path) -> None:
    state = json.loads((two_processes / "whole/checkpoints/step-00000020/state.json").read_text())
    shares = [rank["modules"]["habit"] for rank in state["ranks"]]
    assert len(shares) == 2
    assert shares[0] != shares[1]


def test_two_processes_both_raise_spear_error_when_the_loss_of_one_is_not_finite(two_processes: Path) -> None:
    for entry in told(two_processes):
        assert str(entry["seen"]["bad"]).startswith("the loss of update 4 is not finite; cuts cut-7-0, cut-7-1, cut-7-2; the batch is in")
    files = sorted(path.name for path in (two_processes / "bad/bad_batch").iterdir())
    assert files == [f"step-00000004-rank-{rank}-part-0.safetensors" for rank in (0, 1)]


def test_two_processes_both_leave_out_an_update_that_is_not_finite_on_one(two_processes: Path) -> None:
    files = sorted(path.name for path in (two_processes / "skipped/bad_batch").iterdir())
    assert files == [f"step-00000004-rank-{rank}-part-0.safetensors" for rank in (0, 1)]
    state = json.loads((two_processes / "skipped/checkpoints/step-00000020/state.json").read_text())
    assert state["skipped"] == 1
    records = [json.loads(line) for line in (two_processes / "skipped/metrics.jsonl").read_text().splitlines()]
    assert all(record["loss"] is not None for record in records)


def test_metrics_average_over_processes(two_processes: Path) -> None:
    for entry in told(two_processes):
        assert entry["averages"] == {"both": 1.5, "only-0": 2.0, "only-1": 2.0}


def test_one_process_may_continue_what_two_began(two_processes: Path, tmp_path: Path) -> None:
    """All random numbers are those of the batch, so only the module's own per-process state can differ."""
    (tmp_path / "checkpoints").mkdir()
    step, path = find_checkpoints(two_processes / "plain")[0]
    (tmp_path / "checkpoints" / path.name).symlink_to(path)
    (tmp_path / "metrics.jsonl").write_text((two_processes / "plain/metrics.jsonl").read_text())
    result = toy_trainer(tmp_path, accumulation=2, habit=False).run()
    assert (step, result.steps) == (16, 20)
    a, b = ([json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()] for folder in (tmp_path, two_processes / "plain"))
    for one, two in zip(a, b):
        assert one.pop("split") == two.pop("split")
        assert one == pytest.approx(two, rel=1e-5)


def test_process_group_is_one_process_without_torchrun(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    with process_group() as world:
        assert world == World()
        assert world.is_main
        assert world.gather("x") == ["x"]
        assert float(world.sum_(torch.tensor(3.0))) == 3.0
        world.barrier()


def test_process_group_raises_spear_error_when_the_environment_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "first")
    with pytest.raises(SpearError, match="must be whole numbers"), process_group():
        pass


def test_pick_device_raises_config_error_when_there_is_no_gpu() -> None:
    with pytest.raises(ConfigError, match="`device` cuda needs a CUDA device for local rank 1000"):
        pick_device("cuda", World(rank=1000, size=1001, local_rank=1000))
    assert pick_device("cpu", World()).type == "cpu"


def test_pick_device_takes_the_only_gpu_that_a_process_sees(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert pick_device("auto", World(rank=3, size=4, local_rank=3)) == torch.device("cuda", 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    assert pick_device("cuda", World(rank=7, size=8, local_rank=3)) == torch.device("cuda", 3)


def test_check_one_each_raises_config_error_when_two_processes_share_a_gpu() -> None:
    check_one_each([("one", "a"), ("one", "b"), ("two", "a")])
    with pytest.raises(ConfigError, match="processes 1 and 2 share a GPU of one: start one process per GPU"):
        check_one_each([("one", "a"), ("one", "b"), ("one", "b")])


ENDING = """
import atexit, sys, time
from spear import cli
from spear.errors import SpearError
from spear.training import distributed

def work(options):
    with distributed.process_group("cpu") as world:
        if world.rank == 1:
            raise SpearError("cut x cannot be read")
        world.sum_(distributed.torch.ones(1))

distributed.dist.destroy_process_group = lambda: time.sleep(600)  # as NCCL does while another process is in a collective
atexit.register(time.sleep, 600)  # as destructors may
cli._doctor = work
sys.exit(cli.main(["doctor"]))
"""


def test_command_of_several_processes_ends_with_its_line_when_one_of_them_fails() -> None:
    common = {**os.environ, "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "OMP_NUM_THREADS": "1"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    both = [subprocess.Popen([sys.executable, "-c", ENDING], env={**common, "RANK": rank, "LOCAL_RANK": rank}, **pipes) for rank in ("0", "1")]
    try:
        other, failed = (process.communicate(timeout=200)[1] for process in both)
    finally:
        for process in both:
            process.kill()
    assert [process.returncode for process in both] == [1, 1]
    assert failed.splitlines()[-1] == "spear: error: cut x cannot be read"
    assert "Traceback" not in failed
    assert "peer" in other.lower()


def wait_long(rank: int, port: int, folder: Path) -> None:
    """Rank 0 works for longer than collectives may take."""
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(distributed, "TIMEOUT", datetime.timedelta(seconds=4))
        with process_group("cpu") as world, world.main_first():
            if world.is_main:
                time.sleep(6)
                (folder / "made").touch()
        assert (folder / "made").exists()


def test_main_first_waits_for_longer_than_collectives_do(tmp_path: Path) -> None:
    mp.spawn(wait_long, args=(free_port(), tmp_path), nprocs=2)
    with World().main_first():
        pass
