"""The real recordings of egs/fsdd_esc50, on a miniature of both layouts."""

from __future__ import annotations

import logging
from itertools import pairwise
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import soundfile

from spear.data.audio import load_audio
from spear.data.sources import CutsSource
from spear.errors import DataError
from spear.recipe import load_recipe

SPEAKERS = ("ann", "bob")


@pytest.fixture(scope="module")
def prepare(script: Any) -> ModuleType:
    return script("fsdd_esc50/local/prepare.py")


@pytest.fixture(scope="module")
def fsdd(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two speakers, ten digits, indices 0 to 11; a recording is a tone whose pitch is its digit's."""
    folder = tmp_path_factory.mktemp("fsdd")
    (folder / "recordings").mkdir()
    for speaker in SPEAKERS:
        for digit in range(10):
            for index in range(12):
                tone = 0.3 * np.sin(2 * np.pi * (400 + 200 * digit) * np.arange(2000 + 40 * index) / 8000)
                soundfile.write(folder / "recordings" / f"{digit}_{speaker}_{index}.wav", tone, 8000, subtype="PCM_16")
    return folder


@pytest.fixture(scope="module")
def esc50(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four folds, three classes of which two are in ESC-10; WAV at 44.1 kHz and stereo FLAC, as a user may have them."""
    folder = tmp_path_factory.mktemp("esc")
    (folder / "meta").mkdir()
    (folder / "audio").mkdir()
    rows = ["filename,fold,target,category,esc10,src_file,take"]
    for fold in range(1, 5):
        for target, (category, small) in enumerate((("dog", True), ("rain", True), ("cow", False))):
            name = f"{fold}-10{target}-A-{target}.{'wav' if target else 'flac'}"
            noise = 0.1 * np.random.default_rng(fold).standard_normal((22050, 2))
            soundfile.write(folder / "audio" / name, noise, 44100)
            rows.append(f"{name},{fold},{target},{category},{small},10{target},A")
    (folder / "meta" / "esc50.csv").write_text("\n".join(rows) + "\n")
    return folder


def run(prepare: ModuleType, monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    monkeypatch.setattr("sys.argv", ["prepare.py", *(str(argument) for argument in arguments)])
    return int(prepare.main())


def cuts_of(path: Path) -> list[Any]:
    return [item.cut for item in CutsSource(train=str(path)).files("train")]


def test_main_prepares_both_sets_and_a_second_run_does_nothing(
    prepare: ModuleType, fsdd: Path, esc50: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    arguments = ("--fsdd", fsdd, "--esc50", esc50, "--out", tmp_path, "--passes", 2)
    assert run(prepare, monkeypatch, *arguments) == 0
    heard: dict[str, float] = {}
    for split, recordings in (("train", 2 * 20 * 2), ("valid", 100), ("test", 100)):
        cuts = cuts_of(tmp_path / "digits" / f"cuts_{split}.jsonl.gz")
        words = [word for cut in cuts for word in cut.supervisions[0].alignment["word"]]
        assert len(words) == recordings
        heard[split] = sum(word.duration for word in words)
        for cut in cuts:
            assert cut.sampling_rate == 16000
            assert cut.supervisions[0].speaker in SPEAKERS
            assert cut.custom["domain"] == "speech"
            spans = cut.supervisions[0].alignment["word"]
            assert all(a.end < b.start for a, b in pairwise(spans))
            assert " ".join(span.symbol for span in spans) == cut.supervisions[0].text
    assert heard["test"] == pytest.approx(20 * sum((2000 + 40 * index) / 8000 for index in range(5)), abs=1e-3)
    sounds = {split: cuts_of(tmp_path / "sounds" / f"cuts_{split}.jsonl.gz") for split in ("train", "valid", "test")}
    assert {split: sorted(cut.id for cut in cuts) for split, cuts in sounds.items()} == {
        "train": ["esc-1-100-A-0", "esc-1-101-A-1", "esc-2-100-A-0", "esc-2-101-A-1"],
        "valid": ["esc-3-100-A-0", "esc-3-101-A-1"],
        "test": ["esc-4-100-A-0", "esc-4-101-A-1"],
    }
    assert [cut.supervisions[0].custom["label"] for cut in sounds["test"]] == ["dog", "rain"]
    assert len(load_audio(sounds["test"][0])) == pytest.approx(8000, abs=1)
    with caplog.at_level(logging.INFO):
        assert run(prepare, monkeypatch, *arguments) == 0
    assert caplog.text.count("nothing to do") == 2


def test_recipe_asks_for_tiers_and_labels_that_the_corpora_have() -> None:
    tasks = load_recipe(Path(__file__).parents[2] / "recipes" / "fsdd_esc50.yaml").evaluation.tasks
    assert {getattr(task, "tier", "word") for task in tasks.values()} == {"word"}
    assert {getattr(task, "label", "label") for task in tasks.values()} == {"label", "speaker"}
    assert set(tasks) == {"digits", "speakers", "events"}


def test_join_puts_each_digit_where_its_interval_says(prepare: ModuleType, fsdd: Path) -> None:
    utterance = prepare.draw_utterances(prepare.find_digits(fsdd)["test"], "test", 1, 20)[0]
    audio, words = prepare.join(utterance)
    for word, start, duration in words:
        inside = audio[int(start * 16000) : int((start + duration) * 16000)][200:-200]
        frequency = np.fft.rfftfreq(len(inside), 1 / 16000)[np.abs(np.fft.rfft(inside)).argmax()]
        assert frequency == pytest.approx(400 + 200 * prepare.DIGITS.index(word), abs=10)
    silent = int(utterance.pauses_s[0] * 16000)
    assert np.abs(audio[: silent - 100]).max() == 0


def test_draw_utterances_hears_every_recording_once_a_pass(prepare: ModuleType, fsdd: Path) -> None:
    speakers = prepare.find_digits(fsdd)["train"]
    drawn = prepare.draw_utterances(speakers, "train", 3, 20)
    files = [file for utterance in drawn for file in utterance.files]
    assert sorted(files) == sorted(3 * [file for paths in speakers.values() for file in paths])
    assert len({utterance.id for utterance in drawn}) == len(drawn)
    assert {file.stem.split("_")[2] for file in files} == {"10", "11"}
    assert all(file.stem.split("_")[1] == utterance.speaker for utterance in drawn for file in utterance.files)


def test_split_folds_chooses_test_valid_and_train(prepare: ModuleType) -> None:
    assert prepare.split_folds([1, 2, 3, 4], None, None) == {"train": [1, 2], "valid": [3], "test": [4]}
    assert prepare.split_folds([1, 2, 3, 4, 5], 1, None) == {"train": [2, 3, 4], "valid": [5], "test": [1]}
    assert prepare.split_folds([1, 2, 3], 2, 3) == {"train": [1], "valid": [3], "test": [2]}


@pytest.mark.parametrize(("test", "valid", "message"), [(9, None, "`--test-fold` must be one of"), (2, 2, "must differ")])
def test_split_folds_raises_data_error_when_folds_are_wrong(prepare: ModuleType, test: int, valid: int | None, message: str) -> None:
    with pytest.raises(DataError, match=message):
        prepare.split_folds([1, 2, 3], test, valid)


def test_find_sounds_takes_all_classes_when_asked(prepare: ModuleType, esc50: Path) -> None:
    assert {clip.label for clip in prepare.find_sounds(esc50, all_classes=True)[1]} == {"dog", "rain", "cow"}
    assert {clip.label for clip in prepare.find_sounds(esc50, all_classes=False)[1]} == {"dog", "rain"}


def test_main_names_the_folder_when_it_is_not_the_set(
    prepare: ModuleType, fsdd: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(prepare, monkeypatch, "--fsdd", tmp_path, "--esc50", tmp_path, "--out", tmp_path / "out") == 1
    assert "is `--fsdd` the clone of free-spoken-digit-dataset?" in capsys.readouterr().err
    assert run(prepare, monkeypatch, "--fsdd", fsdd, "--esc50", tmp_path, "--out", tmp_path / "out") == 1
    assert "esc50.csv does not exist" in capsys.readouterr().err
