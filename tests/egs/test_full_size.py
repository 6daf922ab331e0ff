"""The scripts of egs/librispeech_audioset on tiny folders with the layouts of the published sets."""

from __future__ import annotations

import gzip
import os
import shutil
import stat
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import soundfile
from lhotse import CutSet, Recording, RecordingSet, SupervisionSegment, SupervisionSet
from lhotse.supervision import AlignmentItem

from spear.data.audio import load_audio
from spear.data.sources import CutsSource
from spear.recipe import load_run

ROAD = Path(__file__).resolve().parents[2] / "egs" / "librispeech_audioset"


@pytest.fixture(scope="module")
def tagged(script: Any) -> ModuleType:
    return script("librispeech_audioset/local/prepare_tagged.py")


@pytest.fixture(scope="module")
def speech(script: Any) -> ModuleType:
    return script("librispeech_audioset/local/prepare_speech.py")


def sound(path: Path, seconds: float = 0.6) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, 0.1 * np.random.default_rng(0).standard_normal(int(16000 * seconds)), 16000)
    return path


def run(module: ModuleType, monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    monkeypatch.setattr("sys.argv", ["script.py", *(str(argument) for argument in arguments)])
    return int(module.main())


def cuts(out: Path) -> dict[str, dict[str, Any]]:
    source = CutsSource(train=str(out / "cuts_train.jsonl.gz"), valid=str(out / "cuts_valid.jsonl.gz"), test=str(out / "cuts_test.jsonl.gz"))
    found = {split: {item.id: item.cut for item in source.files(split)} for split in source.splits()}
    for split in found.values():
        for cut in split.values():
            assert len(load_audio(cut)) > 1000
    return found


def labels(split: dict[str, Any]) -> dict[str, str]:
    return {name: cut.supervisions[0].custom["label"] for name, cut in split.items()}


def test_audioset_joins_lists_and_files_and_counts_what_is_gone(tagged: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = tmp_path / "audioset"
    head = "# Segments csv created\n# num_ytids=9\n# YTID, start_seconds, end_seconds, positive_labels\n"
    for name, folder, prefix in (("unbalanced_train", "unbalanced_train_segments", ""), ("balanced_train", "audio", "Y"), ("eval", "eval", "Y")):
        ids = [f"{name[:2]}-{i}_x" for i in range(9)]
        rows = [f'{clip}, 30.000, 40.000, "/m/0b,/m/0a"\n' for clip in ids]
        root.mkdir(exist_ok=True)
        (root / f"{name}_segments.csv").write_text(head + "".join(rows))
        for clip in ids[:8]:
            sound(root / folder / f"{prefix}{clip}.flac")
    (root / "eval" / "Yev-3_x.flac").write_bytes(b"broken")
    assert run(tagged, monkeypatch, "audioset", "--root", root, "--out", tmp_path / "out", "--valid-share", 0.3) == 0
    found = cuts(tmp_path / "out")
    assert len(found["train"]) + len(found["valid"]) == 16
    assert found["valid"]
    assert sorted(found["test"]) == [f"ev-{i}_x" for i in range(8) if i != 3]
    assert set(labels(found["train"]).values()) == {"/m/0a;/m/0b"}


def test_tagged_writes_absolute_paths(tagged: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [f"id{i},{i},dog,{'test' if i > 7 else 'train'}" for i in range(10)]
    for i in range(10):
        sound(tmp_path / "vggsound" / "audio" / f"id{i}_{i:06d}.wav")
    (tmp_path / "vggsound" / "vggsound.csv").write_text("\n".join(rows) + "\n")
    monkeypatch.chdir(tmp_path)
    assert run(tagged, monkeypatch, "vggsound", "--root", "vggsound", "--out", "out", "--valid-share", 0.4) == 0
    assert all(Path(cut.recording.sources[0].source).is_absolute() for split in cuts(tmp_path / "out").values() for cut in split.values())
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [f"cuts_{split}.jsonl.gz" for split in ("test", "train", "valid")]


def test_vggsound_and_fsd50k_are_found_by_their_lists(tagged: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = tmp_path / "vggsound"
    rows = [f'id{i},{i},"dog barking, far",{"test" if i > 7 else "train"}' for i in range(10)]
    for i in range(10):
        sound(root / "audio" / f"id{i}_{i:06d}.wav")
    (root / "vggsound.csv").write_text("\n".join(rows) + "\n")
    assert run(tagged, monkeypatch, "vggsound", "--root", root, "--out", tmp_path / "v", "--valid-share", 0.4) == 0
    found = cuts(tmp_path / "v")
    assert sorted(found["test"]) == ["id8_000008", "id9_000009"]
    assert set(labels(found["test"]).values()) == {"dog barking, far"}
    root = tmp_path / "fsd50k"
    (root / "FSD50K.ground_truth").mkdir(parents=True)
    for part in ("dev", "eval"):
        for i in range(12):
            sound(root / f"FSD50K.{part}_audio" / f"{part}{i}.wav")
        rows = [f'{part}{i},"Rain,Water","/m/1,/m/2"{",train" if part == "dev" else ""}' for i in range(12)]
        header = "fname,labels,mids" + (",split" if part == "dev" else "")
        (root / "FSD50K.ground_truth" / f"{part}.csv").write_text("\n".join([header, *rows]) + "\n")
    assert run(tagged, monkeypatch, "fsd50k", "--root", root, "--out", tmp_path / "f", "--valid-share", 0.4) == 0
    found = cuts(tmp_path / "f")
    assert (len(found["train"]) + len(found["valid"]), len(found["test"])) == (12, 12)
    assert set(labels(found["train"]).values()) == {"Rain;Water"}


def test_esc50_and_jamendo_keep_their_own_splits(tagged: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = tmp_path / "esc50"
    (root / "meta").mkdir(parents=True)
    rows = [f"{fold}-{i}-A-0.wav,{fold},0,dog,True,1,A" for fold in range(1, 6) for i in range(2)]
    (root / "meta" / "esc50.csv").write_text("\n".join(["filename,fold,target,category,esc10,src_file,take", *rows]) + "\n")
    for row in rows:
        sound(root / "audio" / row.split(",")[0])
    assert run(tagged, monkeypatch, "esc50", "--root", root, "--out", tmp_path / "e", "--valid-share", 0.9) == 0
    found = cuts(tmp_path / "e")
    assert {split: {name[0] for name in part} for split, part in found.items()} == {"train": {"1", "2", "3"}, "valid": {"4"}, "test": {"5"}}
    root = tmp_path / "jamendo"
    folder = root / "data" / "splits" / "split-0"
    folder.mkdir(parents=True)
    for k, part in enumerate(("train", "validation", "test")):
        rows = [f"track_{k}{i}\tartist_1\talbum_1\t{i:02d}/{k}{i}.mp3\t200.0\tgenre---jazz\tinstrument---bass" for i in range(2)]
        (folder / f"autotagging-{part}.tsv").write_text("\n".join(["TRACK_ID\tARTIST_ID\tALBUM_ID\tPATH\tDURATION\tTAGS", *rows]) + "\n")
        for i in range(2):
            sound(root / "audio" / f"{i:02d}" / (f"{k}{i}.flac" if i else f"{k}{i}.low.flac"))
    assert run(tagged, monkeypatch, "mtg_jamendo", "--root", root, "--out", tmp_path / "j", "--valid-share", 0.9) == 0
    found = cuts(tmp_path / "j")
    assert {split: sorted(part) for split, part in found.items()} == {
        "train": ["track_00", "track_01"],
        "valid": ["track_10", "track_11"],
        "test": ["track_20", "track_21"],
    }
    assert set(labels(found["test"]).values()) == {"genre---jazz;instrument---bass"}


@pytest.mark.parametrize(("layout", "table", "audio"), [("music4all", "id_genres.csv", "audios"), ("freesound", "freesound.csv", "audio")])
def test_sets_without_splits_are_divided_by_a_hash(
    tagged: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, layout: str, table: str, audio: str
) -> None:
    root = tmp_path / "set"
    for i in range(30):
        sound(root / audio / f"{i:04d}.ogg")
    head, row = ("id\tgenres", "{:04d}\tpop,rock") if layout == "music4all" else ("id,tags", "{:04d},pop rock")
    (root / table).write_text("\n".join([head, *(row.format(i) for i in range(30))]) + "\n")
    assert run(tagged, monkeypatch, layout, "--root", root, "--out", tmp_path / "out", "--valid-share", 0.2) == 0
    found = cuts(tmp_path / "out")
    assert sum(len(part) for part in found.values()) == 30
    assert all(0 < len(found[split]) < 15 for split in ("valid", "test"))
    assert set(labels(found["train"]).values()) == {"pop;rock"}


def test_tagged_says_which_split_is_empty(
    tagged: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "vggsound.csv").write_text("a,1,dog,train\nb,1,dog,test\n")
    assert run(tagged, monkeypatch, "vggsound", "--root", tmp_path, "--out", tmp_path / "out") == 1
    assert "gives no cut for the split train (2 files of the lists are missing)" in capsys.readouterr().err


def test_librispeech_goes_by_its_parts(speech: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = tmp_path / "LibriSpeech"
    for k, part in enumerate(("train-clean-100", "dev-clean", "dev-other", "test-clean")):
        chapter = root / part / f"{k + 1}" / "22"
        for i in range(2):
            sound(chapter / f"{k + 1}-22-{i:04d}.flac")
        (chapter / f"{k + 1}-22.trans.txt").write_text("".join(f"{k + 1}-22-{i:04d} HELLO THERE\n" for i in range(2)))
    assert run(speech, monkeypatch, "librispeech", "--root", root, "--out", tmp_path / "out", "--jobs", 1) == 0
    found = cuts(tmp_path / "out")
    assert {split: len(part) for split, part in found.items()} == {"train": 2, "valid": 4, "test": 2}
    (cut, _) = found["train"].values()
    assert (cut.supervisions[0].text, cut.supervisions[0].speaker) == ("HELLO THERE", "1")


def test_libriheavy_takes_its_manifests_with_audio_from_elsewhere(speech: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = tmp_path / "libriheavy"
    root.mkdir()
    for part in ("small", "dev", "test_clean"):
        path = sound(tmp_path / "audio" / "librilight" / part / "book.flac", 2.0)
        cut = Recording.from_file(path, recording_id=f"{part}/book").to_cut().truncate(offset=0.5, duration=1.0).with_id(f"{part}/book_0")
        cut.recording.sources[0].source = f"download/librilight/{part}/book.flac"
        CutSet.from_cuts([cut]).to_file(root / f"libriheavy_cuts_{part}.jsonl.gz")
    assert run(speech, monkeypatch, "libriheavy", "--root", root, "--audio", tmp_path / "audio", "--out", tmp_path / "out") == 0
    found = cuts(tmp_path / "out")
    assert [list(part) for part in found.values()] == [["small/book_0"], ["dev/book_0"], ["test_clean/book_0"]]
    assert len(load_audio(found["train"]["small/book_0"])) == 16000


def speech_set(root: Path, *parts: str) -> Path:
    for k, part in enumerate(parts):
        chapter = root / part / f"{k + 1}" / "22"
        sound(chapter / f"{k + 1}-22-0000.flac")
        (chapter / f"{k + 1}-22.trans.txt").write_text(f"{k + 1}-22-0000 HELLO THERE\n")
    return root


def align(folder: Path, *parts: str) -> None:
    for k, part in enumerate(parts):
        path = folder / part / f"{k + 1}" / "22" / f"{k + 1}-22.alignment.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f'{k + 1}-22-0000 ",HELLO,THERE," "0.1,0.3,0.5,0.6"\n')


PARTS = ("train-clean-100", "dev-clean", "test-clean")


@pytest.mark.parametrize("inner", ["", "LibriSpeech"])
def test_librispeech_finds_its_alignments_in_the_folder_or_below_it(
    speech: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, inner: str
) -> None:
    speech_set(tmp_path / "LibriSpeech", *PARTS)
    align(tmp_path / "alignments" / inner, *PARTS)
    monkeypatch.chdir(tmp_path)
    assert run(speech, monkeypatch, "librispeech", "--root", "LibriSpeech", "--alignments", "alignments", "--out", "out", "--jobs", 1) == 0
    (cut,) = cuts(tmp_path / "out")["train"].values()
    assert [item.symbol for item in cut.supervisions[0].alignment["word"]] == ["", "HELLO", "THERE", ""]
    assert Path(cut.recording.sources[0].source).is_absolute()


def test_librispeech_stops_when_the_folder_of_alignments_has_none(
    speech: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    root = speech_set(tmp_path / "LibriSpeech", *PARTS)
    assert run(speech, monkeypatch, "librispeech", "--root", root, "--alignments", tmp_path, "--out", tmp_path / "out") == 1
    assert f"error: {tmp_path} holds no alignment: PART/SPEAKER/CHAPTER/*.alignment.txt is looked for" in capsys.readouterr().err
    assert not list((tmp_path / "out").glob("*.gz"))


def recordings(folder: Path) -> tuple[Path, Path]:
    """Manifests as `lhotse prepare` writes them: two supervisions of a recording with a relative path, in the wrong order."""
    sound(folder / "audio" / "talk.flac", 3.0)
    recording = Recording.from_file(folder / "audio" / "talk.flac", recording_id="talk")
    recording.sources[0].source = "audio/talk.flac"
    spoken = [SupervisionSegment(f"talk_{i}", "talk", start, 1.0, text=f"text {i}") for i, start in ((1, 1.5), (0, 0.25))]
    paths = folder / "set_recordings_train.jsonl.gz", folder / "set_supervisions_train.jsonl.gz"
    RecordingSet.from_recordings([recording]).to_file(paths[0])
    SupervisionSet.from_segments(spoken).to_file(paths[1])
    return paths


def test_manifests_of_lhotse_become_a_cut_for_every_supervision(speech: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pair = recordings(tmp_path)
    arguments = [part for split in ("train", "valid", "test") for part in (f"--{split}", *pair)]
    assert run(speech, monkeypatch, "manifests", *arguments, "--audio", tmp_path, "--out", tmp_path / "out") == 0
    for split in cuts(tmp_path / "out").values():
        assert {name: (cut.start, cut.duration, len(cut.supervisions)) for name, cut in split.items()} == {
            "talk_1": (1.5, 1.0, 1),
            "talk_0": (0.25, 1.0, 1),
        }
        assert split["talk_0"].supervisions[0].text == "text 0"
        assert split["talk_0"].supervisions[0].start == 0
        assert split["talk_0"].recording.sources[0].source == str(tmp_path / "audio" / "talk.flac")


def test_manifests_write_the_splits_that_are_given(speech: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert run(speech, monkeypatch, "manifests", "--train", *recordings(tmp_path), "--out", "out") == 0
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["cuts_train.jsonl.gz"]


@pytest.mark.parametrize(("change", "message"), [("audio", "relative paths in"), ("recording", "lacks the recording talk that")])
def test_manifests_raise_data_error_when_audio_or_recordings_are_missing(
    speech: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], change: str, message: str
) -> None:
    pair = recordings(tmp_path)
    if change == "recording":
        gzip.open(pair[0], "wt").close()
    assert run(speech, monkeypatch, "manifests", "--train", *pair, "--audio", tmp_path / "elsewhere", "--out", tmp_path / "out") == 1
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out" / "cuts_train.jsonl.gz").exists()


CORPORA = """weights: hours
corpora:
  - {name: librispeech, domain: speech, weight: 960, source: {type: cuts, train: a.gz, valid: a.gz, test: a.gz}}
  - {name: audioset, domain: audio, weight: 500, source: {type: cuts, train: a.gz, valid: a.gz, test: a.gz}}
  - {name: fsd50k, domain: audio, weight: 200, source: {type: cuts, train: a.gz, valid: a.gz, test: a.gz}}
"""


@pytest.mark.parametrize("aligned", [True, False])
def test_tasks_are_those_that_the_corpora_have_labels_for(tmp_path: Path, aligned: bool) -> None:
    (tmp_path / "corpora.yaml").write_text(CORPORA)
    (tmp_path / "data" / "manifests").mkdir(parents=True)
    cut = Recording.from_file(sound(tmp_path / "a.flac"), recording_id="a").to_cut()
    words = [AlignmentItem("HELLO", 0.1, 0.2)]
    cut.supervisions = [SupervisionSegment("a", "a", 0.0, 0.6, alignment={"word": words} if aligned else None)]
    for split in ("train", "valid", "test"):
        CutSet.from_cuts([cut]).to_file(tmp_path / "data" / "manifests" / f"librispeech_cuts_{split}.jsonl.gz")
    arguments = [ROAD.parents[1] / "recipes" / "spear_base.yaml", tmp_path / "corpora.yaml", tmp_path / "data"]
    done = subprocess.run(
        [sys.executable, str(ROAD / "local" / "tasks.py"), *map(str, arguments), "evaluation.tasks.speakers.corpora=[audioset, fsd50k]"],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": str(ROAD.parents[1])},
    )
    assert done.returncode == 0, done.stderr
    words_key = "evaluation.tasks.words.corpora=[librispeech]" if aligned else "evaluation.tasks.words=null"
    assert done.stdout.splitlines() == ["--set", words_key, "--set", "evaluation.tasks.events.corpora=[audioset]"]
    assert ("task words is left out: no alignment of the tier `word` in librispeech (train, valid, test)" in done.stderr) is not aligned
    left = load_run(*arguments[:2], tmp_path, tmp_path, done.stdout.split()[1::2]).recipe.evaluation.tasks
    assert ("words" in left) is aligned


def test_run_evaluates_with_the_tasks_that_have_labels(tmp_path: Path) -> None:
    (tmp_path / "corpora.yaml").write_text(CORPORA)
    stub = tmp_path / "spear"
    stub.write_text(f'#!/bin/bash\necho "$*" > {tmp_path}/told\n')
    stub.chmod(0o755)
    environment = {**os.environ, "SPEAR": str(stub), "PYTHON": sys.executable, "PYTHONPATH": str(ROAD.parents[1])}
    arguments = ["--stage", "7", "--corpora", str(tmp_path / "corpora.yaml"), "--data", str(tmp_path), "--exp", str(tmp_path), "--set", "seed=1"]
    done = subprocess.run([str(ROAD / "run.sh"), *arguments], capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    told = (tmp_path / "told").read_text()
    assert "evaluate --recipe" in told
    assert (
        "--set seed=1 --set evaluation.tasks.words=null --set evaluation.tasks.speakers.corpora=[librispeech] --set evaluation.tasks.events" in told
    )


def test_submit_sends_every_part_after_the_one_before(tmp_path: Path) -> None:
    sbatch = tmp_path / "sbatch"
    sbatch.write_text(f'#!/bin/bash\necho "$@" >> {tmp_path}/sent\nwc -l < {tmp_path}/sent\n')
    sbatch.chmod(sbatch.stat().st_mode | stat.S_IXUSR)
    environment = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", "DATA": "somewhere"}
    command = [str(ROAD / "slurm" / "submit.sh"), "--shards", "4", "--nodes=2", "--set", "seed=1", "--set=training.schedule={type: eden}"]
    environment["CORPORA"] = "conf/own.yaml"
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    assert done.stdout.startswith("manifests to quantizers 1, tokens 2, shards 3, pretrain 4")
    sent = (tmp_path / "sent").read_text().splitlines()
    assert [line.split("--dependency=afterok:")[-1].split()[0] for line in sent[1:]] == ["1", "2", "3", "4"]
    assert "--array=0-3 ../shared/tokens.sbatch --recipe" in sent[1]
    assert all("--data somewhere" in line for line in sent)
    assert all("--corpora conf/own.yaml" in line for line in sent)
    assert all("--set seed=1 --set training.schedule={type: eden}" in line for line in sent)
    assert "--stage 0 --stop-stage 2" in sent[0]
    assert "--nodes=2 ../shared/pretrain.sbatch --recipe" in sent[3]
    assert all((ROAD / name).is_file() for line in sent for name in line.split() if name.endswith(".sbatch"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--shards", "0"], "--shards must be a number of at least 1, but is '0'"),
        (["--nodes"], "--nodes is unknown or lacks its value"),
        (["--set", "seed"], "--set must look like a.b=c"),
        (["--node", "2"], "unknown option --node"),
    ],
)
def test_submit_ends_with_code_2_when_usage_is_wrong(arguments: list[str], message: str) -> None:
    done = subprocess.run([str(ROAD / "slurm" / "submit.sh"), *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert message in done.stderr


def test_run_makes_the_corpora_that_are_there(tmp_path: Path) -> None:
    copy = tmp_path / "egs" / "road"
    for name, source in (("road", ROAD), ("shared", ROAD.parent / "shared")):
        shutil.copytree(source, tmp_path / "egs" / name)
    root = copy / "downloads" / "fsd50k"
    (root / "FSD50K.ground_truth").mkdir(parents=True)
    for part in ("dev", "eval"):
        for i in range(3):
            sound(root / f"FSD50K.{part}_audio" / f"{part}{i}.wav")
        (root / "FSD50K.ground_truth" / f"{part}.csv").write_text("fname,labels\n" + "".join(f"{part}{i},Rain\n" for i in range(3)))
    environment = {**os.environ, "PYTHON": sys.executable, "PYTHONPATH": str(ROAD.parents[1])}
    done = subprocess.run([str(copy / "run.sh"), "--stage=-1", "--stop-stage=-1"], capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 1  # so few files leave valid empty, and the script says so
    assert "gives no cut for the split valid (0 files of the lists are missing)" in done.stderr
    with gzip.open(copy / "data" / "corpus" / "fsd50k" / "cuts_train.jsonl.gz") as file:
        assert len(list(file)) == 3
    assert not (copy / "data" / "corpus" / "audioset").exists()
