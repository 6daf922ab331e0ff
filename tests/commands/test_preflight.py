"""``spear preflight`` finds what would go wrong, and estimates time and disk."""

from __future__ import annotations

import gzip
import json
import re
import shutil
import subprocess
import sys
import time
from collections import namedtuple
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from spear.commands import measure
from spear.commands import preflight as module
from spear.data.corpora import CorpusConfig
from spear.data.sampler import SamplingConfig
from spear.data.sources import CutsSource
from spear.evaluation.config import EvaluationConfig
from spear.evaluation.tasks.base import TaskConfig
from spear.evaluation.tasks.frames import FramesConfig
from spear.evaluation.tasks.utterances import UtterancesConfig
from spear.export.config import ExportConfig
from spear.models.transformer import TransformerConfig
from spear.models.zipformer.config import ZipformerConfig
from spear.objectives.layer_distillation import LayerDistillationConfig
from spear.objectives.masked_prediction import MaskedPredictionConfig
from spear.quantizers.kmeans import KMeans, KMeansConfig
from spear.recipe import Recipe, Run
from spear.stages.artifact import Artifact
from spear.teachers.huggingface import HuggingFaceConfig
from spear.teachers.logmel import LogMelConfig
from spear.training.config import TrainingConfig
from spear.types import TokenSpec
from tests.data.cuts import cut_of, cuts_corpus, save, tone, write_cuts

MEASURED = """
import resource, sys
from spear.cli import main
code = main(sys.argv[1:])
sys.stderr.write(f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss}\\n")
sys.exit(code)
"""
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
    assert "note    tokens: 0.0 h of audio through mel" in text
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
    monkeypatch.setattr(shutil, "disk_usage", lambda _: namedtuple("Usage", "free")(1000))
    assert module.preflight(make_run(tmp_path, [corpus(tmp_path)]), lines.append) == 1
    assert any(line.startswith("PROBLEM the disk of") for line in lines)


def test_preflight_says_what_is_there(tmp_path: Path) -> None:
    lines: list[str] = []
    module.preflight(make_run(tmp_path, [corpus(tmp_path)]), lines.append)
    text = "\n".join(lines)
    assert re.search(r"note    corpus talk: train 3 cuts 0\.0 h, valid 1 cuts 0\.0 h; 16000 Hz", text)
    assert "cuts of 2.00 to 2.30 s, median 2.15 s; 0 shorter than 0.5 s will be left out, 0 longer than 32 s split" in text
    assert "note    domain speech: 0.0 h to train on, teachers mel" in text
    assert re.search(r"note    sampling: \d+ batches an epoch, .* batch 200000 found in \d+ ms", text)
    stages = [line.split()[1].rstrip(":") for line in lines if re.match(r"note    \w+: .* GB$", line)]
    assert stages == ["manifests", "features", "quantizers", "tokens", "shards", "pretrain", "export"]


def test_preflight_notes_files_that_are_trained_on_and_held_out(tmp_path: Path) -> None:
    path = save(tmp_path / "long.wav", tone(5.0))
    cuts = [
        cut_of(path, "a").truncate(offset=0.0, duration=2.0, preserve_id=True),
        cut_of(path, "b").truncate(offset=2.0, duration=2.0, preserve_id=True),
    ]
    train, valid = (write_cuts(tmp_path / f"{cut.id}.jsonl.gz", [cut]) for cut in cuts)  # type: ignore[list-item]
    lines: list[str] = []
    assert module.preflight(make_run(tmp_path, [cuts_corpus("talk", "speech", train, valid)]), lines.append) == 0
    assert any(re.search(r"corpus talk: 1 audio files of train are in valid or test of a corpus, too, such as .*long\.wav", line) for line in lines)


def test_preflight_names_corpora_that_share_ids(tmp_path: Path) -> None:
    cuts = [cut_of(save(tmp_path / f"{i}.wav", tone(1.0 + 0.1 * i)), f"u{i}") for i in range(4)]
    paths = [write_cuts(tmp_path / f"{name}.jsonl.gz", part) for name, part in (("a", cuts[:3]), ("b", cuts[1:]))]  # type: ignore[arg-type]
    lines: list[str] = []
    module.preflight(make_run(tmp_path, [cuts_corpus(name, "speech", path) for name, path in zip("ab", paths)]), lines.append)
    (line,) = [line for line in lines if "share their ids" in line]
    assert line.startswith("note    cuts of several corpora share their ids (a 2, b 2)")


def test_preflight_names_a_batch_shorter_than_the_longest_cut(tmp_path: Path) -> None:
    lines: list[str] = []
    run = make_run(tmp_path, [corpus(tmp_path)], sampling=SamplingConfig(max_batch_s=2.15))
    assert module.preflight(run, lines.append) == 1
    assert any(re.match(r"PROBLEM sampling: .*`max_batch_s` must be at least the longest cut, 2\.\d+ s", line) for line in lines), lines


def made_quantizer(run: Run, teacher: str, spread: float) -> None:
    """A finished quantizer folder: 16 entries, of which with `spread` 0 one is far nearer than all others."""
    centers = spread * torch.randn(16, 256, generator=torch.Generator().manual_seed(0))
    centers[0] = 0.0
    centers[1:] += 0.0 if spread else 1e4
    folder = run.data / "quantizers" / "mel"
    with Artifact(folder, kind="quantizers", config={}, inputs={"features": "f", "teacher": teacher}).making():
        KMeans(centers - 8 * bool(spread)).save(folder)


def test_preflight_shows_the_histogram_of_codes(tmp_path: Path) -> None:
    run = make_run(tmp_path, [corpus(tmp_path)])
    made_quantizer(run, run.recipe.teachers["mel"].build().fingerprint(), 1.0)
    lines: list[str] = []
    assert module.preflight(run, lines.append) == 0, lines
    (line,) = [line for line in lines if "codes of mel" in line]
    assert re.search(r"codes of mel: \d+ frames, entries used \[\d+\], entropy in bits \[\d", line)


def test_preflight_stops_where_a_codebook_has_collapsed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("spear.stages.tokens.COLLAPSED_MIN_FRAMES", 100)
    run = make_run(tmp_path, [corpus(tmp_path)])
    made_quantizer(run, run.recipe.teachers["mel"].build().fingerprint(), 0.0)
    lines: list[str] = []
    assert module.preflight(run, lines.append) == 1
    assert any(re.match("PROBLEM teacher mel: .*codebook 0 of the quantizer mel has collapsed: entry 0 has 100", line) for line in lines), lines


def test_preflight_names_what_was_made_with_another_teacher(tmp_path: Path) -> None:
    run = make_run(tmp_path, [corpus(tmp_path)])
    made_quantizer(run, "another", 1.0)
    lines: list[str] = []
    assert module.preflight(run, lines.append) == 1
    assert any(re.match(r"PROBLEM quantizer mel: .*quantizers/mel was made with another teacher than `teachers\.mel`", line) for line in lines), lines


def test_preflight_names_a_first_frame_that_is_declared_wrongly(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    build = LogMelConfig.build

    def shifted(self: LogMelConfig, folder: Path | None = None) -> Any:
        teacher = build(self, folder)
        teacher.first_frame_s += 0.05
        return teacher

    monkeypatch.setattr(LogMelConfig, "build", shifted)
    lines: list[str] = []
    assert module.preflight(make_run(tmp_path, [corpus(tmp_path)]), lines.append) == 1
    assert any(re.match(r"PROBLEM teacher mel: its first frame .*must be centred at 0\.0600 s, but is measured at 0\.0", line) for line in lines), (
        lines
    )


def test_preflight_of_frames_needs_no_quantizer(tmp_path: Path) -> None:
    objective = LayerDistillationConfig(layers=[1], weights={"speech": {"mel": 1.0}})
    lines: list[str] = []
    student = TransformerConfig(conv_channels=(4, 8, 8), num_layers=1, dim=32, num_heads=2, feedforward_dim=32)
    assert module.preflight(make_run(tmp_path, [corpus(tmp_path)], quantizers={}, objective=objective, student=student), lines.append) == 0, lines
    assert not any("quantizer" in line for line in lines)
    assert "note    domain speech: 0.0 h to train on, teachers mel" in lines


@pytest.mark.slow
def test_preflight_of_a_million_cuts_takes_a_minute_and_a_gigabyte(tmp_path: Path) -> None:
    path = save(tmp_path / "a.wav", tone(2.0))
    line = json.dumps(cut_of(path, "NAME").to_dict()) + "\n"
    with gzip.open(tmp_path / "big.jsonl.gz", "wt", compresslevel=1) as file:
        for i in range(1_000_000):
            file.write(line.replace("NAME", f"speaker-{i:07d}"))
    (tmp_path / "corpora.yaml").write_text("corpora: [{name: big, domain: speech, source: {type: cuts, train: big.jsonl.gz}}]\n")
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        "teachers: {mel: {type: logmel, stack: 2}}\nquantizers: {mel: {type: kmeans}}\n"
        "objective: {type: masked_prediction, weights: {speech: {mel: 1.0}}}\nsampling: {max_batch_s: 4}\ntraining: {max_steps: 10}\n"
        "student: {type: transformer, conv_channels: [4, 8, 8], num_layers: 1, dim: 32, num_heads: 2, feedforward_dim: 32}\n"
    )
    command = ["preflight", "--recipe", recipe, "--corpora", tmp_path / "corpora.yaml", "--data", tmp_path / "d", "--exp", tmp_path / "e"]
    started = time.monotonic()
    done = subprocess.run([sys.executable, "-c", MEASURED, *map(str, command)], capture_output=True, text=True, check=False)
    assert "train 1000000 cuts 555.6 h" in done.stdout
    assert time.monotonic() - started < 60
    assert int(done.stderr.splitlines()[-1]) < 1024**2


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_the_student_is_measured_in_the_precision_of_the_recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, precision: Any) -> None:
    seen: list[tuple[str, str]] = []

    def noted(wanted: Any, device: torch.device) -> Any:
        seen.append((wanted, device.type))
        return nullcontext()

    monkeypatch.setattr(measure, "autocast", noted)
    monkeypatch.setattr(measure, "default_device", lambda: torch.device("cpu"))
    measured = measure.Measured()
    run = make_run(tmp_path, [cuts_corpus("talk", "speech", str(tmp_path / "train.jsonl.gz"))], training=TrainingConfig(precision=precision))
    measure.measure_student(run, {"mel": TokenSpec(1, 16, 50.0, 0.01)}, {}, measured)
    assert seen == [(precision, "cpu")] * 2
    assert measured.student > 0
