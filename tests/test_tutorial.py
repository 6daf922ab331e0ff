"""The tutorial does what it says: its files are written, its commands and its Python run in its order."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from spear.cli import main

ROOT = Path(__file__).resolve().parent.parent
BLOCK = re.compile(r'^```(bash|yaml|python)(?: title="([^"]+)")?\n(.*?)^```$', re.MULTILINE | re.DOTALL)
SHORT = {"max_steps: 300": "max_steps: 20", "every: 100": "every: 10", "train: 400, valid: 60, test: 120": "train: 60, valid: 20, test: 40"}
SHORT |= {"num_frames: 20_000": "num_frames: 3_000", "steps: 200": "steps: 20"}


def here(line: str, folder: Path) -> int:
    """Run one line, a `spear` command in this process; returns its exit code."""
    word, *arguments = shlex.split(line)
    if word == "spear":
        return main([str(path) for given in arguments for path in (sorted(folder.glob(given)) if "*" in given else [given])])
    return subprocess.run([sys.executable, *arguments], cwd=folder, check=False).returncode


def follow(text: str, folder: Path, in_process: bool) -> str:
    """Do what a page says in `folder`, the working directory; returns what its Python printed."""
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    environment = {**os.environ, "PATH": path, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    (folder / "egs").symlink_to(ROOT / "egs")
    (folder / "recipes").symlink_to(ROOT / "recipes")
    printed = []
    for kind, title, code in BLOCK.findall(text):
        if kind == "yaml":
            (folder / title).parent.mkdir(parents=True, exist_ok=True)
            (folder / title).write_text(code)
            continue
        if kind == "bash" and in_process:
            assert all(here(line, folder) == 0 for line in code.splitlines())
            continue
        command = ["bash", "-euc", code] if kind == "bash" else [sys.executable, "-c", code]
        done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=900)
        assert done.returncode == 0, f"{code}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
        printed.append(done.stdout)
    return "".join(printed)


def check(folder: Path, printed: str) -> None:
    assert "torch.Size([1, " in printed
    assert ", 96]) 50.0" in printed
    assert (folder / "tutorial/exp/evaluate/report.html").stat().st_size > 10_000
    assert (folder / "tutorial/map.html").stat().st_size > 10_000
    clips = len(list((folder / "tutorial/audio/test").glob("*.flac")))
    assert clips
    assert len(list((folder / "tutorial/features").glob("*.npz"))) == clips


def test_tutorial_shortened_runs_from_top_to_bottom(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    text = (ROOT / "docs" / "tutorial.md").read_text()
    for old, new in SHORT.items():
        assert old in text
        text = text.replace(old, new)
    check(tmp_path, follow(text, tmp_path, in_process=True))


@pytest.mark.slow
def test_tutorial_runs_as_it_stands(tmp_path: Path) -> None:
    check(tmp_path, follow((ROOT / "docs" / "tutorial.md").read_text(), tmp_path, in_process=False))
