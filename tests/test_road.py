"""The whole road through the command line: what it leaves, a second run that does nothing, and kills at any moment.

"The same bytes" leaves out only what is measured and so differs from run to run:

- ``measured`` in every artifact.json: wall time, memory, GPU hours;
- timing.jsonl and the event files in tensorboard/ of a run: times of day, speeds, memory;
- report.html: it shows the wall time and memory of the evaluation itself;
- speed/<model>.json: the seconds a model took.

costs.json and the model card's README.md also carry wall times, but those of earlier stages, which come from the same finished folders here:
they are compared.

These tests share one road: ``pytest -n 2 --dist loadfile`` builds it once, other ways of sharing them out once per worker.
"""

from __future__ import annotations

import json
import os
import re
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import spear
from spear.training.checkpoint import find_checkpoints
from tests.data.cuts import save, tone
from tests.processes import DIED, Changes, Processes
from tests.road import MODELS, STAGES, TASKS, Outcome, Road, command, contents, make_read_only, make_road, mounted

MEASURED = re.compile(r"timing\.jsonl|tensorboard(/.*)?|report\.html|speed/\w+\.json")


class Built:
    """The uninterrupted run. outcomes: of every stage; changes: how many names it changed."""

    def __init__(self, root: Path) -> None:
        self.road = make_road(root)
        self.outcomes: dict[str, Outcome] = {}
        self.changes: dict[str, int] = {}
        for stage in STAGES:
            with Changes(root) as changes:
                self.outcomes[stage] = command(*self.road.arguments(stage))
            assert self.outcomes[stage].code == 0, self.outcomes[stage].err
            self.changes[stage] = changes.count


@pytest.fixture(scope="session")
def built(tmp_path_factory: pytest.TempPathFactory) -> Built:
    return Built(tmp_path_factory.mktemp("road"))


@pytest.fixture(scope="session")
def road(built: Built) -> Road:
    return built.road


@pytest.fixture(scope="session")
def processes(built: Built, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Processes]:
    """Made after the road, so that both are not at work at once."""
    with Processes(tmp_path_factory.mktemp("processes")) as found:
        yield found


def outputs(road: Road, stage: str) -> dict[str, Any]:
    """What a stage wrote, without what is measured."""

    def leave_out(name: str) -> bool:
        nested = stage == "pretrain" and name.split("/")[0] in ("export", "evaluate")
        return nested or MEASURED.fullmatch(name) is not None

    return contents(road.made_by(stage), leave_out)


def assert_same(road: Road, new: Road, stage: str) -> None:
    """Same names and bytes; the report, whose bytes differ, has the same rows of costs."""
    if stage == "evaluate":
        rows = [re.findall(r'<th scope="row">(\w+)</th>', (run.exp / "evaluate" / "report.html").read_text()) for run in (road, new)]
        assert set(STAGES) <= set(rows[0])
        assert rows[1] == rows[0]
    expected, found = outputs(road, stage), outputs(new, stage)
    assert sorted(found) == sorted(expected)
    assert [name for name in expected if found[name] != expected[name]] == []


def artifacts(road: Road) -> list[Path]:
    return sorted(path.relative_to(road.root) for folder in (road.data, road.exp) for path in folder.rglob("artifact.json"))


def test_road_finishes_every_artifact(road: Road) -> None:
    tokens = [
        f"data/tokens/{teacher}/{corpus}/{split}"
        for teacher in ("audio", "speech")
        for corpus in ("sounds", "voices")
        for split in ("train", "valid")
    ]
    single = ["data/manifests", "data/features/audio", "data/features/speech", "data/quantizers/audio", "data/quantizers/speech"]
    single += ["data/shards/sounds", "data/shards/voices", "exp", "exp/export", "exp/evaluate"]
    assert [str(path.parent) for path in artifacts(road)] == sorted([*single, *tokens])
    for path in artifacts(road):
        record = json.loads((road.root / path).read_text())
        assert record["audio_s"] > 0 or record["kind"] == "quantizers"
        assert record["measured"]["wall_s"] >= 0
        assert len(record["fingerprint"]) == 64
    leftovers = [path for folder in (road.data, road.exp) for path in folder.rglob("*") if path.name == "unfinished.json" or path.suffix == ".tmp"]
    assert leftovers == []


def test_road_counts_every_cut(road: Road) -> None:
    counts = json.loads((road.data / "manifests" / "artifact.json").read_text())["counts"]
    assert {name: [found[split]["cuts"] for split in ("train", "valid", "test")] for name, found in counts.items()} == {
        "sounds": [12, 6, 6],
        "voices": [12, 6, 6],
    }
    pretrain = json.loads((road.exp / "artifact.json").read_text())["counts"]
    assert (pretrain["steps"], pretrain["train_cuts"], pretrain["valid_cuts"]) == (6, 24, 12)


def test_road_trains_and_validates_with_finite_losses(road: Road) -> None:
    records = [json.loads(line) for line in (road.exp / "metrics.jsonl").read_text().splitlines()]
    assert [(record["split"], record["step"]) for record in records] == [("train", 2), ("valid", 3), ("train", 4), ("train", 6), ("valid", 6)]
    for record in records:
        assert np.isfinite([value for key, value in record.items() if key != "split"]).all()
    assert [step for step, _ in find_checkpoints(road.exp)] == [2, 4, 6]  # the last two, and where the exported mean begins


def test_road_scores_every_model_on_every_task(road: Road) -> None:
    scores = json.loads((road.exp / "evaluate" / "scores.json").read_text())
    assert sorted(scores) == sorted(TASKS)
    for models in scores.values():
        assert sorted(models) == sorted(MODELS)
        assert all(0 <= record["value"] <= 1 for record in models.values())
    # the synthetic vowels are plain to see in a log-mel
    assert scores["phones"]["logmel"]["value"] > 0.6


def test_road_report_is_one_page_with_every_model_and_task(road: Road) -> None:
    page = (road.exp / "evaluate" / "report.html").read_text()
    labels = {record["label"] for models in json.loads((road.exp / "evaluate" / "scores.json").read_text()).values() for record in models.values()}
    assert len(labels) == len(MODELS)
    for text in (*labels, *TASKS, *STAGES):
        assert text in page
    assert not re.search(r'(src|href)="(https?:|/)', page)


def test_road_export_is_an_encoder(road: Road) -> None:
    encoder = spear.load_encoder(road.exp / "export")
    audio = torch.from_numpy(tone(1.0))[None]
    with torch.inference_mode():
        output = encoder(audio)
    assert output.features.shape == (1, output.lens[0], encoder.dim)
    assert len(output.hidden_states) == encoder.num_layers == 2
    assert torch.isfinite(output.features).all()
    assert encoder.frame_rate_hz == 50


def test_road_second_run_does_nothing_and_says_so(road: Road) -> None:
    def times() -> dict[str, tuple[int, int]]:
        found = [path for folder in (road.data, road.exp) for path in folder.rglob("*")]
        return {str(path): (path.stat().st_mtime_ns, path.stat().st_ino) for path in found}

    before = times()
    folders = {"features": 2, "quantizers": 2, "tokens": 8, "shards": 2}
    for stage in STAGES:
        outcome = command(*road.arguments(stage))
        assert outcome.code == 0
        assert outcome.err.count(f"{stage}: finished already, nothing to do") == folders.get(stage, 1)
    assert times() == before


def test_road_preflight_finds_nothing_wrong(road: Road) -> None:
    outcome = command(*road.arguments("preflight"))
    assert outcome.code == 0
    assert "nothing was found that would stop this run" in outcome.out
    assert "PROBLEM" not in outcome.out


def test_road_report_puts_runs_side_by_side(road: Road, tmp_path: Path) -> None:
    other = road.copy(tmp_path / "other", "export")
    outcome = command("report", road.exp, other.exp, "--out", tmp_path / "both.html")
    assert (outcome.code, outcome.out.strip()) == (0, str(tmp_path / "both.html"))
    page = (tmp_path / "both.html").read_text()
    assert "other/exp" in page


@pytest.mark.parametrize(("layer", "shape"), [("last", (48,)), ("0", (32,)), ("1", (48,))])
def test_road_encode_writes_frames(road: Road, tmp_path: Path, layer: str, shape: tuple[int, ...]) -> None:
    file = save(tmp_path / "a.wav", tone(1.5, rate=8000), 8000)
    outcome = command("encode", road.exp / "export", file, "--out", tmp_path / "out", "--layer", layer)
    assert outcome.code == 0
    with np.load(tmp_path / "out" / "a.npz") as found:
        assert found["features"].shape[1:] == shape
        assert abs(len(found["features"]) - 75) <= 5
        assert float(found["frame_rate_hz"]) == 50


@pytest.mark.parametrize("named", ["folder", "recipe"])
def test_road_tokenize_gives_the_tokens_of_the_store(road: Road, tmp_path: Path, named: str) -> None:
    from spear.data.token_store import TokenStore

    cut_id = "voices-train-00"
    file = road.root / "audio" / "voices" / f"{cut_id}.flac"
    teacher = ["--teacher-dir", road.data / "teachers" / "speech", "--layer", 1]
    if named == "recipe":
        teacher = ["--recipe", road.recipe, "--teacher", "speech", "--data", road.data]
    outcome = command("tokenize", *teacher, "--quantizer", road.data / "quantizers" / "speech", file, "--out", tmp_path)
    assert outcome.code == 0
    expected = TokenStore.open(road.data / "tokens" / "speech" / "voices" / "train")[cut_id]
    with np.load(tmp_path / f"{cut_id}.npz") as found:
        assert found["codes"].dtype == expected.dtype
        # a frame between two entries may fall either way in a batch of another size
        assert (found["codes"] == expected).mean() > 0.99


@pytest.mark.parametrize("stage", STAGES)
def test_road_stage_killed_again_and_again_ends_in_the_same_bytes(built: Built, processes: Processes, tmp_path: Path, stage: str) -> None:
    """Each run dies some changes later than the one before it, by turns just before and just after a change."""
    new = built.road.copy(tmp_path, stage)
    kills, code = 0, DIED
    while code == DIED:
        code = processes.run(new.arguments(stage), root=tmp_path, die_at=1 + kills * built.changes[stage] // 6, after=kills % 2 == 1)
        kills += code == DIED
    assert code == 0, processes.output()
    assert kills >= 3
    assert_same(built.road, new, stage)


@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
@pytest.mark.parametrize("stage", STAGES)
def test_road_stage_killed_at_its_last_file_ends_in_the_same_bytes(road: Road, processes: Processes, tmp_path: Path, stage: str, after: bool) -> None:
    """Around the rename that makes a folder finished."""
    new = road.copy(tmp_path, stage)
    assert processes.run(new.arguments(stage), root=tmp_path, die_at="artifact.json", after=after) == DIED
    assert any(new.made_by(stage).rglob("artifact.json")) == after
    assert processes.run(new.arguments(stage), root=tmp_path) == 0, processes.output()
    assert_same(road, new, stage)


@pytest.mark.slow
@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
@pytest.mark.parametrize("stage", STAGES)
def test_road_stage_killed_once_anywhere_ends_in_the_same_bytes(built: Built, processes: Processes, tmp_path: Path, stage: str, after: bool) -> None:
    """Every change of every stage; of the many like ones of two stages every few."""
    for die_at in range(1, built.changes[stage] + 1, {"tokens": 3, "evaluate": 6}.get(stage, 1)):
        new = built.road.copy(tmp_path / str(die_at), stage)
        assert processes.run(new.arguments(stage), root=tmp_path, die_at=die_at, after=after) == DIED
        assert processes.run(new.arguments(stage), root=tmp_path) == 0, processes.output()
        assert_same(built.road, new, stage)


@pytest.mark.parametrize("stage", ["pretrain", "export", "evaluate"])
def test_road_stage_exits_1_when_its_folder_is_read_only(road: Road, tmp_path: Path, stage: str) -> None:
    """The stages before these have such a test of their own, see test_bad_input.py."""
    new = road.copy(tmp_path, stage)
    folder = new.made_by(stage)
    with mounted(folder, "size=8m"):
        make_read_only(folder)
        assert re.match(rf"cannot write {folder}/\S+: the file system is read-only", command(*new.arguments(stage)).error())


def start_pretrain(processes: Processes, new: Road, saved: int = 2) -> int:
    """Start a slow training, which never finishes its folder; returns its process id once it has saved the checkpoint of the update `saved`."""
    pid = processes.start(new.arguments("pretrain"), root=new.root.parent, rest_s=0.05, die_at="artifact.json", by=signal.SIGSTOP)
    deadline = time.monotonic() + 60
    while not any(step >= saved for step, _ in find_checkpoints(new.exp)):
        assert time.monotonic() < deadline, processes.output()
        time.sleep(0.005)
    return pid


@pytest.mark.parametrize("delay_s", [0.0, 0.21, 0.47])
def test_road_pretrain_ends_in_the_same_bytes_after_sigkill(road: Road, processes: Processes, tmp_path: Path, delay_s: float) -> None:
    new = road.copy(tmp_path, "pretrain")
    pid = start_pretrain(processes, new)
    time.sleep(delay_s)
    os.kill(pid, signal.SIGKILL)
    assert processes.wait(pid) == -signal.SIGKILL
    assert processes.run(new.arguments("pretrain"), root=tmp_path) == 0, processes.output()
    assert_same(road, new, "pretrain")


@pytest.mark.parametrize("saved", [2, 4])
def test_road_pretrain_saves_and_exits_3_on_sigterm(road: Road, processes: Processes, tmp_path: Path, saved: int) -> None:
    """The checkpoint of the update at which the run was stopped does not stay in place of a regular one."""
    new = road.copy(tmp_path, "pretrain")
    assert processes.run(new.arguments("pretrain"), root=tmp_path, die_at=f"step-{saved:08d}", after=True, by=signal.SIGTERM) == 3
    assert f"spear: stopped: stopped after update {saved + 1} of 6; run again" in processes.output()
    assert find_checkpoints(new.exp)[-1][0] == saved + 1
    assert processes.run(new.arguments("pretrain"), root=tmp_path) == 0, processes.output()
    assert_same(road, new, "pretrain")


@pytest.mark.parametrize("stage", ["manifests", "tokens", "shards"])
def test_road_stage_exits_3_on_sigterm_and_goes_on(built: Built, processes: Processes, tmp_path: Path, stage: str) -> None:
    new = built.road.copy(tmp_path, stage)
    middle = built.changes[stage] // 2
    assert processes.run(new.arguments(stage), root=tmp_path, die_at=middle, after=True, by=signal.SIGTERM) == 3
    finished, wanted = (len(list(road.made_by(stage).rglob("artifact.json"))) for road in (new, built.road))
    assert finished < wanted
    assert "spear: stopped: SIGTERM; run the same command again to go on" in processes.output()
    assert processes.run(new.arguments(stage), root=tmp_path) == 0, processes.output()
    assert_same(built.road, new, stage)
