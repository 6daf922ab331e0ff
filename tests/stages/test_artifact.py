"""Artifacts: finished last, guarded by their inputs, resumable."""

from __future__ import annotations

import errno
import functools
import multiprocessing
import os
import time
from contextlib import suppress
from pathlib import Path

import pytest

from spear.errors import ArtifactError, SpearError
from spear.files import read_json, write_bytes, write_json
from spear.stages.artifact import DONE, UNFINISHED, Artifact, fingerprint_of, read_artifact
from spear.stages.session import LOCK, Cost, locked, noting


def make(folder: Path, **inputs: str) -> Artifact:
    return Artifact(folder, kind="tokens", config={"layer": 3, "nested": {"a": [1, 2]}}, inputs=inputs or {"teacher": "t1"})


def test_artifact_is_finished_only_after_a_clean_exit(tmp_path: Path) -> None:
    artifact = make(tmp_path / "x")
    assert not artifact.is_done()
    with artifact.making() as record:
        record.counts["cuts"] = 3
        record.audio_s += 1.25
        assert (tmp_path / "x" / UNFINISHED).exists()
        assert not (tmp_path / "x" / DONE).exists()
    assert artifact.is_done()
    assert not (tmp_path / "x" / UNFINISHED).exists()
    found = read_artifact(tmp_path / "x")
    assert (found["counts"], found["audio_s"], found["inputs"]) == ({"cuts": 3}, 1.25, {"teacher": "t1"})
    assert found["measured"]["peak_memory_mb"] > 1
    assert fingerprint_of(tmp_path / "x") == artifact.fingerprint


def test_artifact_stays_unfinished_when_the_stage_breaks(tmp_path: Path) -> None:
    artifact = make(tmp_path)
    with pytest.raises(RuntimeError), artifact.making():
        raise RuntimeError("killed")
    assert not artifact.is_done()
    with pytest.raises(ArtifactError, match="is unfinished"):
        read_artifact(tmp_path)
    with artifact.making():
        pass
    assert artifact.is_done()


def test_making_raises_artifact_error_when_content_has_no_record(tmp_path: Path) -> None:
    write_bytes(tmp_path / "notes.txt", b"a user's own")
    with make(tmp_path).making():
        write_bytes(tmp_path / "block-00000.safetensors", b"codes")
    (tmp_path / DONE).unlink()
    rule = r"holds block-00000\.safetensors, but neither artifact\.json nor unfinished\.json to say what it was made from: bring artifact\.json back"
    for enter in (lambda: make(tmp_path, teacher="t2").making(), lambda: make(tmp_path).part(0, 2)):
        with pytest.raises(ArtifactError, match=rule), enter():
            pass
    (tmp_path / "block-00000.safetensors").unlink()
    with make(tmp_path, teacher="t2").making():
        pass


def test_making_takes_what_workers_made(tmp_path: Path) -> None:
    for index in range(2):
        with make(tmp_path).part(index, 2):
            write_bytes(tmp_path / f"block-{index:05d}.safetensors", b"codes")
    with make(tmp_path).making(finishing=True):
        pass
    assert make(tmp_path).is_done()


def test_is_done_raises_artifact_error_when_an_input_changed(tmp_path: Path) -> None:
    with make(tmp_path, teacher="t1").making():
        pass
    with pytest.raises(ArtifactError, match="`inputs.teacher` was t1, is t2"):
        make(tmp_path, teacher="t2").is_done()


def test_is_done_raises_artifact_error_when_the_config_changed(tmp_path: Path) -> None:
    with make(tmp_path).making():
        pass
    other = Artifact(tmp_path, kind="tokens", config={"layer": 4, "nested": {"a": [1, 2]}}, inputs={"teacher": "t1"})
    with pytest.raises(ArtifactError, match="`config.layer` was 3, is 4"):
        other.is_done()


def test_making_raises_artifact_error_when_the_unfinished_folder_has_other_inputs(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError), make(tmp_path).making():
        raise RuntimeError("killed")
    with pytest.raises(ArtifactError, match="`inputs.teacher` was t1, is t2"), make(tmp_path, teacher="t2").making():
        pass


def test_making_adds_up_the_cost_of_all_processes(tmp_path: Path) -> None:
    for number in (1, 2):
        with suppress(RuntimeError), make(tmp_path).making():
            time.sleep(0.05)
            raise RuntimeError("stopped")
        spent = read_json(tmp_path / UNFINISHED)["measured"]
        assert spent["sessions"] == number
        assert spent["wall_s"] >= 0.05 * number
    with make(tmp_path).making():
        time.sleep(0.05)
    found = read_artifact(tmp_path)["measured"]
    assert found["sessions"] == 3
    assert spent["wall_s"] + 0.05 <= found["wall_s"] < spent["wall_s"] + 5


def test_making_keeps_the_account_of_a_process_that_was_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The account is written while the stage works, as a killed process has no last word."""
    monkeypatch.setattr("spear.stages.artifact.noting", functools.partial(noting, every_s=0.02))
    other = multiprocessing.get_context("fork").Process(target=hold, args=(tmp_path / "x", tmp_path / "ready"))
    other.start()
    try:
        deadline = time.monotonic() + 30
        while time.monotonic() < deadline:
            if (tmp_path / "ready").exists() and read_json(tmp_path / "x" / UNFINISHED)["measured"]["wall_s"] > 0.1:
                break
            time.sleep(0.01)
    finally:
        other.kill()
        other.join()
    with make(tmp_path / "x").making():
        pass
    found = read_artifact(tmp_path / "x")["measured"]
    assert found["sessions"] == 2
    assert found["wall_s"] > 0.1


def test_making_counts_the_gpus_of_all_processes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.is_initialized", lambda: True)
    monkeypatch.setattr("torch.cuda.max_memory_allocated", lambda: 3 * 2**20)
    clock = iter([0.0, *[3600.0] * 9])
    monkeypatch.setattr("spear.stages.session.time.monotonic", lambda: next(clock))
    cost = Cost({"sessions": 1, "wall_s": 1800.0, "gpu_hours": 4.0, "peak_memory_mb": 1e9, "peak_gpu_memory_mb": 5.0}, processes=8)
    assert cost.so_far() == {"sessions": 2, "wall_s": 5400.0, "gpu_hours": 12.0, "peak_memory_mb": 1e9, "peak_gpu_memory_mb": 5.0}


def hold(folder: Path, ready: Path) -> None:
    with make(folder).making():
        ready.touch()
        time.sleep(60)


def test_making_raises_artifact_error_when_another_process_is_at_work(tmp_path: Path) -> None:
    """The lock goes with the process, however it ends, and a child that outlives it does not keep it."""
    folder, ready = tmp_path / "x", tmp_path / "ready"
    other = multiprocessing.get_context("fork").Process(target=hold, args=(folder, ready))
    other.start()
    try:
        deadline = time.monotonic() + 30
        while not ready.exists() and time.monotonic() < deadline:
            time.sleep(0.01)
        with pytest.raises(ArtifactError, match=rf"{folder} is being worked on by process {other.pid} on \S+: wait"), make(folder).making():
            pass
        assert (folder / LOCK).exists()
    finally:
        other.kill()
        other.join()
    with make(folder).making():
        assert str(os.getpid()) in (folder / LOCK).read_text()
    assert [path.name for path in folder.iterdir()] == [DONE]


def test_locked_warns_where_the_file_system_knows_no_locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("fcntl.lockf", refuse)
    with locked(tmp_path):
        pass
    assert "cannot be locked (No locks available)" in caplog.text


def test_fingerprint_depends_on_every_part() -> None:
    base = make(Path("a"))
    assert base.fingerprint == make(Path("b")).fingerprint
    assert len({base.fingerprint, make(Path("a"), teacher="t2").fingerprint, make(Path("a"), teacher="t1", more="x").fingerprint}) == 3


def test_write_json_refuses_values_that_are_not_finite(tmp_path: Path) -> None:
    with pytest.raises(ValueError):
        write_json(tmp_path / "x.json", {"a": float("nan")})
    assert list(tmp_path.iterdir()) == []


def test_write_keeps_the_old_file_when_writing_fails(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    write_json(path, 1)
    with pytest.raises(TypeError):
        write_json(path, object())
    assert read_json(path) == 1
    assert [p.name for p in tmp_path.iterdir()] == ["x.json"]


def test_read_json_raises_artifact_error_when_the_file_is_damaged(tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text('{"a": ')
    with pytest.raises(ArtifactError, match=r"x\.json is not valid JSON"):
        read_json(tmp_path / "x.json")


def test_write_raises_spear_error_when_a_file_is_in_the_way(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(SpearError, match="a file is in the way"):
        write_bytes(tmp_path / "file" / "x", b"")


def test_write_raises_spear_error_when_the_disk_is_full() -> None:
    if not os.access("/dev/full", os.W_OK):
        pytest.skip("this system has no /dev/full")
    from spear.files import writing

    with (
        pytest.raises(SpearError, match="cannot write x: no space left on the disk"),
        writing(Path("x")),
        open("/dev/full", "wb", buffering=0) as file,
    ):
        file.write(b"x" * 10)
