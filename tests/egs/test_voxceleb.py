"""Manifests and lists of trials of VoxCeleb and SITW, on a folder of the same shape."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import soundfile

from spear.data.audio import load_audio
from spear.data.sources import CutsSource
from spear.evaluation.tasks.base import Settings
from spear.evaluation.tasks.verification import VerificationConfig


@pytest.fixture(scope="module")
def voxceleb(script: Any) -> ModuleType:
    return script("voxceleb/local/prepare.py")


def write(path: Path, seconds: float = 1.0) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, np.random.default_rng(len(str(path))).uniform(-0.1, 0.1, int(16000 * seconds)), 16000)


@pytest.fixture
def sets(tmp_path: Path) -> Path:
    """Six speakers of VoxCeleb2, three of VoxCeleb1 of whom one recording is in no list, one trial of SITW."""
    for speaker in range(6):
        for file in range(3):
            write(tmp_path / f"vox2/id0{speaker}/video{file}/00001.wav", 2.0)
    for speaker in range(3):
        for file in range(3):
            write(tmp_path / f"vox1/id1{speaker}/video/0000{file}.wav", 3.0)
    (tmp_path / "lists").mkdir()
    text = "1 id10/video/00000.wav id10/video/00001.wav\n0 id10/video/00000.wav id11/video/00000.wav\n"
    (tmp_path / "lists" / "veri_test2.txt").write_text(text)
    (tmp_path / "lists" / "list_test_all2.txt").write_text(text + "0 id12/video/00002.wav id11/video/00000.wav\n")
    for name in ("aa", "bb", "cc", "dd"):
        write(tmp_path / f"sitw/audio/{name}.flac")
    for folder, name, lines in (
        ("lists", "enroll-core.lst", "101 audio/aa.flac\n102 audio/bb.flac\n"),
        ("keys", "core-core.lst", "101 audio/cc.flac tgt\n101 audio/dd.flac imp\n102 audio/cc.flac imp\n"),
    ):
        (tmp_path / "sitw" / folder).mkdir()
        (tmp_path / "sitw" / folder / name).write_text(lines)
    (tmp_path / "meta.csv").write_text("VoxCeleb1 ID\tVGGFace1 ID\tGender\tNationality\tSet\nid10\tA\tf\tIreland\tdev\nid11\tB\tm\tIndia\tdev\n")
    (tmp_path / "meta2.csv").write_text("VoxCeleb2 ID ,VGGFace2 ID ,Gender ,Set \nid00 ,n1 ,f ,dev \nid01 ,n2 ,m ,dev \n")
    return tmp_path


def run(voxceleb: ModuleType, sets: Path, monkeypatch: pytest.MonkeyPatch, *more: str) -> int:
    given = [
        "--vox1",
        "vox1",
        "--vox2",
        "vox2",
        "--lists",
        "lists",
        "--out",
        "out",
        "--valid-speakers",
        "2",
        "--valid-per-speaker",
        "2",
        "--max-s",
        "1.5",
    ]
    monkeypatch.chdir(sets)
    monkeypatch.setattr("sys.argv", ["prepare.py", *given, *more])
    return int(voxceleb.main())


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in gzip.decompress(path.read_bytes()).decode().splitlines()]


def test_prepare_splits_by_speaker_and_tests_what_the_lists_name(voxceleb: ModuleType, sets: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert run(voxceleb, sets, monkeypatch, "--sitw", "sitw", "--meta", "meta.csv", "meta2.csv") == 0
    cuts = {split: read(sets / f"out/cuts_{split}.jsonl.gz") for split in ("train", "valid", "test")}
    speakers = {split: {cut["supervisions"][0]["speaker"] for cut in found} for split, found in cuts.items()}
    assert [len(cuts[split]) for split in ("train", "valid")] == [4 * 3, 2 * 2]
    assert not speakers["train"] & speakers["valid"]
    assert speakers["train"] | speakers["valid"] == {f"id0{k}" for k in range(6)}
    voices = {cut["id"]: cut["supervisions"][0]["speaker"] for cut in cuts["test"]}
    assert {name: voice for name, voice in voices.items() if name.startswith("id")} == {
        "id10-video-00000": "id10",
        "id10-video-00001": "id10",
        "id11-video-00000": "id11",
        "id12-video-00002": "id12",
    }
    # cc is a target of model 101; dd is nobody's
    assert {name: voice for name, voice in voices.items() if name.startswith("sitw")} == {
        "sitw-audio-aa": "sitw-101",
        "sitw-audio-bb": "sitw-102",
        "sitw-audio-cc": "sitw-101",
        "sitw-audio-dd": "sitw-audio-dd",
    }
    assert {cut["duration"] for cut in cuts["train"] + cuts["valid"]} == {1.5}
    assert {cut["duration"] for cut in cuts["test"]} == {1.0, 3.0}
    about = {cut["id"]: cut["supervisions"][0] for split in cuts for cut in cuts[split]}
    assert (about["id10-video-00000"]["gender"], about["id10-video-00000"]["custom"]) == ("female", {"nationality": "Ireland"})
    assert "gender" not in about["id12-video-00002"]
    assert {supervision["gender"] for supervision in about.values() if supervision["speaker"] in ("id00", "id01")} == {"female", "male"}


def test_prepare_writes_what_the_verification_task_reads(voxceleb: ModuleType, sets: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert run(voxceleb, sets, monkeypatch, "--sitw", "sitw") == 0
    assert (sets / "out/trials/sitw.txt").read_text().splitlines()[0] == "1 sitw/audio/aa.flac sitw/audio/cc.flac"
    source = CutsSource(train="out/cuts_train.jsonl.gz", valid="out/cuts_valid.jsonl.gz", test="out/cuts_test.jsonl.gz").resolved(sets)
    cuts: dict[Any, list[Any]] = {split: [item.cut for item in source.files(split)] for split in ("train", "valid", "test")}
    assert load_audio(cuts["train"][0]).shape == (24000,)
    for name, count in (("vox1_o", 3), ("vox1_e", 4), ("sitw", 4)):
        chosen = VerificationConfig(trials=f"out/trials/{name}.txt").build(name, Settings()).select(cuts)
        assert len(chosen["test"]) == count


def test_prepare_run_again_does_nothing_and_another_seed_is_an_error(
    voxceleb: ModuleType, sets: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(voxceleb, sets, monkeypatch) == 0
    before = (sets / "out/cuts_train.jsonl.gz").stat().st_mtime_ns
    assert run(voxceleb, sets, monkeypatch) == 0
    assert (sets / "out/cuts_train.jsonl.gz").stat().st_mtime_ns == before
    assert run(voxceleb, sets, monkeypatch, "--seed", "3") == 1
    assert "seed" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        (lambda sets: (sets / "vox1/id10/video/00001.wav").unlink(), "veri_test2.txt names id10/video/00001.wav, which vox1 does not hold"),
        (lambda sets: (sets / "lists/veri_test2.txt").unlink(), "lists must hold veri_test2.txt, but does not"),
        (lambda sets: (sets / "sitw/audio/cc.flac").unlink(), "the lists of SITW name audio/cc.flac, which sitw does not hold"),
        (
            lambda sets: (sets / "sitw/keys/core-core.lst").write_text("101 audio/cc.flac yes\n"),
            "files, and tgt or imp, but has 101 audio/cc.flac yes",
        ),
        (lambda sets: (sets / "meta.csv").write_text("id,sex\n"), "meta.csv must have a column of VoxCeleb ids and one named Gender"),
    ],
)
def test_prepare_says_in_one_line_what_is_wrong(
    voxceleb: ModuleType, sets: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], break_it: Any, message: str
) -> None:
    break_it(sets)
    assert run(voxceleb, sets, monkeypatch, "--sitw", "sitw", "--meta", "meta.csv") == 1
    error = [line for line in capsys.readouterr().err.splitlines() if line.startswith("prepare: error:")]
    assert len(error) == 1
    assert message in error[0]
