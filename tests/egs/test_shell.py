"""The shell of egs/: every run.sh and what they share."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest
import yaml

EGS = Path(__file__).resolve().parents[2] / "egs"
SCRIPTS = sorted([*EGS.rglob("*.sh"), *EGS.rglob("*.sbatch")])
ROADS = sorted(path.parent for path in EGS.glob("*/run.sh"))
STAGES = ("manifests", "features", "quantizers", "tokens", "shards", "pretrain", "export", "evaluate")

RUN = """
set -euo pipefail
stage=0; stop_stage=7; recipe=r.yaml; corpora=c.yaml; data=data; exp=exp; usage="Stages: 0 to 7."
. "{shared}/log.sh"
. "{shared}/parse_options.sh"
. "{shared}/stages.sh"
"""


def bash(tmp_path: Path, body: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    script = tmp_path / "run.sh"
    script.write_text(RUN.format(shared=EGS / "shared") + body)
    return subprocess.run(["bash", str(script), *arguments], capture_output=True, text=True, timeout=30, check=False)


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: str(path.relative_to(EGS)))
def test_script_is_valid_bash(path: Path) -> None:
    done = subprocess.run(["bash", "-n", str(path)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("road", ROADS, ids=lambda road: road.name)
def test_run_calls_every_stage_once_in_order(road: Path) -> None:
    text = (road / "run.sh").read_text()
    assert "set -euo pipefail" in text
    places = [text.index(f"run_stage {number} {name} spear {name} ") for number, name in enumerate(STAGES)]
    assert places == sorted(places)
    assert text.count(" spear ") == len(STAGES)


@pytest.mark.parametrize("road", ROADS, ids=lambda road: road.name)
def test_run_hands_the_corpora_file_to_every_stage(road: Path, tmp_path: Path) -> None:
    stub = tmp_path / "spear"
    stub.write_text(f'#!/bin/bash\necho "$*" >> {tmp_path}/told\n')
    stub.chmod(0o755)
    environment = {**os.environ, "SPEAR": str(stub), "PYTHON": "true"}
    arguments = ["--stage", "0", "--stop-stage", "6", "--corpora", "own corpora.yaml", "--data", str(tmp_path), "--exp", str(tmp_path)]
    subprocess.run([str(road / "run.sh"), *arguments], check=True, capture_output=True, env=environment)
    told = (tmp_path / "told").read_text().splitlines()
    assert len(told) == 7
    assert all(" --corpora own corpora.yaml --data " in line for line in told)


@pytest.mark.parametrize("road", ROADS, ids=lambda road: road.name)
def test_run_help_says_what_the_options_are(road: Path) -> None:
    done = subprocess.run([str(road / "run.sh"), "--help"], capture_output=True, text=True, check=False)
    assert done.returncode == 0
    for option in ("--stage", "--stop-stage", "--recipe", "--corpora", "--data", "--exp", "--set"):
        assert option in done.stdout


@pytest.mark.parametrize("road", ROADS, ids=lambda road: road.name)
def test_corpora_file_names_three_splits_of_each_corpus(road: Path) -> None:
    corpora = yaml.safe_load((road / "conf" / "corpora.yaml").read_text())["corpora"]
    assert {corpus["domain"] for corpus in corpora} <= {"speech", "audio", "noise"}
    for corpus in corpora:
        if corpus["domain"] == "noise":
            assert corpus["source"]["valid_share"] == corpus["source"]["test_share"] == 0
            continue
        assert {split for split in corpus["source"] if split != "type"} == {"train", "valid", "test"}


def test_parse_options_sets_what_is_given_and_keeps_the_rest(tmp_path: Path) -> None:
    body = 'echo "$stage|$stop_stage|$recipe|$corpora|$data|$exp|${overrides[*]:-}"'
    assert bash(tmp_path, body).stdout == "0|7|r.yaml|c.yaml|data|exp|\n"
    done = bash(tmp_path, body, "--stage", "-1", "--stop-stage=3", "--data", "a b", "--set", "seed=1", "--set", "training.steps=5")
    assert done.stdout == "-1|3|r.yaml|c.yaml|a b|exp|--set seed=1 --set training.steps=5\n"
    assert bash(tmp_path, body, "--corpora", "own.yaml").stdout == "0|7|r.yaml|own.yaml|data|exp|\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--stage"], "--stage needs a value"),
        (["--stage", "two"], "--stage must be a whole number, but is 'two'"),
        (["--stage", "5", "--stop-stage", "4"], "--stage must not be after --stop-stage, but 5 is after 4"),
        (["--set", "seed"], "--set must look like a.b=c, but is 'seed'"),
        (["--data", ""], "--data must not be empty"),
        (["--stages", "1"], "unknown option --stages"),
    ],
)
def test_parse_options_ends_with_code_2_when_usage_is_wrong(tmp_path: Path, arguments: list[str], message: str) -> None:
    done = bash(tmp_path, "echo reached", *arguments)
    assert done.returncode == 2
    assert message in done.stderr
    assert done.stdout == ""


def test_run_stage_runs_only_the_stages_asked_for(tmp_path: Path) -> None:
    body = "for n in 0 1 2 3; do run_stage $n word$n echo did $n; done"
    done = bash(tmp_path, body, "--stage", "1", "--stop-stage", "2")
    assert done.stdout == "did 1\ndid 2\n"
    assert [line.split(" ", 2)[2] for line in done.stderr.splitlines()] == ["Stage 1: word1", "Stage 2: word2"]


def test_run_stage_ends_the_run_with_the_code_of_a_failed_stage(tmp_path: Path) -> None:
    done = bash(tmp_path, "run_stage 0 bad bash -c 'exit 7'; run_stage 1 next echo reached")
    assert done.returncode == 7
    assert "reached" not in done.stdout
    assert "Stage 0: bad ended with exit code 7" in done.stderr


@pytest.mark.parametrize("sent", [signal.SIGTERM, signal.SIGINT])
def test_run_stage_passes_a_signal_on_and_waits(tmp_path: Path, sent: signal.Signals) -> None:
    child = f"trap 'echo saved > {tmp_path}/saved; exit 3' TERM; touch {tmp_path}/ready; for i in $(seq 200); do sleep 0.05; done"
    (tmp_path / "child.sh").write_text(child)
    body = f"run_stage 0 slow bash {tmp_path}/child.sh"
    script = tmp_path / "run.sh"
    script.write_text(RUN.format(shared=EGS / "shared") + body + "\nrun_stage 1 next touch next\n")
    process = subprocess.Popen(["bash", str(script)], cwd=tmp_path, stderr=subprocess.DEVNULL)
    for _ in range(200):
        if (tmp_path / "ready").exists():
            break
        time.sleep(0.05)
    process.send_signal(sent)
    assert process.wait(timeout=20) == 3
    assert (tmp_path / "saved").read_text() == "saved\n"
    assert not (tmp_path / "next").exists()


@pytest.mark.parametrize(
    ("recipe", "overrides", "needed"),
    [
        ("mini", [], {"speech", "audio"}),
        ("delulu_mini", [], {"speaker"}),
        ("spear_speaker_mini", [], {"speech", "audio", "speaker"}),
        ("mini", ["--set", "teachers.audio.model=elsewhere", "--set", "seed=1"], {"speech"}),
    ],
)
def test_train_teacher_trains_those_that_the_recipe_names(tmp_path: Path, recipe: str, overrides: list[str], needed: set[str]) -> None:
    body = """
python() { echo "trained: $*"; }
for name in speech audio speaker; do train_teacher "$name" --steps 1; done
"""
    done = bash(tmp_path, body, "--recipe", str(EGS.parent / "recipes" / f"{recipe}.yaml"), "--data", "d", *overrides)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert {line.rpartition("/")[2] for line in lines} == needed
    assert all(line.endswith(f"train_teacher.py --steps 1 --out d/teachers/{line.rpartition('/')[2]}") for line in lines)


def test_train_teacher_fails_when_the_recipe_cannot_be_read(tmp_path: Path) -> None:
    done = bash(tmp_path, "train_teacher speech --steps 1\n", "--recipe", str(tmp_path / "none.yaml"))
    assert done.returncode == 2
    assert "needs_teacher: error:" in done.stderr
