"""Whole folders and manifests encoded in parts: the same features as one by one, continued after a kill, in three formats."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lhotse import CutSet, MultiCut, SupervisionSegment

from spear.cli import main
from spear.commands import encode_many as command
from spear.commands.encode_many import BulkOptions, encode_many, find_cuts
from spear.errors import ArtifactError, ConfigError, DataError
from spear.export import save_encoder
from spear.export.audio import read_audio
from tests.data.cuts import cut_of, save, tone, write_cuts
from tests.export.tiny import tiny_encoder

SECONDS = {"a/x": 0.7, "a/y": 0.7, "b/z": 0.7}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("many")
    encoder = tiny_encoder(encoder_dim=32)
    save_encoder(folder / "model", encoder.encoder, encoder.student, {})
    for i, (name, seconds) in enumerate(SECONDS.items()):
        save(folder / "audio" / f"{name}.wav", tone(seconds, hz=300.0 + 200 * i))
    write_cuts(folder / "cuts.jsonl.gz", [cut_of(folder / "audio" / f"{name}.wav", name.replace("/", "-")) for name in SECONDS])
    return folder


def expected(place: Path, name: str) -> Any:
    with torch.no_grad():
        return tiny_encoder(encoder_dim=32)(read_audio(place / "audio" / f"{name}.wav", 16000)).features[0].numpy()


def test_encode_many_of_a_folder_gives_what_single_files_give(place: Path, tmp_path: Path) -> None:
    encode_many(place / "model", [place / "audio"], tmp_path, BulkOptions(part_size=2, batch_s=10))
    for name in SECONDS:
        with np.load(tmp_path / f"{name}.npz", allow_pickle=False) as found:
            np.testing.assert_allclose(found["features"], expected(place, name), atol=1e-4)
            assert float(found["frame_rate_hz"]) == 50.0
            assert str(found["source"]).endswith(f"{name}.wav")


def test_encode_many_writes_parquet(place: Path, tmp_path: Path) -> None:
    pq = pytest.importorskip("pyarrow.parquet", reason="an optional package")
    assert main(["encode", str(place / "model"), str(place / "cuts.jsonl.gz"), "--out", str(tmp_path), "--format", "parquet", "--layer", "all"]) == 0
    rows = pq.read_table(tmp_path / "part-000000.parquet").to_pylist()
    assert [row["id"] for row in rows] == ["a-x", "a-y", "b-z"]
    layers = np.asarray(rows[0]["features"], np.float32).reshape(rows[0]["shape"])
    with torch.no_grad():
        states = tiny_encoder(encoder_dim=32)(read_audio(place / "audio" / "a/x.wav", 16000)).hidden_states
    np.testing.assert_allclose(layers, np.stack([state[0] for state in states]), atol=1e-4)


def test_encode_many_writes_shar(place: Path, tmp_path: Path) -> None:
    encode_many(place / "model", [place / "cuts.jsonl.gz"], tmp_path, BulkOptions(form="shar", part_size=2))
    found = {cut.id: cut.load_student() for cut in CutSet.from_shar(in_dir=tmp_path / "shar")}
    assert len(list((tmp_path / "shar").glob("cuts.*"))) == 2
    np.testing.assert_allclose(found["b-z"], expected(place, "b/z"), atol=1e-4)


def test_encode_many_continues_with_the_part_that_is_missing(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    encoded: list[str] = []
    encode_part = command.encode_part

    def failing(encoder: Any, cuts: Any, options: BulkOptions) -> Any:
        encoded.extend(cut.id for cut in cuts)
        if len(encoded) == 2:
            raise KeyboardInterrupt
        return encode_part(encoder, cuts, options)

    monkeypatch.setattr(command, "encode_part", failing)
    options = BulkOptions(part_size=1)
    with pytest.raises(KeyboardInterrupt):
        encode_many(place / "model", [place / "audio"], tmp_path, options)
    encode_many(place / "model", [place / "audio"], tmp_path, options)
    assert encoded == ["a/x", "a/y", "a/y", "b/z"]
    encode_many(place / "model", [place / "audio"], tmp_path, options)
    assert len(encoded) == 4
    with pytest.raises(ArtifactError, match=r"layer` was last, is 0"):
        encode_many(place / "model", [place / "audio"], tmp_path, BulkOptions(part_size=1, layer=0))


def test_encode_many_averages_the_channels_of_cuts_as_of_files(place: Path, tmp_path: Path) -> None:
    both = np.stack([tone(0.7, hz=300.0), tone(0.7, hz=900.0)], axis=1)
    cut: Any = cut_of(save(tmp_path / "in" / "stereo.wav", both))
    assert isinstance(cut, MultiCut)
    cut.supervisions = [SupervisionSegment("s", "stereo", 0.0, 0.7, channel=[0, 1], text="a b")]
    write_cuts(tmp_path / "cuts.jsonl.gz", [cut])
    for name in ("in", "cuts.jsonl.gz"):
        encode_many(place / "model", [tmp_path / name], tmp_path / f"out-{name}", BulkOptions())
    found = [np.load(tmp_path / f"out-{name}" / "stereo.npz")["features"] for name in ("in", "cuts.jsonl.gz")]
    np.testing.assert_array_equal(*found)
    assert find_cuts([tmp_path / "cuts.jsonl.gz"])[0].supervisions[0].text == "a b"


def test_encode_many_sees_other_audio_under_the_same_names(place: Path, tmp_path: Path) -> None:
    for folder in ("clean", "noisy"):
        save(tmp_path / folder / "a.wav", tone(0.7, hz=500.0 if folder == "clean" else 700.0))
    encode_many(place / "model", [tmp_path / "clean"], tmp_path / "out", BulkOptions())
    with pytest.raises(ArtifactError, match="`inputs.cuts` was"):
        encode_many(place / "model", [tmp_path / "noisy"], tmp_path / "out", BulkOptions())


@pytest.mark.parametrize("content", [None, "no json\n"])
def test_encode_command_exits_1_when_a_manifest_cannot_be_read(
    place: Path, tmp_path: Path, content: str | None, capsys: pytest.CaptureFixture[str]
) -> None:
    if content is not None:
        (tmp_path / "cuts.jsonl").write_text(content)
    assert main(["encode", str(place / "model"), str(tmp_path / "cuts.jsonl"), "--out", str(tmp_path / "out")]) == 1
    assert "cuts.jsonl" in capsys.readouterr().err


def test_encode_many_raises_data_error_when_a_name_is_no_text(tmp_path: Path) -> None:
    file = save(tmp_path / "in" / "a.wav", tone(1.0))
    file = file.rename(os.fsdecode(os.fsencode(file.parent) + b"/caf\xe9.wav"))
    manifest = write_cuts(tmp_path / "cuts.jsonl", [cut_of(save(tmp_path / "b.wav", tone(1.0)), "b")])
    Path(manifest).write_text(Path(manifest).read_text().replace("b.wav", r"in/caf\udce9.wav"))
    for given in (file, file.parent, Path(manifest)):
        with pytest.raises(DataError, match=r"names of audio files must be UTF-8, but one is '.*caf\\udce9\.wav'$"):
            find_cuts([given])


def test_encode_many_raises_errors_that_name_what_is_wrong(place: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="`format` must be one of npz, parquet, shar"):
        encode_many(place / "model", [place / "audio"], tmp_path, BulkOptions(form="csv"))
    with pytest.raises(DataError, match="the id 'x' must be unique"):
        encode_many(place / "model", [place / "audio" / "a/x.wav"] * 2, tmp_path, BulkOptions())
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="must hold audio files or cuts"):
        find_cuts([tmp_path / "empty"])
