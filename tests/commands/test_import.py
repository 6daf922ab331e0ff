"""Encoders trained elsewhere as export folders."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from spear.commands.import_ import import_model
from spear.errors import CheckpointError
from spear.export import AudioEncoder, load_encoder, save_encoder
from spear.export.icefall import infer_student
from spear.files import read_json, read_tensors, write_tensors
from tests.export.tiny import tiny_encoder, tone

HEADS = {"codebook_loss_heads.0.linear2_bias": torch.zeros(3), "audio_tagging_proj.1.bias": torch.zeros(527)}


def icefall(path: Path, encoder: AudioEncoder, *, prefix: str = "", **more: Any) -> Path:
    """An icefall checkpoint of an encoder, with training heads and the state of the training around it."""
    state = {prefix + key: value for key, value in {**encoder.encoder.state_dict(), **HEADS}.items()}
    torch.save({"model": state, "optimizer": {"lr": 0.1}, "batch_idx_train": 3, "model_avg": None, **more}, path)
    return path


def features(encoder: AudioEncoder) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = encoder(tone(6000)).features
    return found


@pytest.mark.parametrize("prefix", ["", "module."])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"output_downsampling_factor": 2},
        {"downsampling_factor": (1, 4, 2), "num_encoder_layers": (2, 1, 1), "encoder_dim": (32, 48, 32), "encoder_unmasked_dim": 16}
        | {"feedforward_dim": (64, 48, 40), "num_heads": (2, 4, 2), "cnn_module_kernel": (7, 5, 3), "query_head_dim": 32, "value_head_dim": 12},
        {"num_mel_bins": 80, "conv_channels": (4, 8, 16), "query_head_dim": (8, 12), "pos_dim": 32},
    ],
)
def test_import_reads_all_sizes_off_an_icefall_checkpoint(tmp_path: Path, changes: dict[str, Any], prefix: str) -> None:
    encoder = tiny_encoder(**changes)
    import_model(icefall(tmp_path / "epoch-1.pt", encoder, prefix=prefix), tmp_path / "out")
    assert torch.equal(features(load_encoder(tmp_path / "out")), features(encoder))


def test_import_of_a_causal_icefall_checkpoint_reads_the_whole_utterance(tmp_path: Path) -> None:
    encoder = tiny_encoder(causal=True, chunk_size=8, left_context_frames=64)
    whole = tiny_encoder(causal=True, chunk_size=-1, left_context_frames=-1)
    import_model(icefall(tmp_path / "epoch-1.pt", encoder), tmp_path / "out")
    assert torch.equal(features(load_encoder(tmp_path / "out")), features(whole))


def test_import_says_where_the_weights_are_from_and_which_were_dropped(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO"):
        import_model(icefall(tmp_path / "epoch-1.pt", tiny_encoder()), tmp_path / "out")
    for name in HEADS:
        assert name in caplog.text
    card = (tmp_path / "out" / "README.md").read_text()
    assert "Imported from the icefall checkpoint epoch-1.pt. 2 weights of training heads were left out." in card
    assert str(tmp_path) not in card


def test_import_keeps_heads_where_asked_to(tmp_path: Path) -> None:
    source = icefall(tmp_path / "epoch-1.pt", tiny_encoder(), prefix="module.")
    import_model(source, tmp_path / "out", keep_heads=True)
    kept = read_tensors(tmp_path / "out" / "heads.safetensors")
    assert {name: value.shape for name, value in kept.items()} == {name: value.shape for name, value in HEADS.items()}
    assert "2 weights of training heads were kept in heads.safetensors." in (tmp_path / "out" / "README.md").read_text()
    assert torch.equal(features(load_encoder(tmp_path / "out")), features(tiny_encoder()))
    import_model(source, tmp_path / "out")
    assert not (tmp_path / "out" / "heads.safetensors").exists()


def test_import_takes_the_weights_that_are_named(tmp_path: Path) -> None:
    encoder = tiny_encoder()
    average = {f"module.{key}": value * 0.5 for key, value in encoder.encoder.state_dict().items()}
    source = icefall(tmp_path / "epoch-1.pt", encoder, model_avg=average)
    import_model(source, tmp_path / "out", "model_avg")
    found = read_tensors(tmp_path / "out" / "model.safetensors")["model.mask_emb"]
    assert torch.equal(found, average["module.mask_emb"])
    assert "Imported from the icefall checkpoint epoch-1.pt, model_avg." in (tmp_path / "out" / "README.md").read_text()


@pytest.mark.parametrize("prefix", ["model.", "model.model."])
def test_import_takes_a_released_folder(tmp_path: Path, prefix: str) -> None:
    encoder = tiny_encoder()
    save_encoder(tmp_path / "src", encoder.encoder, encoder.student, {})
    write_tensors(tmp_path / "src" / "model.safetensors", {prefix + key: value for key, value in {**encoder.encoder.state_dict(), **HEADS}.items()})
    (tmp_path / "src" / "modeling_spear.py").write_text("raise RuntimeError('never run')")
    import_model(tmp_path / "src", tmp_path / "out")
    assert torch.equal(features(load_encoder(tmp_path / "out")), features(encoder))
    assert set(read_tensors(tmp_path / "out" / "model.safetensors")) == {f"model.{key}" for key in encoder.encoder.state_dict()}
    assert "never run" not in (tmp_path / "out" / "modeling_spear.py").read_text()


def test_import_raises_checkpoint_error_when_out_is_src(tmp_path: Path) -> None:
    encoder = tiny_encoder()
    save_encoder(tmp_path / "src", encoder.encoder, encoder.student, {})
    with pytest.raises(CheckpointError, match="`OUT` must be another folder than `SRC`"):
        import_model(tmp_path / "src", tmp_path / "src")


class Unsafe:
    """An object that a checkpoint must not bring to life."""


def test_import_raises_checkpoint_error_when_checkpoint_is_unusable(tmp_path: Path) -> None:
    (tmp_path / "text.pt").write_text("no checkpoint")
    torch.save({"state": {}}, tmp_path / "other.pt")
    torch.save({"model": {"a": 1}}, tmp_path / "values.pt")
    torch.save({"model": {"weight": torch.zeros(2)}}, tmp_path / "linear.pt")
    icefall(tmp_path / "unsafe.pt", tiny_encoder(), params=Unsafe())
    for name, match in (
        ("none.pt", "does not exist"),
        ("text.pt", "cannot be read as tensors and plain values"),
        ("other.pt", "has no `model` with tensors"),
        ("values.pt", "has no `model` with tensors"),
        ("linear.pt", "holds no Zipformer"),
        ("unsafe.pt", "cannot be read as tensors and plain values"),
    ):
        with pytest.raises(CheckpointError, match=f"{name} {match}") as caught:
            import_model(tmp_path / name, tmp_path / "out")
        assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_import_raises_checkpoint_error_when_weights_are_left_over_or_missing(tmp_path: Path) -> None:
    encoder = tiny_encoder()
    state = encoder.encoder.state_dict()
    torch.save({"model": {**state, "decoder.weight": torch.zeros(2)}}, tmp_path / "more.pt")
    with pytest.raises(CheckpointError, match=r"left over \(1\): decoder\.weight"):
        import_model(tmp_path / "more.pt", tmp_path / "out")
    torch.save({"model": {**state, "module.mask_emb": state["mask_emb"]}}, tmp_path / "twice.pt")
    with pytest.raises(CheckpointError, match="holds `mask_emb` twice"):
        import_model(tmp_path / "twice.pt", tmp_path / "out")
    del state["mask_emb"]
    torch.save({"model": state}, tmp_path / "less.pt")
    with pytest.raises(CheckpointError, match="lacks `mask_emb`, from which a size is read"):
        import_model(tmp_path / "less.pt", tmp_path / "out")


def test_infer_student_raises_checkpoint_error_when_sizes_contradict() -> None:
    state = tiny_encoder().encoder.state_dict()
    key = "encoder.encoders.0.layers.0.self_attn_weights.linear_pos.weight"
    with pytest.raises(CheckpointError, match="the positional width of stack 0 must be a multiple of 4, but is 6"):
        infer_student({**state, key: torch.zeros(6, 48)}, "x.pt")
    gap = {name.replace("encoders.1.", "encoders.2."): value for name, value in state.items()}
    with pytest.raises(CheckpointError, match="without gaps"):
        infer_student(gap, "x.pt")


def test_infer_student_reads_the_sizes_of_the_published_models(fixtures: Path) -> None:
    table = read_json(fixtures / "state_dict_shapes.json")
    found = 0
    for name, entry in _shape_tables(table):
        state = {key: torch.empty(shape, device="meta") for key, shape in entry.items()}
        student = infer_student(state, name)
        with torch.device("meta"):
            own = student.build().state_dict()
        assert {key: tuple(value.shape) for key, value in own.items()} == {key: tuple(value.shape) for key, value in state.items()}, name
        found += 1
    assert found >= 4


def _shape_tables(value: Any, path: str = "") -> list[tuple[str, dict[str, list[int]]]]:
    """Every name -> shape table in the fixture, with the name of its place."""
    if not isinstance(value, dict):
        return []
    if "mask_emb" in value:
        return [(path, value)]
    return [table for key, part in value.items() for table in _shape_tables(part, f"{path}/{key}")]
