"""Features of audio files: what is in the files, what they are called, what is refused."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch

from spear.commands.encode import encode_files, output_names, select
from spear.errors import CheckpointError, ConfigError, DataError
from spear.export import save_encoder
from spear.export.audio import read_audio
from spear.types import EncoderOutput
from tests.export.tiny import tiny_encoder, tone


@pytest.fixture(scope="module")
def export(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    encoder = tiny_encoder()
    save_encoder(folder, encoder.encoder, encoder.student, {})
    return folder


def write(path: Path, samples: int = 6000, rate: int = 16000, channels: int = 1) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, np.stack([tone(samples).numpy()] * channels, axis=1), rate, subtype="FLOAT" if path.suffix == ".wav" else None)
    return path


def read(path: Path) -> dict[str, Any]:
    with np.load(path, allow_pickle=False) as content:
        return {key: content[key] for key in content.files}


def test_encode_writes_what_the_encoder_gives(export: Path, tmp_path: Path) -> None:
    files = [write(tmp_path / "a.wav"), write(tmp_path / "b.wav", 160, channels=2)]
    targets = encode_files(export, files, tmp_path / "out")
    assert targets == [tmp_path / "out" / "a.npz", tmp_path / "out" / "b.npz"]
    for target, samples in zip(targets, (6000, 160)):
        found = read(target)
        with torch.no_grad():
            expected = tiny_encoder()(tone(samples)).features[0]
        np.testing.assert_allclose(found["features"], expected.numpy(), atol=1e-5)
        assert found["features"].dtype == np.float32
        assert float(found["frame_rate_hz"]) == 50.0
        assert float(found["first_frame_s"]) == pytest.approx(0.045)


def test_encode_writes_one_layer_or_all(export: Path, tmp_path: Path) -> None:
    file = write(tmp_path / "a.wav")
    with torch.no_grad():
        states = tiny_encoder()(tone(6000)).hidden_states
    for layer in (0, 1):
        (target,) = encode_files(export, [file], tmp_path / str(layer), layer)
        np.testing.assert_allclose(read(target)["features"], states[layer][0].numpy(), atol=1e-5)
    even = tiny_encoder(encoder_dim=32)
    save_encoder(tmp_path / "even", even.encoder, even.student, {})
    (target,) = encode_files(tmp_path / "even", [file], tmp_path / "all", "all")
    with torch.no_grad():
        expected = torch.stack([state[0] for state in even(tone(6000)).hidden_states])
    assert expected.shape[0] == 2
    np.testing.assert_allclose(read(target)["features"], expected.numpy(), atol=1e-5)


def test_encode_gives_the_same_bytes_again(export: Path, tmp_path: Path) -> None:
    file = write(tmp_path / "a.flac", 12000, 8000)
    (first,) = encode_files(export, [file], tmp_path / "out")
    before = first.read_bytes()
    (second,) = encode_files(export, [file], tmp_path / "out")
    assert second == first
    assert second.read_bytes() == before
    # 1.5 s at 8 kHz are 150 log-mel frames
    assert read(first)["features"].shape == ((150 - 7) // 2, 48)


@pytest.mark.parametrize("layer", ["last", 0, "all"])
def test_encode_writes_a_long_recording_piece_by_piece(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, layer: Any) -> None:
    monkeypatch.setattr("spear.commands.encode.LONG_S", 20.0)
    encoder = tiny_encoder(encoder_dim=32)
    save_encoder(tmp_path / "even", encoder.encoder, encoder.student, {})
    files = [write(tmp_path / "short.wav", 6000), write(tmp_path / "long.wav", 16000 * 41 // 2, 8000)]
    short, long = encode_files(tmp_path / "even", files, tmp_path / "out", layer, window_s=16.0)
    again = encode_files(tmp_path / "even", files, tmp_path / "again", layer, window_s=16.0)
    assert [path.read_bytes() for path in (short, long)] == [path.read_bytes() for path in again]
    expected = encoder.encode_long(read_audio(files[1], 16000), window_s=16.0, hidden_states=True)
    states = torch.stack([state[0] for state in expected.hidden_states])
    wanted = {"last": expected.features[0], 0: states[0], "all": states}[layer]
    np.testing.assert_allclose(read(long)["features"], wanted.numpy(), atol=1e-5)
    assert read(long)["features"].flags.c_contiguous
    assert read(short)["features"].ndim == wanted.ndim
    (whole,) = encode_files(tmp_path / "even", files[1:], tmp_path / "whole", layer, window_s=0)
    assert read(whole)["features"].shape == wanted.shape
    assert np.abs(read(whole)["features"] - wanted.numpy()).max() > 1e-4
    assert not [path for path in (tmp_path / "out").iterdir() if path.suffix != ".npz"]


def test_encode_raises_config_error_when_the_window_is_too_short(export: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="`window` must be 0 or at least 16 s, twice the overlap of windows, but is 10"):
        encode_files(export, [write(tmp_path / "a.wav")], tmp_path / "out", window_s=10.0)


def test_encode_never_writes_two_audios_to_one_name(export: Path, tmp_path: Path) -> None:
    files = [write(tmp_path / "one" / "x.wav"), write(tmp_path / "two" / "x.wav", 3000), write(tmp_path / "one" / "x.flac", 4000)]
    targets = encode_files(export, [*files, files[0]], tmp_path / "out")
    assert len(set(targets)) == 3
    assert [str(read(target)["source"]) for target in targets] == [str(file) for file in files]
    assert [len(read(target)["features"]) for target in targets] == [((samples + 80) // 160 - 7) // 2 for samples in (6000, 3000, 4000)]


def test_encode_keeps_the_features_of_an_earlier_call(export: Path, tmp_path: Path) -> None:
    first, second = write(tmp_path / "one" / "x.wav"), write(tmp_path / "two" / "x.wav", 3000)
    (before,) = encode_files(export, [first], tmp_path / "out")
    (after,) = encode_files(export, [second], tmp_path / "out")
    assert before.name == "x.npz"
    assert after != before
    assert str(read(before)["source"]) == str(first)
    assert encode_files(export, [second], tmp_path / "out") == [after]


def test_output_names_differ_even_where_a_name_looks_like_a_hash(tmp_path: Path) -> None:
    files = [Path("a/x.wav"), Path("b/x.wav")]
    hashed = output_names(files, tmp_path)[files[0]].stem
    tricky = [*files, Path(f"{hashed}.wav")]
    assert len(set(output_names(tricky, tmp_path).values())) == 3


@pytest.mark.parametrize("layer", [2, -1])
def test_encode_raises_config_error_when_layer_is_out_of_range(export: Path, tmp_path: Path, layer: int) -> None:
    with pytest.raises(ConfigError, match=f"`layer` must be between 0 and 1, but is {layer}"):
        encode_files(export, [write(tmp_path / "a.wav")], tmp_path / "out", layer)


def test_encode_raises_config_error_when_layers_cannot_be_stacked(export: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"different widths \(32, 48\)"):
        encode_files(export, [write(tmp_path / "a.wav")], tmp_path / "out", "all")
    with pytest.raises(ConfigError, match="`layer` must be a number, all or last, but is 'first'"):
        encode_files(export, [write(tmp_path / "a.wav")], tmp_path / "out", "first")  # type: ignore[arg-type]


def test_encode_raises_data_error_when_a_file_is_missing_and_writes_nothing(export: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"b\.wav is not a file"):
        encode_files(export, [write(tmp_path / "a.wav"), tmp_path / "b.wav"], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_encode_raises_data_error_when_a_name_is_no_text(export: Path, tmp_path: Path) -> None:
    paths = [write(tmp_path / name / "a.wav").rename(os.fsdecode(os.fsencode(tmp_path / name) + b"/caf\xe9.wav")) for name in ("x", "y")]
    with pytest.raises(DataError, match=r"^names of audio files must be UTF-8, but one is '.*/x/caf\\udce9\.wav'$"):
        encode_files(export, paths, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_encode_raises_data_error_when_a_file_is_no_audio(export: Path, tmp_path: Path) -> None:
    (tmp_path / "b.wav").write_text("no audio")
    with pytest.raises(DataError, match=r"b\.wav cannot be decoded"):
        encode_files(export, [tmp_path / "b.wav"], tmp_path / "out")


def test_encode_raises_checkpoint_error_when_export_is_none(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="missing does not exist"):
        encode_files(tmp_path / "missing", [write(tmp_path / "a.wav")], tmp_path / "out")


class OnDevice(torch.Tensor):
    """A tensor that has no array until it is copied, like one on a GPU."""

    def cpu(self, *_: Any, **__: Any) -> torch.Tensor:
        return self.as_subclass(torch.Tensor)

    def numpy(self, **_: Any) -> Any:
        raise TypeError("can't convert cuda:0 device type tensor to numpy")


@pytest.mark.parametrize(("layer", "shape"), [("last", (7, 4)), (1, (7, 4)), ("all", (2, 7, 4))])
def test_select_copies_features_from_any_device(layer: Any, shape: tuple[int, ...]) -> None:
    states = tuple(torch.full((1, 7, 4), float(i)).as_subclass(OnDevice) for i in range(2))
    found = select(EncoderOutput(states[1], torch.tensor([7]), states), layer)
    assert found.shape == shape
    assert found.dtype == np.float32
