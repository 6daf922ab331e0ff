"""Audio in pieces gives the features of the whole."""

from __future__ import annotations

import pytest
import torch

from spear.errors import ConfigError, DataError
from spear.export import AudioEncoder
from tests.export.tiny import tiny_encoder, tone

CAUSAL = {"causal": True, "chunk_size": 8, "left_context_frames": 16}


def causal(**changes: object) -> AudioEncoder:
    return tiny_encoder(**{**CAUSAL, **changes})


def pushed(encoder: AudioEncoder, audio: torch.Tensor, sizes: list[int]) -> list[torch.Tensor]:
    """Features of every push, and of the end."""
    stream = encoder.stream()
    state, begin, found = stream.start(), 0, []
    while begin < len(audio):
        size = sizes[len(found) % len(sizes)]
        features, state = stream.push(audio[begin : begin + size], state)
        found.append(features)
        begin += size
    return [*found, stream.finish(state)]


@pytest.mark.parametrize("factor", [1, 2])
@pytest.mark.parametrize("sizes", [[1600], [37, 5000, 0, 411], [100_000]])
@pytest.mark.parametrize("samples", [16000 * 2, 16000 * 2 + 1234, 30_001])
def test_pieces_give_the_features_of_the_whole(factor: int, sizes: list[int], samples: int) -> None:
    encoder, audio = causal(output_downsampling_factor=factor), tone(samples)
    with torch.no_grad():
        whole = encoder(audio[None]).features
    streamed = torch.cat(pushed(encoder, audio, sizes), dim=1)
    assert streamed.shape == whole.shape
    last_chunk = 8 // factor + 3  # the end is padding to the whole pass, and silence to the stream
    torch.testing.assert_close(streamed[:, :-last_chunk], whole[:, :-last_chunk], rtol=1e-5, atol=1e-5)
    assert (streamed[:, -last_chunk:] - whole[:, -last_chunk:]).abs().mean() < 0.2 * whole.abs().mean()


def test_arrays_are_taken_like_tensors() -> None:
    stream, audio = causal().stream(), tone(9000)
    found = [stream.push(given, stream.start())[0] for given in (audio, audio.numpy())]
    assert found[0].shape[1] > 0
    assert torch.equal(*found)


def test_features_come_as_soon_as_the_look_ahead_is_there() -> None:
    encoder = causal()
    stream = encoder.stream()
    needed = round(16000 * (stream.chunk_s + 0.13 + 0.0075))  # 29 log-mel frames and the rest of the last one's window
    features, state = stream.push(tone(needed - 1), stream.start())
    assert features.shape[1] == 0
    features, _ = stream.push(tone(1), state)
    assert features.shape[1] == 8


def test_state_is_explicit_and_does_not_grow() -> None:
    encoder, audio = causal(), tone(16000)
    stream = encoder.stream()
    _, state = stream.push(audio, stream.start())
    first, after = stream.push(audio, state)
    again, _ = stream.push(audio, state)
    assert torch.equal(first, again)
    sizes = []
    for _ in range(20):
        _, after = stream.push(audio, after)
        sizes.append(len(after.audio) + sum(t.numel() for layer in after.network.layers for t in layer))
    assert max(sizes) - min(sizes) <= 2 * 16 * 160


def test_an_empty_stream_has_an_end() -> None:
    stream = causal().stream()
    assert stream.finish(stream.start()).shape == (1, 0, 48)
    _, state = stream.push(tone(700), stream.start())
    assert stream.finish(state).shape[1] == 0


def test_what_cannot_stream_is_refused() -> None:
    with pytest.raises(ConfigError, match="`causal` must be true"):
        tiny_encoder().stream()
    several = causal(chunk_size=(8, 16), left_context_frames=(16, 32))
    with pytest.raises(ConfigError, match=r"`chunk_size` must be one positive number for streaming, but is \[8, 16\]: choose one"):
        several.stream()
    with pytest.raises(ConfigError, match=r"`chunk_size` must be one of \[8, 16\]"):
        several.stream(chunk_size=4, left_context_frames=16)
    assert several.stream(chunk_size=16, left_context_frames=32).chunk_s == 0.32
    stream = causal().stream()
    with pytest.raises(DataError, match=r"must have the shape \(S,\), one channel, but has \(2, 800\)"):
        stream.push(torch.zeros(2, 800), stream.start())
    with pytest.raises(DataError, match="finite"):
        stream.push(torch.full((800,), float("nan")), stream.start())
