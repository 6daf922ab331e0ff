"""``spear preflight`` finds what would go wrong, and estimates time and disk."""

from __future__ import annotations

import re
from collections import namedtuple
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from spear.commands import preflight as module
from spear.data.corpora import CorpusConfig
from spear.data.sampler import SamplingConfig
from spear.data.sources import CutsSource
from spear.evaluation.config import EvaluationConfig
from spear.evaluation.tasks.base import TaskConfig
from spear.evaluation.tasks.frames import FramesConfig
from spear.evaluation.tasks.utterances import UtterancesConfig
from spear.export.config import ExportConfig
from spear.models.zipformer.config import ZipformerConfig
from spear.objectives.masked_prediction import MaskedPredictionConfig
from spear.quantizers.kmeans import KMeansConfig
from spear.recipe import Recipe, Run
from spear.teachers.huggingface import HuggingFaceConfig
from spear.teachers.logmel import LogMelConfig
from tests.data.cuts import cut_of, cuts_corpus, save, tone, write_cuts

STUDENT = ZipformerConfig(
    downsampling_factor=(1, 2),
    num_encoder_layers=1,
    encoder_dim=32,
    feedforward_dim=64,
    num_heads=2,
    encoder_unmasked_dim=32,
    cnn_module_kernel=15,
    conv_channels=(4, 8, 8),
)


def make_run(tmp_path: Path, corpora: list[CorpusConfig], **settings: object) -> Run:
    recipe = Recipe(
        student=STUDENT,
        objective=MaskedPredictionConfig(weights={"speech": {"mel": 1.0}}),
        teachers={"mel": LogMelConfig(stack=2)},
        quantizers={"mel": KMeansConfig(codebook_size=16)},
        sampling=SamplingConfig(max_batch_s=4.0),
    )
    return Run(replace(recipe, **settings), corpora, tmp_path / "data", tmp_path / "exp")  # type: ignore[arg-type]


def corpus(tmp_path: Path, *, damaged: bool = False, shared_id: bool = False) -> CorpusConfig:
    cuts = [cut_of(save(tmp_path / f"{i}.wav", tone(2.0 + i / 10)), f"cut{i}") for i in range(4)]
    if damaged:
        (tmp_path / "1.wav").write_bytes((tmp_path / "1.wav").read_bytes()[:2000])
    train, valid = cuts[:3], [cuts[0]] if shared_id else [cuts[3]]
    return cuts_corpus("talk", "speech", write_cuts(tmp_path / "train.jsonl.gz", train), write_cuts(tmp_path / "valid.jsonl.gz", valid))


def test_preflight_is_content_and_estimates(tmp_path: Path) -> None:
    lines: list[str] = []
    assert module.preflight(make_run(tmp_path, [corpus(tmp_path)]), lines.append) == 0
    text = "\n".join(lines)
    assert "PROBLEM" not in text
    assert "note    tokens of mel: 0.0 h of audio" in text
    assert "note    pretrain: 400000 updates, 444.4 h of audio" in text
    assert lines[-1] == "nothing was found that would stop this run"
    assert not (tmp_path / "data").exists()


@pytest.mark.parametrize(
    ("damage", "message"),
    [({"damaged": True}, "PROBLEM corpus talk: .*cut1"), ({"shared_id": True}, "PROBLEM corpus talk: .*the cut cut0 is in train and in valid")],
)
def test_preflight_names_what_is_wrong_with_a_corpus(tmp_path: Path, damage: dict[str, bool], message: str) -> None:
    lines: list[str] = []
    assert module.preflight(make_run(tmp_path, [corpus(tmp_path, **damage)]), lines.append) == 1
    assert any(re.search(message, line) for line in lines), lines
    assert lines[-1] == "1 problems"


def labelled_corpora(tmp_path: Path, *, splits: int = 3) -> list[CorpusConfig]:
    """Speech with speakers and phones in every split but the last, sounds without labels."""
    made = []
    for name, domain in (("talk", "speech"), ("city", "audio")):
        paths = []
        for split in range(3):
            extra: dict[str, Any] = {"speaker": "ann", "phones": [("a", 0.0, 1.0)]} if domain == "speech" and split < splits else {}
            path = save(tmp_path / f"{name}{split}.wav", tone(2.0))
            paths.append(write_cuts(tmp_path / f"{name}{split}.jsonl.gz", [cut_of(path, f"{name}{split}", **extra)]))
        train, valid, test = paths
        made.append(CorpusConfig(name=name, domain=domain, source=CutsSource(train=train, valid=valid, test=test)))
    return made


@pytest.mark.parametrize(
    ("task", "message"),
    [
        (FramesConfig(domain="speech", tier="phone"), ""),
        (UtterancesConfig(label="speaker"), ""),
        (FramesConfig(domain="speech", tier="fone"), r"finds no labelled cut in the train split of talk \(it needs the alignment tier `fone`\)"),
        (FramesConfig(domain="audio"), "finds no labelled cut in the train split of city"),
        (UtterancesConfig(domain="speach", label="speaker"), "`evaluation.tasks.x.domain` is 'speach', but no corpus of the task has that domain"),
        (UtterancesConfig(corpora=["tulk"]), "`evaluation.tasks.x.corpora` names 'tulk', but the run has city, talk"),
    ],
)
def test_preflight_checks_the_tasks_of_the_evaluation(tmp_path: Path, task: TaskConfig, message: str) -> None:
    lines: list[str] = []
    objective = MaskedPredictionConfig(weights={"speech": {"mel": 1.0}, "audio": {"mel": 1.0}})
    run = make_run(tmp_path, labelled_corpora(tmp_path), objective=objective, evaluation=EvaluationConfig(tasks={"x": task}))
    assert module.preflight(run, lines.append) == (1 if message else 0)
    (line,) = [line for line in lines if "task x: " in line]
    assert re.match(f"PROBLEM task x: .*{message}" if message else "ok      task x", line)


def test_preflight_names_the_split_without_labels_or_without_cuts(tmp_path: Path) -> None:
    lines: list[str] = []
    evaluation = EvaluationConfig(tasks={"x": FramesConfig(domain="speech")})
    module.preflight(make_run(tmp_path, labelled_corpora(tmp_path, splits=2)[:1], evaluation=evaluation), lines.append)
    assert any(re.match("PROBLEM task x: .*finds no labelled cut in the test split of talk", line) for line in lines), lines
    module.preflight(make_run(tmp_path, [corpus(tmp_path)], evaluation=evaluation), lines.append)
    assert any(line.endswith("task `x` reads the test split, which the corpus talk lacks") for line in lines), lines


def test_preflight_says_so_when_all_corpora_are_noise(tmp_path: Path) -> None:
    lines: list[str] = []
    assert module.preflight(make_run(tmp_path, [replace(corpus(tmp_path), domain="noise")]), lines.append) == 1
    assert any(line.endswith("there is nothing to train on: all corpora only give noise") for line in lines), lines


def test_preflight_names_an_export_without_its_checkpoint(tmp_path: Path) -> None:
    lines: list[str] = []
    assert module.preflight(make_run(tmp_path, [corpus(tmp_path)], export=ExportConfig(step=4001)), lines.append) == 1
    assert any(line.startswith("PROBLEM export: ") and "`export.step` must be a step with a checkpoint" in line for line in lines), lines


def test_preflight_names_a_teacher_that_does_not_load(tmp_path: Path) -> None:
    lines: list[str] = []
    run = make_run(tmp_path, [corpus(tmp_path)], teachers={"mel": HuggingFaceConfig(model=str(tmp_path))})
    assert module.preflight(run, lines.append) == 1
    assert any(line.startswith("PROBLEM teacher mel") and "config.json" in line for line in lines), lines


def test_preflight_names_a_disk_that_is_too_small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines: list[str] = []
    monkeypatch.setattr(module.shutil, "disk_usage", lambda _: namedtuple("Usage", "free")(1000))
    assert module.preflight(make_run(tmp_path, [corpus(tmp_path)]), lines.append) == 1
    assert any(line.startswith("PROBLEM the disk of") for line in lines)
