"""Conformer and Transformer students: the contract of an encoder, positions, padding, and what a layer is made of."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import nn

from spear.errors import ConfigError, DataError
from spear.models.base import Encoder, StudentConfig
from spear.models.conformer import ConformerConfig
from spear.models.masking import MaskConfig
from spear.models.rotary import RotaryAttention, rotate, rotation
from spear.models.student import Student
from spear.models.transformer import TransformerConfig
from spear.models.uniform import UniformConfig
from spear.models.zipformer.subsampling import Conv2dSubsampling, output_width
from tests.models.parity import random_batch

TINY: dict[str, Any] = {"num_mel_bins": 20, "conv_channels": (2, 3, 4), "num_layers": 3, "dim": 16, "num_heads": 2, "feedforward_dim": 24}
KINDS: dict[str, type[UniformConfig]] = {"conformer": ConformerConfig, "transformer": TransformerConfig}
kinds = pytest.mark.parametrize("kind", KINDS)


def tiny(kind: str, **changes: Any) -> UniformConfig:
    extra = {"kernel": 5} if kind == "conformer" else {}
    return KINDS[kind](**{**TINY, **extra, **changes})


def built(kind: str, **changes: Any) -> Encoder:
    torch.manual_seed(0)
    return tiny(kind, **changes).build()


def count(encoder: nn.Module) -> int:
    return sum(parameter.numel() for parameter in encoder.parameters())


@kinds
def test_uniform_encoder_is_a_variant_of_the_student(kind: str) -> None:
    assert StudentConfig.get_choice_class(kind) is KINDS[kind]


@kinds
@pytest.mark.parametrize("changes", [TINY, {}])
def test_uniform_encoder_has_the_parameters_that_its_sizes_say(kind: str, changes: dict[str, Any]) -> None:
    config = KINDS[kind](**changes)
    d, f, norm = config.dim, config.feedforward_dim, 2 * config.dim
    a, b, c = config.conv_channels
    front = 10 * a + b * (9 * a + 1) + c * (9 * b + 1) + 50 * c + 3 * c * (c + 1) + c * (3 * c + 1)
    front += d * (c * output_width(config.num_mel_bins) + 1) + d + 1 + config.num_mel_bins
    attention = 4 * d * (d + 1) + norm
    feed_forward = f * (d + 1) + d * (f + 1) + norm
    if isinstance(config, ConformerConfig):
        convolution = 2 * d * (d + 1) + d * (config.kernel + 1) + d * (d + 1) + 2 * norm
        expected = front + config.num_layers * (attention + 2 * feed_forward + convolution + norm)
    else:
        expected = front + config.num_layers * (attention + feed_forward) + norm
    with torch.device("meta"):
        assert count(config.build()) == expected
    if not changes:
        assert abs(expected / 93_289_489 - 1) < 0.005, "as large as SPEAR Base"


@kinds
def test_uniform_encoder_gives_frames_at_50_hz_and_every_layer(kind: str) -> None:
    encoder = built(kind).eval()
    out = encoder(*random_batch([100, 57]))
    assert (encoder.frame_rate_hz, encoder.num_layers, encoder.dim, encoder.layer_dims) == (50.0, 3, 16, [16, 16, 16])
    assert encoder.first_frame_s == pytest.approx(0.045)
    assert out.features.shape == (2, 46, 16)
    assert out.lens.tolist() == [46, 25]
    assert [state.shape for state in out.hidden_states] == [(2, 46, 16)] * 3
    normed = encoder.norm(out.hidden_states[-1])
    assert torch.equal(out.features, normed)
    assert isinstance(encoder.encoder_embed, Conv2dSubsampling)


@kinds
def test_uniform_encoder_layers_never_see_padding(kind: str) -> None:
    encoder = built(kind).eval()
    features, lens = random_batch([120, 67, 31])
    whole = encoder(features, lens)
    embed, frames = encoder.encoder_embed(features, lens)
    for i, length in enumerate(frames.tolist()):
        # the front end's output as it is in the batch, so that only the layers are asked
        alone = run_layers(encoder, embed[i : i + 1, :length])
        torch.testing.assert_close(whole.features[i, :length], alone[0], atol=1e-5, rtol=1e-5)


def run_layers(encoder: Encoder, x: torch.Tensor) -> torch.Tensor:
    positions = rotation(x.shape[1], encoder.dim // encoder.config.num_heads, x.device)
    for layer in encoder.layers:
        x, _ = layer(x, positions, None, None)
    found: torch.Tensor = encoder.norm(x)
    return found


@kinds
def test_uniform_encoder_gives_items_of_equal_length_their_own_result(kind: str) -> None:
    encoder = built(kind).eval()
    features, lens = random_batch([90, 90, 90])
    together = encoder(features, lens).features
    for i in range(3):
        torch.testing.assert_close(together[i : i + 1], encoder(features[i : i + 1], lens[i : i + 1]).features, atol=1e-5, rtol=1e-5)


@kinds
def test_uniform_encoder_passes_gradients_to_every_parameter(kind: str) -> None:
    encoder = built(kind)
    encoder.set_batch_count(5.0)
    features, lens = random_batch([100, 57])
    student = Student(encoder, MaskConfig(channel_length=5))
    student.train()
    torch.manual_seed(1)
    weights = torch.randn(encoder.dim)
    (student(features, lens, torch.Generator().manual_seed(0)).features * weights).sum().backward()
    without = [name for name, parameter in encoder.named_parameters() if parameter.grad is None or not bool(parameter.grad.any())]
    assert not without
    assert all(bool(parameter.grad.isfinite().all()) for parameter in encoder.parameters() if parameter.grad is not None)


@kinds
def test_uniform_encoder_training_is_determined_by_the_seed(kind: str) -> None:
    encoder = built(kind, dropout=0.3)
    batch = random_batch([100, 57])
    found = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        found.append(encoder(*batch).features)
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])
    encoder.eval()
    state = torch.random.get_rng_state()
    assert torch.equal(encoder(*batch).features, encoder(*batch).features)
    assert torch.equal(torch.random.get_rng_state(), state)


@kinds
def test_uniform_encoder_moves_the_front_end_s_schedules(kind: str) -> None:
    encoder = built(kind, schedule_offset=20_000.0)
    encoder.set_batch_count(1.0)
    convnext = encoder.encoder_embed.convnext
    assert convnext.batch_count == 20_001.0
    assert convnext.value(convnext.layerdrop_rate) == pytest.approx(0.015)


@kinds
def test_uniform_encoder_branches_start_small(kind: str) -> None:
    shallow, deep = (built(kind, num_layers=count) for count in (1, 4))
    sizes = [float(encoder.layers[0].attention.out_proj.weight.detach().abs().max()) for encoder in (shallow, deep)]
    assert sizes[1] == pytest.approx(sizes[0] / 2, rel=0.05)


@kinds
def test_uniform_encoder_raises_data_error_when_input_is_wrong(kind: str) -> None:
    encoder = built(kind)
    with pytest.raises(DataError, match=r"features must be \(N, T, 20\)"):
        encoder(torch.zeros(1, 50, 21), torch.tensor([50]))
    with pytest.raises(DataError, match="an input has 8 log-mel frames, but the encoder needs at least 9"):
        encoder(torch.zeros(2, 50, 20), torch.tensor([50, 8]))


@kinds
@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"dim": 18}, r"`dim` must be a multiple of 4 \(twice `num_heads`\), but is 18"),
        ({"num_layers": 0}, "`num_layers` must be positive, but is 0"),
        ({"dropout": 1.0}, "`dropout` must be at least 0 and below 1, but is 1.0"),
        ({"conv_channels": (1, 2)}, r"`conv_channels` must be three positive numbers, but is \[1, 2\]"),
        ({"num_mel_bins": 6}, "`num_mel_bins` must be at least 7, but is 6"),
        ({"schedule_offset": -1.0}, "`schedule_offset` must be at least 0, but is -1.0"),
    ],
)
def test_uniform_config_raises_config_error_when_a_value_is_out_of_bounds(kind: str, changes: dict[str, Any], match: str) -> None:
    with pytest.raises(ConfigError, match=match):
        tiny(kind, **changes)


def test_conformer_config_raises_config_error_when_kernel_is_even() -> None:
    with pytest.raises(ConfigError, match="`kernel` must be odd and positive, but is 4"):
        tiny("conformer", kernel=4)


def test_rotation_depends_on_the_distance_only() -> None:
    generator = torch.Generator().manual_seed(0)
    query, key = torch.randn(2, 8, generator=generator)
    cosines, sines = rotation(50, 8, torch.device("cpu"))
    turned = [rotate(vector.expand(50, 8), cosines, sines) for vector in (query, key)]
    scores = turned[0] @ turned[1].T
    for offset in (-7, 0, 3):
        diagonal = scores.diagonal(offset)
        torch.testing.assert_close(diagonal, diagonal[:1].expand_as(diagonal), atol=1e-4, rtol=0)
    torch.testing.assert_close(scores[0, 0], query @ key)
    # the first pair turns by one radian per frame, the last by 10000 ** -(3 / 4)
    assert float(cosines[1, 0]) == pytest.approx(math.cos(1.0))
    assert float(sines[1, 3]) == pytest.approx(math.sin(1e-3), rel=1e-4)


def test_rotary_attention_is_softmax_attention_on_turned_queries_and_keys() -> None:
    torch.manual_seed(0)
    attention = RotaryAttention(8, 2, 0.5).eval()
    x = torch.randn(2, 6, 8)
    positions = rotation(6, 4, x.device)
    visible = torch.arange(6) < torch.tensor([6, 4])[:, None]
    found = attention(x, positions, visible[:, None, None])
    queries, keys, values = attention.in_proj(x).split(8, dim=-1)
    heads = []
    for head in range(2):
        part = slice(4 * head, 4 * head + 4)
        scores = rotate(queries[..., part], *positions) @ rotate(keys[..., part], *positions).transpose(1, 2) / 2.0
        heads.append(scores.masked_fill(~visible[:, None], -math.inf).softmax(dim=-1) @ values[..., part])
    torch.testing.assert_close(found, attention.out_proj(torch.cat(heads, dim=-1)), atol=1e-6, rtol=1e-5)
