"""Corpora files and the two sources of cuts."""

from __future__ import annotations

import os
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest

from spear.data.corpora import CorporaConfig, CorpusConfig, ManifestsConfig, SourceConfig, expand
from spear.data.scan import manifest_entries
from spear.data.sources import CutsSource, FolderSource
from spear.errors import ConfigError, DataError
from spear.recipe import load_run
from spear.teachers.extraction import count_cuts
from tests.conftest import ROOT
from tests.data.cuts import cut_of, folder_corpus, save, tone, write_cuts


def test_corpora_say_what_their_weights_are(tmp_path: Path) -> None:
    entry = "{name: a, domain: speech, weight: 960, source: {type: cuts, train: a.jsonl.gz}}"
    recipe = ROOT / "recipes" / "spear_speech_base.yaml"
    (tmp_path / "hours.yaml").write_text(f"weights: hours\ncorpora: [{entry}]\n")
    (tmp_path / "silent.yaml").write_text(f"corpora: [{entry}]\n")

    def weights(name: str, *overrides: str) -> str:
        return load_run(recipe, tmp_path / name, tmp_path, tmp_path, overrides).recipe.sampling.weights

    assert weights("hours.yaml") == "hours" == weights("silent.yaml", "sampling.weights=hours")
    with pytest.raises(ConfigError, match=r"`weight` is a factor .*, but is 960 \(corpus a\); for hours set `sampling.weights: hours`"):
        weights("silent.yaml")


def ids(source: SourceConfig, split: str = "train") -> list[str]:
    return [item.id for item in source.files(split)]


def test_folder_source_finds_all_audio_files_in_order(tmp_path: Path) -> None:
    for name in ("b/x.wav", "a.flac", "b/c/y.ogg", "z.mp3", "notes.txt", ".hidden.wav"):
        if name.endswith("txt"):
            (tmp_path / name).write_text("x")
        else:
            save(tmp_path / name, tone(0.3))
    assert ids(FolderSource(path=str(tmp_path), valid_share=0, test_share=0)) == ["a", "b--c--y", "b--x", "z"]


def test_folder_source_splits_by_hash_of_the_id_alone(tmp_path: Path) -> None:
    for i in range(60):
        save(tmp_path / f"{i}.wav", tone(0.05))
    source = FolderSource(path=str(tmp_path), valid_share=0.25, test_share=0.25, seed=3)
    split = {name: set(ids(source, name)) for name in source.splits()}
    assert sum(map(len, split.values())) == 60 == len(set.union(*split.values()))
    assert all(5 <= len(split[name]) <= 26 for name in ("valid", "test"))
    for i in range(30):
        (tmp_path / f"{i}.wav").unlink()
    assert set(ids(source, "valid")) == {name for name in split["valid"] if int(name) >= 30}


def test_folder_source_takes_labels_from_parents(tmp_path: Path) -> None:
    save(tmp_path / "dog" / "1.wav", np.stack([tone(0.3), tone(0.3)], axis=1))
    item = next(FolderSource(path=str(tmp_path), label="parent", valid_share=0, test_share=0).files("train"))
    assert item.cut is not None
    assert item.cut.supervisions[0].custom == {"label": "dog"}
    assert item.cut.supervisions[0].duration == 0.3


def test_folder_source_reports_unreadable_files_without_stopping(tmp_path: Path) -> None:
    save(tmp_path / "good.wav", tone(0.3))
    (tmp_path / "bad.wav").write_text("no audio")
    (tmp_path / "empty.wav").touch()
    found = {item.id: item.cause for item in FolderSource(path=str(tmp_path), valid_share=0, test_share=0).files("train")}
    assert found == {"bad": "decode", "empty": "empty", "good": ""}


def test_folder_source_fingerprint_follows_the_files(tmp_path: Path) -> None:
    save(tmp_path / "a.wav", tone(0.3))
    source = FolderSource(path=str(tmp_path))
    before = source.fingerprint()
    assert source.fingerprint() == before
    save(tmp_path / "b.wav", tone(0.3))
    assert source.fingerprint() != before


def test_folder_source_fingerprint_follows_every_setting_but_the_path(tmp_path: Path) -> None:
    save(tmp_path / "in" / "a.wav", tone(0.3))
    plain = FolderSource(path=str(tmp_path / "in"), valid_share=0.0)
    before = plain.fingerprint()
    other = {"valid_share": 0.1, "test_share": 0.1, "seed": 1, "label": "parent"}
    assert {field.name for field in fields(FolderSource)} == {"path", *other}
    assert len({before, *(replace(plain, **{name: value}).fingerprint() for name, value in other.items())}) == 5
    (tmp_path / "in").rename(tmp_path / "moved")
    assert replace(plain, path=str(tmp_path / "moved"), valid_share=0).fingerprint() == before


def test_folder_source_takes_linked_folders_once(tmp_path: Path) -> None:
    save(tmp_path / "in" / "a" / "x.wav", tone(0.3))
    save(tmp_path / "elsewhere" / "deep" / "y.wav", tone(0.3))
    links = {"latest": ".", "0": "a", "one": "../elsewhere", "two": "../elsewhere/deep"}
    for name, target in links.items():
        (tmp_path / "in" / name).symlink_to(target)
    assert ids(FolderSource(path=str(tmp_path / "in"), valid_share=0, test_share=0)) == ["a--x", "one--deep--y"]


def test_cuts_source_reads_manifests_and_anchors_relative_audio(tmp_path: Path) -> None:
    cut = cut_of(save(tmp_path / "audio" / "a.wav", tone(0.3)))
    cut.recording.sources[0].source = "audio/a.wav"
    source = CutsSource(train=write_cuts(tmp_path / "train.jsonl.gz", [cut]))
    item = next(source.files("train"))
    assert source.splits() == ["train"]
    assert item.origin == str(tmp_path / "audio" / "a.wav")


@pytest.mark.parametrize("content", ['{"id": "x"}\n', "no json\n", ""])
def test_cuts_source_raises_data_error_when_the_manifest_is_no_manifest(tmp_path: Path, content: str) -> None:
    (tmp_path / "cuts.jsonl").write_text(content)
    with pytest.raises(DataError, match=r"cuts\.jsonl (is not a manifest of cuts|holds no cuts)"):
        list(CutsSource(train=str(tmp_path / "cuts.jsonl")).files("train"))


def test_folder_source_names_a_file_whose_name_is_no_text(tmp_path: Path) -> None:
    save(tmp_path / "a.wav", tone(0.3))
    os.rename(tmp_path / "a.wav", os.fsencode(tmp_path) + b"/caf\xe9.wav")
    with pytest.raises(DataError, match=r"names of audio files must be UTF-8, but one is 'caf\\udce9\.wav'"):
        FolderSource(path=str(tmp_path)).fingerprint()


def test_cuts_source_raises_data_error_when_the_data_are_damaged(tmp_path: Path) -> None:
    path = Path(write_cuts(tmp_path / "t.jsonl.gz", [cut_of(save(tmp_path / f"{i}.wav", tone(0.3))) for i in range(9)]))
    data = bytearray(path.read_bytes())
    data[len(data) // 2 :] = bytes(255 - byte for byte in data[len(data) // 2 :])
    path.write_bytes(data)
    for read in (lambda: list(CutsSource(train=str(path)).files("train")), lambda: list(manifest_entries(path)), lambda: count_cuts(path)):
        with pytest.raises(DataError, match=r"t\.jsonl\.gz is not a"):
            read()


def test_sources_raise_data_error_when_paths_do_not_exist(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"gone\.jsonl does not exist"):
        CutsSource(train=str(tmp_path / "gone.jsonl")).fingerprint()
    with pytest.raises(DataError, match="nowhere does not exist or is not a folder"):
        FolderSource(path=str(tmp_path / "nowhere")).fingerprint()
    with pytest.raises(DataError, match="holds no audio files"):
        FolderSource(path=str(tmp_path)).fingerprint()


def test_resolved_expands_variables_and_starts_from_the_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("SPEAR_TEST_ROOT", "/somewhere")
    cuts = CutsSource(train="$SPEAR_TEST_ROOT/a.jsonl", valid="../b.jsonl")
    corpora = CorporaConfig(corpora=[CorpusConfig(name="x", domain="speech", source=cuts), folder_corpus(Path("sounds"))]).resolved(tmp_path / "conf")
    assert corpora.corpora[0].source == CutsSource(train="/somewhere/a.jsonl", valid=str(tmp_path / "b.jsonl"))
    assert getattr(corpora.corpora[1].source, "path") == str(tmp_path / "conf" / "sounds")  # noqa: B009 - a field of one variant


def test_expand_raises_config_error_when_a_variable_is_not_set(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="environment variable SPEAR_NOT_SET is not set"):
        expand("${SPEAR_NOT_SET}/x", tmp_path)


def test_corpora_raise_config_error_when_values_break_rules() -> None:
    source = CutsSource(train="x")
    with pytest.raises(ConfigError, match="'a' is there twice"):
        CorporaConfig(corpora=[CorpusConfig(name="a", domain="s", source=source)] * 2)
    with pytest.raises(ConfigError, match="at least one corpus"):
        CorporaConfig(corpora=[])
    with pytest.raises(ConfigError, match="`name` must be made of letters.*'a/b'"):
        CorpusConfig(name="a/b", domain="s", source=source)
    with pytest.raises(ConfigError, match=r"`weight` must be 0 or more, but is -1 \(corpus a\)"):
        CorpusConfig(name="a", domain="s", source=source, weight=-1)
    with pytest.raises(ConfigError, match=r"`valid_share` \+ `test_share` must be less than 1"):
        FolderSource(path="x", valid_share=0.5, test_share=0.5)
    with pytest.raises(ConfigError, match="`valid_share` must be at least 0"):
        FolderSource(path="x", valid_share=-0.1)


def test_limits_come_from_the_corpus_before_the_recipe() -> None:
    corpus = CorpusConfig(name="a", domain="s", source=CutsSource(train="x"), max_duration_s=10)
    assert corpus.limits_s(ManifestsConfig(min_duration_s=1)) == (1, 10)
    with pytest.raises(ConfigError, match=r"`max_duration_s` must be at least twice `min_duration_s` \(6\), but is 10 \(corpus a\)"):
        corpus.limits_s(ManifestsConfig(min_duration_s=6))
    with pytest.raises(ConfigError, match="`max_failed_share` must be between 0 and 1"):
        ManifestsConfig(max_failed_share=2)
    with pytest.raises(ConfigError, match=r"`min_duration_s` must be at least 0\.025"):
        ManifestsConfig(min_duration_s=0.01)
