"""What the classification tasks share: linear probes on every layer and on their weighted sum."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import product
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from spear.errors import DataError
from spear.evaluation.metrics import accuracy, cluster_interval, mean_average_precision
from spear.evaluation.probe import Probe, ProbeRun, fit_probe, stack_layers, standardise
from spear.evaluation.tasks.base import Features, Score, Settings, Split, Task

logger = logging.getLogger(__name__)
WEIGHTED_SUM = "weighted sum"


class Classification(Task):
    """A task of predicting one label per item, or with `separator` several, by a linear probe."""

    separator: str | None = None

    def score(self, features: Mapping[Split, Features], layer_names: Sequence[str]) -> Score:
        """See `Task`; learning rate and weight decay are chosen per layer on valid with the first seed, then the layer, then all seeds run."""
        labels = LabelSet(self.name, features, self.separator)
        device = torch.device(self.settings.device)
        inputs = {name: [x[None] for x in splits] for name, splits in _standardised(features, layer_names, device).items()}
        targets = [labels.encode(features[split]).to(device) for split in ("train", "valid", "test")]
        trained: dict[str, tuple[ProbeRun, float, Probe]] = {}
        for name, (train, valid, _) in inputs.items():
            trained[name] = _best(labels, train, valid, targets, _grid(self.settings))
        if len(inputs) > 1:
            best_single = max(trained, key=lambda name: trained[name][1])
            joined = [stack_layers([splits[i][0] for splits in inputs.values()]) for i in range(3)]
            inputs[WEIGHTED_SUM] = joined
            trained[WEIGHTED_SUM] = _best(labels, joined[0], joined[1], targets, [trained[best_single][0]])
        by_layer = {name: {"valid": found[1], "test": labels.measure(found[2](inputs[name][2]), targets[2])} for name, found in trained.items()}
        chosen = max(trained, key=lambda name: trained[name][1])
        run, _, probe = trained[chosen]
        train, _, test = inputs[chosen]
        others = [fit_probe(train, targets[0], len(labels.names), replace(run, seed=seed)) for seed in self.settings.seeds[1:]]
        values = [by_layer[chosen]["test"], *(labels.measure(other(test), targets[2]) for other in others)]
        details: dict[str, Any] = {
            "items": len(features["test"].labels),
            "classes": len(labels.names),
            "chance": round(labels.chance, 6),
            "learning_rate": run.learning_rate,
            "weight_decay": run.weight_decay,
        }
        if chosen == WEIGHTED_SUM:
            details["layer_weights"] = {name: round(x, 6) for name, x in zip(layer_names, probe.layer_logits.softmax(0).tolist())}
        interval = labels.interval(probe(test), targets[2], features["test"].groups, self.settings)
        return Score(labels.metric, True, float(np.mean(values)), float(np.std(values)), interval, chosen, by_layer, details)


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

    def _chance(self, features: Mapping[Split, Features]) -> float:
        """Score of the answer that never looks: the commonest train class, or each class's share."""
        train, test = (self.encode(features[split]) for split in ("train", "test"))
        if self.separator is None:
            commonest = int(torch.bincount(train[train >= 0], minlength=len(self.names)).argmax())
            return float((test == commonest).float().mean())
        return float(test[:, test.any(0)].mean())


def _standardised(features: Mapping[Split, Features], names: Sequence[str], device: torch.device) -> dict[str, list[Tensor]]:
    splits: list[list[NDArray[np.float32]]] = [features[split].layers for split in ("train", "valid", "test")]
    found = {}
    for name, arrays in zip(names, zip(*splits)):
        train, *others = (torch.from_numpy(x).to(device) for x in arrays)
        found[name] = standardise(train, others)
    return found


def _grid(settings: Settings) -> list[ProbeRun]:
    return [
        ProbeRun(rate, decay, settings.seeds[0], settings.steps, settings.batch_size)
        for rate, decay in product(settings.learning_rates, settings.weight_decays)
    ]


def _best(labels: LabelSet, train: Tensor, valid: Tensor, targets: Sequence[Tensor], runs: Sequence[ProbeRun]) -> tuple[ProbeRun, float, Probe]:
    """The run with the best valid score; the first of equals."""
    found = []
    for run in runs:
        probe = fit_probe(train, targets[0], len(labels.names), run)
        found.append((run, labels.measure(probe(valid), targets[1]), probe))
    return max(found, key=lambda item: item[1])
