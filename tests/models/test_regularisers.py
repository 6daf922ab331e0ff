"""The training-time parts: what they do to gradients, how often, and never in evaluation."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck
from torch.nn import functional as F

from spear.models.zipformer.attention import add_shifted, shift_to_offsets, softmax
from spear.models.zipformer.balancer import Balancer
from spear.models.zipformer.chance import drop_items, shared_dropout
from spear.models.zipformer.depthwise import depthwise_conv1d
from spear.models.zipformer.downsample import Bypass
from spear.models.zipformer.gradient import ScaleGrad, limit_parameter
from spear.models.zipformer.norm import BiasNorm, bias_norm
from spear.models.zipformer.scheduled_float import ScheduledModule, schedule
from spear.models.zipformer.swoosh import BLOCK, swoosh_l, swoosh_r
from spear.models.zipformer.whiten import HIGH_PROB, LOW_PROB, Whiten, whitening_metric


def gradient(module: torch.nn.Module, x: Tensor, grad: Tensor) -> Tensor:
    """Gradient of x when `grad` arrives behind `module`."""
    leaf = x.clone().requires_grad_()
    out = module(leaf)
    assert torch.equal(out, x)
    return torch.autograd.grad(out, leaf, grad)[0]


@pytest.mark.parametrize("function", [swoosh_l, swoosh_r])
def test_swoosh_gradient_is_exact(function: object) -> None:
    assert callable(function)
    assert gradcheck(function, (torch.linspace(-30.1, 29.3, 41, dtype=torch.float64).requires_grad_(),))


def test_swoosh_does_not_depend_on_blocks_layout_or_gradient_mode() -> None:
    torch.manual_seed(0)
    x = torch.randn(3, 5, 2 * BLOCK // 10 + 7) * 4
    expected = F.softplus(x.double() - 1) - 0.08 * x.double() - 0.313261687
    for layout in (x, x.transpose(0, 2), x[:, ::2], x[:, :, 1:], x[:0]):
        wanted = F.softplus(layout.double() - 1) - 0.08 * layout.double() - 0.313261687
        assert torch.allclose(swoosh_r(layout).double(), wanted, atol=1e-5)
        leaf = layout.clone(memory_format=torch.preserve_format).requires_grad_()
        out = swoosh_r(leaf)
        assert torch.allclose(out.double(), wanted, atol=1e-5)
        grad = torch.autograd.grad(out, leaf, torch.ones_like(out).flip(0))[0]
        assert torch.allclose(grad.double(), torch.sigmoid(layout.double() - 1) - 0.08, atol=1e-6)
    rough = swoosh_r(x.bfloat16())
    assert rough.dtype == torch.bfloat16
    assert torch.allclose(rough.double(), expected, atol=0.1)


def test_swoosh_keeps_one_tensor_for_the_backward_pass() -> None:
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):  # type: ignore[func-returns-value]
        x = torch.randn(10, requires_grad=True)
        swoosh_l(x)
    assert len(kept) == 1
    assert kept[0] is x


def test_bias_norm_gradient_is_exact() -> None:
    torch.manual_seed(0)
    x, bias = torch.randn(2, 3, 5, dtype=torch.float64), torch.randn(5, dtype=torch.float64)
    log_scale = torch.tensor(0.3, dtype=torch.float64)
    assert gradcheck(bias_norm, tuple(t.requires_grad_() for t in (x, bias, log_scale)))


def test_bias_norm_ignores_the_size_of_its_input_when_the_bias_is_zero() -> None:
    norm = BiasNorm(16).eval()
    torch.nn.init.zeros_(norm.bias)
    x = torch.randn(2, 3, 16)
    assert torch.allclose(norm(x), norm(7.0 * x), atol=1e-5)
    assert torch.allclose(norm(x).square().mean(-1).sqrt(), norm.log_scale.exp().expand(2, 3), atol=1e-5)


@pytest.mark.parametrize(("frames", "kernel", "padding"), [(50, 7, 3), (3, 15, 7), (33, 5, 0), (64, 1, 0)])
def test_depthwise_convolution_equals_conv1d(frames: int, kernel: int, padding: int) -> None:
    torch.manual_seed(0)
    leaves = [torch.randn(shape, requires_grad=True) for shape in ((2, frames, 6), (6, 1, kernel), (6,))]
    out = depthwise_conv1d(*leaves, padding)
    expected = F.conv1d(leaves[0].transpose(1, 2), leaves[1], leaves[2], padding=padding, groups=6).transpose(1, 2)
    grad = torch.randn_like(expected)
    assert torch.allclose(out, expected, atol=1e-5)
    for found, wanted in zip(torch.autograd.grad(out, leaves, grad), torch.autograd.grad(expected, leaves, grad)):
        assert torch.allclose(found, wanted, atol=1e-4)


@pytest.mark.parametrize(("queries", "keys"), [(1, 1), (1, 4), (2, 2), (5, 5), (3, 7)])
def test_position_scores_move_to_their_keys(queries: int, keys: int) -> None:
    rows = queries + keys - 1
    scores = torch.randn(2, 3, queries, rows, dtype=torch.float64, requires_grad=True)
    moved = shift_to_offsets(scores, keys)
    for t in range(queries):
        for s in range(keys):
            offset = s - (keys - queries) - t
            assert torch.equal(moved[:, :, t, s], scores[:, :, t, offset + keys - 1])
    content = torch.randn(2, 3, queries, keys, dtype=torch.float64, requires_grad=True)
    assert gradcheck(add_shifted, (content, scores))


def test_softmax_of_bf16_scores_is_that_of_float32() -> None:
    torch.manual_seed(0)
    scores = (5 * torch.randn(2, 3, 4, 50)).bfloat16().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        weights = softmax(scores)
    assert weights.dtype == torch.bfloat16
    assert torch.equal(weights, scores.float().softmax(-1).bfloat16())


def test_balancer_pushes_channels_towards_their_bounds() -> None:
    torch.manual_seed(0)
    x = torch.randn(2000, 4) * torch.tensor([1.0, 1.0, 100.0, 0.001]) + torch.tensor([0.0, 3.0, 0.0, 0.0])
    balancer = Balancer(min_positive=0.4, max_positive=0.6, min_abs=0.2, max_abs=4.0, prob=1.0)
    grad = torch.ones_like(x)
    push = gradient(balancer, x, grad) - grad
    assert float(push[:, 0].abs().max()) == 0.0  # within all bounds
    assert float(push[:, 1].mean()) > 0.0  # a descent step lowers the mean
    assert float((push[:, 2] * x[:, 2]).mean()) > 0.0  # shrinks
    assert float((push[:, 3] * x[:, 3]).mean()) < 0.0  # grows
    assert push[:, 1:].square().mean(0).sqrt().tolist() == pytest.approx([0.04] * 3, rel=1e-4)


def test_whiten_makes_channels_whiter_and_visits_less_often_once_they_are() -> None:
    torch.manual_seed(0)
    x = torch.randn(500, 1) + 0.2 * torch.randn(500, 8)
    whiten = Whiten(2.0, grad_scale=0.01)
    assert float(whitening_metric(x, 1)) > 2.0
    grad = torch.randn_like(x)
    whiten.load_training_state(1.0)
    push = gradient(whiten, x, grad) - grad
    assert whiten.training_state() == HIGH_PROB
    assert float(push.norm() / grad.norm()) == pytest.approx(0.01, rel=1e-3)
    assert float(whitening_metric(x - 5.0 * push / push.norm(), 1)) < float(whitening_metric(x, 1))
    white = torch.randn(500, 8)
    whiten.load_training_state(1.0)
    assert torch.equal(gradient(whiten, white, grad), grad)
    assert whiten.training_state() == LOW_PROB
    assert float(whitening_metric(torch.randn(20000, 8), 4)) == pytest.approx(1.0, abs=0.01)


def test_whiten_gradient_is_that_of_the_metric() -> None:
    torch.manual_seed(0)
    x = torch.randn(60, 2, 6) @ torch.randn(6, 6)
    leaf = x.clone().requires_grad_()
    direction = torch.autograd.grad(whitening_metric(leaf, 2), leaf)[0]
    whiten = Whiten(1.0, num_groups=2)
    whiten.load_training_state(1.0)
    grad = torch.randn_like(x)
    push = gradient(whiten, x, grad) - grad
    assert float(F.cosine_similarity(push.flatten(), direction.flatten(), dim=0)) == pytest.approx(1.0, abs=1e-4)


@pytest.mark.parametrize("module", [Balancer(prob=1.0, max_abs=0.1), Whiten(1.0), ScaleGrad(0.2)])
def test_regularisers_leave_evaluation_and_constants_alone(module: torch.nn.Module) -> None:
    if isinstance(module, Whiten):
        module.load_training_state(1.0)
    x = torch.randn(50, 4).cumsum(1)
    grad = torch.ones_like(x)
    module.train()
    assert not torch.equal(gradient(module, x, grad), grad)
    assert module(x) is x
    module.eval()
    leaf = x.clone().requires_grad_()
    assert module(leaf) is leaf
    module.train()
    with torch.no_grad():
        assert module(leaf) is leaf


def test_regularisers_are_visited_with_their_probability() -> None:
    torch.manual_seed(0)
    x = torch.randn(5, 2, requires_grad=True)
    balancer = Balancer(prob=0.3)
    visits = sum(balancer(x) is not x for _ in range(1000))
    assert visits == pytest.approx(300, abs=60)
    limited = sum(limit_parameter(x, 0.0, 1.0, training=True) is not x for _ in range(1000))
    assert limited == pytest.approx(600, abs=60)


def test_bypass_in_training_skips_whole_items_and_keeps_its_scale_in_range() -> None:
    torch.manual_seed(0)
    bypass = Bypass(3, skip_rate=0.5)
    orig, new = torch.zeros(1000, 2, 3), torch.ones(1000, 2, 3)
    skipped = (bypass(orig, new) == 0.0).flatten(1)
    assert torch.equal(skipped.any(1), skipped.all(1))
    assert float(skipped.float().mean()) == pytest.approx(0.5, abs=0.06)
    bypass.eval()
    assert torch.equal(bypass(orig, new), torch.full_like(new, 0.5))


def test_bypass_gradient_turns_where_the_scale_is_too_small() -> None:
    bypass = Bypass(1)
    bypass.batch_count = 0.0  # the lower limit is 0.9, the scale 0.5
    signs = set()
    for seed in range(20):
        torch.manual_seed(seed)
        bypass.zero_grad()
        bypass(torch.zeros(1, 1, 1), torch.ones(1, 1, 1)).sum().backward()  # descent would lower the scale
        assert bypass.bypass_scale.grad is not None
        signs.add(float(bypass.bypass_scale.grad.sign()))
    assert signs == {1.0, -1.0}


def test_dropouts_share_their_mask_as_they_say() -> None:
    torch.manual_seed(0)
    x = torch.ones(300, 4, 5)
    dropped = shared_dropout(x, 0.2)
    assert torch.equal(dropped[:, :1].expand_as(dropped), dropped)
    assert float(dropped.mean()) == pytest.approx(1.0, abs=0.05)
    assert sorted(set(dropped.flatten().tolist())) == pytest.approx([0.0, 1.25])
    items = drop_items(x, 0.2).flatten(1)
    assert set(items.mean(1).tolist()) == {0.0, 1.0}
    assert float(items.mean()) == pytest.approx(0.8, abs=0.07)
    assert drop_items(x, 0.0) is x


def test_schedule_is_linear_between_points_and_constant_outside() -> None:
    rate = schedule((10, 1.0), (20, 3.0), (40, 0.0), default=7.0)
    assert [rate(count) for count in (0, 10, 15, 20, 30, 40, 99)] == [1.0, 1.0, 2.0, 3.0, 1.5, 0.0, 0.0]
    module = ScheduledModule()
    assert module.value(rate) == 7.0
    module.batch_count = 15
    assert module.value(rate) == 2.0
    assert module.value(0.5) == 0.5
    assert module.eval().value(rate) == 7.0
