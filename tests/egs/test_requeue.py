"""The SLURM jobs of egs/ with a stand-in for SLURM: what the processes are told, and when a job is sent again."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest

from tests.conftest import ROOT

EGS = ROOT / "egs"
ROAD = EGS / "librispeech_audioset"
# as the real one, srun has its tasks killed at once when it gets SIGTERM, and its code is that of the task
SRUN = """#!/bin/bash
trap 'kill -KILL $child' TERM
while [ "${1#--}" != "$1" ]; do shift; done
SLURM_PROCID=5 SLURM_LOCALID=1 "$@" & child=$!
echo $child > {folder}/task
wait $child; code=$?
while kill -0 $child 2> /dev/null; do wait $child; code=$?; done
exit $code
"""
SCANCEL = """#!/bin/bash
echo "$*" >> {folder}/cancelled
kill -TERM $(cat {folder}/task)
"""
PYTHON = """#!/bin/bash
echo "$RANK $LOCAL_RANK $WORLD_SIZE $MASTER_ADDR $*" >> {folder}/told
[ -n "$ENDS_WITH" ] && exit $ENDS_WITH
[ -n "$SLOW_START" ] || trap 'exit 3' TERM
touch {folder}/ready.$RANK
while :; do sleep 0.05; done
"""
SCONTROL = """#!/bin/bash
[ "$1" = show ] && echo "first" && echo "second" && exit 0
echo "$*" >> {folder}/sent
"""
SLURM = {"SLURM_JOB_NODELIST": "x", "SLURM_NTASKS": "16", "SLURM_JOB_ID": "77"}
ARRAY = {"SLURM_ARRAY_JOB_ID": "70", "SLURM_ARRAY_TASK_ID": "7", "SLURM_ARRAY_TASK_COUNT": "16", "SLURM_GPUS_ON_NODE": "2"}


def start(script: Path, folder: Path, *arguments: str, cwd: Path = ROAD, **environment: str) -> subprocess.Popen[bytes]:
    for name, text in (("srun", SRUN), ("python", PYTHON), ("scontrol", SCONTROL), ("scancel", SCANCEL)):
        path = folder / name
        path.write_text(text.replace("{folder}", str(folder)))
        path.chmod(0o755)
    found = {**os.environ, "PATH": f"{folder}:{os.environ['PATH']}", "PYTHON": str(folder / "python"), **SLURM, **environment}
    return subprocess.Popen(["bash", str(script), *arguments], env={k: v for k, v in found.items() if v}, cwd=cwd)


def stop(job: subprocess.Popen[bytes], folder: Path, *ready: str) -> int:
    deadline = time.monotonic() + 60
    while not all((folder / f"ready.{rank}").exists() for rank in ready):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    os.kill(job.pid, signal.SIGTERM)
    return job.wait(timeout=60)


@pytest.mark.parametrize(("code", "sent"), [(0, False), (1, False), (3, True), (137, False)])
def test_requeue_happens_for_a_stopped_run_alone(tmp_path: Path, code: int, sent: bool) -> None:
    assert start(EGS / "shared" / "pretrain.sbatch", tmp_path, "--exp", "a b", ENDS_WITH=str(code)).wait(timeout=60) == (0 if sent else code)
    assert (tmp_path / "told").read_text() == "5 1 16 first -m spear pretrain --exp a b\n"
    assert (tmp_path / "sent").exists() == sent


def test_requeue_signals_the_tasks_and_not_srun(tmp_path: Path) -> None:
    assert stop(start(EGS / "shared" / "pretrain.sbatch", tmp_path), tmp_path, "5") == 0
    assert (tmp_path / "sent").read_text() == "requeue 77\n"
    assert (tmp_path / "cancelled").read_text() == "--signal=TERM 77\n"  # the steps of the job, once


def test_requeue_happens_when_the_signal_comes_before_python_is_ready(tmp_path: Path) -> None:
    assert stop(start(EGS / "shared" / "pretrain.sbatch", tmp_path, SLOW_START="1"), tmp_path, "5") == 0
    assert (tmp_path / "sent").read_text() == "requeue 77\n"


def test_tokens_job_has_a_process_per_gpu_and_sends_its_own_task_again(tmp_path: Path) -> None:
    assert stop(start(EGS / "shared" / "tokens.sbatch", tmp_path, "--exp", "a b", **ARRAY), tmp_path, "0", "1") == 0
    told = sorted((tmp_path / "told").read_text().splitlines())
    assert told == [f"{rank} {rank} 2  -m spear tokens --exp a b --num-shards 16 --shard 7" for rank in (0, 1)]
    assert (tmp_path / "sent").read_text() == "requeue 70_7\n"


@pytest.mark.parametrize("code", [0, 1])
def test_tokens_job_ends_with_the_code_of_its_processes(tmp_path: Path, code: int) -> None:
    environment = {**ARRAY, "NUM_SHARDS": "20", "ENDS_WITH": str(code)}
    assert start(EGS / "shared" / "tokens.sbatch", tmp_path, **environment).wait(timeout=60) == code
    assert "--num-shards 20 --shard 7" in (tmp_path / "told").read_text()
    assert not (tmp_path / "sent").exists()


def test_stages_job_sends_itself_again_when_it_is_stopped(tmp_path: Path) -> None:
    job = start(ROAD / "slurm" / "stages.sbatch", tmp_path, "--stage", "4", "--stop-stage", "4", "--exp", "e", RANK="0")
    assert stop(job, tmp_path, "0") == 0
    assert "-m spear shards --recipe" in (tmp_path / "told").read_text()
    assert (tmp_path / "sent").read_text() == "requeue 77\n"


@pytest.mark.parametrize("code", [0, 1])
def test_stages_job_ends_with_the_code_of_a_stage(tmp_path: Path, code: int) -> None:
    arguments = ("--stage", "4", "--stop-stage", "4", "--exp", "e")
    assert start(ROAD / "slurm" / "stages.sbatch", tmp_path, *arguments, ENDS_WITH=str(code)).wait(timeout=60) == code
    assert not (tmp_path / "sent").exists()


def test_jobs_take_the_python_of_the_repository(tmp_path: Path) -> None:
    shutil.copytree(EGS / "shared", tmp_path / "egs" / "shared")
    own = tmp_path / ".venv" / "bin" / "python"
    own.parent.mkdir(parents=True)
    own.write_text(f"#!/bin/bash\necho own > {tmp_path}/own\n")
    own.chmod(0o755)
    (tmp_path / "egs" / "road").mkdir()
    for name in ("pretrain", "tokens"):
        (tmp_path / "own").unlink(missing_ok=True)
        job = start(tmp_path / "egs" / "shared" / f"{name}.sbatch", tmp_path, cwd=tmp_path / "egs" / "road", PYTHON="", **ARRAY)
        assert job.wait(timeout=60) == 0
        assert (tmp_path / "own").exists()
