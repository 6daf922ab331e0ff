"""The manifests stage: what it keeps, splits, counts and refuses."""

from __future__ import annotations

import itertools
import json
import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from lhotse import CutSet, Recording
from lhotse.cut import MonoCut

from spear.data.audio import load_audio
from spear.data.corpora import ManifestsConfig
from spear.errors import ArtifactError, ConfigError, DataError
from spear.files import read_json
from spear.stages import manifests
from tests.data.cuts import cut_of, cuts_corpus, folder_corpus, make_run, save, tone, write_cuts


def made(data: Path, corpus: str, split: str = "train") -> list[MonoCut]:
    return list(CutSet.from_jsonl_lazy(manifests.manifest_path(data, corpus, split)))


def counts(data: Path) -> dict[str, Any]:
    found: dict[str, Any] = read_json(data / "manifests" / "artifact.json")["counts"]
    return found


def test_manifests_makes_16_khz_mono_cuts_of_any_audio(tmp_path: Path) -> None:
    left, right = tone(1.0, 44100, 300), tone(1.0, 44100, 900)
    save(tmp_path / "in" / "stereo.wav", np.stack([left, right], axis=1), 44100)
    save(tmp_path / "in" / "phone.flac", tone(1.0, 8000), 8000)
    run = make_run(tmp_path, [folder_corpus(tmp_path / "in")])
    manifests.run(run)
    phone, stereo = made(tmp_path, "sounds")
    assert [phone.id, stereo.id] == ["phone", "stereo"]
    for cut in (phone, stereo):
        assert cut.sampling_rate == 16000
        assert cut.custom["domain"] == "audio"
        assert cut.custom["corpus"] == "sounds"
        assert load_audio(cut).shape == (16000,)
    peaks = np.argsort(np.abs(np.fft.rfft(load_audio(stereo))))[-2:]
    assert set(peaks) == {300, 900}
    assert counts(tmp_path)["sounds"]["train"]["cuts"] == 2


def test_manifests_keeps_labels_alignments_and_custom_fields(tmp_path: Path) -> None:
    cut = cut_of(save(tmp_path / "a.wav", tone(1.0)), speaker="anna", phones=[("ah", 0.1, 0.2)])
    cut.custom = {"session": 3}
    run = make_run(tmp_path, [cuts_corpus("voices", "speech", write_cuts(tmp_path / "train.jsonl", [cut]))])
    manifests.run(run)
    (found,) = made(tmp_path, "voices")
    assert found.custom == {"session": 3, "domain": "speech", "corpus": "voices"}
    assert found.supervisions[0].speaker == "anna"
    assert tuple(found.supervisions[0].alignment["phone"][0])[:3] == ("ah", 0.1, 0.2)


def test_manifests_splits_a_long_clip_into_equal_windows_with_their_alignments(tmp_path: Path) -> None:
    audio = tone(10.0)
    cut = cut_of(save(tmp_path / "a.wav", audio, subtype="FLOAT"), "long", speaker="s", phones=[("x", 0.5, 0.5), ("y", 3.0, 1.0), ("z", 9.0, 0.5)])
    run = make_run(tmp_path, [cuts_corpus("v", "speech", write_cuts(tmp_path / "t.jsonl", [cut]))], manifests=ManifestsConfig(max_duration_s=4.0))
    manifests.run(run)
    windows = made(tmp_path, "v")
    assert [window.id for window in windows] == ["long-w0000", "long-w0001", "long-w0002"]
    assert max(window.duration for window in windows) <= 4.0
    assert np.array_equal(np.concatenate([load_audio(window) for window in windows]), audio)
    phones = [[tuple(item)[:3] for item in window.supervisions[0].alignment["phone"]] for window in windows]
    edge = 53333 / 16000
    assert phones[0] == [("x", 0.5, 0.5), ("y", 3.0, pytest.approx(edge - 3.0))]
    assert phones[1] == [("y", 0.0, pytest.approx(4.0 - edge))]
    assert phones[2] == [("z", pytest.approx(9.0 - 106666 / 16000), 0.5)]
    assert all(window.supervisions[0].text is None for window in windows)  # nobody knows which words lie where
    assert all(window.supervisions[0].speaker == "s" for window in windows)


def test_manifests_skips_what_is_too_long_or_too_short_and_counts_it(tmp_path: Path) -> None:
    for name, seconds in (("long", 3.0), ("ten_ms", 0.01), ("good", 1.0), ("excluded", 1.0)):
        save(tmp_path / "in" / f"{name}.wav", tone(seconds))
    config = ManifestsConfig(max_duration_s=2.0, long="skip", exclude=["excluded"])
    manifests.run(make_run(tmp_path, [folder_corpus(tmp_path / "in")], manifests=config))
    assert [cut.id for cut in made(tmp_path, "sounds")] == ["good"]
    assert counts(tmp_path)["sounds"]["train"]["skipped"] == {"excluded": 1, "too_long": 1, "too_short": 1}


def test_manifests_counts_failures_by_cause_below_the_allowed_share(tmp_path: Path) -> None:
    for i in range(4):
        save(tmp_path / "in" / f"good{i}.wav", tone(1.0))
    noisy = tone(1.0)
    noisy[7] = np.nan
    save(tmp_path / "in" / "nan.wav", noisy, subtype="FLOAT")
    (tmp_path / "in" / "zero.wav").touch()
    save(tmp_path / "in" / "cut.flac", np.random.default_rng(0).uniform(-0.5, 0.5, 16000))
    whole = (tmp_path / "in" / "cut.flac").read_bytes()
    (tmp_path / "in" / "cut.flac").write_bytes(whole[: len(whole) // 2])
    manifests.run(make_run(tmp_path, [folder_corpus(tmp_path / "in")], manifests=ManifestsConfig(max_failed_share=0.5)))
    failures = [json.loads(line) for line in (tmp_path / "manifests" / "failures.jsonl").read_text().splitlines()]
    assert [failure["id"] for failure in failures] == ["cut", "nan", "zero"]
    assert [failure["cause"] for failure in failures[1:]] == ["not_finite", "empty"]
    assert failures[0]["cause"] in ("decode", "length_mismatch")
    assert failures[1]["path"].endswith("in/nan.wav")
    assert sum(counts(tmp_path)["sounds"]["train"]["failed"].values()) == 3
    assert counts(tmp_path)["sounds"]["train"]["cuts"] == 4


@pytest.mark.parametrize("check_audio", ["full", "header"])
def test_manifests_raises_data_error_when_too_many_files_are_missing(tmp_path: Path, check_audio: Any) -> None:
    cuts = [cut_of(save(tmp_path / "in" / f"{i}.wav", tone(1.0))) for i in range(3)]
    (tmp_path / "in" / "1.wav").unlink()
    corpus = cuts_corpus("v", "speech", write_cuts(tmp_path / "t.jsonl", cuts))
    match = r"corpus v, split train: 1 of 3 cuts failed, a share of 0\.333, but `max_failed_share` is 0\.001; first: .*in/1\.wav: missing_file"
    with pytest.raises(DataError, match=match):
        manifests.run(make_run(tmp_path, [corpus], manifests=ManifestsConfig(check_audio=check_audio)))
    assert json.loads((tmp_path / "manifests" / "failures.jsonl").read_text())["id"] == "1"
    assert not (tmp_path / "manifests" / "artifact.json").exists()


def test_manifests_keeps_silent_clips_counts_them_and_warns(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    save(tmp_path / "in" / "a.wav", np.zeros(16000))
    save(tmp_path / "in" / "b.wav", tone(1.0))
    with caplog.at_level(logging.WARNING):
        manifests.run(make_run(tmp_path, [folder_corpus(tmp_path / "in")]))
    assert counts(tmp_path)["sounds"]["train"]["silent"] == 1
    assert len(made(tmp_path, "sounds")) == 2
    assert "1 of 2 cuts are silent (50.0 %)" in caplog.text


def test_manifests_raises_data_error_when_an_id_is_there_twice(tmp_path: Path) -> None:
    save(tmp_path / "in" / "a.wav", tone(1.0))
    save(tmp_path / "in" / "a.flac", tone(1.0))
    with pytest.raises(DataError, match=r"cut id 'a' must be unique, but is there 2 times: .*a\.flac \(train\) and .*a\.wav \(train\)"):
        manifests.run(make_run(tmp_path, [folder_corpus(tmp_path / "in")]))


def test_manifests_raises_data_error_when_splits_overlap(tmp_path: Path) -> None:
    one, two = (cut_of(save(tmp_path / folder / "a.wav", tone(1.0))) for folder in ("x", "y"))
    corpus = cuts_corpus("v", "speech", write_cuts(tmp_path / "t.jsonl", [one]), write_cuts(tmp_path / "v.jsonl", [two]))
    with pytest.raises(DataError, match=r"'a' must be unique.*x/a\.wav \(train\) and .*y/a\.wav \(valid\)"):
        manifests.run(make_run(tmp_path, [corpus]))


def test_manifests_raises_data_error_when_an_id_cannot_name_a_tar_member(tmp_path: Path) -> None:
    cut = cut_of(save(tmp_path / "a.wav", tone(1.0)), "../a")
    with pytest.raises(DataError, match=r"must be a plain relative name.*'\.\./a' \(.*a\.wav\)"):
        manifests.run(make_run(tmp_path, [cuts_corpus("v", "speech", write_cuts(tmp_path / "t.jsonl", [cut]))]))


def test_manifests_raises_data_error_when_nothing_is_left(tmp_path: Path) -> None:
    save(tmp_path / "in" / "a.wav", tone(0.1))
    with pytest.raises(DataError, match=r"split train: no cut is left \(0 cuts, 0\.00 h, 1 too_short\)"):
        manifests.run(make_run(tmp_path, [folder_corpus(tmp_path / "in")]))


def test_manifests_raises_config_error_when_the_recipe_does_not_know_the_domain(tmp_path: Path) -> None:
    save(tmp_path / "in" / "a.wav", tone(1.0))
    with pytest.raises(ConfigError, match="does not know the domain music"):
        manifests.run(make_run(tmp_path, [folder_corpus(tmp_path / "in", domain="music")]))
    manifests.run(make_run(tmp_path, [folder_corpus(tmp_path / "in", domain="noise")]))


def test_manifests_gives_the_same_bytes_again_and_after_a_stop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for i in range(5):
        save(tmp_path / "in" / f"{i}.wav", tone(1.0 + i / 10))
    corpora = [folder_corpus(tmp_path / "in", name) for name in ("one", "two")]
    manifests.run(make_run(tmp_path / "a", corpora))

    write_cuts_of = manifests._write_cuts

    def stop_in_the_second(path: Path, cuts: Any) -> None:
        write_cuts_of(path, itertools.islice(cuts, 2) if "two" in path.name else cuts)
        if "two" in path.name:
            raise KeyboardInterrupt

    monkeypatch.setattr(manifests, "_write_cuts", stop_in_the_second)
    with pytest.raises(KeyboardInterrupt):
        manifests.run(make_run(tmp_path / "b", corpora))
    monkeypatch.undo()
    first = manifests.manifest_path(tmp_path / "b", "one", "train").stat().st_mtime_ns
    assert not manifests.manifest_path(tmp_path / "b", "two", "train").exists()
    manifests.run(make_run(tmp_path / "b", corpora))
    assert manifests.manifest_path(tmp_path / "b", "one", "train").stat().st_mtime_ns == first
    for name in ("one", "two"):
        assert (
            manifests.manifest_path(tmp_path / "a", name, "train").read_bytes() == manifests.manifest_path(tmp_path / "b", name, "train").read_bytes()
        )


def test_manifests_go_on_after_the_last_whole_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for i in range(7):
        save(tmp_path / "in" / f"{i}.wav", tone(1.0 + i / 7), subtype="FLOAT")
    (tmp_path / "in" / "1.wav").touch()
    (tmp_path / "in" / "6.wav").touch()
    save(tmp_path / "in" / "2.wav", tone(0.01))
    settings = ManifestsConfig(max_failed_share=0.5, max_duration_s=1.5)
    corpora = [folder_corpus(tmp_path / "in")]
    manifests.run(make_run(tmp_path / "whole", corpora, manifests=settings))

    monkeypatch.setattr(manifests, "PART_ITEMS", 2)
    prepare, heard = manifests.prepare, []

    def noted(item: Any, *rest: Any) -> Any:
        heard.append(item.id)
        if item.id == "5" and len(heard) < 7:
            raise KeyboardInterrupt
        return prepare(item, *rest)

    monkeypatch.setattr(manifests, "prepare", noted)
    run = make_run(tmp_path / "parts", corpora, manifests=settings)
    with pytest.raises(KeyboardInterrupt):
        manifests.run(run)
    assert sorted(heard) == ["0", "1", "2", "3", "4", "5"]
    manifests.run(run)
    assert sorted(heard[6:]) == ["4", "5", "6"]
    found, expected = ({path.name: path.read_bytes() for path in (tmp_path / name / "manifests").glob("*.*")} for name in ("parts", "whole"))
    assert found.keys() == expected.keys()
    assert [name for name in found if found[name] != expected[name]] in ([], ["artifact.json"])  # which holds how long it took
    assert counts(tmp_path / "parts") == counts(tmp_path / "whole")


def test_manifests_know_the_ids_of_parts_that_a_stopped_run_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cuts = [cut_of(save(tmp_path / folder / "a.wav", tone(1.0)), name) for folder, name in (("x", "a"), ("x", "b"), ("y", "c"), ("y", "a"))]
    run = make_run(tmp_path, [cuts_corpus("v", "speech", write_cuts(tmp_path / "t.jsonl", cuts))])
    monkeypatch.setattr(manifests, "PART_ITEMS", 2)
    for _ in range(2):
        with pytest.raises(DataError, match=r"'a' must be unique.*x/a\.wav \(train\) and .*y/a\.wav \(train\)"):
            manifests.run(run)
        assert (tmp_path / "manifests" / "v_parts_train" / "v_train_000000.jsonl.gz").exists()


def test_manifests_look_at_all_files_again_after_too_many_failed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for i in range(4):
        save(tmp_path / "in" / f"{i}.wav", tone(1.0))
    cuts = [cut_of(tmp_path / "in" / f"{i}.wav") for i in range(4)]
    (tmp_path / "in" / "0.wav").rename(tmp_path / "gone.wav")
    run = make_run(tmp_path, [cuts_corpus("v", "speech", write_cuts(tmp_path / "t.jsonl", cuts))])
    monkeypatch.setattr(manifests, "PART_ITEMS", 2)
    with pytest.raises(DataError, match="1 of 4 cuts failed"):
        manifests.run(run)
    (tmp_path / "gone.wav").rename(tmp_path / "in" / "0.wav")
    manifests.run(run)
    assert len(made(tmp_path, "v")) == 4


def test_manifests_raises_artifact_error_when_the_source_changed(tmp_path: Path) -> None:
    save(tmp_path / "in" / "a.wav", tone(1.0))
    run = make_run(tmp_path, [folder_corpus(tmp_path / "in")])
    manifests.run(run)
    manifests.run(run)
    save(tmp_path / "in" / "b.wav", tone(1.0))
    with pytest.raises(ArtifactError, match="`inputs.sounds` was"):
        manifests.run(run)


def test_manifests_raises_artifact_error_when_the_settings_of_a_folder_changed(tmp_path: Path) -> None:
    for i in range(6):
        save(tmp_path / "in" / f"{i}.wav", tone(1.0))
    manifests.run(make_run(tmp_path, [folder_corpus(tmp_path / "in")]))
    with pytest.raises(ArtifactError, match="`inputs.sounds` was"):
        manifests.run(make_run(tmp_path, [folder_corpus(tmp_path / "in", valid_share=0.5)]))


def test_manifests_raises_artifact_error_when_the_audio_moved(tmp_path: Path) -> None:
    save(tmp_path / "in" / "a.wav", tone(1.0))
    manifests.run(make_run(tmp_path, [folder_corpus(tmp_path / "in")]))
    (tmp_path / "in").rename(tmp_path / "moved")
    moved = make_run(tmp_path, [folder_corpus(tmp_path / "moved", "sounds")])
    with pytest.raises(
        ArtifactError, match=r"sounds_cuts_train\.jsonl\.gz names .*in/a\.wav, which does not exist: put the audio back, or remove .*manifests and"
    ):
        manifests.run(moved)
    (tmp_path / "moved").rename(tmp_path / "in")
    manifests.run(make_run(tmp_path, [folder_corpus(tmp_path / "in")]))


def test_manifests_leaves_out_windows_by_the_ids_that_failures_have(tmp_path: Path) -> None:
    audio = tone(3.0)
    audio[16000 + 7] = np.nan
    save(tmp_path / "in" / "l.wav", audio, subtype="FLOAT")
    corpora, config = [folder_corpus(tmp_path / "in")], ManifestsConfig(max_duration_s=1.0, max_failed_share=0.5)
    manifests.run(make_run(tmp_path / "a", corpora, manifests=config))
    failed = json.loads((tmp_path / "a" / "manifests" / "failures.jsonl").read_text())["id"]
    manifests.run(make_run(tmp_path / "b", corpora, manifests=replace(config, max_failed_share=0.0, exclude=[failed])))
    assert [cut.id for cut in made(tmp_path / "b", "sounds")] == ["l-w0000", "l-w0002"]
    assert counts(tmp_path / "b")["sounds"]["train"]["skipped"] == {"excluded": 1}


def test_manifests_refuses_audio_far_beyond_full_scale_and_counts_what_is_clipped(tmp_path: Path) -> None:
    for name, gain in (("good", 0.9), ("over", 1.5), ("shorts", 8000.0)):
        save(tmp_path / "in" / f"{name}.wav", tone(1.0, gain=gain), subtype="FLOAT")
    manifests.run(make_run(tmp_path, [folder_corpus(tmp_path / "in")], manifests=ManifestsConfig(max_failed_share=0.5)))
    found = counts(tmp_path)["sounds"]["train"]
    assert (found["cuts"], found["clipped"], found["failed"]) == (2, 1, {"too_loud": 1})
    failure = json.loads((tmp_path / "manifests" / "failures.jsonl").read_text())
    assert (failure["id"], failure["cause"]) == ("shorts", "too_loud")
    assert "samples must be between -1 and 1, but reach 8000" in failure["message"]


def test_manifests_raises_data_error_when_an_id_is_a_number(tmp_path: Path) -> None:
    cut = cut_of(save(tmp_path / "a.wav", tone(1.0)))
    cut.id = 17  # type: ignore[assignment]
    with pytest.raises(DataError, match=r"^a cut's id must be text, but is 17 \(.*a\.wav\)$"):
        manifests.run(make_run(tmp_path, [cuts_corpus("v", "speech", write_cuts(tmp_path / "t.jsonl", [cut]))]))


@pytest.mark.parametrize("rate", [16000, 44100])
@pytest.mark.parametrize("check_audio", ["full", "header"])
def test_manifests_finds_audio_that_became_shorter_at_any_rate(tmp_path: Path, check_audio: Any, rate: int) -> None:
    cut = cut_of(save(tmp_path / "a.wav", tone(4.0, rate), rate))
    save(tmp_path / "a.wav", tone(1.0, rate), rate)
    corpus = cuts_corpus("v", "speech", write_cuts(tmp_path / "t.jsonl", [cut]))
    with pytest.raises(DataError, match="length_mismatch"):
        manifests.run(make_run(tmp_path, [corpus], manifests=ManifestsConfig(check_audio=check_audio)))


def test_manifests_finds_a_cut_that_reaches_past_its_recording(tmp_path: Path) -> None:
    recording = Recording.from_file(save(tmp_path / "a.wav", tone(5.0)))
    corpus = cuts_corpus("v", "speech", write_cuts(tmp_path / "t.jsonl", [MonoCut("long", 0.0, 10.0, 0, recording=recording)]))
    with pytest.raises(DataError, match="length_mismatch"):
        manifests.run(make_run(tmp_path, [corpus]))
    failure = json.loads((tmp_path / "manifests" / "failures.jsonl").read_text())
    assert failure["message"].endswith("must reach to 10 s, but its recording ends at 5 s")


def test_manifests_reads_a_sub_cut_of_a_resampled_recording(tmp_path: Path) -> None:
    recording = Recording.from_file(save(tmp_path / "a.wav", tone(4.0, 8000, 500), 8000))
    cut = MonoCut("part", 1.0, 2.0, 0, recording=recording)
    manifests.run(make_run(tmp_path, [cuts_corpus("v", "speech", write_cuts(tmp_path / "t.jsonl", [cut]))]))
    (found,) = made(tmp_path, "v")
    assert load_audio(found).shape == (32000,)
    assert np.abs(np.fft.rfft(load_audio(found))).argmax() == 1000


def test_manifests_goes_on_when_a_folder_has_no_file_for_valid(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    save(tmp_path / "in" / "a.wav", tone(1.0))
    run = make_run(tmp_path, [folder_corpus(tmp_path / "in", valid_share=1e-9)])
    manifests.run(run)
    assert "the source has nothing for the split valid" in caplog.text
    assert not manifests.manifest_path(tmp_path, "sounds", "valid").exists()
