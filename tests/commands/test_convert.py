"""``spear convert``: Shar and token stores, there and back, to the same bytes."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lhotse import CutSet
from lhotse.cut import MonoCut
from lhotse.shar import SharWriter

import spear.commands.convert as convert
from spear.cli import main
from spear.data.token_convert import open_shar
from spear.data.token_store import TokenStore, TokenWriter
from spear.files import read_json
from spear.types import TokenSpec
from tests.data.cuts import AUDIO, SPEECH, cut_of, make_shards, save, tone, write_cuts

RECIPE = """
student: {type: zipformer}
objective: {type: masked_prediction, weights: {speech: {mel: 1.0}}}
teachers: {mel: {type: logmel, num_mel_bins: 20}}
quantizers: {mel: {type: random_projection, num_codebooks: 2, codebook_size: 300}}
features: {num_frames: 800, heldout_share: 0.2}
tokens: {cuts_per_block: 4}
shards: {cuts_per_shard: 3}
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A corpus with tokens and shards: 8 cuts in 2 blocks and 3 shards."""
    root = tmp_path_factory.mktemp("convert")
    (root / "recipe.yaml").write_text(RECIPE)
    cuts = [cut_of(save(root / f"train{i}.wav", tone(0.7 + i / 10, hz=200.0 + 90 * i)), f"talk/{i}") for i in range(8)]
    write_cuts(root / "train.jsonl.gz", cuts)
    (root / "corpora.yaml").write_text("corpora: [{name: talk, domain: speech, source: {type: cuts, train: train.jsonl.gz}}]\n")
    for stage in ("manifests", "features", "quantizers", "tokens", "shards"):
        assert stage_of(root, stage, root / "data") == 0
    return root


def stage_of(root: Path, stage: str, data: Path) -> int:
    places = ["--recipe", root / "recipe.yaml", "--corpora", root / "corpora.yaml", "--data", data, "--exp", root / "exp"]
    return main([stage, *map(str, places)])


def run(*words: object) -> int:
    return main(["convert", *map(str, words)])


def error_of(capsys: pytest.CaptureFixture[str], *words: object) -> str:
    """The one line that a command which must fail says."""
    capsys.readouterr()
    assert run(*words) == 1
    (line,) = (line for line in capsys.readouterr().err.splitlines() if line.startswith("spear: error"))
    return line


def files_of(folder: Path) -> dict[str, bytes]:
    """Codes and descriptions, without the record of what was made when."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*.*")) if path.name[:8] not in ("artifact", "failures")}


def test_convert_makes_of_shards_the_store_they_were_made_of(place: Path, tmp_path: Path) -> None:
    shards, store = place / "data" / "shards" / "talk" / "train", place / "data" / "tokens" / "mel" / "talk" / "train"
    assert run(shards, tmp_path / "store", "--cuts", 4) == 0
    assert files_of(tmp_path / "store") == files_of(store)
    assert len(files_of(store)) == 2 * 2 + 1
    found = read_json(tmp_path / "store" / "artifact.json")
    frames = sum(TokenStore.open(store).num_frames(name) for name in TokenStore.open(store))
    assert (found["kind"], found["counts"]) == ("convert", {"cuts": 8, "frames": frames})
    assert found["audio_s"] == pytest.approx(sum(0.7 + i / 10 for i in range(8)))


def test_convert_makes_of_a_store_the_shar_that_shards_hold(place: Path, tmp_path: Path) -> None:
    shards, store = place / "data" / "shards" / "talk" / "train", place / "data" / "tokens" / "mel" / "talk" / "train"
    manifest = place / "data" / "manifests" / "talk_cuts_train.jsonl.gz"
    assert run(store, tmp_path / "out", "--manifest", manifest, "--field", "mel_tokens", "--cuts", 3) == 0
    for number in range(3):
        name = f"mel_tokens.{number:06d}.tar"
        assert (tmp_path / "out" / "shar" / name).read_bytes() == (shards / name).read_bytes()
    assert (
        run(tmp_path / "out" / "shar", tmp_path / "again", "--field", "mel_tokens", "--codebook-size", 300, "--first-frame", 0.005, "--cuts", 4) == 0
    )
    codes = TokenStore.open(store)
    for cut in CutSet.from_shar(in_dir=str(tmp_path / "out" / "shar")):
        np.testing.assert_array_equal(cut.load_mel_tokens(), codes[cut.id])
        assert cut.load_audio().shape == (1, cut.num_samples)
        np.testing.assert_array_equal(TokenStore.open(tmp_path / "again")[cut.id], codes[cut.id])
    assert read_json(tmp_path / "out" / "artifact.json")["counts"] == {"cuts": 8, "shards": 3}


def test_convert_keeps_all_codes_of_cuts_that_start_late(tmp_path: Path) -> None:
    recording = cut_of(save(tmp_path / "long.wav", tone(5.0))).recording
    cuts = [MonoCut(f"c{start}", float(start), 3.0, 0, recording=recording) for start in range(3)]
    codes = [torch.arange(75)[:, None] + 75 * start for start in range(3)]
    writer = TokenWriter(tmp_path / "store", TokenSpec(1, 256, 25.0, 0.02))
    writer.write(0, [cut.id for cut in cuts], codes)
    writer.close(1)
    manifest = write_cuts(tmp_path / "cuts.jsonl.gz", cuts)
    assert run(tmp_path / "store", tmp_path / "out", "--manifest", manifest, "--field", "units") == 0
    for cut, expected in zip(CutSet.from_shar(in_dir=str(tmp_path / "out" / "shar")), codes, strict=True):
        np.testing.assert_array_equal(cut.load_units(), expected.numpy())
        np.testing.assert_array_equal(cut.truncate(offset=1.0, duration=1.0).load_units(), expected[25:50].numpy())


def test_shards_can_be_made_of_a_converted_store(place: Path, tmp_path: Path) -> None:
    data = tmp_path / "data"
    shutil.copytree(place / "data", data)
    shutil.rmtree(data / "tokens")
    assert run(data / "shards" / "talk" / "train", data / "tokens" / "mel" / "talk" / "train") == 0
    shutil.rmtree(data / "shards")
    assert stage_of(place, "shards", data) == 0
    assert files_of(data / "shards") == files_of(place / "data" / "shards")


@pytest.mark.parametrize("broken", [False, True])
def test_convert_goes_on_where_it_was_stopped_and_refuses_another_source(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], broken: bool
) -> None:
    shards, out = place / "data" / "shards" / "talk" / "train", tmp_path / "store"
    written: list[int] = []
    whole = TokenWriter.write

    def write(self: Any, index: int, *rest: Any, **notes: Any) -> None:
        if broken and index == 1 and not written.count(1):
            written.append(1)
            raise KeyboardInterrupt
        written.append(index)
        whole(self, index, *rest, **notes)

    monkeypatch.setattr(convert.TokenWriter, "write", write)
    assert run(shards, out, "--cuts", 4) == (3 if broken else 0)
    assert run(shards, out, "--cuts", 4) == 0
    assert written == ([0, 1, 1] if broken else [0, 1])
    assert files_of(out) == files_of(place / "data" / "tokens" / "mel" / "talk" / "train")
    assert "was made from other inputs: `config.cuts_per_block` was 4, is 5" in error_of(capsys, shards, out, "--cuts", 5)


def test_convert_takes_one_of_several_teachers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made = make_shards(tmp_path, speech=4, sounds=6)
    shards = made.data / "shards" / "sounds" / "train"
    assert "`--field` must say which codes to take" in error_of(capsys, shards, tmp_path / "out")
    assert "but none.000000.tar does not exist" in error_of(capsys, shards, tmp_path / "out", "--field", "none")
    for name, spec in (("speech", SPEECH), ("audio", AUDIO)):
        assert run(shards, tmp_path / name, "--field", f"{name}_tokens") == 0
        found, store = TokenStore.open(tmp_path / name), TokenStore.open(made.data / "tokens" / name / "sounds" / "train")
        assert found.spec == spec == store.spec
        assert all(np.array_equal(found[cut_id], store[cut_id]) for cut_id in store)


def foreign(folder: Path, codes: dict[str, Any], shift: float = 0.04) -> Path:
    """Shar as Lhotse's own writer makes it."""
    folder.mkdir()
    with SharWriter(str(folder), fields={"units": "numpy"}, shard_size=2) as writer:
        for name, rows in codes.items():
            cut = cut_of(save(folder.parent / f"{name}.wav", tone(len(rows) * shift)), name)
            cut.units = _stored(cut, rows, folder.parent, shift)
            writer.write(cut)
    return folder


def _stored(cut: Any, rows: Any, folder: Path, shift: float) -> Any:
    from lhotse import NumpyFilesWriter

    with NumpyFilesWriter(str(folder / "arrays")) as arrays:
        return arrays.store_array(cut.id, rows, temporal_dim=0, frame_shift=shift, start=0)


def test_convert_reads_the_shar_of_other_programs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    codes = {name: torch.randint(500, (20 + n, 3), generator=torch.Generator().manual_seed(n)).numpy() for n, name in enumerate("abc")}
    folder = foreign(tmp_path / "foreign", codes)
    assert "are needed: " in error_of(capsys, folder, tmp_path / "out", "--field", "units")
    how = ("--field", "units", "--first-frame", 0.02, "--codebook-size")
    assert "must be in 0..399" in error_of(capsys, folder, tmp_path / "narrow", *how, 400)
    assert not (tmp_path / "narrow" / "store.json").exists()
    assert run(folder, tmp_path / "out", *how, 500) == 0
    store = TokenStore.open(tmp_path / "out")
    assert (store.spec.num_codebooks, store.spec.codebook_size, store.spec.frame_rate_hz, store.spec.first_frame_s) == (3, 500, 25.0, 0.02)
    assert all(np.array_equal(store[name], rows) and store[name].dtype == np.int16 for name, rows in codes.items())
    real = foreign(tmp_path / "real", {"d": np.ones((20, 3), np.float32)})
    assert "codes of d must be whole numbers, but are float32" in error_of(capsys, real, tmp_path / "floats", *how, 500)


@pytest.mark.parametrize(
    ("shift", "rate"), [(512 / 44100, 44100 / 512), (1 / 75, 75.0), (0.02, 50.0), (320 / 22050, 22050 / 320), (0.0133333, 1 / 0.0133333)]
)
def test_convert_keeps_the_frame_rate_of_other_programs(tmp_path: Path, shift: float, rate: float) -> None:
    folder = foreign(tmp_path / "foreign", {"a": np.zeros((20, 1), np.int16)}, shift)
    assert open_shar(folder, "units", 500, 0.02).spec.frame_rate_hz == rate


def test_convert_says_in_one_line_what_does_not_fit(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    store, manifest = place / "data" / "tokens" / "mel" / "talk" / "train", place / "data" / "manifests" / "talk_cuts_train.jsonl.gz"
    assert "is neither a token store nor a folder of Shar" in error_of(capsys, tmp_path, tmp_path / "out")
    assert "becomes Shar with `--manifest`" in error_of(capsys, store, tmp_path / "out")
    assert "must be another folder than `SRC`" in error_of(capsys, store, store)
    cuts = [json.loads(line) for line in _lines(manifest)]
    cuts[2]["id"] = "stranger"
    CutSet.from_dicts(cuts).to_file(tmp_path / "other.jsonl.gz")
    assert "the cut stranger has no tokens in" in error_of(capsys, store, tmp_path / "out", "--manifest", tmp_path / "other.jsonl.gz", "--field", "x")
    shards = tmp_path / "shards" / "train"
    shutil.copytree(place / "data" / "shards" / "talk", shards.parent)
    tar = shards / "mel_tokens.000001.tar"
    tar.write_bytes((shards / "mel_tokens.000002.tar").read_bytes())
    assert "must hold the codes of talk/3 next, but holds talk/6" in error_of(capsys, shards, tmp_path / "a")
    tar.write_bytes(b"no tar")
    assert "is not a readable tar of codes" in error_of(capsys, shards, tmp_path / "b")
    tar.unlink()
    assert "mel_tokens.000001.tar" in error_of(capsys, shards, tmp_path / "c")


def _lines(path: Path) -> list[str]:
    import gzip

    return gzip.decompress(path.read_bytes()).decode().splitlines()
