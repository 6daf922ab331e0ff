"""The training graph of the Zipformer: which regularisers stand where, with which numbers, and that each of them runs."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from spear.models.base import Encoder
from spear.models.zipformer import attention, encoder, layer
from spear.models.zipformer.attention import AttentionWeights
from spear.models.zipformer.balancer import Balancer
from spear.models.zipformer.downsample import Bypass
from spear.models.zipformer.gradient import ScaleGrad
from spear.models.zipformer.layer import ZipformerLayer
from spear.models.zipformer.norm import BiasNorm
from spear.models.zipformer.position import RelativePositions
from spear.models.zipformer.scheduled_float import Schedule, schedule
from spear.models.zipformer.whiten import Whiten
from tests.export.tiny import tiny_config

Number = float | Schedule
PROB = schedule((0, 0.5), (8000, 0.125), default=0.4)
FRONT: dict[str, tuple[Number, ...]] = {
    "conv.2": (1, 0.05, 0.95, 0.2, 1.0, PROB),
    "conv.5": (1, 0.05, 0.95, 0.2, 4.0, PROB),
    "conv.8": (1, 0.05, 0.95, 0.2, 4.0, PROB),
    "convnext.hidden_balancer": (1, 0.3, 1.0, 0.75, 5.0, PROB),
    "convnext.out_balancer": (1, 0.4, 0.6, 1.0, 6.0, PROB),
    "convnext.out_whiten": (1, 5.0, 0.01),
    "out_whiten": (1, schedule((0, 4.0), (20000, 8.0), default=4.0), 0.02),
}
FEED_FORWARD: dict[str, tuple[Number, ...]] = {
    "hidden_balancer": (-1, 0.3, 1.0, 0.75, 5.0, PROB),
    "out_whiten": (1, schedule((0, 7.5), (20000, 15.0), default=7.5), 0.01),
}
ATTENTION: dict[str, tuple[Number, ...]] = {"whiten": (1, schedule((0, 7.5), (20000, 22.5), default=7.5), 0.01)}
CONVOLUTION: dict[str, tuple[Number, ...]] = {
    "balancer1": (-1, schedule((0, 0.05), (8000, 0.025)), 1.0, 1.5, schedule((0, 5.0), (8000, 10.0), default=1.0), PROB),
    "balancer2": (-1, schedule((0, 0.1), (8000, 0.05)), 1.0, schedule((0, 0.2), (20000, 0.5)), 10.0, PROB),
    "whiten": (1, schedule((0, 7.5), (20000, 15.0), default=7.5), 0.01),
}
LAYER: dict[str, tuple[Number, ...]] = {
    "balancer_na": (-1, 0.3, 0.7, schedule((0, 0.004), (4000, 0.02)), 100.0, 0.05),
    "balancer_ff2": (-1, 0.3, 0.7, schedule((0, 0.0), (4000, 0.1)), 2.0, 0.05),
    "balancer_ff3": (-1, 0.3, 0.7, schedule((0, 0.0), (4000, 0.2)), 4.0, 0.05),
    "balancer1": (-1, 0.45, 0.55, 0.2, 4.0, PROB),
    "balancer2": (-1, 0.45, 0.55, 0.1, 4.0, PROB),
    "whiten": (1, schedule((0, 4.0), (20000, 12.0), default=4.0), 0.01),
    "self_attn_weights.balance_keys": (-1, 0.4, 0.6, 0.0, 100.0, 0.025),
    "self_attn_weights.whiten_keys": (4, schedule((0, 3.0), (20000, 6.0), default=3.0), 0.025),
    "nonlin_attention.balancer": (-1, schedule((0, 0.25), (20000, 0.05)), schedule((0, 0.75), (20000, 0.95)), 0.5, 5.0, PROB),
    "nonlin_attention.whiten1": (1, schedule((0, 5.0), (20000, 10.0), default=5.0), 0.01),
    "nonlin_attention.whiten2": (1, schedule((0, 5.0), (20000, 15.0), default=5.0), 0.01),
    **{f"self_attn{k}.{name}": row for k in (1, 2) for name, row in ATTENTION.items()},
    **{f"conv_module{k}.{name}": row for k in (1, 2) for name, row in CONVOLUTION.items()},
    **{f"feed_forward{k}.{name}": row for k in (1, 2, 3) for name, row in FEED_FORWARD.items()},
}
"""Balancer: channel dimension, share of positives, size, probability. Whiten: groups, limit, scale of the gradient."""
LENS = torch.tensor([80, 61])


def built() -> Encoder:
    torch.manual_seed(0)
    return tiny_config().build().train()


def features() -> Tensor:
    return torch.randn(2, 80, 128, generator=torch.Generator().manual_seed(1))


def settings(module: nn.Module) -> dict[str, tuple[Number, ...]]:
    found: dict[str, tuple[Number, ...]] = {}
    for name, part in module.named_modules():
        if isinstance(part, Balancer):
            found[name] = (part.channel_dim, part.min_positive, part.max_positive, part.min_abs, part.max_abs, part.prob)
        elif isinstance(part, Whiten):
            found[name] = (part.num_groups, part.limit, part.grad_scale)
    return found


def layers(model: nn.Module) -> list[ZipformerLayer]:
    return [part for part in model.modules() if isinstance(part, ZipformerLayer)]


def test_balancers_and_whiteners_have_the_bounds_of_the_reference() -> None:
    model = built()
    assert settings(model.encoder_embed) == FRONT
    assert settings(layers(model)[1]) == LAYER
    assert [part.scale for part in model.modules() if isinstance(part, ScaleGrad)] == [0.2]


def test_every_regulariser_and_module_of_a_layer_runs_once_in_a_training_step(monkeypatch: pytest.MonkeyPatch) -> None:
    model, ran = built(), Counter[int]()
    apply_to = Balancer.apply_to

    def balanced(self: Balancer, x: Tensor) -> Tensor:
        ran[id(self)] += 1
        return apply_to(self, x)

    monkeypatch.setattr(Balancer, "apply_to", balanced)
    monkeypatch.setattr("spear.models.zipformer.balancer.happens", lambda prob: True)
    counted: dict[str, nn.Module] = {}
    for name, part in model.named_modules():
        is_block = name.rpartition(".")[2] in {key.split(".")[0] for key in LAYER if "." in key}
        if isinstance(part, (Whiten, ScaleGrad, BiasNorm, Bypass)) or is_block:
            part.register_forward_hook(lambda module, inputs, output: ran.update([id(module)]))
            counted[name] = part
        elif isinstance(part, Balancer):
            counted[name] = part
    model(features(), LENS).features.sum().backward()
    assert {name: ran[id(part)] for name, part in counted.items()} == dict.fromkeys(counted, 1)


def test_feature_masks_silence_the_input_of_every_layer_in_training_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    model = built()
    monkeypatch.setattr(encoder, "feature_masks", lambda stacks, x: [torch.zeros(2, 1, stack.dim) for stack in stacks])
    seen: list[float] = []
    for part in layers(model):
        part.register_forward_pre_hook(lambda module, inputs: seen.append(float(inputs[0].detach().abs().max())))
    model(features(), LENS)
    assert seen == [0.0, 0.0]
    model.eval()(features(), LENS)
    assert min(seen[2:]) > 0.0


def test_layer_whose_branches_are_all_skipped_keeps_the_first_feed_forward_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    part = layers(built())[0]
    monkeypatch.setattr(layer, "keep_mask", lambda shape, prob, like: torch.zeros(shape))
    monkeypatch.setattr(layer, "drop_items", lambda x, prob: torch.zeros_like(x))
    for name in ("attention_skip_rate", "conv_skip_rate", "ff2_skip_rate", "ff3_skip_rate"):
        setattr(part, name, 0.5)
    x = torch.randn(2, 9, 32)
    with torch.no_grad():
        found = part(x, RelativePositions(48)(9, 9, x.device))
        middle = x + 0.5 * part.feed_forward1(x)
        wanted = x + 0.5 * (part.norm(middle) - x)
    torch.testing.assert_close(found, wanted)


def test_scores_beyond_25_are_penalised(monkeypatch: pytest.MonkeyPatch) -> None:
    caught: list[Any] = []
    asked: list[float] = []
    monkeypatch.setattr(attention, "happens", lambda prob: asked.append(prob) or prob == 0.1)  # type: ignore[func-returns-value]
    monkeypatch.setattr(attention, "penalize_large", lambda x, *numbers: caught.append(numbers) or x)  # type: ignore[func-returns-value]
    part = AttentionWeights(8, pos_dim=6, num_heads=2, query_head_dim=4, pos_head_dim=2).train()
    part(torch.randn(1, 5, 8, requires_grad=True), torch.randn(9, 6), None)
    assert caught == [(25.0, 1e-4)]
    assert asked == [0.0, 0.1]
    scores = torch.tensor([24.9, 25.1, -24.9, -25.1])
    torch.testing.assert_close(part.pull(scores, torch.zeros(4)), torch.tensor([0.0, 1e-4, 0.0, -1e-4]))


@pytest.mark.parametrize(
    ("name", "scale"),
    [
        *(("self_attn_weights.linear_pos", 0.05), ("self_attn1.out_proj", 0.05), ("self_attn2.out_proj", 0.05)),
        *(("nonlin_attention.out_proj", 0.05), ("conv_module1.out_proj", 0.05), ("conv_module2.out_proj", 0.05)),
        *(("feed_forward1.out_proj", 0.1), ("feed_forward2.out_proj", 0.1), ("feed_forward3.out_proj", 0.1)),
        *(("self_attn_weights.in_proj", 8**-0.25), ("feed_forward1.in_proj", 1.0), ("conv_module1.in_proj", 1.0)),
    ],
)
def test_initial_weights_are_uniform_with_the_scale_of_the_reference(name: str, scale: float) -> None:
    part = layers(built())[0].get_submodule(name)
    limit = scale * part.weight.shape[1] ** -0.5
    assert 0.95 * limit < float(part.weight.detach().abs().max()) <= limit * (1 + 1e-6)
    if scale != 1.0 and part.bias is not None:
        assert 0.8 * 0.1 * scale < float(part.bias.detach().abs().max()) <= 0.1 * scale * (1 + 1e-6)


def test_positions_lose_15_percent_of_their_numbers_in_training() -> None:
    torch.manual_seed(0)
    table = RelativePositions(48)
    whole = table.eval()(200, 200, torch.device("cpu"))
    found = table.train()(200, 200, torch.device("cpu"))
    lost = found == 0.0
    assert float(lost.float().mean()) == pytest.approx(0.15, abs=0.01)
    torch.testing.assert_close(found[~lost], whole[~lost] / 0.85)
