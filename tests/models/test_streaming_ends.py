"""Streaming of items that end within a chunk: what lies past their end is not heard."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from spear.models.zipformer import ZipformerEncoder, ZipformerStream
from spear.models.zipformer.streaming import EXTRA_FRAMES
from spear.types import LOG_EPSILON
from tests.models.parity import assert_near, random_batch, tiny_config


def causal(factors: tuple[int, ...]) -> ZipformerEncoder:
    """An encoder with weights that are not those of the start, and chunks of 4 frames."""
    torch.manual_seed(0)
    encoder = tiny_config(causal=True, chunk_size=4, left_context_frames=8, downsampling_factor=factors).build().eval()
    with torch.no_grad():
        for parameter in encoder.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return encoder


def run(stream: ZipformerStream, features: Tensor, lens: list[int], steps: int) -> list[Tensor]:
    """Valid output frames of every item, of features (N, T, F) with `lens` frames each."""
    state = stream.start(len(features))
    found: list[list[Tensor]] = [[] for _ in lens]
    for i in range(steps):
        begin = i * stream.hop_frames
        left = torch.tensor([min(max(length - begin, 0), stream.step_frames) for length in lens])
        out = stream.step(features[:, begin : begin + stream.step_frames], left, state)
        state = out.state
        for own, row, length in zip(found, out.features, out.lens.tolist()):
            own.append(row[:length])
    return [torch.cat(own) for own in found]


@pytest.mark.parametrize(("factors", "last"), [((1, 1), 3), ((1, 2), 2)], ids=["full_rate", "half_rate"])
def test_stream_does_not_hear_what_lies_past_the_end_of_the_last_chunk(factors: tuple[int, ...], last: int) -> None:
    stream = ZipformerStream(causal(factors))
    length = 2 * stream.hop_frames + EXTRA_FRAMES + 2 * last
    features, _ = random_batch([2 * stream.hop_frames + stream.step_frames])
    quiet, loud = features.clone(), features.clone()
    quiet[:, length:], loud[:, length:] = LOG_EPSILON, 100 * features[:, length:]
    (one,), (two,) = (run(stream, heard, [length], 3) for heard in (quiet, loud))
    assert len(one) == 2 * 4 + last
    assert_near(one, two, 1e-5)


def test_stream_of_items_of_different_lengths_equals_that_of_each_alone() -> None:
    stream = ZipformerStream(causal((1, 1)))
    features, _ = random_batch([61, 61])
    padded = features.clone()
    features[1, 43:] *= 100
    padded[1, 43:] = LOG_EPSILON
    together = run(stream, features, [61, 43], 6)
    assert [len(x) for x in together] == [24, 15]
    assert_near(together[0], run(stream, padded[:1], [61], 6)[0], 1e-5)
    assert_near(together[1], run(stream, padded[1:], [43], 6)[0], 1e-5)
