"""Stage `tokens` on two small corpora."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import soundfile
import torch

from spear.data.audio import load_audio
from spear.data.batches import batches_of
from spear.data.token_store import TokenStore, TokenWriter
from spear.errors import ArtifactError, DataError
from spear.files import read_json, read_tensors
from spear.quantizers import load_quantizer
from spear.quantizers.kmeans import KMeansConfig
from spear.stages import features, tokens
from spear.stages.artifact import Artifact, fingerprint_of, read_artifact
from spear.stages.manifests import manifest_path
from spear.teachers import Teacher, extract
from spear.teachers.extraction import read_cuts
from tests.teachers.runs import contents, make_run, write_corpus


def fit(run: Any, name: str, frames: torch.Tensor, size: int = 8) -> None:
    """A finished quantizers folder."""
    features = run.data / "features" / name
    folder = run.data / "quantizers" / name
    artifact = Artifact(
        folder, kind="quantizers", config={}, inputs={"features": fingerprint_of(features), "teacher": read_artifact(features)["inputs"]["teacher"]}
    )
    with artifact.making():
        KMeansConfig(codebook_size=size).fit(frames, frames[:50], seed=1).save(folder)


def prepared(root: Path, name: str = "data", **settings: Any) -> Any:
    run = make_run(root, name, **settings)
    features.run(run)
    for teacher in ("mel", "wide"):
        fit(run, teacher, read_tensors(run.data / "features" / teacher / "frames-00000.safetensors")["frames"])
    return run


def finished(run: Any) -> dict[str, bytes]:
    """What an uninterrupted run writes; the folder is removed again."""
    tokens.run(run)
    found = contents(run.data / "tokens")
    shutil.rmtree(run.data / "tokens")
    return found


def expected_codes(run: Any, teacher_name: str, cut: Any) -> np.ndarray[Any, Any]:
    teacher: Teacher = run.recipe.teachers[teacher_name].build()
    (frames,) = extract(teacher, [torch.from_numpy(load_audio(cut))])
    return load_quantizer(run.data / "quantizers" / teacher_name).encode(frames).numpy()


def test_tokens_are_the_codes_of_every_cut(tmp_path: Path) -> None:
    run = prepared(tmp_path)
    tokens.run(run)
    for teacher, corpora in (("mel", ("talk", "city")), ("wide", ("city",))):
        for corpus in corpora:
            for split in ("train", "valid"):
                store = TokenStore.open(run.data / "tokens" / teacher / corpus / split)
                cuts = list(read_cuts(manifest_path(run.data, corpus, split)))
                assert store.ids == [cut.id for cut in cuts]
                for cut in cuts:
                    np.testing.assert_array_equal(store[cut.id], expected_codes(run, teacher, cut))
    assert not (run.data / "tokens" / "wide" / "talk").exists()


def test_tokens_spec_names_rate_and_origin(tmp_path: Path) -> None:
    run = prepared(tmp_path)
    tokens.run(run)
    folder = run.data / "tokens" / "wide" / "city" / "train"
    spec = TokenStore.open(folder).spec
    teacher = run.recipe.teachers["wide"].build()
    assert (spec.num_codebooks, spec.codebook_size, spec.frame_rate_hz, spec.first_frame_s) == (1, 8, 50.0, 0.01)
    assert spec.teacher_fingerprint == teacher.fingerprint()
    assert spec.quantizer_fingerprint == fingerprint_of(run.data / "quantizers" / "wide")
    artifact = read_json(folder / "artifact.json")
    assert artifact["kind"] == "tokens"
    assert set(artifact["inputs"]) == {"teacher", "quantizer", "manifest"}
    assert artifact["counts"]["cuts"] == 12
    assert artifact["counts"]["failed"] == {}
    assert artifact["audio_s"] == pytest.approx(sum(cut.duration for cut in read_cuts(manifest_path(run.data, "city", "train"))), abs=1e-3)
    assert len(artifact["extra"]["codes_used"]) == 1
    assert 0 < artifact["extra"]["entropy_bits"][0] <= 3
    assert (folder / "failures.jsonl").read_text() == ""
    assert sorted(path.name for path in folder.glob("block-*.safetensors")) == [f"block-0000{i}.safetensors" for i in range(3)]


def test_tokens_of_all_pairs_when_asked(tmp_path: Path) -> None:
    run = prepared(tmp_path, tokens={"pairs": "all"})
    tokens.run(run)
    assert len(TokenStore.open(run.data / "tokens" / "wide" / "talk" / "valid")) == 3


def test_tokens_killed_and_run_again_give_the_same_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = prepared(tmp_path)
    whole = finished(run)
    write, calls = TokenWriter.write, []

    def dies(self: TokenWriter, index: int, *args: Any, **notes: Any) -> None:
        calls.append(index)
        if len(calls) == 3:
            raise KeyboardInterrupt
        write(self, index, *args, **notes)

    with monkeypatch.context() as patch:
        patch.setattr(TokenWriter, "write", dies)
        with pytest.raises(KeyboardInterrupt):
            tokens.run(run)
    folder = run.data / "tokens" / "mel" / "talk" / "train"
    with pytest.raises(ArtifactError, match="is not a finished token store"):
        TokenStore.open(folder)
    first = folder / "block-00000.safetensors"
    stamp = first.stat().st_mtime_ns
    tokens.run(run)
    assert contents(run.data / "tokens") == whole
    assert first.stat().st_mtime_ns == stamp


def test_tokens_run_twice_does_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = prepared(tmp_path)
    tokens.run(run)
    before = contents(run.data / "tokens")
    monkeypatch.setattr(tokens, "_fill", lambda *_: pytest.fail("filled again"))
    tokens.run(run)
    assert contents(run.data / "tokens") == before


def test_tokens_skips_a_split_without_a_manifest(tmp_path: Path) -> None:
    run = prepared(tmp_path)
    manifest_path(run.data, "talk", "valid").unlink()
    tokens.run(run)
    assert not (run.data / "tokens" / "mel" / "talk" / "valid").exists()
    assert len(TokenStore.open(run.data / "tokens" / "mel" / "talk" / "train")) == 12


def test_tokens_leaves_failed_cuts_out_and_counts_them(tmp_path: Path) -> None:
    run = prepared(tmp_path, tokens={"max_failed_share": 0.5})
    (run.data / "audio" / "talk" / "train-004.wav").write_bytes(b"no audio")
    (run.data / "audio" / "talk" / "train-006.wav").unlink()
    tokens.run(run)
    folder = run.data / "tokens" / "mel" / "talk" / "train"
    store = TokenStore.open(folder)
    assert len(store) == 10
    with pytest.raises(DataError, match="the cut talk-train-004 has no tokens"):
        store["talk-train-004"]
    assert read_json(folder / "artifact.json")["counts"]["failed"] == {"decode": 1, "missing_file": 1}
    lines = [json.loads(line) for line in (folder / "failures.jsonl").read_text().splitlines()]
    assert [(line["id"], line["cause"]) for line in lines] == [("talk-train-004", "decode"), ("talk-train-006", "missing_file")]
    # the neighbours of a failed cut have their own tokens still
    for cut in read_cuts(manifest_path(run.data, "talk", "train")):
        if cut.id in store:
            np.testing.assert_array_equal(store[cut.id], expected_codes(run, "mel", cut))


def test_tokens_raises_data_error_when_too_many_cuts_fail_and_goes_on_once_repaired(tmp_path: Path) -> None:
    run = prepared(tmp_path)
    whole = finished(run)
    damaged = run.data / "audio" / "talk" / "train-007.wav"
    good = damaged.read_bytes()
    damaged.write_bytes(b"no audio")
    with pytest.raises(DataError, match=r"1 of 12 cuts failed \(decode: 1\), more than `tokens\.max_failed_share` 0\.001 allows; .*talk-train-007"):
        tokens.run(run)
    folder = run.data / "tokens" / "mel" / "talk" / "train"
    assert "talk-train-007" in (folder / "failures.jsonl").read_text()
    assert not (folder / "artifact.json").exists()
    damaged.write_bytes(good)
    tokens.run(run)
    assert contents(run.data / "tokens") == whole


def test_tokens_counts_a_length_mismatch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from spear.data import audio

    run = prepared(tmp_path, tokens={"max_failed_share": 0.5})
    monkeypatch.setattr(audio, "load_audio", lambda cut, rate: load_audio(cut, rate)[: -400 if cut.id == "talk-train-002" else None])
    tokens.run(run)
    folder = run.data / "tokens" / "mel" / "talk" / "train"
    assert read_json(folder / "artifact.json")["counts"]["failed"] == {"length_mismatch": 1}
    assert "talk-train-002" not in TokenStore.open(folder)


def test_tokens_raises_artifact_error_when_the_quantizer_is_not_finished(tmp_path: Path) -> None:
    run = prepared(tmp_path)
    (run.data / "quantizers" / "mel" / "artifact.json").unlink()
    with pytest.raises(ArtifactError, match="quantizers/mel is unfinished"):
        tokens.run(run)


def test_tokens_raises_artifact_error_when_the_quantizer_belongs_to_another_teacher(tmp_path: Path) -> None:
    from spear.teachers.logmel import LogMelConfig

    run = prepared(tmp_path)
    run.recipe.teachers["mel"] = LogMelConfig(num_mel_bins=20)
    with pytest.raises(ArtifactError, match=r"quantizers/mel was fitted on another teacher than `teachers\.mel`"):
        tokens.run(run)


def test_tokens_raises_artifact_error_when_the_quantizer_changed(tmp_path: Path) -> None:
    run = prepared(tmp_path)
    tokens.run(run)
    path = run.data / "quantizers" / "mel" / "artifact.json"
    path.write_text(json.dumps({**read_json(path), "fingerprint": "another"}))
    with pytest.raises(ArtifactError, match=r"tokens/mel/talk/train was made from other inputs: `inputs\.quantizer` was .*, is another"):
        tokens.run(run)


def test_tokens_raises_data_error_when_a_codebook_has_collapsed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokens, "COLLAPSED_MIN_FRAMES", 100)
    run = make_run(tmp_path)
    features.run(run)
    near = torch.randn(200, 16, generator=torch.Generator().manual_seed(1))
    fit(run, "mel", torch.cat([near, near + 1000]), size=2)
    with pytest.raises(DataError, match=r"codebook 0 of the quantizer mel has collapsed: entry \d has 100\.00 % of \d+ frames"):
        tokens.run(run)
    assert not (run.data / "tokens" / "mel" / "talk" / "train" / "store.json").exists()


def test_check_collapse_names_the_book_and_spares_short_samples() -> None:
    counts = torch.tensor([[1000, 1000, 0], [1999, 1, 0]])
    with pytest.raises(DataError, match=r"codebook 1 of the quantizer x has collapsed: entry 0 has 99\.95 % of 2000 frames"):
        tokens.check_collapse(counts, "x")
    tokens.check_collapse(torch.tensor([[500, 0, 0]]), "x")
    tokens.check_collapse(torch.tensor([[1998, 2, 0]]), "x")


def test_entropy_bits_of_even_use_is_log2_of_the_entries() -> None:
    assert tokens.entropy_bits(torch.tensor([[25, 25, 25, 25], [100, 0, 0, 0]])) == [2.0, 0.0]


def test_batches_of_stays_within_the_padded_seconds(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    cuts = list(read_cuts(manifest_path(run.data, "talk", "train")))
    batches = batches_of(cuts, 2.0)
    assert sorted(cut.id for batch in batches for cut in batch) == sorted(cut.id for cut in cuts)
    assert all(len(batch) * max(cut.duration for cut in batch) <= 2.0 for batch in batches)
    assert [cut.id for batch in batches_of(cuts[::-1], 2.0) for cut in batch] == [cut.id for batch in batches for cut in batch]
    assert all(len(batch) == 1 for batch in batches_of(cuts, 0.1))


def test_tokens_labels_every_good_file_and_names_every_broken_one(tmp_path: Path) -> None:
    run = make_run(tmp_path, tokens={"max_failed_share": 0.1})
    write_corpus(run.data, "talk", "train", 60, seed=1)
    features.run(run)
    for teacher in ("mel", "wide"):
        fit(run, teacher, read_tensors(run.data / "features" / teacher / "frames-00000.safetensors")["frames"])
    folder = run.data / "audio" / "talk"
    (folder / "train-007.wav").unlink()
    (folder / "train-023.wav").write_bytes((folder / "train-023.wav").read_bytes()[:3000])
    samples, rate = soundfile.read(folder / "train-041.wav", dtype="float32")
    soundfile.write(folder / "train-041.wav", np.where(np.arange(len(samples)) == 9, np.nan, samples), rate, subtype="FLOAT")
    broken = {"talk-train-007": "missing_file", "talk-train-023": "length_mismatch", "talk-train-041": "not_finite"}
    tokens.run(run)
    store = TokenStore.open(run.data / "tokens" / "mel" / "talk" / "train")
    listed = [json.loads(line) for line in (store.folder / "failures.jsonl").read_text().splitlines()]
    assert {failure["id"]: failure["cause"] for failure in listed}.keys() == broken.keys()
    for failure in listed:
        assert failure["cause"] in (broken[failure["id"]], "decode")
        assert failure["id"].removeprefix("talk-") in failure["message"]
    good = [cut for cut in read_cuts(manifest_path(run.data, "talk", "train")) if cut.id not in broken]
    assert len(good) == 57
    assert store.ids == [cut.id for cut in good]
    for cut in good:
        np.testing.assert_array_equal(store[cut.id], expected_codes(run, "mel", cut))


def test_store_takes_one_byte_per_code_and_tens_of_bytes_per_cut(tmp_path: Path) -> None:
    """The table of docs/formats.md: rate x codebooks x bytes of a code."""
    run = prepared(tmp_path)
    tokens.run(run)
    store = TokenStore.open(run.data / "tokens" / "mel" / "talk" / "train")
    codes = sum(store[cut_id].nbytes for cut_id in store.ids)
    assert codes == sum(len(store[cut_id]) for cut_id in store.ids) * store.spec.num_codebooks
    blocks = list(store.folder.glob("block-*.safetensors"))
    size = sum(path.stat().st_size for path in [*blocks, *store.folder.glob("block-*.json")])
    assert codes + 8 * len(store.ids) < size < codes + 64 * len(store.ids) + 400 * len(blocks)


def test_tokenizer_leaves_codes_where_the_quantizer_is() -> None:
    class OnDevice(torch.Tensor):
        def cpu(self, *_: Any, **__: Any) -> torch.Tensor:
            raise AssertionError("codes are copied")

    quantizer = SimpleNamespace(encode=lambda frames: frames.long().as_subclass(OnDevice))
    tokenizer = tokens.Tokenizer("mel", cast(Any, None), quantizer, cast(Any, None), torch.device("cpu"))
    assert tokenizer.encode(torch.ones(3, 2)).shape == (3, 2)
