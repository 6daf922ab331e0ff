"""``spear compare``."""

from __future__ import annotations

import json
import weakref
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from spear.cli import main
from spear.commands.compare import describe, gather, grouped, load_runs, make_frames
from spear.errors import ConfigError, DataError
from spear.stages import features, manifests
from spear.stages.quantizers import read_frames
from spear.teachers.logmel import LogMelConfig
from spear.teachers.pipeline import Outcome, extract_cuts
from tests.data.cuts import cut_of, save, tone, write_cuts

RECIPE = """
student: {type: zipformer}
objective: {type: masked_prediction, weights: {speech: {mel: 1.0}}}
teachers: {mel: {type: logmel, num_mel_bins: 20, stack: 2}}
quantizers: {mel: {type: %s}}
features: {num_frames: 400, heldout_share: 0.2}
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Recipes `a.yaml` and `b.yaml`, a corpus and its manifests."""
    root = tmp_path_factory.mktemp("compare")
    (root / "a.yaml").write_text(RECIPE % "kmeans, codebook_size: 16")
    (root / "b.yaml").write_text(RECIPE.replace("stack: 2", "stack: 1") % "dmel")
    for split, count in (("train", 6), ("valid", 3)):
        cuts = [cut_of(save(root / f"{split}{i}.wav", tone(1.5 + i / 10, hz=200.0 + 90 * i)), f"{split}{i}") for i in range(count)]
        write_cuts(root / f"{split}.jsonl.gz", cuts)
    (root / "c.yaml").write_text("corpora: [{name: talk, domain: speech, source: {type: cuts, train: train.jsonl.gz, valid: valid.jsonl.gz}}]\n")
    manifests.run(load_runs(options(root, "a"))[0])
    return root


def options(root: Path, *recipes: str, add: tuple[str, ...] = (), teacher: str = "mel", cuts: int = 3) -> Namespace:
    places: dict[str, Any] = {"corpora": root / "c.yaml", "data": root / "data", "out": root / "out"}
    return Namespace(recipes=[root / f"{name}.yaml" for name in recipes], add=list(add), teacher=teacher, cuts=cuts, **places)


def test_compare_prints_the_table_and_writes_it(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipes = [str(place / f"{name}.yaml") for name in ("a", "b", "a")]
    places = ["--corpora", str(place / "c.yaml"), "--data", str(place / "data"), "--out", str(place / "out"), "--cuts", "2"]
    more = ["--add", "{type: residual, num_codebooks: 2, codebook_size: 8}", "--add", "{type: kmeans, codebook_size: 16}"]
    assert main(["compare", *recipes, "--teacher", "mel", *places, *more]) == 0
    rows = json.loads((place / "out" / "compare.json").read_text())["rows"]
    assert [(row["name"], row["teacher"]) for row in rows] == [
        ("kmeans 1 x 16", "logmel num_mel_bins 20 stack 2"),
        ("residual 2 x 8", "logmel num_mel_bins 20 stack 2"),
        ("dmel 20 x 16", "logmel num_mel_bins 20"),
    ]
    assert rows[1]["relative_loss"] < rows[0]["relative_loss"]
    assert rows[0]["bits_per_second"] == 200
    assert "| kmeans 1 x 16 |" in capsys.readouterr().out


def test_compare_groups_by_teacher_and_drops_what_is_there_twice(place: Path) -> None:
    runs = load_runs(options(place, "a", "b", "a", add=("{type: fsq}", "{type: fsq, scale: 1.0}")))
    assert [len(group) for group in grouped(runs, "mel")] == [3, 1]


def test_make_frames_gives_what_the_stage_writes(place: Path, tmp_path: Path) -> None:
    run = load_runs(options(place, "a"))[0]
    teacher = run.recipe.teachers["mel"].build(run.data)
    train, heldout = make_frames(run, run.corpora, teacher)
    features.run(run)
    for made, stored in zip((train, heldout), read_frames(run.data / "features" / "mel")):
        assert torch.equal(made, stored)
    sample = gather(run, "mel", teacher, 2)
    assert torch.equal(sample.train, train)
    assert [len(items) for items in (sample.clean, *sample.changed.values())] == [2] * 5


def test_describe_names_what_is_not_the_default() -> None:
    assert describe(LogMelConfig()) == "logmel"
    assert describe(LogMelConfig(stack=4)) == "logmel stack 4"


def test_compare_raises_when_teacher_or_cuts_are_missing(place: Path) -> None:
    with pytest.raises(ConfigError, match="has no teacher 'speech': `teachers` has mel"):
        load_runs(options(place, "a", teacher="speech"))
    run = load_runs(options(place, "a"))[0]
    with pytest.raises(DataError, match="needs at least 2 valid cuts, but .* has 1"):
        gather(run, "mel", run.recipe.teachers["mel"].build(run.data), 1)


class OnDevice(torch.Tensor):
    """Frames on a GPU: a copy of them is made for the CPU."""

    def cpu(self, *_: Any, **__: Any) -> torch.Tensor:
        return self.as_subclass(torch.Tensor).clone()


def test_make_frames_keeps_no_frames_on_the_device(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = load_runs(options(place, "a"))[0]
    teacher = run.recipe.teachers["mel"].build(run.data)
    expected = make_frames(run, run.corpora, teacher)
    made: list[weakref.ref[torch.Tensor]] = []
    peak = 0

    def on_device(*args: Any, **settings: Any) -> Iterator[list[Outcome]]:
        nonlocal peak
        for outcomes in extract_cuts(*args, **{**settings, "batch_seconds": 0.1}):
            for outcome in outcomes:
                assert outcome.features is not None
                frames = outcome.features.as_subclass(OnDevice)
                made.append(weakref.ref(frames))
                peak = max(peak, sum(ref() is not None for ref in made))
                yield [outcome._replace(features=frames)]
                del frames

    monkeypatch.setattr("spear.commands.compare.extract_cuts", on_device)
    found = make_frames(run, run.corpora, teacher)
    assert all(torch.allclose(a, b, atol=1e-4) for a, b in zip(found, expected))
    assert len(made) > 2
    assert peak <= 2
