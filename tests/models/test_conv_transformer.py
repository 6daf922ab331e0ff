"""The encoder of samples: sizes and times, padding, masks, taps, and the same numbers as its formula."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from spear.data.fbank import num_fbank_frames
from spear.data.inputs import INPUTS, sample_frames
from spear.errors import ConfigError, DataError
from spear.export import AudioEncoder
from spear.models.conv_transformer import ConvTransformer, ConvTransformerConfig, normalise_samples
from spear.models.masking import MaskConfig, draw_masks
from spear.models.student import Student

TINY: dict[str, Any] = {
    "conv_dim": 8,
    "num_layers": 3,
    "dim": 16,
    "num_heads": 2,
    "feedforward_dim": 24,
    "position_layers": 2,
    "position_kernel": 5,
    "position_groups": 4,
}


def tiny(**changes: Any) -> ConvTransformer:
    torch.manual_seed(0)
    return ConvTransformerConfig(**{**TINY, **changes}).build()


def batch(*samples: int) -> tuple[torch.Tensor, torch.Tensor]:
    lens = torch.tensor(samples)
    audio = 0.1 * torch.randn(len(samples), max(samples), generator=torch.Generator().manual_seed(1))
    return INPUTS["samples"].batch(audio, lens, 160)


def test_base_has_the_size_and_times_of_spidr() -> None:
    config = ConvTransformerConfig()
    with torch.device("meta"):
        encoder = config.build()
    assert sum(p.numel() for p in encoder.parameters()) == 93_136_640  # 93.1 M
    assert (config.hop, config.field, encoder.frame_rate_hz, encoder.first_frame_s) == (320, 400, 50.0, 0.0125)
    assert encoder.min_fbank_frames == 3


@pytest.mark.parametrize("samples", [400, 719, 720, 8000, 8081, 16_000])
def test_frames_of_the_output_are_those_that_are_promised(samples: int) -> None:
    encoder = tiny().eval()
    features, lens = batch(samples)
    frames = num_fbank_frames(samples)
    out = encoder(features, lens)
    assert out.features.shape[1] == encoder.output_frames(frames) == int(out.lens[0])
    assert abs(out.features.shape[1] - ((samples - 400) // 320 + 1)) <= 1


def test_sample_frames_hold_the_samples() -> None:
    audio = torch.arange(500.0)
    frames = sample_frames(audio)
    assert frames.shape == (3, 160)
    assert torch.equal(frames.flatten(), audio[:480])
    assert torch.equal(sample_frames(audio[:250]).flatten(), F.pad(audio[:250], (0, 70)))
    with pytest.raises(DataError, match="at least 80 samples"):
        sample_frames(audio[:10])


def test_samples_are_normalised_by_item() -> None:
    features, lens = batch(8000, 4800)
    x = normalise_samples(3 * features + 0.5, lens)
    for row, length in zip(x, lens.tolist()):
        valid = row[: 160 * length]
        torch.testing.assert_close(valid.mean(), torch.tensor(0.0), atol=1e-5, rtol=0)
        torch.testing.assert_close(valid.var(correction=0), torch.tensor(1.0), atol=1e-3, rtol=0)
        assert not row[160 * length :].any()


def test_items_do_not_depend_on_the_batch() -> None:
    encoder = tiny().eval()
    features, lens = batch(8000, 4800, 6400)
    together = encoder(features, lens)
    for i, length in enumerate(lens.tolist()):
        alone = encoder(features[i : i + 1, :length], lens[i : i + 1])
        frames = int(alone.lens[0])
        for found, wanted in zip((together.features, *together.hidden_states), (alone.features, *alone.hidden_states)):
            torch.testing.assert_close(found[i : i + 1, :frames], wanted)


def test_masks_hide_frames_after_the_convolutions() -> None:
    masking = MaskConfig(time_prob=0.5, time_length=4, channel_prob=0.3, channel_length=4)
    encoder = tiny(dropout=0.0)
    features, lens = batch(8000, 6400)
    out = Student(encoder, masking)(features, lens, torch.Generator().manual_seed(3))
    time, channel = draw_masks(masking, encoder.output_lens(lens), out.features.shape[1], 16, torch.Generator().manual_seed(3))
    assert torch.equal(out.masked_share, time.float())
    seen: list[torch.Tensor] = []
    encoder.positions.register_forward_pre_hook(lambda _, arguments: seen.append(arguments[0]))
    encoder.forward_masked(features, lens, time, channel)
    plain = encoder.conv_front_end(normalise_samples(features, lens))
    wanted = torch.where(time[:, :, None], encoder.mask_emb, plain).masked_fill(channel[:, None], 0.0)
    torch.testing.assert_close(seen[0], wanted)


def test_taps_are_the_layer_and_its_feed_forward_module() -> None:
    encoder = tiny().eval()
    features, lens = batch(8000)
    blocks = encoder(features, lens).hidden_states
    encoder.read_at("ffn_pre_residual")
    out = encoder(features, lens)
    assert torch.equal(blocks[-1], out.features)
    layer, x = encoder.layers[2], blocks[1]
    visible = torch.ones(1, 1, 1, x.shape[1], dtype=torch.bool)
    torch.testing.assert_close(layer(x, visible)[1], out.hidden_states[2])


def test_conv_gradient_scales_what_reaches_the_convolutions() -> None:
    norms = []
    for factor in (1.0, 0.1):
        encoder = tiny(conv_gradient=factor, dropout=0.0)
        features, lens = batch(8000)
        encoder(features, lens).features.square().mean().backward()
        norms.append((encoder.conv_front_end.convs[0].weight.grad.norm(), encoder.conv_front_end.proj.weight.grad.norm()))
    torch.testing.assert_close(norms[1][0], 0.1 * norms[0][0])
    torch.testing.assert_close(norms[1][1], norms[0][1])


def test_layer_drop_skips_layers_in_training_only() -> None:
    encoder = tiny(layer_drop=0.99, dropout=0.0)
    features, lens = batch(8000)
    states = encoder(features, lens).hidden_states
    assert any(torch.equal(a, b) for a, b in itertools.pairwise(states))
    encoder.eval()
    states = encoder(features, lens).hidden_states
    assert not any(torch.equal(a, b) for a, b in itertools.pairwise(states))


def test_long_audio_is_encoded_in_windows_of_the_right_frames() -> None:
    encoder = AudioEncoder(tiny().eval(), ConvTransformerConfig(**TINY))
    audio = 0.1 * torch.randn(16_000 * 7)
    with torch.no_grad():
        whole = encoder(audio)
    pieces = encoder.encode_long(audio, window_s=4.0, overlap_s=2.0)
    assert pieces.features.shape == whole.features.shape
    assert int(pieces.lens[0]) == whole.features.shape[1]
    cosine = F.cosine_similarity(pieces.features, whole.features, dim=2)
    assert float(cosine.mean()) > 0.99


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"conv_strides": (5, 2, 2, 2, 2, 2)}, "`conv_kernels` and `conv_strides` must be as many"),
        ({"position_kernel": 4}, "`position_kernel` must be odd"),
        ({"num_heads": 3}, "`dim` must be a multiple of `num_heads` 3"),
        ({"layer_drop": 1.0}, "`layer_drop` must be"),
        ({"conv_gradient": 2.0}, "`conv_gradient` must be"),
        ({"conv_strides": (5, 2, 2, 2, 2, 1, 1)}, "a multiple of 160, but it is 80"),
    ],
)
def test_config_raises_config_error_when_out_of_bounds(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        ConvTransformerConfig(**{**TINY, **changes})


def test_short_input_raises_data_error() -> None:
    features, lens = batch(399)
    with pytest.raises(DataError, match="needs at least 3"):
        tiny().eval()(features[:, :2], lens.clamp(max=2))
