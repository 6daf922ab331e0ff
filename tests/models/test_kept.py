"""Modules that keep little for the backward pass have the outputs and gradients of the plain ones."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from spear.models.zipformer.downsample import Bypass
from spear.models.zipformer.gate import Kind, gated
from spear.models.zipformer.linear import Linear, linear, swoosh_linear
from spear.models.zipformer.swoosh import Swoosh, swoosh_l, swoosh_r
from tests.models.parity import random_batch, tiny_config

low = pytest.mark.parametrize("low", [False, True], ids=["fp32", "bf16"])


def precision(low: bool) -> AbstractContextManager[object]:
    return torch.autocast("cpu", torch.bfloat16) if low else nullcontext()


def leaves(*shapes: tuple[int, ...]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator).requires_grad_() for shape in shapes]


def same_gradients(found: Tensor, wanted: Tensor, inputs: list[Tensor], tolerance: float) -> None:
    assert found.dtype == wanted.dtype
    torch.testing.assert_close(found, wanted, rtol=tolerance, atol=tolerance)
    grad = torch.randn(found.shape, generator=torch.Generator().manual_seed(1)).to(found.dtype)
    for a, b in zip(torch.autograd.grad(found, inputs, grad), torch.autograd.grad(wanted, inputs, grad)):
        assert a.dtype == b.dtype == torch.float32
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance * float(b.abs().max()))


@low
@pytest.mark.parametrize("bias", [True, False])
def test_linear_is_that_of_torch(low: bool, bias: bool) -> None:
    inputs = leaves((2, 5, 8), (7, 8), (7,))[: 3 if bias else 2]
    with precision(low):
        same_gradients(linear(*inputs), F.linear(*inputs), inputs, 4e-3 if low else 1e-6)


def test_linear_keeps_the_parameter_and_no_copy_of_it() -> None:
    layer, kept = Linear(8, 7), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t), precision(low=True):  # type: ignore[func-returns-value]
        layer(torch.randn(2, 5, 8, requires_grad=True))
    assert [tuple(t.shape) for t in kept] == [(2, 5, 8), (7, 8)]
    assert kept[1] is layer.weight
    assert kept[0].dtype == torch.bfloat16


@low
@pytest.mark.parametrize("swoosh", [swoosh_l, swoosh_r])
@pytest.mark.parametrize("dropout", [True, False])
def test_swoosh_linear_is_three_operations(low: bool, swoosh: Swoosh, dropout: bool) -> None:
    x, weight, bias = inputs = leaves((2, 5, 8), (7, 8), (7,))
    with precision(low):
        value = x.bfloat16() if low else x
        keep = torch.tensor([0.0, 1.0, 2.0, 1.0]).repeat(2, 1, 2).to(value.dtype) if dropout else None
        hidden = swoosh(value) if keep is None else swoosh(value) * keep
        same_gradients(swoosh_linear(value, keep, weight, bias, swoosh), F.linear(hidden, weight, bias), inputs, 8e-3 if low else 1e-5)


@low
@pytest.mark.parametrize("kind", ["sigmoid", "tanh"])
def test_gate_is_two_operations(low: bool, kind: Kind) -> None:
    inputs = leaves((2, 5, 8), (2, 5, 8))
    value, gate = (t.bfloat16() for t in inputs) if low else inputs
    same_gradients(gated(value, gate, kind), value * getattr(gate, kind)(), inputs, 4e-3 if low else 1e-6)


@low
def test_bypass_gradients_are_those_of_its_formula(low: bool) -> None:
    inputs = leaves((2, 5, 8), (2, 5, 8))
    bypass = Bypass(8).eval()
    torch.nn.init.uniform_(bypass.bypass_scale)
    orig, new = inputs
    with precision(low):
        found = bypass(orig, new)
    wanted = orig + (new - orig) * bypass.bypass_scale
    same_gradients(found, wanted, [*inputs, bypass.bypass_scale], 4e-3 if low else 1e-6)


def test_training_in_bf16_keeps_no_copy_of_a_weight() -> None:
    encoder = tiny_config(encoder_dim=48, feedforward_dim=80).build()
    encoder.set_batch_count(100.0)
    shapes = {tuple(p.shape) for name, p in encoder.named_parameters() if p.ndim == 2 and "encoder_embed" not in name}
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t), precision(low=True):  # type: ignore[func-returns-value]
        encoder(*random_batch([101, 57]))
    assert len(shapes & {tuple(t.shape) for t in kept}) > 5
    copies = [t.shape for t in kept if t.dtype == torch.bfloat16 and {tuple(t.shape), tuple(t.shape)[::-1]} & shapes]
    assert copies == []
