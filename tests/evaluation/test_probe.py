"""Probes find what is there and nothing that is not."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from spear.evaluation.probe import ProbeRun, _gradients, fit_probe, stack_layers, standardise

RUN = ProbeRun(learning_rate=0.03, weight_decay=0.0, seed=0, steps=200, batch_size=256)


def separable(num: int, noise: float, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(4, 16, generator=torch.Generator().manual_seed(99))
    targets = torch.randint(0, 4, (num,), generator=generator)
    return centres[targets] + noise * torch.randn(num, 16, generator=generator), targets


def test_fit_probe_solves_a_separable_problem() -> None:
    x, y = separable(1500, 0.2)
    probe = fit_probe(x[None, :1000], y[:1000], 4, RUN)
    assert (probe(x[None, 1000:]).argmax(1) == y[1000:]).float().mean() > 0.99


def test_fit_probe_is_at_chance_on_noise() -> None:
    generator = torch.Generator().manual_seed(1)
    x, y = torch.randn(6000, 16, generator=generator), torch.randint(0, 4, (6000,), generator=generator)
    probe = fit_probe(x[None, :3000], y[:3000], 4, RUN)
    # four deviations of a share of 3000 items
    assert (probe(x[None, 3000:]).argmax(1) == y[3000:]).float().mean() == pytest.approx(1 / 4, abs=4 * (0.25 * 0.75 / 3000) ** 0.5)


def test_fit_probe_gives_equal_probes_for_equal_arguments_and_others_for_other_seeds() -> None:
    x, y = separable(600, 1.0)
    first, second, other = (fit_probe(x[None], y, 4, ProbeRun(0.01, 0.1, seed, 30, 100)) for seed in (0, 0, 1))
    assert torch.equal(first.weight, second.weight)
    assert not torch.equal(first.weight, other.weight)


def test_fit_probe_weights_the_layer_that_carries_the_label() -> None:
    x, y = separable(1000, 0.3)
    generator = torch.Generator().manual_seed(5)
    layers = torch.stack([torch.randn(1000, 16, generator=generator), x, torch.randn(1000, 16, generator=generator)])
    probe = fit_probe(layers, y, 4, RUN)
    share = probe.layer_logits.softmax(0)
    assert share.argmax() == 1
    assert share[1] > 0.5


def test_fit_probe_learns_several_labels_per_item() -> None:
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(800, 8, generator=generator)
    y = (x[:, :3] > 0).float()
    probe = fit_probe(x[None], y, 3, RUN)
    assert ((probe(x[None]) > 0).float() == y).float().mean() > 0.97


@pytest.mark.parametrize("multilabel", [False, True])
def test_gradients_equal_autograd(multilabel: bool) -> None:
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(3, 20, 5, generator=generator, dtype=torch.float64)
    state = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in ((3,), (5, 4), (4,))]
    leaves = [value.clone().requires_grad_() for value in state]
    scores = torch.einsum("l,lmd->md", leaves[0].softmax(0), x) @ leaves[1] + leaves[2]
    if multilabel:
        targets = (torch.rand(20, 4, generator=generator) < 0.5).double()
        loss = torch.nn.functional.binary_cross_entropy_with_logits(scores, targets, reduction="sum") / 20
    else:
        targets = torch.randint(0, 4, (20,), generator=generator)
        loss = torch.nn.functional.cross_entropy(scores, targets)
    for ours, theirs in zip(_gradients(state, x, targets), torch.autograd.grad(loss, leaves)):
        torch.testing.assert_close(ours, theirs)


def test_standardise_uses_train_statistics_and_zeroes_constant_channels() -> None:
    train = torch.tensor([[1.0, 5.0], [3.0, 5.0]])
    ready, other = standardise(train, [torch.tensor([[5.0, 9.0]])])
    torch.testing.assert_close(ready, torch.tensor([[-1.0, 0.0], [1.0, 0.0]]))
    torch.testing.assert_close(other, torch.tensor([[3.0, 0.0]]))


def test_stack_layers_fills_narrow_layers_with_zeros() -> None:
    stacked = stack_layers([torch.ones(2, 1), torch.ones(2, 3)])
    assert stacked.shape == (2, 2, 3)
    assert stacked[0].sum(1).tolist() == [1.0, 1.0]


@pytest.mark.parametrize("num_layers", [1, 3])
def test_fit_probe_equals_adamw_under_a_cosine_rate(num_layers: int) -> None:
    torch.manual_seed(4)
    x, y = torch.randn(num_layers, 40, 6), torch.randint(0, 4, (40,))
    run = ProbeRun(learning_rate=0.05, weight_decay=0.5, seed=0, steps=25, batch_size=64)
    start = fit_probe(x, y, 4, replace(run, steps=0))
    leaves = [value.clone().requires_grad_() for value in (start.layer_logits, start.weight, start.bias)]
    groups = [{"params": [leaves[1]]}, {"params": [leaves[0], leaves[2]], "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=run.learning_rate, weight_decay=run.weight_decay)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda done: 0.5 * (1 + math.cos(math.pi * done / run.steps)))
    for _ in range(run.steps):
        optimizer.zero_grad()
        scores = torch.einsum("l,lmd->md", leaves[0].softmax(0), x) @ leaves[1] + leaves[2]
        torch.nn.functional.cross_entropy(scores, y).backward()
        optimizer.step()
        schedule.step()
    found = fit_probe(x, y, 4, run)
    torch.testing.assert_close(found.weight, leaves[1].detach(), rtol=0, atol=1e-5)
    torch.testing.assert_close(found.bias, leaves[2].detach(), rtol=0, atol=1e-5)
    torch.testing.assert_close(found.layer_logits, leaves[0].detach(), rtol=0, atol=1e-5)
