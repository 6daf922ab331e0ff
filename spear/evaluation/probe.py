"""Linear probes on frozen features: one layer, or a learned weighted sum of layers, chosen on valid, scored once on test."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from spear.files import seed_from

BETAS, EPSILON = (0.9, 0.999), 1e-8
CHUNK = 8192


@dataclass(frozen=True, slots=True)
class ProbeRun:
    """Settings of one training of one probe."""

    learning_rate: float
    weight_decay: float
    seed: int
    steps: int
    batch_size: int
    neighbours: int = 10


@dataclass(frozen=True, slots=True)
class Probe:
    """A trained probe: ``softmax(layer_logits)``-weighted sum of standardised layers, then one linear map.

    layer_logits: (L,); weight: (D, K); bias: (K,); K classes.
    """

    layer_logits: Tensor
    weight: Tensor
    bias: Tensor

    def __call__(self, x: Tensor | LayerStack) -> Tensor:
        """Class scores (M, K) of standardised features (L, M, D)."""
        share = self.layer_logits.softmax(0)
        return torch.cat([torch.einsum("l,lmd->md", share, part) @ self.weight + self.bias for part in parts_of(x)])


def standardise(train: Tensor, others: Sequence[Tensor]) -> list[Tensor]:
    """Shift and scale every channel to mean 0 and deviation 1 on `train`; the same map is applied to `others`.

    Args:
        train: (M, D). others: tensors (M_i, D). Channels that are constant on `train` become 0 there.
    """
    mean, scale = scale_of(train)
    return [(x - mean) * scale for x in (train, *others)]


def scale_of(train: Tensor) -> tuple[Tensor, Tensor]:
    """Mean (D,) of `train` (M, D) and the factor (D,) that makes deviations 1; 0 for channels that are constant."""
    mean = train.mean(0)
    deviation = train.std(0, unbiased=False)
    return mean, torch.where(deviation > 1e-6 * (1 + mean.abs()), 1 / deviation.clamp(min=1e-12), torch.zeros_like(deviation))


def stack_layers(layers: Sequence[Tensor]) -> Tensor:
    """Layers (M, D_l) as one (L, M, D) tensor, D the widest; narrower layers are filled up with zeros."""
    width = max(x.shape[1] for x in layers)
    return torch.stack([F.pad(x, (0, width - x.shape[1])) for x in layers])


class LayerStack:
    """Standardised layers as one (L, M, D) tensor of which only the rows in use are made.

    Args:
        layers: (M, D_l) arrays, perhaps mapped from files. scales: (mean, factor) of each, see `scale_of`. device: of the rows.
    """

    def __init__(self, layers: Sequence[NDArray[np.float32]], scales: Sequence[tuple[Tensor, Tensor]], device: torch.device) -> None:
        self._layers, self._scales, self.device = layers, scales, device
        self.shape = (len(layers), len(layers[0]), max(x.shape[1] for x in layers))

    def __len__(self) -> int:
        return len(self._layers)

    def rows(self, index: Tensor | slice) -> Tensor:
        """(L, m, D) of some rows."""
        wanted = index.cpu().numpy() if isinstance(index, Tensor) else index
        found = [torch.from_numpy(np.array(x[wanted])).to(self.device) for x in self._layers]
        return stack_layers([(x - mean) * factor for x, (mean, factor) in zip(found, self._scales)])

    def parts(self) -> Iterator[Tensor]:
        """(L, m, D) of all rows, some at a time."""
        return (self.rows(slice(start, start + CHUNK)) for start in range(0, self.shape[1], CHUNK))


def fit_probe(x: Tensor | LayerStack, targets: Tensor, num_classes: int, run: ProbeRun) -> Probe:
    """Train one probe with Adam, decoupled weight decay and a cosine learning rate; the same arguments give the same probe.

    Args:
        x: (L, M, D) float32 standardised features. targets: (M,) int64 classes for a softmax probe, or (M, K) float32 0/1 for
            independent sigmoids. num_classes: K. run: optimisation settings; whole-set steps where M <= batch_size.
    Source: SUPERB, arXiv:2105.01051 section 3.3 (frozen encoder, weighted sum of layers); AdamW, arXiv:1711.05101.
    """
    generator = torch.Generator().manual_seed(seed_from(run.seed, "probe"))
    num_layers, num_items, dim = x.shape
    weight = (torch.randn(dim, num_classes, generator=generator) * 0.01).to(x.device)
    state = [torch.zeros(num_layers, device=x.device), weight, torch.zeros(num_classes, device=x.device)]
    first = [torch.zeros_like(p) for p in state]
    second = [torch.zeros_like(p) for p in state]
    order = torch.empty(0, dtype=torch.int64)
    whole = rows_of(x, slice(None)) if num_items <= run.batch_size else torch.empty(0)
    for step in range(1, run.steps + 1):
        if num_items <= run.batch_size:
            batch, wanted = whole, targets
        else:
            if len(order) < run.batch_size:
                order = torch.cat([order, torch.randperm(num_items, generator=generator)])
            index, order = order[: run.batch_size].to(x.device), order[run.batch_size :]
            batch, wanted = rows_of(x, index), targets[index]
        gradients = _gradients(state, batch, wanted)
        rate = run.learning_rate * 0.5 * (1 + math.cos(math.pi * (step - 1) / run.steps))
        state[1].mul_(1 - rate * run.weight_decay)
        for value, gradient, m, v in zip(state, gradients, first, second):
            m.lerp_(gradient, 1 - BETAS[0])
            v.lerp_(gradient.square(), 1 - BETAS[1])
            moved = m / (1 - BETAS[0] ** step)
            value.addcdiv_(moved, (v / (1 - BETAS[1] ** step)).sqrt_().add_(EPSILON), value=-rate)
    return Probe(*state)


def rows_of(x: Tensor | LayerStack, index: Tensor | slice) -> Tensor:
    """Some rows of (L, M, D)."""
    return x[:, index] if isinstance(x, Tensor) else x.rows(index)


def parts_of(x: Tensor | LayerStack) -> Iterable[Tensor]:
    """All rows of (L, M, D), at most CHUNK at a time."""
    return x.split(CHUNK, dim=1) if isinstance(x, Tensor) else x.parts()


def _gradients(state: list[Tensor], x: Tensor, targets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of the mean cross entropy, written out: the model is too small for autograd to pay."""
    logits, weight, bias = state
    share = logits.softmax(0)
    pooled = x[0] if len(x) == 1 else torch.einsum("l,lmd->md", share, x)
    scores = pooled @ weight + bias
    if targets.ndim == 1:
        error = scores.softmax(1)
        error[torch.arange(len(targets), device=x.device), targets] -= 1
    else:
        error = scores.sigmoid() - targets
    error /= len(targets)
    if len(x) == 1:
        by_layer = torch.zeros_like(logits)
    else:
        slope = torch.einsum("lmd,md->l", x, error @ weight.T)
        by_layer = share * (slope - (share * slope).sum())
    return by_layer, pooled.T @ error, error.sum(0)
