"""What the classification tasks share: linear probes on every layer and on their weighted sum."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from scipy import stats
from torch import Tensor

from spear.errors import DataError
from spear.evaluation.heads import HEADS, Head, HeadName, Scorer
from spear.evaluation.metrics import accuracy, cluster_interval, mean_average_precision
from spear.evaluation.probe import LayerStack, Probe, ProbeRun, scale_of, standardise
from spear.evaluation.tasks.base import SPLITS, Features, Score, Settings, Split, Task

logger = logging.getLogger(__name__)
WEIGHTED_SUM = "weighted sum"
SMALL = 64 << 20
"""Values of a stack of layers that are held at once."""
MOST_CONFUSED = 64
"""Classes up to which the counts of confusions are kept."""


class Classification(Task):
    """A task of predicting one label per item, or with `separator` several, by a probe of one kind."""

    separator: str | None = None
    head: HeadName = "linear"

    def score(self, features: Mapping[Split, Features], layer_names: Sequence[str]) -> Score:
        """See `Task`; learning rate and weight decay are chosen per layer on valid with the first seed, then the layer, then all seeds run."""
        labels = LabelSet(self.name, features, self.separator)
        device = torch.device(self.settings.device)
        targets = [labels.encode(features[split]).to(device) for split in SPLITS]
        inputs, head = Inputs(features, layer_names, device), HEADS[self.head]
        best: dict[str, tuple[ProbeRun, float]] = {}
        by_layer: dict[str, dict[str, float]] = {}
        kept: list[Scorer] = []

        def judge(name: str, runs: Sequence[ProbeRun]) -> None:
            train, valid, test = inputs[name]
            run, value, probe = _best(labels, head, train, valid, targets, runs)
            if value > max((found for _, found in best.values()), default=-1.0):
                kept[:] = [probe]
            best[name] = run, value
            by_layer[name] = {"valid": value, "test": labels.measure(probe(test), targets[2])}

        for name in layer_names:
            judge(name, head.grid(self.settings))
        if len(layer_names) > 1 and head.sums_layers:
            judge(WEIGHTED_SUM, [best[max(best, key=lambda name: best[name][1])][0]])
        chosen = max(best, key=lambda name: best[name][1])
        run, (train, _, test) = best[chosen][0], inputs[chosen]
        seeds = self.settings.seeds if head.seeded else self.settings.seeds[:1]
        probes = [*kept, *(head.fit(train, targets[0], len(labels.names), replace(run, seed=seed)) for seed in seeds[1:])]
        scores = probes[0](test)
        values = [by_layer[chosen]["test"], *(labels.measure(other(test), targets[2]) for other in probes[1:])]
        details: dict[str, Any] = {
            "items": len(features["test"].labels),
            "classes": len(labels.names),
            "chance": round(labels.chance, 6),
            "seeds": len(seeds),
        }
        details |= {"head": self.head, **head.chosen(run), **seed_spread(values), **labels.confusion(scores, targets[2])}
        if isinstance(probes[0], Probe) and chosen == WEIGHTED_SUM:
            details["layer_weights"] = {name: round(x, 6) for name, x in zip(layer_names, probes[0].layer_logits.softmax(0).tolist())}
        interval = labels.interval(scores, targets[2], features["test"].groups, self.settings)
        return Score(labels.metric, True, float(np.mean(values)), float(np.std(values)), interval, chosen, by_layer, details)


class Inputs:
    """Standardised features (L, M, D) of the three splits, one layer of them at a time, or all as a stack.

    Args:
        features: split -> items. names: of the layers. device: of what is handed out.
    """

    def __init__(self, features: Mapping[Split, Features], names: Sequence[str], device: torch.device) -> None:
        self._features, self._names, self._device = features, list(names), device

    def __getitem__(self, name: str) -> list[Tensor | LayerStack]:
        """Train, valid and test of a layer, or of the weighted sum: tensors where they are small, else rows are made as they are used."""
        if name != WEIGHTED_SUM:
            place = self._names.index(name)
            arrays = [torch.from_numpy(np.array(self._features[split].layers[place])).to(self._device) for split in SPLITS]
            return [x[None] for x in standardise(arrays[0], arrays[1:])]
        scales = [scale_of(torch.from_numpy(np.array(x)).to(self._device)) for x in self._features["train"].layers]
        stacks = [LayerStack(self._features[split].layers, scales, self._device) for split in SPLITS]
        return [stack.rows(slice(None)) if math.prod(stack.shape) <= SMALL else stack for stack in stacks]


def seed_spread(values: Sequence[float]) -> dict[str, Any]:
    """``seed_values``, and ``seed_half_width``: half of the 95 % interval of their mean by Student's t where there are several."""
    found: dict[str, Any] = {"seed_values": [round(value, 6) for value in values]}
    if len(values) > 1:
        half = stats.t.ppf(0.975, len(values) - 1) * np.std(values, ddof=1) / math.sqrt(len(values))
        found["seed_half_width"] = round(float(half), 6)
    return found


class LabelSet:
    """The classes of the train split, and the measure that fits them.

    Raises:
        DataError: train has fewer than two classes, or valid or test has no item of a known class.
    """

    def __init__(self, task: str, features: Mapping[Split, Features], separator: str | None) -> None:
        self.separator, self.metric = separator, "accuracy" if separator is None else "mAP"
        self.names = sorted({word for label in features["train"].labels for word in self.words(label)})
        self._index = {name: i for i, name in enumerate(self.names)}
        if len(self.names) < 2:
            raise DataError(f"task `{task}` needs at least two classes in its train split, but finds {self.names}")
        for split in ("valid", "test"):
            unknown = sum(not any(word in self._index for word in self.words(label)) for label in features[split].labels)
            total = len(features[split].labels)
            if unknown == total:
                raise DataError(f"task `{task}`: no label of the {split} split occurs in the train split")
            if unknown:
                logger.info("task %s: %d of %d %s items have a class that train lacks; they count as errors", task, unknown, total, split)
        self.chance = self._chance(features)

    def words(self, label: str) -> list[str]:
        """The classes an item's label names."""
        return [label] if self.separator is None else [word for word in label.split(self.separator) if word]

    def encode(self, features: Features) -> Tensor:
        """(M,) int64 with -1 for unknown classes, or (M, K) float32 0/1."""
        if self.separator is None:
            return torch.tensor([self._index.get(label, -1) for label in features.labels])
        targets = torch.zeros(len(features.labels), len(self.names))
        for row, label in zip(targets, features.labels):
            for word in self.words(label):
                if word in self._index:
                    row[self._index[word]] = 1
        return targets

    def measure(self, scores: Tensor, targets: Tensor) -> float:
        """Accuracy, or mean average precision where items have several labels."""
        if self.separator is None:
            return accuracy(scores.argmax(1).cpu().numpy(), targets.cpu().numpy())
        return mean_average_precision(scores.cpu().numpy(), targets.cpu().numpy() > 0)

    def interval(self, scores: Tensor, targets: Tensor, groups: Sequence[str], settings: Settings) -> tuple[float, float]:
        """95 % bootstrap interval over whole cuts."""
        if self.separator is None:
            hits = (scores.argmax(1) == targets).cpu().numpy().astype(np.float64)
            return cluster_interval(hits, groups, resamples=settings.resamples, seed=settings.seed)
        rng, values, relevant = np.random.default_rng(settings.seed), scores.cpu().numpy(), targets.cpu().numpy() > 0
        draws = (rng.integers(0, len(values), len(values)) for _ in range(settings.resamples))
        found = [mean_average_precision(values[i], relevant[i]) for i in draws if relevant[i].any()]
        low, high = np.quantile(found, [0.025, 0.975])
        return float(low), float(high)

    def confusion(self, scores: Tensor, targets: Tensor) -> dict[str, Any]:
        """Counts of every (class, answer) where there are at most MOST_CONFUSED classes: ``{"confusion": {classes, rows}}``, a row as text."""
        count = len(self.names)
        if self.separator is not None or count > MOST_CONFUSED:
            return {}
        known = targets >= 0
        cells = torch.bincount(targets[known] * count + scores.argmax(1)[known], minlength=count * count).reshape(count, count)
        return {"confusion": {"classes": self.names, "rows": [" ".join(str(x) for x in row) for row in cells.tolist()]}}

    def _chance(self, features: Mapping[Split, Features]) -> float:
        """Score of the answer that never looks: the commonest train class, or each class's share."""
        train, test = (self.encode(features[split]) for split in ("train", "test"))
        if self.separator is None:
            commonest = int(torch.bincount(train[train >= 0], minlength=len(self.names)).argmax())
            return float((test == commonest).float().mean())
        return float(test[:, test.any(0)].mean())


def _best(
    labels: LabelSet, head: Head, train: Tensor | LayerStack, valid: Tensor | LayerStack, targets: Sequence[Tensor], runs: Sequence[ProbeRun]
) -> tuple[ProbeRun, float, Scorer]:
    """The run with the best valid score; the first of equals."""
    found = []
    for run in runs:
        probe = head.fit(train, targets[0], len(labels.names), run)
        found.append((run, labels.measure(probe(valid), targets[1]), probe))
    return max(found, key=lambda item: item[1])
