"""The synthetic speech of the mini road."""

from __future__ import annotations

import gzip
import json
import logging
import time
from itertools import pairwise
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml

from spear.data.audio import load_audio
from spear.data.sources import CutsSource
from spear.errors import SpearError

pytest.importorskip("espeakng_loader")


@pytest.fixture(scope="module")
def speech(script: Any) -> ModuleType:
    return script("mini/local/make_speech.py")


@pytest.fixture(scope="module")
def config(egs: Path) -> dict[str, Any]:
    return yaml.safe_load((egs / "mini/conf/corpus.yaml").read_text())


def make(speech: ModuleType, config: dict[str, Any], folder: Path, workers: int, monkeypatch: pytest.MonkeyPatch) -> int:
    small = {"seed": 1, "speech": {**config["speech"], "utterances": {"train": 4, "valid": 2, "test": 2}}}
    path = folder.parent / "corpus.yaml"
    path.write_text(json.dumps(small))
    monkeypatch.setattr("sys.argv", ["make_speech.py", "--config", str(path), "--out", str(folder), "--workers", str(workers)])
    return int(speech.main())


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file() and path.name != "artifact.json"}


def test_voices_are_disjoint_between_splits(config: dict[str, Any]) -> None:
    train, valid, test = (set(config["speech"]["speakers"][split]) for split in ("train", "valid", "test"))
    assert not train & valid
    assert not train & test
    assert not valid & test
    assert min(len(valid), len(test)) >= 6


def test_draw_utterances_gives_each_speaker_its_own_manner_and_all_words(speech: ModuleType, config: dict[str, Any]) -> None:
    drawn = speech.draw_utterances(config["speech"], "train", 20)
    assert drawn == speech.draw_utterances(config["speech"], "train", 20)
    assert len(drawn) == config["speech"]["utterances"]["train"] == len({u.id for u in drawn})
    assert {u.speaker for u in drawn} == set(config["speech"]["speakers"]["train"])
    assert len({u.text for u in drawn}) > 0.95 * len(drawn)
    spoken = " ".join(u.text for u in drawn)
    for word in [word for words in config["speech"]["words"].values() for word in words]:
        assert word in spoken
    one = [u.pitch for u in drawn if u.speaker == drawn[0].speaker]
    assert max(one) - min(one) <= 12


def test_main_gives_the_same_bytes_whatever_the_workers_and_after_a_kill(
    speech: ModuleType, config: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    first, second = tmp_path / "a" / "speech", tmp_path / "b" / "speech"
    first.parent.mkdir()
    second.parent.mkdir()
    assert make(speech, config, first, 1, monkeypatch) == 0
    assert make(speech, config, second, 2, monkeypatch) == 0
    wanted = files(first)
    assert len(wanted) == 2 * 8 + 3
    assert files(second) == wanted
    for name in ("artifact.json", "cuts_train.jsonl.gz", "train/speech-train-00001.flac"):
        (second / name).unlink()
    assert make(speech, config, second, 1, monkeypatch) == 0
    assert files(second) == wanted
    with caplog.at_level(logging.INFO):
        assert make(speech, config, second, 1, monkeypatch) == 0
    assert "nothing to do" in caplog.text


def test_main_writes_cuts_with_ordered_phones_and_words_inside_the_audio(
    speech: ModuleType, config: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert make(speech, config, tmp_path / "speech", 2, monkeypatch) == 0
    for item in CutsSource(train=str(tmp_path / "speech" / "cuts_train.jsonl.gz")).files("train"):
        cut = item.cut
        assert cut is not None
        audio = load_audio(cut)
        assert 1.0 < cut.duration < 6.0
        assert 0.1 < abs(audio).max() < 1.0
        labels = cut.supervisions[0]
        assert labels.speaker in config["speech"]["speakers"]["train"]
        for tier in ("phone", "word"):
            spans = labels.alignment[tier]
            assert all(span.duration > 0 for span in spans)
            assert all(a.end <= b.start + 2e-6 for a, b in pairwise(spans))
            assert spans[-1].end <= cut.duration + 2e-6
        assert " ".join(word.symbol for word in labels.alignment["word"]) == labels.text
        covered = sum(phone.duration for phone in labels.alignment["phone"])
        assert covered > 0.8 * cut.duration
        phones = labels.alignment["phone"]
        for word in labels.alignment["word"]:
            inside = [phone for phone in phones if word.start - 3e-6 <= phone.start and phone.end <= word.end + 3e-6]
            assert inside
            assert inside[0].start == pytest.approx(word.start, abs=1e-5)


def test_intervals_ends_each_phone_at_the_next_event(speech: ModuleType) -> None:
    events = [
        ["word", 0.0, "so"],
        ["phone", 0.1, "s"],
        ["phone", 0.3, "oʊ"],
        ["pause", 0.7, ""],
        ["word", 0.9, "at"],
        ["phone", 1.0, "æ"],
        ["phone", 1.2, "t"],
    ]
    tiers = speech.intervals(events, 1.5)
    assert [(p, round(a, 6), round(d, 6)) for p, a, d in tiers["phone"]] == [("s", 0.1, 0.2), ("oʊ", 0.3, 0.4), ("æ", 1.0, 0.2), ("t", 1.2, 0.3)]
    assert [(w, round(a, 6), round(d, 6)) for w, a, d in tiers["word"]] == [("so", 0.1, 0.6), ("at", 1.0, 0.5)]


def test_intervals_gives_a_timeless_l_the_end_of_its_vowel(speech: ModuleType) -> None:
    events = [["word", 0.0, "ill"], ["phone", 0.0, "ɪ"], ["phone", 0.5, "l"], ["word", 0.5, "so"], ["phone", 0.5, "s"]]
    tiers = speech.intervals(events, 1.0)
    vowel, late, _ = tiers["phone"]
    assert vowel == ("ɪ", 0.0, pytest.approx(0.5 * (1 - speech.LATE_L_SHARE)))
    assert late == ("l", pytest.approx(0.5 * (1 - speech.LATE_L_SHARE)), pytest.approx(0.5 * speech.LATE_L_SHARE))
    assert tiers["word"][0] == ("ill", 0.0, pytest.approx(0.5))


def test_speak_raises_spear_error_when_the_voice_is_unknown(speech: ModuleType) -> None:
    utterance = speech.Utterance(id="u", speaker="nobody", text="hello", rate=160, pitch=50, range=50, gain_db=-3.0, snr_db=30.0)
    with pytest.raises(SpearError, match="did not speak u .voice 'nobody'"):
        list(speech.speak([utterance], "gmw/en-US", 1))


def test_speak_names_words_that_are_spoken_as_one(speech: ModuleType) -> None:
    utterance = speech.Utterance(id="u", speaker="f2", text="wished for the yacht", rate=160, pitch=50, range=50, gain_db=-3.0, snr_db=30.0)
    header, samples = next(iter(speech.speak([utterance], "gmw/en-US", 1)))
    tiers = speech.intervals(header["events"], len(samples) / header["sample_rate"])
    assert [word for word, _, _ in tiers["word"]] == ["wished", "for the", "yacht"]


def test_speak_gives_the_same_samples_at_another_time_of_day(speech: ModuleType) -> None:
    breathy = speech.Utterance(id="u", speaker="f3", text="we wish", rate=160, pitch=50, range=50, gain_db=-3.0, snr_db=30.0)
    first = next(iter(speech.speak([breathy], "gmw/en-US", 1)))[1]
    time.sleep(1.1)
    assert (next(iter(speech.speak([breathy], "gmw/en-US", 1)))[1] == first).all()


def test_manifest_paths_are_relative(speech: ModuleType, config: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert make(speech, config, tmp_path / "speech", 2, monkeypatch) == 0
    text = gzip.decompress((tmp_path / "speech" / "cuts_test.jsonl.gz").read_bytes()).decode()
    sources = [source["source"] for line in text.splitlines() for source in json.loads(line)["recording"]["sources"]]
    assert sources == [f"test/speech-test-{index:05d}.flac" for index in range(2)]
