"""Encoders of others: released layouts, icefall checkpoints in and out, and students that start from them."""

from __future__ import annotations

import pathlib
from pathlib import Path
from typing import Any

import pytest
import torch

from spear.errors import CheckpointError
from spear.export import AudioEncoder, load_encoder, save_encoder, save_icefall
from spear.export.encoder import start_from
from spear.export.icefall import OPTIONS
from spear.export.source import fingerprint_source, read_source
from spear.files import write_json, write_tensors
from spear.models.conformer import ConformerConfig
from spear.models.zipformer import ZipformerConfig
from tests.export.tiny import tiny_config, tiny_encoder, tone

SEVEN: dict[str, Any] = {
    "downsampling_factor": (1, 2, 4, 8, 4, 2, 1),
    "num_encoder_layers": (1, 2, 1, 1, 1, 1, 1),
    "encoder_unmasked_dim": 16,
    "feedforward_dim": 48,
    "num_heads": (2, 4, 4, 2, 4, 2, 2),
    "cnn_module_kernel": (7, 7, 5, 3, 5, 7, 7),
    "query_head_dim": 32,
    "value_head_dim": 12,
}
"""The released stacks with small widths; the head widths are the released ones."""
VARIANTS: dict[str, dict[str, Any]] = {
    "50hz": {"encoder_dim": 24},
    "25hz": {"encoder_dim": 24, "output_downsampling_factor": 2},
    "mixed": {"encoder_dim": (16, 24, 32, 40, 32, 24, 16)},
    "causal": {"encoder_dim": 24, "causal": True, "chunk_size": 8, "left_context_frames": 128},
    "heads": {"encoder_dim": 24, "query_head_dim": 16, "pos_head_dim": 2, "value_head_dim": (8, 8, 12, 12, 12, 8, 8)},
}
HEADS = {
    "codebook_loss_heads.0.linear1.weight": torch.ones(2, 3),
    "codebook_loss_heads.0.codebook_embedding.weight": torch.ones(4),
    "audio_tagging_proj.1.bias": torch.ones(527),
}
variants = pytest.mark.parametrize("variant", VARIANTS)


def seven(variant: str) -> AudioEncoder:
    return tiny_encoder(**{**SEVEN, **VARIANTS[variant]})


def features(encoder: AudioEncoder) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = encoder(tone(9000)).features
    return found


def released(folder: Path, encoder: AudioEncoder, prefix: str, *, more: dict[str, torch.Tensor] | None = None) -> Path:
    """A folder as the authors release it: their keys only, tuples as text, weights under `prefix`."""
    student: Any = encoder.student
    stacks = student.stacks()
    config: dict[str, Any] = {
        "architectures": ["SpearModel"],
        "auto_map": {"AutoConfig": "configuration_spear.SpearConfig", "AutoModel": "modeling_spear.SpearModel"},
        "model_type": "spear",
        "torch_dtype": "float32",
        "transformers_version": "4.50.0",
        "num_mel_bins": student.num_mel_bins,
        "output_downsampling_factor": student.output_downsampling_factor,
        "downsampling_factor": ",".join(str(stack.downsampling) for stack in stacks),
        "num_encoder_layers": ",".join(str(stack.num_layers) for stack in stacks),
        "encoder_dim": ",".join(str(stack.dim) for stack in stacks),
        "encoder_unmasked_dim": ",".join(str(stack.unmasked_dim) for stack in stacks),
        "feedforward_dim": ",".join(str(stack.feedforward_dim) for stack in stacks),
        "num_heads": ",".join(str(stack.num_heads) for stack in stacks),
        "cnn_module_kernel": ",".join(str(stack.kernel) for stack in stacks),
        "causal": student.causal,
        "chunk_size": student.chunk_sizes[0],
        "left_context_frames": student.left_contexts[0],
        "pos_dim": student.pos_dim,
    }
    if "query_head_dim" in VARIANTS["heads"] and student.pos_head_dim == 2:
        values = ",".join(str(stack.value_head_dim) for stack in stacks)
        config |= {"query_head_dim": "16", "pos_head_dim": 2, "value_head_dim": values}
    write_json(folder / "config.json", config)
    state = {**encoder.encoder.state_dict(), **(more or {})}
    write_tensors(folder / "model.safetensors", {prefix + key: value for key, value in state.items()}, {"format": "pt"})
    return folder


@variants
@pytest.mark.parametrize("prefix", ["model.", "model.model."])
def test_released_folder_gives_its_numbers(tmp_path: Path, variant: str, prefix: str) -> None:
    encoder = seven(variant)
    loaded = load_encoder(released(tmp_path, encoder, prefix, more=HEADS))
    assert loaded.frame_rate_hz == encoder.frame_rate_hz
    assert torch.equal(features(loaded), features(encoder))


def test_released_folder_raises_checkpoint_error_when_weights_are_missing_or_unknown(tmp_path: Path) -> None:
    encoder = seven("50hz")
    folder = released(tmp_path, encoder, "model.model.", more={"projection.weight": torch.zeros(2), "projection.bias": torch.zeros(2)})
    with pytest.raises(CheckpointError, match=r"left over \(2\): projection.bias, projection.weight"):
        load_encoder(folder)


def checkpoint(path: Path, **content: Any) -> Path:
    torch.save(content, path)
    return path


@pytest.mark.parametrize("variant", ["50hz", "25hz", "mixed"])
def test_icefall_checkpoint_loads_as_an_encoder(tmp_path: Path, variant: str) -> None:
    encoder = seven(variant)
    path = checkpoint(
        tmp_path / "epoch-3.pt",
        model={f"module.{key}": value for key, value in {**encoder.encoder.state_dict(), **HEADS}.items()},
        exp_dir=pathlib.PosixPath("exp"),
        manifest_dir=pathlib.PurePosixPath("data"),
        env_info={"torch-version": "2.0", "IP address": "127.0.0.1"},
        best_valid_loss=float("inf"),
        sampler=None,
    )
    assert torch.equal(features(load_encoder(path)), features(encoder))


def test_icefall_options_settle_what_shapes_do_not_tell(tmp_path: Path) -> None:
    encoder = seven("heads")
    options = {"pos_head_dim": "2", "encoder_unmasked_dim": "12,16,16,16,16,16,12", "encoder_dim": "24"}
    path = checkpoint(tmp_path / "epoch-3.pt", model=encoder.encoder.state_dict(), **options)
    loaded = load_encoder(path)
    assert torch.equal(features(loaded), features(encoder))
    assert [stack.unmasked_dim for stack in loaded.student.stacks()] == [12, 16, 16, 16, 16, 16, 12]


def test_icefall_checkpoint_has_a_choice_of_weights(tmp_path: Path) -> None:
    encoder = seven("50hz")
    state = encoder.encoder.state_dict()
    average = {key: value * 0.5 for key, value in state.items()}
    path = checkpoint(tmp_path / "epoch-3.pt", model=state, model_avg=average)
    for entry, expected in ((None, state), ("model", state), ("model_avg", average)):
        assert torch.equal(read_source(path, entry=entry).encoder["mask_emb"], expected["mask_emb"])
    only = checkpoint(tmp_path / "average.pt", model_avg=average)
    assert torch.equal(load_encoder(only).encoder.state_dict()["mask_emb"], average["mask_emb"])
    with pytest.raises(CheckpointError, match="average.pt has no `model` with tensors: .*only with `model_avg`"):
        read_source(only, entry="model")
    with pytest.raises(CheckpointError, match="only an icefall checkpoint has a choice of weights"):
        read_source(tmp_path, entry="model_avg")


def test_icefall_recogniser_loses_its_heads_and_gets_a_mask_embedding_of_zeros(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    encoder = tiny_encoder(num_mel_bins=80, output_downsampling_factor=2, query_head_dim=32, value_head_dim=12)
    state = {key: value for key, value in encoder.encoder.state_dict().items() if key != "mask_emb"}
    heads = {name: torch.zeros(2) for name in ("decoder.embedding.weight", "joiner.output_linear.bias", "simple_am_proj.weight", "ctc_output.1.bias")}
    with caplog.at_level("INFO"):
        loaded = load_encoder(checkpoint(tmp_path / "pretrained.pt", model={**state, **heads}))
    assert torch.equal(features(loaded), features(encoder))
    assert loaded.encoder.num_mel_bins == 80
    assert "has no `mask_emb`, as a model that was trained without masks: taken as zeros for 80 mel bins" in caplog.text
    assert all(name in caplog.text for name in heads)


@variants
def test_saved_icefall_checkpoint_comes_back(tmp_path: Path, variant: str) -> None:
    encoder = seven(variant)
    save_icefall(tmp_path / "pretrained.pt", encoder.encoder, encoder.student)
    content = torch.load(tmp_path / "pretrained.pt", weights_only=True)
    assert content["model"].keys() == encoder.encoder.state_dict().keys()
    assert all(torch.equal(value, content["model"][key]) for key, value in encoder.encoder.state_dict().items())
    assert content["downsampling_factor"] == "1,2,4,8,4,2,1"
    assert set(OPTIONS) <= content.keys()
    loaded = load_encoder(tmp_path / "pretrained.pt")
    assert [stack.unmasked_dim for stack in loaded.student.stacks()] == [16] * 7
    if variant != "causal":  # whose chunks are a choice of the reader
        assert torch.equal(features(loaded), features(encoder))
    first = (tmp_path / "pretrained.pt").read_bytes()
    save_icefall(tmp_path / "again.pt", encoder.encoder, encoder.student)
    assert (tmp_path / "again.pt").read_bytes() == first


def test_saving_for_icefall_raises_checkpoint_error_when_it_cannot_be_read_there(tmp_path: Path) -> None:
    config = ConformerConfig(num_layers=1, dim=8, num_heads=2, feedforward_dim=8, conv_channels=(2, 2, 2))
    with pytest.raises(CheckpointError, match="must be of type zipformer for the format of icefall, but is ConformerConfig"):
        save_icefall(tmp_path / "a.pt", config.build(), config)
    encoder = tiny_encoder()
    with torch.no_grad():
        encoder.encoder.mask_emb[0] = float("nan")
    with pytest.raises(CheckpointError, match="1 weights hold NaN or infinity: mask_emb"):
        save_icefall(tmp_path / "a.pt", encoder.encoder, encoder.student)
    assert not list(tmp_path.iterdir())


def fresh(config: ZipformerConfig) -> Any:
    torch.manual_seed(99)
    return config.build()


def test_start_from_takes_every_weight_and_leaves_training_settings_alone(tmp_path: Path) -> None:
    encoder = tiny_encoder()
    save_encoder(tmp_path / "folder", encoder.encoder, encoder.student, {})
    save_icefall(tmp_path / "pretrained.pt", encoder.encoder, encoder.student)
    config = tiny_config(schedule_offset=500.0, dropout_start=0.2, encoder_unmasked_dim=(8, 8), chunk_size=16)
    for source in (tmp_path / "folder", tmp_path / "pretrained.pt"):
        student = fresh(config)
        before = student.mask_emb.clone()
        start_from(student, config, source)
        assert not torch.equal(student.mask_emb, before)
        assert all(torch.equal(value, encoder.encoder.state_dict()[key]) for key, value in student.state_dict().items())
        assert student.config.schedule_offset == 500.0


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"num_encoder_layers": (1, 2)}, r"`student.num_encoder_layers` is 1,2 and there 1,1"),
        ({"query_head_dim": 4, "num_heads": (4, 8)}, r"`student.num_heads` is 4,8 and there 2,4; `student.query_head_dim` is 4,4 and there 8,8"),
        ({"causal": True}, r"`student.causal` is True and there False"),
        ({"downsampling_factor": (1, 4)}, r"`student.downsampling_factor` is 1,4 and there 1,2"),
    ],
)
def test_start_from_raises_checkpoint_error_when_the_network_is_another(tmp_path: Path, changes: dict[str, Any], match: str) -> None:
    encoder = tiny_encoder()
    save_encoder(tmp_path, encoder.encoder, encoder.student, {})
    config = tiny_config(**changes)
    with pytest.raises(CheckpointError, match=match):
        start_from(fresh(config), config, tmp_path)


def test_start_from_raises_checkpoint_error_when_the_kind_or_a_weight_differs(tmp_path: Path) -> None:
    encoder = tiny_encoder()
    save_encoder(tmp_path, encoder.encoder, encoder.student, {})
    other = ConformerConfig(num_layers=1, dim=8, num_heads=2, feedforward_dim=8, conv_channels=(2, 2, 2))
    with pytest.raises(CheckpointError, match="`student.type` is conformer, but .* holds a zipformer"):
        start_from(other.build(), other, tmp_path)
    state = {f"model.{key}": value for key, value in encoder.encoder.state_dict().items() if key != "mask_emb"}
    write_tensors(tmp_path / "model.safetensors", state)
    with pytest.raises(CheckpointError, match=r"missing \(1\): mask_emb"):
        start_from(fresh(tiny_config()), tiny_config(), tmp_path)


def test_fingerprint_of_a_source_is_that_of_its_weights(tmp_path: Path) -> None:
    encoder = tiny_encoder()
    save_encoder(tmp_path / "a", encoder.encoder, encoder.student, {"name": "a"})
    save_encoder(tmp_path / "b", encoder.encoder, encoder.student, {"name": "b"})
    save_icefall(tmp_path / "c.pt", encoder.encoder, encoder.student)
    same = {fingerprint_source(read_source(tmp_path / name)) for name in ("a", "b", "c.pt")}
    with torch.no_grad():
        encoder.encoder.mask_emb[0] += 1e-3
    save_encoder(tmp_path / "d", encoder.encoder, encoder.student, {})
    assert len(same) == 1
    assert fingerprint_source(read_source(tmp_path / "d")) not in same
