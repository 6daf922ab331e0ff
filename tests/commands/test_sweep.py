"""``spear sweep``: which runs are made, by how many processes, what the table says, and what is refused before anything is made."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import spear.commands.sweep as sweep_module
from spear.commands.sweep import DATA_STAGES, RUN_STAGES, markdown, read_values, summary, sweep
from spear.errors import ConfigError, SpearError
from spear.files import write_json
from spear.stages.session import BusyError
from tests.conftest import ROOT

CORPORA = ROOT / "egs" / "mini" / "conf" / "corpora.yaml"
TABLE = """
recipe: {recipe}
seeds: [3, 4]
overrides: [training.max_steps=7]
variants:
  base: []
  masked: [objective.alpha=1]
"""


class Stages:
    """Stands for the stages: notes what was asked for, and leaves scores that are the seed plus alpha."""

    def __init__(self, fail_at: int = 0) -> None:
        self.asked: list[tuple[str, str, int, float, int]] = []
        self.fail_at = fail_at

    def __call__(self, name: str, run: Any) -> None:
        recipe = run.recipe
        self.asked.append((name, str(run.exp), recipe.seed, recipe.objective.alpha, recipe.training.max_steps))
        if len(self.asked) == self.fail_at:
            raise SpearError("the disk is full")
        value = recipe.seed + recipe.objective.alpha
        if name == "pretrain":
            valid = {"step": 7, "loss": 1.0, "accuracy/speech/speech": value / 100, "accuracy/audio/audio": None}
            write_json(run.exp / "artifact.json", {"extra": {"valid": valid}})
        if name == "evaluate":
            scores = {"phones": {"student": {"metric": "accuracy", "value": value}, "logmel": {"metric": "accuracy", "value": 0.0}}, "none": {}}
            write_json(run.exp / "evaluate" / "scores.json", scores)
            write_json(run.exp / "evaluate" / "artifact.json", {})


@pytest.fixture
def files(tmp_path: Path) -> tuple[Path, Path]:
    (tmp_path / "table.yaml").write_text(TABLE.format(recipe=ROOT / "recipes" / "mini.yaml"))
    return tmp_path / "table.yaml", CORPORA


def test_sweep_makes_every_run_in_its_own_folder_and_writes_mean_and_deviation(
    files: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stages = Stages()
    monkeypatch.setattr(sweep_module, "run_stage", stages)
    text = sweep(*files, tmp_path / "data", tmp_path / "out")
    expected = [(seed, name, alpha) for seed in (3, 4) for name, alpha in (("base", 0.5), ("masked", 1.0))]
    assert stages.asked == [(s, str(tmp_path / "out" / name / f"seed-{seed}"), seed, alpha, 7) for seed, name, alpha in expected for s in RUN_STAGES]
    result = json.loads((tmp_path / "out" / "sweep.json").read_text())
    values = {"mean": 4.5, "std": pytest.approx(0.5**0.5), "median": 4.5, "min": 4.0, "max": 5.0, "seeds": [4.0, 5.0]}
    assert result["variants"]["masked"]["values"]["phones (accuracy)"] == values
    assert text == (tmp_path / "out" / "sweep.md").read_text()
    assert "| base | none | 2 | 4.0000 ± 0.7071 | 0.0400 ± 0.0071 |" in text
    assert "| masked | `objective.alpha=1` | 2 |" in text


def test_sweep_goes_on_after_a_failed_run_and_names_it_at_the_end(files: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stages = Stages(fail_at=len(RUN_STAGES) + 1)  # the first stage of the second run
    monkeypatch.setattr(sweep_module, "run_stage", stages)
    with pytest.raises(SpearError, match=r"1 of 4 runs of the sweep failed; masked with seed 3: the disk is full"):
        sweep(*files, tmp_path / "data", tmp_path / "out")
    assert len(stages.asked) == 3 * len(RUN_STAGES) + 1
    result = json.loads((tmp_path / "out" / "sweep.json").read_text())
    assert [result["variants"][name]["seeds"] for name in ("base", "masked")] == [[3, 4], [4]]


def test_sweep_leaves_a_run_to_the_process_that_is_at_work_on_it_and_comes_back(
    files: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stages, waits = Stages(), []

    def busy_twice(name: str, run: Any) -> None:
        if len(waits) < 2 and run.exp == tmp_path / "out" / "base" / "seed-3":
            raise BusyError("another process is at work")
        stages(name, run)

    monkeypatch.setattr(sweep_module, "run_stage", busy_twice)
    monkeypatch.setattr(sweep_module.time, "sleep", waits.append)
    text = sweep(*files, tmp_path / "data", tmp_path / "out")
    assert waits == [sweep_module.WAIT_S] * 2
    assert [Path(exp).parent.name for name, exp, *_ in stages.asked if name == "pretrain"] == ["masked", "base", "masked", "base"]
    assert "| base | none | 2 |" in text


def test_sweep_gives_seeds_of_their_own_to_some_variants(files: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stages = Stages()
    monkeypatch.setattr(sweep_module, "run_stage", stages)
    files[0].write_text(files[0].read_text() + "more_seeds: {masked: [8, 9], base: [7]}\n")
    sweep(*files, tmp_path / "data", tmp_path / "out")
    runs = [Path(exp).relative_to(tmp_path / "out").as_posix() for name, exp, *_ in stages.asked if name == "pretrain"]
    assert runs[4:] == ["masked/seed-8", "base/seed-7", "masked/seed-9"]


def test_sweep_makes_tokens_for_variants_with_other_quantizers_from_the_same_frames(
    files: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[tuple[str, Path, int]] = []
    stages = Stages()

    def run_stage(name: str, run: Any) -> None:
        if name in DATA_STAGES:
            made.append((name, run.data, run.recipe.seed))
            assert (run.data / "features").resolve() == tmp_path / "data" / "features"
            assert run.recipe.quantizers["speech"].num_codebooks == 8
        else:
            assert (run.data == tmp_path / "data") == ("eight" not in str(run.exp))
            stages(name, run)

    (tmp_path / "data" / "features").mkdir(parents=True)
    monkeypatch.setattr(sweep_module, "run_stage", run_stage)
    files[0].write_text(files[0].read_text() + "  eight: [quantizers.speech.num_codebooks=8]\n")
    sweep(*files, tmp_path / "data", tmp_path / "out")
    assert [name for name, _, _ in made] == [*DATA_STAGES, *DATA_STAGES]
    assert len({place for _, place, _ in made}) == 1
    assert {seed for _, _, seed in made} == {0}  # the seeds of a variant differ in the student alone


def test_sweep_of_several_processes_starts_them_on_the_same_table(files: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    started, shown = [], []
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,MIG-5")

    class Helper:
        def __init__(self, command: list[str], **options: Any) -> None:
            started.append(command[1:])
            shown.append(options["env"]["CUDA_VISIBLE_DEVICES"])

        def wait(self) -> int:
            return 0

        def poll(self) -> int:
            return 0

    monkeypatch.setattr(sweep_module, "run_stage", Stages())
    monkeypatch.setattr(sweep_module.subprocess, "Popen", Helper)
    sweep(*files, tmp_path / "data", tmp_path / "out", jobs=3)
    folders = ["--data", str(tmp_path / "data"), "--out", str(tmp_path / "out")]
    assert started == [["-m", "spear", "sweep", str(files[0]), "--corpora", str(files[1]), *folders]] * 2
    assert shown == ["MIG-5", "4"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("seeds: [3, 4]", "seeds: [3, 3]"), "`seeds` must differ"),
        (("seeds: [3, 4]", "seeds: [3, 4]\nmore_seeds: {masked: [3]}"), "`more_seeds.masked` must differ"),
        (("seeds: [3, 4]", "seeds: [3, 4]\nmore_seeds: {mask: [5]}"), "`more_seeds` must name variants, but has 'mask'"),
        (("seeds: [3, 4]", "seeds: []"), "must have at least one entry"),
        (("masked:", "a/b:"), "`variants` must have names of letters"),
        (("seeds: [3, 4]", "stages: [shards]"), "`stages` must be among pretrain, export, evaluate, but has 'shards'"),
        (("objective.alpha=1", "objective.alpha=2"), "`alpha` must be between 0 and 1"),
        (("objective.alpha=1", "objective.beta=2"), "beta"),
    ],
)
def test_sweep_raises_config_error_before_the_first_run(
    files: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: tuple[str, str], message: str
) -> None:
    stages = Stages()
    monkeypatch.setattr(sweep_module, "run_stage", stages)
    files[0].write_text(files[0].read_text().replace(*change))
    with pytest.raises(ConfigError, match=message):
        sweep(*files, tmp_path / "data", tmp_path / "out")
    assert not stages.asked


def test_summary_leaves_out_what_a_seed_lacks() -> None:
    found = summary([{"a": 1.0, "b": 2.0}, {"a": 3.0}])
    assert found == {"a": {"mean": 2.0, "std": pytest.approx(2**0.5), "median": 2.0, "min": 1.0, "max": 3.0, "seeds": [1.0, 3.0]}}
    assert summary([]) == {}


def test_read_values_of_an_unfinished_run_are_none(tmp_path: Path) -> None:
    assert read_values(tmp_path) == {}
    assert markdown({"variants": {"a": {"overrides": ["x=1|2"], "seeds": [], "values": {}}}}).splitlines()[-1] == "| a | `x=1\\|2` | 0 |"
