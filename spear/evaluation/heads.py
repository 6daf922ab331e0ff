"""Kinds of probes on frozen features: a linear map, one hidden layer, or the nearest neighbours."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import product
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from spear.evaluation.probe import LayerStack, ProbeRun, fit_probe, parts_of, rows_of
from spear.evaluation.tasks.base import Settings
from spear.files import seed_from

HeadName = Literal["linear", "mlp", "knn"]
Input = Tensor | LayerStack
Scorer = Callable[[Input], Tensor]
"""Standardised features (L, M, D) -> class scores (M, K)."""
HIDDEN = 256
NEIGHBOURS = (1, 3, 10, 30)


class Head(NamedTuple):
    """How a probe is trained, what is tried, and what of it is told.

    fit: (features (L, M, D), targets (M,) or (M, K), classes K, run) -> scorer. sums_layers: several layers at once are weighed and added.
    seeded: its result depends on the seed.
    """

    fit: Callable[[Input, Tensor, int, ProbeRun], Scorer]
    grid: Callable[[Settings], Sequence[ProbeRun]]
    chosen: Callable[[ProbeRun], dict[str, Any]]
    sums_layers: bool
    seeded: bool


class Mlp(nn.Module):
    """Weighted sum of layers, one hidden layer of `HIDDEN` rectified units, class scores."""

    def __init__(self, num_layers: int, dim: int, num_classes: int, generator: torch.Generator) -> None:
        super().__init__()
        self.layer_logits = nn.Parameter(torch.zeros(num_layers))
        self.first = nn.Parameter(torch.randn(dim, HIDDEN, generator=generator) * (2 / dim) ** 0.5)
        self.second = nn.Parameter(torch.randn(HIDDEN, num_classes, generator=generator) * HIDDEN**-0.5)
        self.biases = nn.ParameterList([torch.zeros(HIDDEN), torch.zeros(num_classes)])

    def forward(self, x: Tensor) -> Tensor:
        """Class scores (M, K) of features (L, M, D)."""
        pooled = x[0] if len(x) == 1 else torch.einsum("l,lmd->md", self.layer_logits.softmax(0), x)
        scores: Tensor = (pooled @ self.first + self.biases[0]).relu() @ self.second + self.biases[1]
        return scores


def fit_mlp(x: Input, targets: Tensor, num_classes: int, run: ProbeRun) -> Scorer:
    """Train one with AdamW and a cosine learning rate; batches as in `fit_probe`."""
    generator = torch.Generator().manual_seed(seed_from(run.seed, "mlp"))
    num_layers, num_items, dim = x.shape
    model = Mlp(num_layers, dim, num_classes, generator).to(x.device)
    optimizer = torch.optim.AdamW(model.parameters(), run.learning_rate, weight_decay=run.weight_decay)
    order = torch.empty(0, dtype=torch.int64)
    size = min(run.batch_size, num_items)
    for step in range(run.steps):
        if len(order) < size:
            order = torch.cat([order, torch.randperm(num_items, generator=generator)])
        index, order = order[:size].to(x.device), order[size:]
        scores, wanted = model(rows_of(x, index)), targets[index]
        loss = F.cross_entropy(scores, wanted) if targets.ndim == 1 else F.binary_cross_entropy_with_logits(scores, wanted)
        for group in optimizer.param_groups:
            group["lr"] = run.learning_rate * 0.5 * (1 + math.cos(math.pi * step / run.steps))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    @torch.no_grad()
    def score(features: Input) -> Tensor:
        return torch.cat([model(part) for part in parts_of(features)])

    return score


def fit_knn(x: Input, targets: Tensor, num_classes: int, run: ProbeRun) -> Scorer:
    """Shares of the classes among the `neighbours` train items of the highest cosine; of equal shares the class of the nearest wins.

    Args:
        x: (1, M, D).
    """
    known = F.normalize(torch.cat([part[0] for part in parts_of(x)]), dim=1)
    count = min(run.neighbours, len(known))

    def score(features: Input) -> Tensor:
        found = []
        for part in parts_of(features):
            for block in part[0].split(1024):
                nearest = (F.normalize(block, dim=1) @ known.T).topk(count, dim=1).indices
                votes = F.one_hot(targets[nearest], num_classes).float()
                votes[:, 0] *= 1 + 1e-3
                found.append(votes.mean(dim=1))
        return torch.cat(found)

    return score


def gradient_grid(settings: Settings) -> list[ProbeRun]:
    """Every learning rate with every weight decay."""
    return [
        ProbeRun(rate, decay, settings.seeds[0], settings.steps, settings.batch_size)
        for rate, decay in product(settings.learning_rates, settings.weight_decays)
    ]


def neighbour_grid(settings: Settings) -> list[ProbeRun]:
    """Numbers of neighbours."""
    return [replace(gradient_grid(settings)[0], neighbours=count) for count in NEIGHBOURS]


def _rates(run: ProbeRun) -> dict[str, Any]:
    return {"learning_rate": run.learning_rate, "weight_decay": run.weight_decay}


HEADS: dict[HeadName, Head] = {
    "linear": Head(fit_probe, gradient_grid, _rates, sums_layers=True, seeded=True),
    "mlp": Head(fit_mlp, gradient_grid, _rates, sums_layers=True, seeded=True),
    "knn": Head(fit_knn, neighbour_grid, lambda run: {"neighbours": run.neighbours}, sums_layers=False, seeded=False),
}
