"""The SLURM example of pre-training with a stand-in for SLURM: what the processes are told, and when the job is sent again."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

from tests.conftest import ROOT

SCRIPT = ROOT / "egs" / "shared" / "pretrain.sbatch"
SRUN = """#!/bin/bash
trap 'kill -TERM $child' TERM
shift
SLURM_PROCID=5 SLURM_LOCALID=1 "$@" & child=$!
wait $child; code=$?
while kill -0 $child 2> /dev/null; do wait $child; code=$?; done
exit $code
"""
PYTHON = """#!/bin/bash
echo "$RANK $LOCAL_RANK $WORLD_SIZE $MASTER_ADDR $*" > {folder}/told
[ -n "$ENDS_WITH" ] && exit $ENDS_WITH
trap 'exit 3' TERM
touch {folder}/ready
while :; do sleep 0.05; done
"""
SCONTROL = """#!/bin/bash
[ "$1" = show ] && echo "first" && echo "second" && exit 0
echo "$*" >> {folder}/sent
"""


def start(folder: Path, **environment: str) -> subprocess.Popen[bytes]:
    for name, text in (("srun", SRUN), ("python", PYTHON), ("scontrol", SCONTROL)):
        path = folder / name
        path.write_text(text.replace("{folder}", str(folder)))
        path.chmod(0o755)
    slurm = {"SLURM_JOB_NODELIST": "x", "SLURM_NTASKS": "16", "SLURM_JOB_ID": "77"}
    found = {**os.environ, "PATH": f"{folder}:{os.environ['PATH']}", **slurm, **environment}
    return subprocess.Popen(["bash", str(SCRIPT), "--exp", "a b"], env=found)


@pytest.mark.parametrize(("code", "sent"), [(0, False), (1, False), (3, True), (137, False)])
def test_requeue_happens_for_a_stopped_run_alone(tmp_path: Path, code: int, sent: bool) -> None:
    assert start(tmp_path, ENDS_WITH=str(code)).wait(timeout=60) == (0 if sent else code)
    assert (tmp_path / "told").read_text() == "5 1 16 first -m spear pretrain --exp a b\n"
    assert (tmp_path / "sent").exists() == sent


def test_requeue_hands_the_signal_on_and_waits(tmp_path: Path) -> None:
    job = start(tmp_path)
    deadline = time.monotonic() + 60
    while not (tmp_path / "ready").exists():
        assert time.monotonic() < deadline
        time.sleep(0.01)
    os.kill(job.pid, signal.SIGTERM)
    assert job.wait(timeout=60) == 0
    assert (tmp_path / "sent").read_text() == "requeue 77\n"
