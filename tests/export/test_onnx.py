"""Recorded encoders give what torch gives: log-mels in and out of the graph, whole utterances, single steps of a stream."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from spear.data.fbank import fbank_batch
from spear.errors import CheckpointError, ConfigError
from spear.export.encoder import AudioEncoder
from spear.export.onnx import min_frames, min_program_frames, require_onnx, write_onnx, write_program
from spear.export.onnx_modules import RecordableEncoder, RecordableFbank, RecordableStep, flat, unflat
from spear.export.onnx_parity import CASES, TOLERANCE, check_onnx, check_program, session
from spear.files import read_json
from spear.models.conv_transformer import ConvTransformerConfig
from spear.stages.export import run as export_run
from tests.export.tiny import tiny_encoder, tone
from tests.stages.test_export import make_run, train

ALL = ("fp32", "fp16", "int8")


def causal_encoder() -> AudioEncoder:
    return tiny_encoder(causal=True, chunk_size=16, left_context_frames=32)


def test_recordable_fbank_equals_the_log_mels_of_training() -> None:
    lens = torch.tensor([9013, 80, 4000, 399])
    audio = torch.nn.utils.rnn.pad_sequence([tone(length, hz=200.0 + 300 * i) for i, length in enumerate(lens.tolist())], batch_first=True)
    audio += 0.01 * torch.randn(audio.shape, generator=torch.Generator().manual_seed(3))  # no band is so quiet that rounding shows
    audio[3, 200:] = 7.0  # what lies past the end is not looked at
    lens[3] = 200
    expected, expected_lens = fbank_batch(audio, lens, 80)
    found, found_lens = RecordableFbank(80)(audio, lens)
    assert found_lens.tolist() == expected_lens.tolist()
    torch.testing.assert_close(found[:, : expected.shape[1]], expected, atol=5e-4, rtol=0)


def test_recordable_encoder_does_not_look_past_the_end() -> None:
    encoder = tiny_encoder().encoder
    x, lens = torch.randn(2, 60, 128), torch.tensor([60, 41])
    with torch.no_grad():
        features, _ = RecordableEncoder(encoder)(x, lens)
        x[1, 41:] = 1e3
        again, _ = RecordableEncoder(encoder)(x, lens)
    torch.testing.assert_close(again, features)


def test_recordable_step_is_a_step_of_the_stream() -> None:
    encoder = causal_encoder().encoder
    step = RecordableStep(encoder).eval()  # type: ignore[arg-type]
    x = torch.randn(2, step.stream.step_frames, 128)
    lens = torch.full((2,), step.stream.step_frames)
    expected = step.stream.step(x, lens, step.stream.start(2))
    features, out_lens, *state = step(x, lens, step.start(2))
    assert len(state) == len(step.state_names)
    assert torch.equal(features, expected.features)
    assert torch.equal(out_lens, expected.lens)
    assert all(torch.equal(a, b) for a, b in zip(flat(unflat(state)), flat(expected.state)))


@pytest.mark.parametrize(("changes", "least"), [({}, 9), ({"downsampling_factor": (1, 4)}, 9), ({"causal": True, "chunk_size": 16}, 39)])
def test_min_frames(changes: dict[str, Any], least: int) -> None:
    assert min_frames(tiny_encoder(**changes)) == least


def test_min_program_frames_leaves_two_frames_to_the_coarsest_stack() -> None:
    encoder = tiny_encoder(downsampling_factor=(1, 4))
    frames = min_program_frames(encoder)
    assert [-(-((frames - 7 - shorter) // 2) // 4) for shorter in (0, 2)] == [2, 1]
    assert min_program_frames(causal_encoder()) == 41


def test_require_onnx_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *args: None if name == "onnxscript" else find(name, *args))
    with pytest.raises(ConfigError, match=r"needs the package onnxscript: install the extra \[onnx\]"):
        require_onnx()


def test_write_program_refuses_an_encoder_of_samples(tmp_path: Path) -> None:
    config = ConvTransformerConfig(conv_dim=8, num_layers=1, dim=16, num_heads=2, feedforward_dim=16, position_layers=1, position_groups=2)
    with pytest.raises(CheckpointError, match="only an encoder that reads log-mels can be recorded, but this one reads samples"):
        write_program(tmp_path, AudioEncoder(config.build(), config).eval())


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All files of a causal encoder."""
    folder = tmp_path_factory.mktemp("onnx")
    files = write_onnx(folder, causal_encoder(), ALL)
    assert files == ["encoder.onnx", "audio.onnx", "encoder_fp16.onnx", "audio_fp16.onnx", "encoder_int8.onnx", "audio_int8.onnx", "stream.onnx"]
    return folder


@pytest.mark.slow
def test_onnx_equals_torch(recorded: Path) -> None:
    report = check_onnx(recorded, causal_encoder(), ALL)
    for name in ("encoder.onnx", "audio.onnx", "stream.onnx"):
        assert report[name]["largest_difference"] <= TOLERANCE * max(1.0, report[name]["features_rms"])
    cases = report["encoder.onnx"]["cases"]
    assert len(cases) == CASES >= 20
    assert {size for size, _ in cases} == {1, 2, 3, 4}
    assert len({frames for _, frames in cases}) >= 18
    assert 0 < report["encoder_fp16.onnx"]["relative"] < 2e-3
    assert 0 < report["encoder_int8.onnx"]["relative"] < 0.05
    sizes = {name: (recorded / f"encoder{name}.onnx").stat().st_size for name in ("", "_fp16", "_int8")}
    assert sizes[""] > sizes["_fp16"]
    assert sizes[""] > sizes["_int8"]


@pytest.mark.slow
def test_onnx_check_finds_an_encoder_that_differs(recorded: Path) -> None:
    other = causal_encoder()
    with torch.no_grad():
        other.encoder.encoder_embed.out_norm.log_scale.add_(1e-2)  # type: ignore[union-attr, operator]
    with pytest.raises(CheckpointError, match=r"encoder.onnx must equal torch up to 0.0001, but differs by"):
        check_onnx(recorded, other, ("fp32",))


@pytest.mark.slow
def test_onnx_metadata_and_audio_of_one_file(recorded: Path) -> None:
    runtime = session(recorded / "audio.onnx")
    facts = runtime.get_modelmeta().custom_metadata_map
    assert {key: facts[key] for key in ("model_type", "sample_rate", "frame_rate_hz", "num_mel_bins", "min_frames", "precision")} == {
        "model_type": "spear",
        "sample_rate": "16000",
        "frame_rate_hz": "50.0",
        "num_mel_bins": "128",
        "min_frames": "39",
        "precision": "fp32",
    }
    audio = tone(12_345)
    features, lens = runtime.run(["features", "lens"], {"audio": audio[None].numpy(), "audio_lens": np.array([12_345])})
    with torch.no_grad():
        expected = causal_encoder()(audio)
    assert lens.tolist() == expected.lens.tolist()
    np.testing.assert_allclose(features, expected.features.numpy(), atol=2e-4)


@pytest.mark.slow
@pytest.mark.parametrize("changes", [{"downsampling_factor": (1, 4)}, {"causal": True, "chunk_size": 16, "left_context_frames": 32}])
def test_program_equals_torch(tmp_path: Path, changes: dict[str, Any]) -> None:
    encoder = tiny_encoder(**changes)
    write_program(tmp_path, encoder)
    found = check_program(tmp_path, encoder)["encoder.pt2"]
    assert found["largest_difference"] <= TOLERANCE * max(1.0, found["features_rms"])


@pytest.mark.slow
@pytest.mark.parametrize(("form", "name"), [("onnx", "encoder.onnx"), ("torch", "encoder.pt2")])
def test_export_stage_writes_files_and_their_parity(tmp_path: Path, form: str, name: str) -> None:
    run = make_run(tmp_path, format=form, precisions=("fp32",), use="last")
    train(run.exp, saved=(10,))
    export_run(run)
    report = read_json(run.exp / f"export_{form}" / "parity.json")
    assert report[name]["largest_difference"] < 1e-3
    assert read_json(run.exp / f"export_{form}" / "artifact.json")["extra"]["parity"][name] == report[name]["largest_difference"]
