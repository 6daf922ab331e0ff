"""What harnesses get of an export: paths with layers, frames, times."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from spear.errors import CheckpointError, ConfigError, DataError
from spear.evaluation.frozen import LONG_S, FrozenFrames, load_frames, parse_model_path
from spear.export import save_encoder
from tests.export.tiny import tiny_encoder, tone


@pytest.mark.parametrize(
    ("path", "parts"),
    [
        ("a/b", ("a/b", "last")),
        ("a/b#all", ("a/b", "all")),
        ("org/model#3", ("org/model", "3")),
        ("a#b/c#last", ("a#b/c", "last")),
        ("a/b#most", ("a/b#most", "last")),
        ("a/b#-1", ("a/b#-1", "last")),
        ("#all", ("#all", "last")),
    ],
)
def test_model_path_splits_at_a_layer(path: str, parts: tuple[str, str]) -> None:
    assert parse_model_path(path) == parts


def test_model_path_that_exists_is_taken_as_a_whole(tmp_path: Path) -> None:
    folder = tmp_path / "run#2"
    folder.mkdir()
    assert parse_model_path(str(folder)) == (str(folder), "last")
    assert parse_model_path(f"{folder}#all") == (str(folder), "all")


def test_model_path_falls_back_on_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPEAR_EXPORT", "x/y#1")
    assert parse_model_path("") == ("x/y", "1")
    assert parse_model_path("z") == ("z", "last")
    monkeypatch.delenv("SPEAR_EXPORT")
    with pytest.raises(ConfigError, match="SPEAR_EXPORT is not set"):
        parse_model_path("")


@pytest.mark.parametrize("layer", ["last", "all", "0", "1", 1])
def test_frames_are_the_layer_asked_for(layer: str | int) -> None:
    encoder, audio = tiny_encoder(), torch.stack([tone(9000), tone(9000, 500.0)])
    with torch.no_grad():
        output = encoder(audio)
    wanted = {"last": output.features, "all": torch.cat(output.hidden_states, 2), "0": output.hidden_states[0], "1": output.hidden_states[1]}
    frames = FrozenFrames(encoder, layer)
    found = frames(audio)
    torch.testing.assert_close(found, wanted[str(layer)], rtol=0, atol=0)
    assert found.shape[2] == frames.dim
    assert found.dtype == torch.float32
    assert not found.requires_grad


@pytest.mark.parametrize("layer", ["2", "first", -1, ""])
def test_frames_raises_config_error_when_there_is_no_such_layer(layer: str | int) -> None:
    with pytest.raises(ConfigError, match=r"`layer` must be last, all or a number between 0 and 1, but is .* \(here\)"):
        FrozenFrames(tiny_encoder(), layer, "here")


@pytest.mark.parametrize("layer", ["last", "all"])
def test_frames_of_long_recordings_are_those_of_encode_long(layer: str) -> None:
    encoder, audio = tiny_encoder(), tone(int((LONG_S + 3) * 16000))[None]
    frames = FrozenFrames(encoder, layer)
    long = encoder.encode_long(audio[0], hidden_states=True)
    wanted = long.features if layer == "last" else torch.cat(long.hidden_states, 2)
    torch.testing.assert_close(frames(audio), wanted, rtol=0, atol=0)


def test_frame_times_do_not_drift() -> None:
    times = FrozenFrames(tiny_encoder()).times_ms(180_001)
    assert float(times[0]) == pytest.approx(45.0)
    assert float(times[-1]) == pytest.approx(45.0 + 3_600_000.0, abs=1e-6)


def test_frames_raise_data_error_when_audio_is_not_audio() -> None:
    frames = FrozenFrames(tiny_encoder())
    with pytest.raises(DataError, match="NaN"):
        frames(torch.full((1, 8000), torch.nan))
    with pytest.raises(DataError, match="shape"):
        frames(torch.zeros(1, 1, 8000))


def test_load_frames_reads_path_layer_and_option(tmp_path: Path) -> None:
    encoder = tiny_encoder()
    save_encoder(tmp_path / "export", encoder.encoder, encoder.student)
    assert load_frames(f"{tmp_path}/export").layer == "last"
    assert load_frames(f"{tmp_path}/export#1").layer == "1"
    assert load_frames(f"{tmp_path}/export#1", "all").layer == "all"
    with pytest.raises(CheckpointError):
        load_frames(f"{tmp_path}/nothing#1")
