"""The encoder and its front end against the reference outputs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from spear.models.zipformer import ZipformerConfig, ZipformerEncoder
from spear.models.zipformer.chunks import Chunking
from spear.models.zipformer.encoder import join_channels
from spear.models.zipformer.subsampling import Conv2dSubsampling, output_lens
from tests.models.parity import assert_near, config_of, loaded, read, under


@pytest.mark.parametrize("name", ["zipformer_tiny", "zipformer_tiny_causal"])
def test_zipformer_matches_the_reference(fixtures: Path, name: str) -> None:
    tensors, metadata = read(fixtures, name)
    encoder = loaded(ZipformerEncoder(config_of(metadata)), under(tensors, "model."))
    features, lens = tensors["in.x"], tensors["in.x_lens"]
    with torch.no_grad():
        embed, embed_lens = encoder.encoder_embed(features, lens)
        inner = encoder.encoder(embed, embed_lens)
        out = encoder(features, lens)
    assert_near(embed, tensors["out.embed"], 1e-4)
    assert embed_lens.tolist() == tensors["out.embed_lens"].tolist()
    for i, stack in enumerate(inner.stacks):
        assert_near(stack, tensors[f"out.stack.{i}"], 1e-4)
    assert len(out.hidden_states) == encoder.num_layers
    for i, layer in enumerate(out.hidden_states):
        assert_near(layer, tensors[f"out.layer.{i}"], 1e-4)
    assert_near(join_channels(inner.stacks), tensors["out.full_dim"], 1e-4)
    assert_near(out.features, tensors["out.encoder_out"], 1e-4)
    assert out.lens.tolist() == tensors["out.encoder_out_lens"].tolist()


def test_zipformer_causal_without_chunks_matches_the_reference(fixtures: Path) -> None:
    tensors, metadata = read(fixtures, "zipformer_tiny_causal")
    encoder = loaded(ZipformerEncoder(config_of(metadata)), under(tensors, "model."))
    with torch.no_grad():
        out = encoder.encoder(*encoder.encoder_embed(tensors["in.x"], tensors["in.x_lens"]), Chunking(-1, -1))
    assert_near(out.stacks[1], tensors["nochunk.out.stack.1"], 1e-4)
    assert_near(join_channels(out.stacks), tensors["nochunk.out.full_dim"], 1e-4)
    assert_near(out.features, tensors["nochunk.out.encoder_out"], 1e-4)


@pytest.mark.parametrize(("name", "bins", "dim"), [("mel128", 128, 48), ("mel80", 80, 40)])
def test_subsampling_matches_the_reference(fixtures: Path, name: str, bins: int, dim: int) -> None:
    tensors = under(read(fixtures, "subsampling")[0], f"{name}.")
    module = loaded(Conv2dSubsampling(bins, dim, (8, 32, 128), 0.1), under(tensors, "param."))
    with torch.no_grad():
        convolved = module.conv(module.image(tensors["x"]))
        out, lens = module(tensors["x"], tensors["x_lens"])
    assert_near(convolved[:, :, 0], tensors["after_conv_t0"], 1e-5)
    assert_near(module.convnext(convolved)[:, :, 0], tensors["after_convnext_t0"], 1e-5)
    assert_near(out, tensors["out"], 1e-5)
    assert lens.tolist() == tensors["out_lens"].tolist()


def test_output_lens_follow_the_receptive_field() -> None:
    lens = torch.tensor([9, 10, 11, 100, 1000, 1500])
    assert output_lens(lens).tolist() == [1, 1, 2, 46, 496, 746]


SIZES: dict[str, dict[str, object]] = {
    "base_1,2,3,3,1,1,1": {},
    "large": {"num_encoder_layers": (1, 2, 2, 3, 1, 1, 1), "encoder_dim": 1024, "feedforward_dim": 3072, "encoder_unmasked_dim": 512},
    "xlarge": {"num_encoder_layers": (1, 2, 3, 4, 1, 1, 1), "encoder_dim": 1280, "feedforward_dim": 3840, "encoder_unmasked_dim": 768},
}


def test_state_dict_has_the_released_names_and_shapes(fixtures: Path) -> None:
    tables = json.loads((fixtures / "state_dict_shapes.json").read_text())
    checked = 0
    for name, table in tables.items():
        if not isinstance(table, dict) or "shapes" not in table:
            continue
        size = next(value for key, value in SIZES.items() if name.startswith(key.split("_")[0]))
        causal = "causal" in name
        config = ZipformerConfig(**size, causal=causal, output_downsampling_factor=2 if "ods2" in name else 1)  # type: ignore[arg-type]
        with torch.device("meta"):
            state = ZipformerEncoder(config).state_dict()
        assert {key: list(value.shape) for key, value in state.items()} == table["shapes"], name
        assert sum(value.numel() for value in state.values()) == table["total_params"]
        checked += 1
    assert checked >= 5
