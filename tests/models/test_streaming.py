"""Streaming against the reference and against the chunk-masked offline pass."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from spear.errors import ConfigError, DataError
from spear.models.zipformer import ZipformerEncoder, ZipformerStream
from spear.models.zipformer.streaming import LayerState, StreamOutput
from tests.models.parity import Tensors, assert_near, config_of, loaded, random_batch, read, tiny_config, under


def run(stream: ZipformerStream, features: Tensor, steps: int) -> list[StreamOutput]:
    """All steps over features (N, T, F) long enough for them."""
    outputs = []
    state = stream.start(features.shape[0])
    for i in range(steps):
        piece = features[:, i * stream.hop_frames : i * stream.hop_frames + stream.step_frames]
        outputs.append(stream.step(piece, torch.full((features.shape[0],), piece.shape[1]), state))
        state = outputs[-1].state
    return outputs


def check_layer(found: LayerState, expected: Tensors) -> None:
    assert_near(found.keys.transpose(0, 1), expected["cached_key"], 1e-4)
    assert_near(found.nonlin[None], expected["cached_nonlin_attn"], 1e-4)
    assert_near(found.values1.transpose(0, 1), expected["cached_val1"], 1e-4)
    assert_near(found.values2.transpose(0, 1), expected["cached_val2"], 1e-4)
    assert_near(found.conv1.transpose(1, 2), expected["cached_conv1"], 1e-4)
    assert_near(found.conv2.transpose(1, 2), expected["cached_conv2"], 1e-4)


def test_stream_matches_the_reference(fixtures: Path) -> None:
    tensors, metadata = read(fixtures, "zipformer_tiny_causal")
    encoder = loaded(ZipformerEncoder(config_of(metadata)), under(tensors, "model."))
    assert isinstance(encoder, ZipformerEncoder)
    outputs = run(ZipformerStream(encoder), tensors["in.x"][:1], 7)
    assert_near(torch.cat([out.embed for out in outputs], dim=1), tensors["stream.out.embed"], 1e-4)
    assert_near(torch.cat([out.features for out in outputs], dim=1), tensors["stream.out.encoder_out"], 1e-4)
    for step in (1, 6):  # counted from zero
        state = outputs[step].state
        assert_near(state.embed, tensors[f"stream.after{step}.embed_cache"], 1e-4)
        assert len(state.layers) == encoder.num_layers
        for i, layer in enumerate(state.layers):
            check_layer(layer, under(tensors, f"stream.after{step}.layer{i}."))


@pytest.mark.parametrize(("factor", "left"), [(1, 8), (2, 8), (1, 10), (1, 14)])
def test_stream_equals_the_chunk_masked_pass(factor: int, left: int) -> None:
    torch.manual_seed(0)
    encoder = tiny_config(causal=True, chunk_size=4, left_context_frames=left, output_downsampling_factor=factor).build().eval()
    with torch.no_grad():
        for parameter in encoder.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    stream = ZipformerStream(encoder)
    steps = 6
    features, lens = random_batch([stream.hop_frames * steps + 13] * 2)
    streamed = torch.cat([out.features for out in run(stream, features, steps)], dim=1)
    offline = encoder(features, lens).features
    assert_near(streamed, offline[:, : streamed.shape[1]].detach(), 1e-5)


def test_stream_raises_config_error_when_the_encoder_cannot_stream() -> None:
    with pytest.raises(ConfigError, match="`causal` must be true for streaming, but is false"):
        ZipformerStream(tiny_config().build())
    encoder = tiny_config(causal=True, chunk_size=(4, 8), left_context_frames=8).build()
    with pytest.raises(ConfigError, match=r"`chunk_size` must be one positive number for streaming, but is \[4, 8\]"):
        ZipformerStream(encoder)


def test_stream_raises_data_error_when_a_step_has_another_length() -> None:
    stream = ZipformerStream(tiny_config(causal=True, chunk_size=4, left_context_frames=8).build().eval())
    with pytest.raises(DataError, match="a step takes 21 log-mel frames, but got 20"):
        stream.step(torch.zeros(1, 20, 20), torch.tensor([20]), stream.start())
