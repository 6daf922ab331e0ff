"""Stage `features` on two small corpora."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from lhotse import CutSet

from spear.errors import ArtifactError, ConfigError, DataError
from spear.files import read_json, read_tensors, write_tensors
from spear.stages import features
from spear.stages.manifests import manifest_path
from spear.teachers.extraction import FeaturesConfig, read_cuts
from tests.teachers.runs import contents, make_run


def frames_of(folder: Path) -> torch.Tensor:
    return torch.cat([read_tensors(path)["frames"] for path in sorted(folder.glob("frames-*.safetensors"))])


def test_features_samples_the_asked_number_of_frames(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    features.run(run)
    folder = run.data / "features" / "mel"
    heldout = read_tensors(folder / "heldout.safetensors")["frames"]
    assert heldout.shape == (30, 16)
    assert frames_of(folder).shape == (570, 16)
    artifact = read_json(folder / "artifact.json")
    assert artifact["counts"]["frames"] == 570
    assert artifact["counts"]["heldout_frames"] == 30
    assert artifact["extra"]["frame_rate_hz"] == 100.0
    assert set(artifact["inputs"]) == {"teacher", "manifest.talk", "manifest.city"}
    # the second teacher is used by the audio corpus alone
    assert set(read_json(run.data / "features" / "wide" / "artifact.json")["inputs"]) == {"teacher", "manifest.city"}


def test_features_are_frames_of_the_teacher(tmp_path: Path) -> None:
    from spear.data.audio import load_audio
    from spear.data.fbank import fbank

    run = make_run(tmp_path, features={"num_frames": 100_000})
    features.run(run)
    folder = run.data / "features" / "mel"
    found = torch.cat([frames_of(folder), read_tensors(folder / "heldout.safetensors")["frames"]])
    cuts = [cut for name in ("talk", "city") for cut in read_cuts(manifest_path(run.data, name, "train"))]
    expected = torch.cat([fbank(torch.from_numpy(load_audio(cut)), 16) for cut in cuts])
    rows = {tuple(row) for row in expected.tolist()}
    assert all(tuple(row) in rows for row in found.tolist())
    assert len(found) > 0.9 * len(expected)  # the cut that is cut short for the held-out frames loses the rest


def test_features_do_not_depend_on_the_order_of_the_manifest(tmp_path: Path) -> None:
    one, other = make_run(tmp_path, "one"), make_run(tmp_path, "other", reverse=True)
    for run in (one, other):
        features.run(run)
    assert contents(one.data / "features") == contents(other.data / "features")


def test_features_change_with_the_seed(tmp_path: Path) -> None:
    one, other = make_run(tmp_path, "one"), make_run(tmp_path, "other")
    other.recipe.seed = 8
    for run in (one, other):
        features.run(run)
    assert not torch.equal(frames_of(one.data / "features" / "mel"), frames_of(other.data / "features" / "mel"))


def test_features_plan_keeps_heldout_cuts_apart(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    teacher = run.recipe.teachers["mel"].build()
    cuts = list(read_cuts(manifest_path(run.data, "talk", "train")))
    configs = ({"num_frames": 300, "heldout_share": 0.3}, {"num_frames": 10**6}, {"num_frames": 300, "frames_per_cut": 25})
    for config in (FeaturesConfig(**values) for values in configs):  # type: ignore[arg-type]
        heldout, train = features.plan(teacher, {"talk": cuts}, config, seed=3)
        assert not {pick.cut.id for pick in heldout} & {pick.cut.id for pick in train}
        total = sum(pick.frames for pick in heldout + train)
        assert total <= config.num_frames
        if config.num_frames == 300:
            assert total == (300 if config.frames_per_cut is None else 290)
        if config.frames_per_cut:
            # 12 cuts of 25 frames; 15 of them are held out, the other 10 of that cut are not used
            assert max(pick.frames for pick in heldout + train) == 25
            assert len(heldout + train) == 12


def test_features_plan_takes_the_heldout_share_of_what_there_is(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    teacher = run.recipe.teachers["mel"].build()
    cuts = list(read_cuts(manifest_path(run.data, "talk", "train")))
    total = sum(teacher.num_frames(round(cut.duration * 16000)) for cut in cuts)
    heldout, train = features.plan(teacher, {"talk": cuts}, FeaturesConfig(num_frames=10**6, heldout_share=0.2), seed=3)
    assert sum(pick.frames for pick in heldout) == int(0.2 * total)
    assert len(heldout) + len(train) == len(cuts)


def test_features_keep_cuts_of_one_id_in_two_corpora_apart(tmp_path: Path) -> None:
    """Alone and beside a corpus of the same ids, under the corpus's name; the frames are those of both."""
    run = make_run(tmp_path, features={"num_frames": 100_000})
    cuts = {name: list(read_cuts(manifest_path(run.data, name, "train"))) for name in ("talk", "city")}
    same = {name: [cut.with_id(f"u{i}") for i, cut in enumerate(found)] for name, found in cuts.items()}
    config, teacher = FeaturesConfig(num_frames=100_000), run.recipe.teachers["mel"].build()
    picks = [pick for part in features.plan(teacher, same, config, seed=3) for pick in part]
    shared = range(min(map(len, cuts.values())))
    assert {f"{name}//u{i}" for name in cuts for i in shared} <= {pick.cut.id for pick in picks}
    assert len({pick.cut.id for pick in picks}) == sum(map(len, cuts.values()))
    turned = dict(reversed(same.items()))
    assert [pick.cut.id for part in features.plan(teacher, turned, config, seed=3) for pick in part] == [pick.cut.id for pick in picks]
    for name, found in same.items():
        CutSet.from_cuts(found).to_file(manifest_path(run.data, name, "train"))
    features.run(run)
    expected = sum(teacher.num_frames(round(cut.duration * 16000)) for found in cuts.values() for cut in found)
    made = read_json(run.data / "features" / "mel" / "artifact.json")["counts"]
    assert made["cuts"] == len(picks)
    assert 0.9 * expected < made["frames"] + made["heldout_frames"] <= expected


def test_features_stores_half_precision_when_asked(tmp_path: Path) -> None:
    run = make_run(tmp_path, features={"dtype": "float16"})
    features.run(run)
    assert frames_of(run.data / "features" / "mel").dtype == torch.float16


def test_features_killed_and_run_again_give_the_same_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(features, "FRAMES_PER_BLOCK", 150)
    whole, killed = make_run(tmp_path, "whole"), make_run(tmp_path, "killed")
    features.run(whole)
    calls: list[Path] = []

    def dies(path: Path, *args: Any) -> None:
        calls.append(path)
        if len(calls) == 3:
            raise KeyboardInterrupt
        write_tensors(path, *args)

    with monkeypatch.context() as patch:
        patch.setattr(features, "write_tensors", dies)
        with pytest.raises(KeyboardInterrupt):
            features.run(killed)
    stamps = {path: path.stat().st_mtime_ns for path in calls[:2]}
    features.run(killed)
    assert len(list((killed.data / "features" / "mel").glob("frames-*"))) == 4
    assert contents(killed.data / "features") == contents(whole.data / "features")
    assert {path: path.stat().st_mtime_ns for path in calls[:2]} == stamps


def test_features_run_twice_does_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = make_run(tmp_path)
    features.run(run)
    before = contents(run.data / "features")
    monkeypatch.setattr(features, "write_tensors", lambda *_: pytest.fail("wrote again"))
    features.run(run)
    assert contents(run.data / "features") == before


def test_features_raises_artifact_error_when_the_teacher_changed(tmp_path: Path) -> None:
    from spear.teachers.logmel import LogMelConfig

    run = make_run(tmp_path)
    features.run(run)
    run.recipe.teachers = {"mel": LogMelConfig(num_mel_bins=20)}
    with pytest.raises(ArtifactError, match=r"features/mel was made from other inputs: `inputs\.teacher` was"):
        features.run(run)


def test_features_counts_failures_by_cause(tmp_path: Path) -> None:
    run = make_run(tmp_path, features={"num_frames": 10**6, "max_failed_share": 0.2})
    (run.data / "audio" / "talk" / "train-004.wav").write_bytes(b"no audio")
    (run.data / "audio" / "city" / "train-001.wav").unlink()
    features.run(run)
    folder = run.data / "features" / "mel"
    assert read_json(folder / "artifact.json")["counts"]["failed"] == {"decode": 1, "missing_file": 1}
    lines = [json.loads(line) for line in (folder / "failures.jsonl").read_text().splitlines()]
    assert {line["id"] for line in lines} == {"talk-train-004", "city-train-001"}


def test_features_raises_data_error_when_too_many_cuts_fail(tmp_path: Path) -> None:
    run = make_run(tmp_path, features={"num_frames": 10**6})
    damaged = run.data / "audio" / "talk" / "train-004.wav"
    good = damaged.read_bytes()
    damaged.write_bytes(b"no audio")
    with pytest.raises(DataError, match=r"1 of 24 cuts failed \(decode: 1\), more than `features\.max_failed_share` 0\.01 allows; .*talk-train-004"):
        features.run(run)
    damaged.write_bytes(good)
    features.run(run)  # the block with the failure is made again
    assert read_json(run.data / "features" / "mel" / "artifact.json")["counts"]["failed"] == {}


def test_features_raises_artifact_error_when_there_is_no_manifest(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    manifest_path(run.data, "talk", "train").unlink()
    with pytest.raises(ArtifactError, match=r"talk_cuts_train\.jsonl\.gz does not exist: run `spear manifests` first"):
        features.run(run)


def test_features_raises_data_error_when_no_corpus_uses_the_teacher(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    run = replace(run, corpora=run.corpora[:1])
    with pytest.raises(DataError, match=r"no corpus has a domain that uses the teacher wide: .*`features\.domains\.wide`"):
        features.run(run)
    run = make_run(tmp_path, features={"domains": {"wide": ["speech"]}})
    run = replace(run, corpora=run.corpora[:1])
    features.run(run)


def test_features_raises_data_error_when_an_id_occurs_twice(tmp_path: Path) -> None:
    from lhotse import CutSet

    run = make_run(tmp_path)
    path = manifest_path(run.data, "talk", "train")
    cuts = list(read_cuts(path))
    CutSet.from_cuts([*cuts]).to_file(path.with_name("x.jsonl"))
    path.unlink()
    import gzip

    path.write_bytes(gzip.compress(path.with_name("x.jsonl").read_bytes() * 2))
    with pytest.raises(DataError, match=r"holds the cut talk-train-000 twice"):
        features.run(run)


@pytest.mark.parametrize(
    ("key", "value", "rule"),
    [
        ("num_frames", 1, "must be at least 2, but is 1"),
        ("heldout_share", 0.0, "must be above 0, but is 0.0"),
        ("heldout_share", 1.0, r"must be in \[0, 1\), but is 1.0"),
        ("frames_per_cut", 0, "must be at least 1, but is 0"),
        ("batch_seconds", 0.0, "must be above 0, but is 0.0"),
    ],
)
def test_features_config_raises_config_error_when_a_value_is_out_of_range(key: str, value: float, rule: str) -> None:
    with pytest.raises(ConfigError, match=f"`{key}` {rule}"):
        FeaturesConfig(**{key: value})  # type: ignore[arg-type]
