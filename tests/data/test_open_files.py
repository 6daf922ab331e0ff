"""Files that stay open: few enough for the process, the right bytes, also in forked ones."""

from __future__ import annotations

import os
import resource
from collections.abc import Iterator
from pathlib import Path

import pytest

from spear.data.open_files import MOST, OpenFiles, new_owner


@pytest.fixture
def few() -> Iterator[int]:
    """A process that may open few files; gives how many."""
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (512, before[1]))
    yield 512
    resource.setrlimit(resource.RLIMIT_NOFILE, before)


def numbered(folder: Path, count: int) -> list[Path]:
    paths = [folder / str(number) for number in range(count)]
    for number, path in enumerate(paths):
        path.write_bytes(f"{number:06d}".encode())
    return paths


def test_open_files_stay_below_half_of_what_a_process_may_open(tmp_path: Path, few: int) -> None:
    paths, files, owners = numbered(tmp_path, 70), OpenFiles(), [new_owner() for _ in range(9)]
    for owner in owners:
        assert [files.read(owner, path, 2, 4) for path in paths] == [f"{number:04d}".encode() for number in range(70)]
    assert len(files) == few // 2 < MOST
    before = len(os.listdir("/proc/self/fd"))
    for owner in owners:
        files.drop(owner)
    assert (len(files), len(os.listdir("/proc/self/fd"))) == (0, before - few // 2)


def test_open_files_of_a_new_reader_are_new(tmp_path: Path) -> None:
    (path,), files, old = numbered(tmp_path, 1), OpenFiles(), new_owner()
    assert files.read(old, path, 0, 6) == b"000000"
    (tmp_path / "other").write_bytes(b"000001")
    (tmp_path / "other").replace(path)
    assert files.read(new_owner(), path, 0, 6) == b"000001"
    assert files.read(old, path, 0, 6) == b"000000"


def test_open_files_are_read_on_by_a_forked_process(tmp_path: Path) -> None:
    paths, files, owner = numbered(tmp_path, 3), OpenFiles(), new_owner()
    files.read(owner, paths[0], 0, 6)
    with files._lock:  # as another thread would hold it
        child = os.fork()
        if child == 0:
            good = [files.read(owner, path, 0, 6) for path in paths] == [b"000000", b"000001", b"000002"]
            files.drop(owner)
            os._exit(0 if good else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert files.read(owner, paths[0], 0, 6) == b"000000"
