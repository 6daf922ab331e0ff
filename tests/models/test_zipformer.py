"""The encoder as a whole: sizes, padding, determinism, state dict, errors."""

from __future__ import annotations

import copy

import draccus
import pytest
import torch

from spear.errors import ConfigError, DataError
from spear.models.base import StudentConfig
from spear.models.zipformer import StackConfig, ZipformerConfig, ZipformerEncoder
from spear.models.zipformer.chunks import Chunking, chunk_mask
from spear.models.zipformer.encoder import feature_masks, fit_channels, join_channels
from spear.models.zipformer.subsampling import output_width
from spear.types import LOG_EPSILON
from tests.models.parity import random_batch, tiny_config
from tests.models.test_zipformer_parity import SIZES


def layer_count(stack: StackConfig) -> int:
    """Parameters of one layer, from the sizes alone."""
    d, heads, kernel = stack.dim, stack.num_heads, stack.kernel
    values, projected = stack.value_head_dim * heads, (2 * stack.query_head_dim + stack.pos_head_dim) * heads
    hidden = 3 * d // 4
    count = 3 * d + projected * (d + 1) + heads * stack.pos_head_dim * stack.pos_dim
    count += 2 * (values * (d + 1) + d * (values + 1))
    for width in (stack.feedforward_dim * 3 // 4, stack.feedforward_dim, stack.feedforward_dim * 5 // 4):
        count += width * (d + 1) + d * (width + 1)
    conv = d * (kernel + 1) // 2 + 3 * d * kernel + 2 * d if stack.causal else d * (kernel + 1)
    return count + 3 * hidden * (d + 1) + d * (hidden + 1) + 2 * (3 * d * (d + 1) + conv) + d + 1


@pytest.mark.parametrize(
    ("size", "changes", "total"),
    [
        ("base_1,2,3,3,1,1,1", {}, 93_289_489),
        ("large", {}, 326_951_472),
        ("large", {"causal": True}, 328_239_664),
        ("xlarge", {}, 596_973_362),
        ("xlarge", {"output_downsampling_factor": 2}, 596_973_364),
    ],
)
def test_encoder_has_the_published_number_of_parameters(size: str, changes: dict[str, object], total: int) -> None:
    config = ZipformerConfig(**{**SIZES[size], **changes})  # type: ignore[arg-type]
    stacks = config.stacks()
    expected = config.num_mel_bins + 144_625 + (128 * output_width(config.num_mel_bins) + 2) * stacks[0].dim
    for stack in stacks:
        expected += stack.num_layers * layer_count(stack) + (stack.downsampling + stack.dim if stack.downsampling > 1 else 0)
    expected += 2 if config.output_downsampling_factor == 2 else 0
    with torch.device("meta"):
        encoder = config.build()
    assert sum(parameter.numel() for parameter in encoder.parameters()) == expected == total
    assert not list(encoder.buffers())
    assert encoder.num_layers == sum(stack.num_layers for stack in stacks)
    assert encoder.layer_dims == [stack.dim for stack in stacks for _ in range(stack.num_layers)]


@pytest.mark.parametrize(("factor", "rate", "first"), [(1, 50.0, 0.045), (2, 25.0, 0.055)])
def test_encoder_states_its_rate_and_keeps_to_it(factor: int, rate: float, first: float) -> None:
    encoder = tiny_config(output_downsampling_factor=factor).build().eval()
    assert encoder.frame_rate_hz == rate
    assert encoder.first_frame_s == pytest.approx(first)
    out = encoder(*random_batch([100, 57]))
    assert out.lens.tolist() == [-(-46 // factor), -(-25 // factor)]
    assert out.features.shape == (2, -(-46 // factor), encoder.dim)
    assert [state.shape for state in out.hidden_states] == [(2, 46, 16), (2, 46, 24), (2, 46, 24)]


def test_encoder_ignores_padding_beyond_the_reach_of_the_front_end() -> None:
    torch.manual_seed(0)
    encoder = tiny_config().build().eval()
    length = 67  # 30 frames at 50 Hz: no group of two frames lies across the end
    features, lens = random_batch([120, length])
    features[1, length:] = LOG_EPSILON
    alone = encoder(features[1:, :length], lens[1:]).features
    padded = encoder(features, lens).features[1:, : alone.shape[1]]
    embed_alone, _ = encoder.encoder_embed(features[1:, :length], lens[1:])
    embed, _ = encoder.encoder_embed(features, lens)
    assert torch.allclose(embed[1, : alone.shape[1] - 3], embed_alone[0, :-3], atol=1e-6)
    # from the front end on nothing comes from padding: equal inputs give equal outputs
    inner_alone = encoder.encoder(embed[1:, : alone.shape[1]], torch.tensor([alone.shape[1]])).features
    assert torch.allclose(padded, inner_alone, atol=1e-5)


def test_encoder_without_padding_gives_each_item_its_own_result() -> None:
    torch.manual_seed(0)
    encoder = tiny_config().build().eval()
    features, lens = random_batch([90, 90, 90])
    together = encoder(features, lens).features
    for i in range(3):
        assert torch.allclose(together[i : i + 1], encoder(features[i : i + 1], lens[i : i + 1]).features, atol=1e-5)


def test_encoder_training_is_determined_by_the_seed() -> None:
    torch.manual_seed(3)
    encoder = tiny_config().build()
    encoder.set_batch_count(100.0)
    features, lens = random_batch([100, 57])
    runs = []
    for seed in (1, 1, 2):
        copied = copy.deepcopy(encoder)
        torch.manual_seed(seed)
        out = copied(features, lens).features
        out.square().mean().backward()
        grad = copied.encoder_embed.out.weight.grad
        assert grad is not None
        runs.append((out.detach(), grad))
    assert torch.equal(runs[0][0], runs[1][0])
    assert torch.equal(runs[0][1], runs[1][1])
    assert not torch.equal(runs[0][0], runs[2][0])


def test_encoder_evaluation_draws_nothing_and_passes_plain_gradients() -> None:
    torch.manual_seed(3)
    encoder = tiny_config().build().eval()
    encoder.set_batch_count(100.0)
    features, lens = random_batch([60])
    features.requires_grad_()
    before = torch.get_rng_state()
    grads = [torch.autograd.grad(encoder(features, lens).features.square().mean(), features)[0] for _ in range(2)]
    assert torch.equal(before, torch.get_rng_state())
    assert torch.equal(*grads)


def test_encoder_gives_every_live_parameter_a_gradient() -> None:
    torch.manual_seed(0)
    encoder = tiny_config(output_downsampling_factor=2).build()
    encoder.set_batch_count(0.0)
    for seed in range(4):  # whatever is skipped, all ranks must hold the same gradients
        torch.manual_seed(seed)
        encoder.zero_grad()
        encoder(*random_batch([100, 57])).features.square().mean().backward()
        missing = {name for name, p in encoder.named_parameters() if p.requires_grad and p.grad is None}
        assert missing == {"mask_emb"}
    dead = {name for name, p in encoder.named_parameters() if not p.requires_grad}
    assert {name.split("layers.")[1].split(".", 1)[1] for name in dead} == {"bypass_scale"}


def test_encoder_trains_in_bf16_close_to_float32() -> None:
    torch.manual_seed(0)
    encoder = tiny_config().build().eval()
    features, lens = random_batch([100, 57])
    exact = encoder(features, lens).features
    with torch.autocast("cpu", torch.bfloat16):
        rough = encoder(features, lens).features
    assert rough.dtype == torch.float32
    assert float((rough - exact).detach().abs().max()) < 0.1 * float(exact.detach().std())
    rough.square().mean().backward()
    assert all(p.grad is None or bool(p.grad.isfinite().all()) for p in encoder.parameters())


def test_state_dict_round_trip_restores_the_outputs() -> None:
    torch.manual_seed(0)
    config = tiny_config(causal=True, chunk_size=4, left_context_frames=8)
    first, second = config.build().eval(), config.build().eval()
    features, lens = random_batch([80])
    assert not torch.equal(first(features, lens).features, second(features, lens).features)
    second.load_state_dict(first.state_dict())
    assert torch.equal(first(features, lens).features, second(features, lens).features)


def test_layers_of_a_stack_start_equal_and_are_brought_in_one_after_another() -> None:
    encoder = tiny_config(num_encoder_layers=(1, 3)).build()
    layers = encoder.encoder.encoders[1].encoder.layers
    for name, parameter in layers[0].named_parameters():
        assert all(torch.equal(parameter, layer.get_parameter(name)) for layer in layers[1:])
        assert all(parameter is not layer.get_parameter(name) for layer in layers[1:])
    points = [layer.bypass.skip_rate.points for layer in layers]
    assert points[0][1][0] == points[1][0][0] < points[1][1][0] == pytest.approx(points[2][0][0])


def test_schedule_offset_is_added_to_the_batch_count() -> None:
    encoder = tiny_config(schedule_offset=20000.0).build()
    assert encoder.encoder_embed.value(encoder.encoder_embed.dropout) == 0.0
    encoder.set_batch_count(0.0)
    assert encoder.encoder_embed.value(encoder.encoder_embed.dropout) == pytest.approx(0.1)
    assert encoder.eval().encoder_embed.value(encoder.encoder_embed.dropout) == 0.0


@pytest.mark.parametrize(("shape", "lens", "shown"), [((1, 8, 20), [8], 8), ((2, 50, 20), [50, 5], 5)])
def test_encoder_raises_data_error_when_the_input_is_too_short(shape: tuple[int, ...], lens: list[int], shown: int) -> None:
    encoder = tiny_config().build().eval()
    with pytest.raises(DataError, match=f"an input has {shown} log-mel frames, but the encoder needs at least 9") as caught:
        encoder(torch.zeros(shape), torch.tensor(lens))
    assert caught.value.cause == "too_short"
    assert encoder(torch.zeros(1, 9, 20), torch.tensor([9])).features.shape[1] == 1


def test_encoder_raises_data_error_when_the_bins_are_others() -> None:
    with pytest.raises(DataError, match=r"features must be \(N, T, 20\), but are \(1, 50, 80\)"):
        tiny_config().build()(torch.zeros(1, 50, 80), torch.tensor([50]))


def test_feature_masks_hide_upper_channels_more_often_and_agree_between_stacks() -> None:
    torch.manual_seed(0)
    stacks = tiny_config().stacks()
    masks = feature_masks(stacks, torch.zeros(4000, 1, 1))
    assert [mask.shape[-1] for mask in masks] == [16, 24]
    shares = masks[0].mean(0)[0]
    assert shares[:8].tolist() == [1.0] * 8
    assert float(shares[8:12].mean()) == pytest.approx(0.875, abs=0.02)
    assert float(shares[12:].mean()) == pytest.approx(0.875**2, abs=0.02)
    assert torch.equal(masks[0][..., 8], masks[1][..., 12])
    assert torch.equal(masks[0][..., 15], masks[1][..., 23])


def test_join_channels_takes_missing_channels_from_the_latest_wider_output() -> None:
    outputs = [torch.full((1, 2, width), float(width)) for width in (6, 4, 5, 3)]
    assert join_channels(outputs)[0, 0].tolist() == [3.0, 3.0, 3.0, 5.0, 5.0, 6.0]
    assert join_channels(outputs[:1]) is outputs[0]
    assert fit_channels(outputs[3], 4)[0, 0].tolist() == [3.0, 3.0, 3.0, 0.0]


def test_chunk_mask_shows_the_own_chunk_and_the_left_ones() -> None:
    shown = ~chunk_mask(6, Chunking(2, 1), torch.device("cpu"))
    assert shown.int().tolist() == [[1, 1, 0, 0, 0, 0]] * 2 + [[1, 1, 1, 1, 0, 0]] * 2 + [[0, 0, 1, 1, 1, 1]] * 2
    assert (~chunk_mask(6, Chunking(2, -1), torch.device("cpu")))[5].all()


def test_causal_encoder_never_sees_later_chunks() -> None:
    torch.manual_seed(0)
    encoder = tiny_config(causal=True, chunk_size=4, left_context_frames=8).build().eval()
    embed = torch.randn(1, 16, 16)
    changed = embed.clone()
    changed[:, 8:] += 1.0
    lens = torch.tensor([16])
    first, second = encoder.encoder(embed, lens).features, encoder.encoder(changed, lens).features
    assert torch.allclose(first[:, :8], second[:, :8], atol=1e-6)
    assert not torch.allclose(first[:, 8:], second[:, 8:], atol=1e-2)


def test_causal_encoder_draws_chunk_sizes_only_in_training() -> None:
    encoder = tiny_config(causal=True, chunk_size=(4, 8, -1), left_context_frames=(8, 16, -1)).build()
    torch.manual_seed(0)
    drawn = {encoder.encoder.choose_chunking() for _ in range(100)}
    assert {chunking.size for chunking in drawn} == {4, 8, -1}
    assert Chunking(8, 1) in drawn
    assert Chunking(8, -1) in drawn
    encoder.eval()
    assert {encoder.encoder.choose_chunking() for _ in range(10)} == {Chunking(4, 2)}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_heads": (4, 4, 4)}, "`num_heads` must have 1 value or 2 .*, but has 3"),
        ({"cnn_module_kernel": 4}, "`cnn_module_kernel` must be odd and positive, but is 4"),
        ({"encoder_unmasked_dim": 20}, "`encoder_unmasked_dim` must be between 0 and the stack's width 16, but is 20"),
        ({"output_downsampling_factor": 4}, "`output_downsampling_factor` must be 1 or 2, but is 4"),
        ({"conv_channels": (8, 16)}, r"`conv_channels` must be three positive numbers, but is \[8, 16\]"),
        ({"pos_dim": 7}, "`pos_dim` must be even and positive, but is 7"),
        ({"num_mel_bins": 6}, "`num_mel_bins` must be at least 7, but is 6"),
        ({"dropout_end": 1.0}, "`dropout_end` must be at least 0 and below 1, but is 1.0"),
        ({"causal": True, "chunk_size": 3}, "`chunk_size` must be a multiple of the downsampling factor 2, but is 3"),
        ({"causal": True, "chunk_size": 2, "cnn_module_kernel": 9, "left_context_frames": 6}, "`left_context_frames` must be at least the 8 frames"),
    ],
)
def test_zipformer_config_raises_config_error_when_out_of_bounds(settings: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        tiny_config(**settings)


def test_zipformer_config_survives_json() -> None:
    config = tiny_config(num_heads=2, chunk_size=(8, 16))
    encoded = draccus.encode(config, StudentConfig)
    assert encoded["type"] == "zipformer"
    decoded = draccus.decode(StudentConfig, encoded)
    assert decoded == config
    assert isinstance(decoded.build(), ZipformerEncoder)


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore::DeprecationWarning")
def test_traced_encoder_takes_other_lengths() -> None:
    torch.manual_seed(0)
    encoder = tiny_config().build().eval().requires_grad_(False)

    class Tensors(torch.nn.Module):
        def forward(self, features: torch.Tensor, lens: torch.Tensor) -> torch.Tensor:
            return encoder(features, lens).features

    features, lens = random_batch([140, 80, 33], seed=1)
    with torch.no_grad():
        traced = torch.jit.trace(Tensors(), random_batch([100, 57]), check_trace=False)
        assert torch.allclose(traced(features, lens), encoder(features, lens).features, atol=1e-5)
