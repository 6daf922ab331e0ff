"""The script that trains the small teachers."""

from __future__ import annotations

import gzip
import json
import logging
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
from lhotse import AudioSource, MonoCut, Recording, SupervisionSegment
from lhotse.supervision import AlignmentItem

from spear.files import read_json
from spear.teachers.huggingface import HuggingFaceConfig


@pytest.fixture(scope="module")
def teacher_script(script: Any) -> ModuleType:
    return script("shared/train_teacher.py")


@pytest.fixture(scope="module")
def cuts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six cuts of a low tone, then a high one, of 0.6 to 1 s; half of them labelled ``loud``."""
    folder = tmp_path_factory.mktemp("cuts")
    made = []
    for index in range(6):
        samples = 9600 + 1280 * index
        half = samples // 2 / 16000
        tone = np.sin(2 * np.pi * np.where(np.arange(samples) < samples // 2, 300, 1500) * np.arange(samples) / 16000)
        soundfile.write(folder / f"c{index}.flac", (0.2 + 0.3 * (index % 2)) * tone, 16000)
        recording = Recording(f"c{index}", [AudioSource("file", [0], f"c{index}.flac")], 16000, samples, samples / 16000)
        tiers = {"tone": [AlignmentItem("low", 0.0, half), AlignmentItem("high", half, half)]}
        labels = SupervisionSegment(f"c{index}", f"c{index}", 0.0, samples / 16000, alignment=tiers, custom={"label": ("soft", "loud")[index % 2]})
        made.append(MonoCut(f"c{index}", 0.0, samples / 16000, 0, supervisions=[labels], recording=recording))
    lines = "".join(json.dumps(cut.to_dict()) + "\n" for cut in made)
    (folder / "cuts.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    return folder / "cuts.jsonl.gz"


def train(teacher_script: ModuleType, monkeypatch: pytest.MonkeyPatch, cuts: Path, out: Path, *arguments: str) -> int:
    given = [
        "--cuts-train",
        str(cuts),
        "--cuts-valid",
        str(cuts),
        "--out",
        str(out),
        "--steps",
        "2",
        "--batch-size",
        "2",
        "--crop-s",
        "0.5",
        "--threads",
        "1",
    ]
    monkeypatch.setattr("sys.argv", ["train_teacher.py", *given, *arguments])
    try:
        return int(teacher_script.main())
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize(("model", "labels"), [("wavlm", ("--tier", "tone")), ("wav2vec2-bert", ("--label", "label"))])
def test_main_saves_a_teacher_with_the_same_bytes_every_time(
    teacher_script: ModuleType,
    cuts: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    model: str,
    labels: tuple[str, str],
) -> None:
    first, second = tmp_path / "a", tmp_path / "b"
    for out in (first, second):
        assert train(teacher_script, monkeypatch, cuts, out, "--model", model, *labels) == 0
    for name in ("config.json", "preprocessor_config.json", "model.safetensors"):
        assert (first / name).read_bytes() == (second / name).read_bytes()
    record = read_json(first / "artifact.json")
    assert record["counts"]["classes"] == 2
    assert 0 <= record["extra"]["accuracy_valid"] <= 1
    with caplog.at_level(logging.INFO):
        assert train(teacher_script, monkeypatch, cuts, first, "--model", model, *labels) == 0
    assert "nothing to do" in caplog.text
    teacher = HuggingFaceConfig(model="a").build(tmp_path)
    assert teacher.frame_rate_hz == 50
    assert teacher.dim == 128
    assert not teacher.depends_on_padding


def test_training_changes_the_saved_weights(teacher_script: ModuleType, cuts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert train(teacher_script, monkeypatch, cuts, tmp_path / "a", "--model", "wavlm", "--tier", "tone") == 0
    assert train(teacher_script, monkeypatch, cuts, tmp_path / "b", "--model", "wavlm", "--tier", "tone", "--steps", "3") == 0
    assert (tmp_path / "a" / "model.safetensors").read_bytes() != (tmp_path / "b" / "model.safetensors").read_bytes()


class Clock:
    """A teacher's frame times."""

    first_frame_s, frame_rate_hz = 0.01, 50.0


def test_frame_targets_takes_the_class_at_each_frames_centre(teacher_script: ModuleType) -> None:
    example = teacher_script.Example(torch.zeros(3200), [(4, 0.02, 0.06), (5, 0.06, 0.1)], -100)
    assert teacher_script.frame_targets(example, 0.0, 6, Clock(), 9).tolist() == [9, 4, 4, 5, 5, 9]
    assert teacher_script.frame_targets(example, 0.04, 3, Clock(), 9).tolist() == [4, 5, 5]


def test_batches_hold_every_example_once_a_pass_and_similar_lengths(teacher_script: ModuleType) -> None:
    lens = np.arange(64)
    stream = teacher_script.batches(lens, 4, np.random.default_rng(0))
    for _ in range(3):
        groups = [next(stream) for _ in range(16)]
        assert sorted(np.concatenate(groups)) == list(range(64))
        assert np.mean([np.ptp(lens[group]) for group in groups]) < 16


@pytest.mark.parametrize(("labels", "message"), [(("--tier", "phone"), "has no tier `phone`"), (("--label", "genre"), "has no label `genre`")])
def test_main_names_the_cut_when_a_label_is_missing(
    teacher_script: ModuleType,
    cuts: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    labels: tuple[str, str],
    message: str,
) -> None:
    assert train(teacher_script, monkeypatch, cuts, tmp_path / "t", "--model", "wavlm", *labels) == 1
    error = capsys.readouterr().err
    assert error.startswith("train_teacher: error: cut c0")
    assert message in error


@pytest.fixture(scope="module")
def voices(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six cuts a speaker: a speaker is a pitch and a tilt of its spectrum, loudness differs from cut to cut. `known` has a speaker of train."""
    folder = tmp_path_factory.mktemp("voices")
    rng = np.random.default_rng(0)
    for split, pitches in {"train": (90, 130, 180, 240), "valid": (100, 160, 220), "known": (90, 160, 220)}.items():
        made = []
        for index in range(6 * len(pitches)):
            pitch, name = pitches[index % len(pitches)], f"{split}-{index}"
            phase = 2 * np.pi * np.cumsum(pitch * (1 + 0.05 * rng.standard_normal(9600).cumsum() / 100)) / 16000
            tone = np.sum([k ** (-pitch / 90) * np.sin(k * phase) for k in range(1, 20)], axis=0) + 0.01 * rng.standard_normal(9600)
            soundfile.write(folder / f"{name}.flac", rng.uniform(0.05, 0.5) * tone / np.abs(tone).max(), 16000)
            recording = Recording(name, [AudioSource("file", [0], f"{name}.flac")], 16000, 9600, 0.6)
            speaker = SupervisionSegment(name, name, 0.0, 0.6, speaker=f"v{pitch}")
            made.append(MonoCut(name, 0.0, 0.6, 0, supervisions=[speaker], recording=recording))
        lines = "".join(json.dumps(cut.to_dict()) + "\n" for cut in made)
        (folder / f"{split}.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    return folder


def test_speaker_teacher_is_scored_on_new_voices(teacher_script: ModuleType, voices: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = ("--model", "wav2vec2-bert", "--speaker", "--cuts-valid", str(voices / "valid.jsonl.gz"), "--steps", "12", "--batch-size", "8")
    assert train(teacher_script, monkeypatch, voices / "train.jsonl.gz", tmp_path / "t", *arguments) == 0
    record = read_json(tmp_path / "t" / "artifact.json")
    assert record["counts"]["classes"] == 4
    assert record["extra"].keys() == {"eer_valid"}
    assert record["extra"]["eer_valid"] < 0.25
    assert HuggingFaceConfig(model="t", normalize=False).build(tmp_path).frame_rate_hz == 50


def test_main_names_a_voice_of_train_in_another_split(
    teacher_script: ModuleType, voices: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ("--model", "wav2vec2-bert", "--speaker", "--cuts-valid", str(voices / "known.jsonl.gz"))
    assert train(teacher_script, monkeypatch, voices / "train.jsonl.gz", tmp_path / "t", *arguments) == 1
    assert "is of speaker 'v90', whom the training split has, too" in capsys.readouterr().err


def test_cosine_classifier_compares_directions_only(teacher_script: ModuleType) -> None:
    torch.manual_seed(0)
    classifier = teacher_script.CosineClassifier(8, 3)
    x = torch.randn(5, 8)
    expected = 16 * torch.nn.functional.cosine_similarity(x[:, None], classifier.weight[None], dim=2)
    torch.testing.assert_close(classifier(x), expected)
    torch.testing.assert_close(classifier(7 * x), expected)
