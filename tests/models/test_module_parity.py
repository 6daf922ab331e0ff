"""Single modules against the reference outputs."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from spear.models.zipformer.attention import AttentionWeights, NonlinAttention, SelfAttention
from spear.models.zipformer.convolution import ConvolutionModule
from spear.models.zipformer.downsample import Bypass, Downsample, upsample
from spear.models.zipformer.feedforward import FeedForward
from spear.models.zipformer.layer import ZipformerLayer
from spear.models.zipformer.norm import bias_norm
from spear.models.zipformer.position import RelativePositions, relative_encoding
from spear.models.zipformer.subsampling import ConvNeXt
from spear.models.zipformer.swoosh import swoosh_l, swoosh_r
from tests.models.parity import Tensors, assert_near, batch_first, layer_config, loaded, read, under


@pytest.fixture(scope="module")
def modules(fixtures: Path) -> Tensors:
    return read(fixtures, "layer_modules")[0]


def swapped(weights: torch.Tensor) -> torch.Tensor:
    """(H, N, T, S) of the fixtures to (N, H, T, S)."""
    return weights.transpose(0, 1)


@pytest.mark.parametrize(("name", "function"), [("swoosh_l", swoosh_l), ("swoosh_r", swoosh_r)])
def test_swoosh_matches_the_reference(fixtures: Path, name: str, function: object) -> None:
    assert callable(function)
    tensors = read(fixtures, "swoosh")[0]
    x = tensors["x"].clone().requires_grad_()
    y = function(x)
    torch.testing.assert_close(y, tensors[name], rtol=1e-6, atol=1e-5)
    torch.testing.assert_close(y.double(), tensors[f"{name}_f64"], rtol=1e-6, atol=1e-5)
    y.sum().backward()
    assert x.grad is not None
    assert_near(x.grad, tensors[f"d{name}"], 1e-5)


@pytest.mark.parametrize(("case", "channel_dim"), [("last", -1), ("dim1", 1)])
def test_bias_norm_matches_the_reference(fixtures: Path, case: str, channel_dim: int) -> None:
    tensors = under(read(fixtures, "biasnorm")[0], f"{case}.")
    x, bias, log_scale = (tensors[key].clone().requires_grad_() for key in ("x", "param.bias", "param.log_scale"))
    y = bias_norm(x.movedim(channel_dim, -1), bias, log_scale).movedim(-1, channel_dim)
    assert_near(y, tensors["y"], 1e-5)
    y.backward(tensors["g"])
    for leaf, name in ((x, "dx"), (bias, "dbias"), (log_scale, "dlog_scale")):
        assert leaf.grad is not None
        assert_near(leaf.grad, tensors[name], 2e-5)


def test_relative_positions_match_the_reference(fixtures: Path) -> None:
    tensors = read(fixtures, "relpos_attention")[0]
    for dim in (32, 48, 192):
        assert_near(RelativePositions(dim).eval()(20, 20, torch.device("cpu")), tensors[f"pe.D{dim}.T20"][0], 1e-5)
    assert_near(RelativePositions(48).eval()(16, 48, torch.device("cpu")), tensors["pe.D48.T16_left32"][0], 1e-5)
    assert_near(relative_encoding(tensors["pe.D48.big_offsets"], 48), tensors["pe.D48.big_rows"], 1e-5)


@pytest.mark.parametrize(("name", "dim", "heads", "query", "pos"), [("attn_a", 64, 4, 16, 4), ("attn_b", 40, 5, 6, 3)])
def test_attention_weights_match_the_reference(fixtures: Path, name: str, dim: int, heads: int, query: int, pos: int) -> None:
    tensors = under(read(fixtures, "relpos_attention")[0], f"{name}.")
    module = AttentionWeights(dim, pos_dim=48, num_heads=heads, query_head_dim=query, pos_head_dim=pos)
    loaded(module, under(tensors, "param."))
    x, positions = batch_first(tensors["x"]), tensors["pos_emb"][0]
    padding = tensors["key_padding_mask"][:, None, None]
    with torch.no_grad():
        assert_near(module(x, positions, None), swapped(tensors["out_plain"]), 1e-5)
        assert_near(module(x, positions, padding), swapped(tensors["out_padded"]), 1e-5)
        assert_near(module(x, positions, padding | tensors["attn_mask"]), swapped(tensors["out_chunk_padded"]), 1e-5)
        positions = RelativePositions(48).eval()(12, 32, x.device)
        mask = tensors["stream.key_padding_mask"][:, None, None]
        out, cached = module.stream(x[:, :12], positions, mask, batch_first(tensors["stream.cached_key"]))
    assert_near(out, swapped(tensors["stream.out"]), 1e-5)
    assert_near(cached, batch_first(tensors["stream.new_cached_key"]), 1e-5)


def test_attention_modules_match_the_reference(modules: Tensors) -> None:
    x, weights = batch_first(modules["in.x"]), swapped(modules["in.attn_weights"])
    attention = loaded(SelfAttention(64, num_heads=4, value_head_dim=12), under(modules, "self_attn.param."))
    nonlin = loaded(NonlinAttention(64, 48), under(modules, "nonlin_attn.param."))
    with torch.no_grad():
        assert_near(attention(x, weights), batch_first(modules["self_attn.out"]), 1e-5)
        assert_near(nonlin(x, weights[:, 0]), batch_first(modules["nonlin_attn.out"]), 1e-5)


def test_feed_forward_and_bypass_match_the_reference(modules: Tensors) -> None:
    x = batch_first(modules["in.x"])
    feed_forward = loaded(FeedForward(64, 96, 0.1), under(modules, "feed_forward.param."))
    bypass = loaded(Bypass(64), under(modules, "bypass.param."))
    with torch.no_grad():
        assert_near(feed_forward(x), batch_first(modules["feed_forward.out"]), 1e-5)
        assert_near(bypass(x, 1.3 * x.flip(1)), batch_first(modules["bypass.out"]), 1e-5)


@pytest.mark.parametrize("grad", [False, True])
def test_convolution_matches_the_reference(modules: Tensors, grad: bool) -> None:
    x, padding = batch_first(modules["in.x"]), modules["in.key_padding_mask"]
    module = loaded(ConvolutionModule(64, 15, causal=False), under(modules, "conv.param."))
    causal = loaded(ConvolutionModule(64, 15, causal=True), under(modules, "conv_causal.param."))
    with torch.set_grad_enabled(grad):
        assert_near(module(x, padding), batch_first(modules["conv.out"]), 1e-5)
        assert_near(module(x, None), batch_first(modules["conv.out_nomask"]), 1e-5)
        for chunk in (-1, 8, 16, 20, 64):
            assert_near(causal(x, padding, chunk), batch_first(modules[f"conv_causal.out_chunk{chunk}"]), 1e-5)


def test_convolution_streams_as_the_reference(modules: Tensors) -> None:
    module = loaded(ConvolutionModule(64, 15, causal=True), under(modules, "conv_causal.param."))
    assert isinstance(module, ConvolutionModule)
    size = modules["conv_causal.stream.out"].shape[0]
    x = batch_first(modules["in.x"])[:, :size]
    with torch.no_grad():
        out, cached = module.stream(x, torch.zeros(3, size, dtype=torch.bool), modules["conv_causal.stream.cache"].transpose(1, 2))
    assert_near(out, batch_first(modules["conv_causal.stream.out"]), 1e-5)
    assert_near(cached, modules["conv_causal.stream.new_cache"].transpose(1, 2), 1e-5)


@pytest.mark.parametrize("factor", [2, 4, 8])
def test_downsample_and_upsample_match_the_reference(modules: Tensors, factor: int) -> None:
    x = batch_first(modules["in.x"])
    module = loaded(Downsample(factor), under(modules, f"downsample{factor}.param."))
    with torch.no_grad():
        out = module(x)
    assert_near(out, batch_first(modules[f"downsample{factor}.out"]), 1e-5)
    assert_near(upsample(out, factor, x.shape[1]), batch_first(modules[f"downsample{factor}.up"]), 1e-5)


def test_convnext_matches_the_reference(modules: Tensors) -> None:
    module: nn.Module = loaded(ConvNeXt(16), under(modules, "convnext.param."))
    with torch.no_grad():
        assert_near(module(modules["in.image"]), modules["convnext.out"], 1e-5)


def test_layer_matches_the_reference(modules: Tensors) -> None:
    x, padding = batch_first(modules["in.x"]), modules["in.key_padding_mask"]
    positions = RelativePositions(48).eval()(x.shape[1], x.shape[1], x.device)
    plain = loaded(ZipformerLayer(layer_config()), under(modules, "layer.param."))
    causal = loaded(ZipformerLayer(layer_config(causal=True)), under(modules, "layer_causal.param."))
    hidden = padding[:, None, None]
    with torch.no_grad():
        assert_near(plain(x, positions, hidden, padding), batch_first(modules["layer.out"]), 1e-5)
        assert_near(plain(x, positions), batch_first(modules["layer.out_nomask"]), 1e-5)
        out = causal(x, positions, hidden | modules["in.attn_mask_chunk8"], padding, 8)
    assert_near(out, batch_first(modules["layer_causal.out"]), 1e-5)
