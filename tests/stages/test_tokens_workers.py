"""Stage `tokens` with several workers: the same bytes for any number of them and any kills; failed files made again."""

from __future__ import annotations

import gzip
import json
import multiprocessing
import os
import random
import shutil
import signal
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from spear.data.token_store import TokenStore, TokenWriter
from spear.errors import ArtifactError, ConfigError, DataError
from spear.files import read_json
from spear.stages import tokens
from spear.stages.artifact import PARTS
from spear.stages.manifests import manifest_path
from spear.stages.session import BusyError, added_up, locked
from spear.training.distributed import World
from tests.stages.test_tokens import finished, prepared
from tests.teachers.runs import contents, make_run

FORK = multiprocessing.get_context("fork")


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, bytes]]:
    """Folder of a run up to its quantizers, and the token stores of one uninterrupted process."""
    root = tmp_path_factory.mktemp("whole")
    run = prepared(root, tokens={"cuts_per_block": 2})
    return root, finished(run)


def again(whole: tuple[Path, dict[str, bytes]], **settings: Any) -> Any:
    """The run of `whole` without tokens."""
    run = make_run(whole[0], tokens={"cuts_per_block": 2, **settings})
    shutil.rmtree(run.data / "tokens", ignore_errors=True)
    return run


def start(run: Any, shard: int, num_shards: int) -> Any:
    """A worker in a process of its own."""
    process = FORK.Process(target=tokens.run, args=(run,), kwargs={"num_shards": num_shards, "shard": shard})
    process.start()
    return process


def stores(run: Any) -> list[Path]:
    return [path.parent for path in (run.data / "tokens").rglob("artifact.json")]


def test_share_numbers_processes_across_machines() -> None:
    shares = [tokens.share_of(World(rank=rank, size=2), num_shards=3, shard=shard) for shard in range(3) for rank in range(2)]
    assert [(share.index, share.count) for share in shares] == [(index, 6) for index in range(6)]
    blocks = [[block for block in range(20) if block in share] for share in shares]
    assert sorted(block for share in blocks for block in share) == list(range(20))


@pytest.mark.parametrize(("num_shards", "shard"), [(2, 2), (2, -1), (0, 0)])
def test_share_raises_config_error_when_there_is_no_such_shard(num_shards: int, shard: int) -> None:
    with pytest.raises(ConfigError, match=rf"`--shard` must be between 0 and {max(num_shards, 1) - 1} .*, but is {shard}"):
        tokens.share_of(World(), num_shards, shard)


@pytest.mark.parametrize("order", [(0, 1), (1, 0), (2, 0, 1), (3, 1, 0, 2), tuple(reversed(range(9)))])
def test_workers_one_after_the_other_leave_the_bytes_of_one_process(whole: tuple[Path, dict[str, bytes]], order: Sequence[int]) -> None:
    run = again(whole)
    for place, shard in enumerate(order):
        assert place == 0 or contents(run.data / "tokens") != whole[1]
        tokens.run(run, num_shards=len(order), shard=shard)
    assert contents(run.data / "tokens") == whole[1]
    assert len(stores(run)) == 6


def test_workers_side_by_side_leave_the_bytes_of_one_process(whole: tuple[Path, dict[str, bytes]]) -> None:
    run = again(whole)
    workers = [start(run, shard, 4) for shard in range(4)]
    for worker in workers:
        worker.join()
        assert worker.exitcode == 0
    assert contents(run.data / "tokens") == whole[1]


def test_workers_are_told_apart_by_torchrun(whole: tuple[Path, dict[str, bytes]], monkeypatch: pytest.MonkeyPatch) -> None:
    run = again(whole)
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank in ("1", "0"):
        assert not stores(run)
        monkeypatch.setenv("RANK", rank)
        tokens.run(run)
    assert contents(run.data / "tokens") == whole[1]


def test_workers_killed_at_any_moment_and_started_again_leave_the_same_bytes(whole: tuple[Path, dict[str, bytes]]) -> None:
    run, chance = again(whole), random.Random(5)
    for _ in range(10):
        workers = [start(run, shard, 2) for shard in range(2)]
        time.sleep(chance.uniform(0.0, 0.25))
        for worker in workers:
            os.kill(worker.pid, signal.SIGKILL)
            worker.join()
    for shard in range(2):
        tokens.run(run, num_shards=2, shard=shard)
    assert contents(run.data / "tokens") == whole[1]


def test_one_process_finishes_what_workers_left(whole: tuple[Path, dict[str, bytes]]) -> None:
    run = again(whole)
    tokens.run(run, num_shards=3, shard=1)
    folder = run.data / "tokens" / "mel" / "talk" / "train"
    made = {path: path.stat().st_mtime_ns for path in folder.glob("block-*")}
    assert sorted(path.name for path in made if path.suffix == ".json") == ["block-00001.json", "block-00004.json"]
    assert read_json(folder / PARTS / "00001-of-00003" / "unfinished.json")["measured"]["sessions"] == 1
    tokens.run(run)
    assert contents(run.data / "tokens") == whole[1]
    assert {path: path.stat().st_mtime_ns for path in made} == made
    assert read_json(folder / "artifact.json")["measured"]["sessions"] == 2


def test_a_worker_makes_its_own_blocks_only(whole: tuple[Path, dict[str, bytes]], monkeypatch: pytest.MonkeyPatch) -> None:
    run, made = again(whole), []
    write = TokenWriter.write
    monkeypatch.setattr(TokenWriter, "write", lambda self, index, *args, **notes: (made.append(index), write(self, index, *args, **notes)))
    tokens.run(run, num_shards=2, shard=1)
    assert set(made) == {1, 3, 5}
    tokens.run(run, num_shards=2, shard=1)
    assert len(made) == 3 * 3 + 3  # three train splits of six blocks, three valid splits of two


def hold(folder: Path, taken: Any, release: Any) -> None:
    with locked(folder):
        taken.set()
        release.wait(30)


@pytest.mark.parametrize(
    ("held", "settings", "passes"),
    [
        ("", {"num_shards": 2, "shard": 0}, False),
        (f"{PARTS}/00000-of-00002", {"num_shards": 2, "shard": 0}, False),
        (f"{PARTS}/00000-of-00002", {}, False),
        (f"{PARTS}/00000-of-00002", {"num_shards": 3, "shard": 1}, False),
        (f"{PARTS}/00000-of-00002", {"num_shards": 2, "shard": 1}, True),
    ],
)
def test_workers_keep_out_of_each_other_s_way(whole: tuple[Path, dict[str, bytes]], held: str, settings: dict[str, int], passes: bool) -> None:
    run = again(whole)
    folder = run.data / "tokens" / "mel" / "talk" / "train" / held
    folder.mkdir(parents=True)
    taken, release = FORK.Event(), FORK.Event()
    other = FORK.Process(target=hold, args=(folder, taken, release))
    other.start()
    taken.wait(30)
    try:
        if passes:
            tokens.run(run, **settings)
        else:
            with pytest.raises(BusyError, match=rf"{folder} is being worked on by process {other.pid}"):
                tokens.run(run, **settings)
    finally:
        release.set()
        other.join()


def test_workers_raise_artifact_error_when_another_share_has_other_inputs(whole: tuple[Path, dict[str, bytes]]) -> None:
    run = again(whole)
    tokens.run(run, num_shards=2, shard=0)
    other = make_run(whole[0], tokens={"cuts_per_block": 3})
    with pytest.raises(ArtifactError, match=r"was made from other inputs: `config\.cuts_per_block` was 2, is 3"):
        tokens.run(other, num_shards=2, shard=1)
    with pytest.raises(ArtifactError, match=r"was made from other inputs: `config\.cuts_per_block` was 2, is 3"):
        tokens.run(other)


def test_workers_raise_data_error_when_too_many_cuts_fail_in_all(whole: tuple[Path, dict[str, bytes]]) -> None:
    run = again(whole, max_failed_share=0.1)
    damaged = [run.data / "audio" / "talk" / f"train-{index:03d}.wav" for index in (1, 2)]  # blocks 0 and 1: one failure for each worker
    good = [path.read_bytes() for path in damaged]
    for path in damaged:
        path.write_bytes(b"no audio")
    tokens.run(run, num_shards=2, shard=0)
    with pytest.raises(DataError, match=r"2 of 12 cuts failed \(decode: 2\), more than `tokens\.max_failed_share` 0\.1 allows"):
        tokens.run(run, num_shards=2, shard=1)
    for path, content in zip(damaged, good):
        path.write_bytes(content)
    for shard in (1, 0):
        tokens.run(run, num_shards=2, shard=shard)
    assert contents(run.data / "tokens") == whole[1]


@pytest.mark.parametrize("num_shards", [1, 2])
def test_failed_files_are_made_again_when_asked(whole: tuple[Path, dict[str, bytes]], num_shards: int) -> None:
    run = again(whole, max_failed_share=0.5)
    damaged = run.data / "audio" / "talk" / "train-004.wav"
    good = damaged.read_bytes()
    damaged.write_bytes(b"no audio")
    try:
        tokens.run(run)
        folder = run.data / "tokens" / "mel" / "talk" / "train"
        assert "talk-train-004" not in TokenStore.open(folder)
        before = {path.name: path.stat().st_mtime_ns for path in folder.glob("block-*.json")}
        for shard in range(num_shards):
            tokens.run(run, num_shards=num_shards, shard=shard, retry_failed=True)
        assert json.loads((folder / "failures.jsonl").read_text())["id"] == "talk-train-004"  # broken still
    finally:
        damaged.write_bytes(good)
    tokens.run(run)
    assert "talk-train-004" not in TokenStore.open(folder)
    for shard in range(num_shards):
        tokens.run(run, num_shards=num_shards, shard=shard, retry_failed=True)
    assert contents(run.data / "tokens") == whole[1]
    after = {path.name: path.stat().st_mtime_ns for path in folder.glob("block-*.json")}
    assert [name for name in after if after[name] != before[name]] == ["block-00002.json"]
    assert read_json(folder / "artifact.json")["measured"]["sessions"] >= 2


def test_workers_raise_data_error_when_an_id_is_in_the_blocks_of_two(tmp_path: Path) -> None:
    run = prepared(tmp_path, tokens={"cuts_per_block": 2})
    path = manifest_path(run.data, "talk", "train")
    lines = gzip.decompress(path.read_bytes()).splitlines(keepends=True)
    path.write_bytes(gzip.compress(b"".join([*lines[:3], lines[0]])))
    tokens.run(run, num_shards=2, shard=0)
    with pytest.raises(DataError, match="holds the cut talk-train-000 twice"):
        tokens.run(run, num_shards=2, shard=1)


def test_added_up_adds_times_and_takes_the_largest_memory() -> None:
    costs = [{"sessions": 1, "wall_s": 2.5, "peak_memory_mb": 10.0}, {"sessions": 2, "wall_s": 1.0, "peak_memory_mb": 30.0, "gpu_hours": 0.5}]
    assert added_up(costs) == {"sessions": 3, "wall_s": 3.5, "peak_memory_mb": 30.0, "gpu_hours": 0.5}
