"""Profiling of speakers without training: gender, age band, accent, or whatever else is labelled, by the nearest class or the nearest cuts."""

from __future__ import annotations

import bisect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from spear.bounds import at_least
from spear.errors import ConfigError, DataError
from spear.evaluation.metrics import cluster_interval
from spear.evaluation.tasks.base import Array, Features, Rows, Score, Settings, Split, Task, TaskConfig
from spear.evaluation.tasks.utterances import known_speakers, label_of
from spear.evaluation.tasks.verification import directions

BLOCK = 4096


@dataclass(frozen=True, kw_only=True, slots=True)
class ProfilingConfig(TaskConfig):
    """A label of the speaker, read off mean vectors by their cosines."""

    label: str = "gender"
    """`gender`, `language` or `speaker` of the supervision, else the key of its custom fields, e.g. `age` or `accent`."""
    bands: list[float] = field(default_factory=list)
    """Edges that turn a number into bands: ``[30, 50]`` makes "below 30", "30 to 50" and "50 and above"; empty: labels as they are."""
    rule: Literal["centroid", "knn"] = "centroid"
    """``centroid``: nearest mean vector of a class; ``knn``: majority of the nearest train cuts."""
    neighbours: int = 15
    """``knn``: train cuts that vote; equal votes go to the class with the higher sum of cosines."""
    held_out: bool = True
    """Leave out valid and test cuts of speakers that the train split has."""

    def __post_init__(self) -> None:
        TaskConfig.__post_init__(self)
        at_least("neighbours", self.neighbours, 1)
        if not self.label:
            raise ConfigError("`label` must name a field of the supervision, but is empty")
        if self.bands != sorted(set(self.bands)):
            raise ConfigError(f"`bands` must rise, but is {self.bands}")

    def build(self, name: str, settings: Settings) -> Task:
        """See `TaskConfig`."""
        return Profiling(name, self, settings)


class Profiling(Task):
    """One vector per cut, centred on the train split's mean; the layer is chosen on valid, nothing is trained."""

    config: ProfilingConfig

    def __init__(self, name: str, config: ProfilingConfig, settings: Settings) -> None:
        super().__init__(name, config, settings)
        self._voices: dict[str, str] = {}
        self._noted: set[str] = set()
        self._refused: set[Split] = set()

    def wants(self, cut: Any) -> bool:
        """See `Task`."""
        return label_of(cut, self.config.label) is not None

    def needs(self) -> str:
        """See `Task`."""
        return f"it needs the supervision field `{self.config.label}`"

    def note(self, split: Split, cut: Any) -> None:
        """See `Task`: speakers of the train split, and other splits with a labelled cut of one of them."""
        if split == "train":
            self._noted |= known_speakers({"train": [cut]})
        elif self.wants(cut) and label_of(cut, "speaker") in self._noted:
            self._refused.add(split)

    def eligible(self, split: Split, cut: Any) -> bool:
        """See `Task`."""
        known = self.config.held_out and split != "train" and label_of(cut, "speaker") in self._noted
        return super().eligible(split, cut) and not known

    def select(self, cuts: Mapping[Split, Sequence[Any]]) -> dict[Split, list[Any]]:
        """See `Task`; known speakers are left out of valid and test, cuts without a speaker are kept."""
        if self.config.held_out:
            known = self._noted | known_speakers(cuts)
            splits: tuple[Split, ...] = ("valid", "test")
            for split in splits:
                new = [cut for cut in cuts.get(split, ()) if label_of(cut, "speaker") not in known]
                if (split in self._refused or any(map(self.wants, cuts.get(split, ())))) and not any(map(self.wants, new)):
                    rule = "`held_out` is true; false takes known speakers, too"
                    raise DataError(f"task `{self.name}`: every labelled speaker of the {split} split is in the train split, too ({rule})")
                cuts = {**cuts, split: new}
        chosen = super().select(cuts)
        self._voices = {cut.id: label_of(cut, "speaker") or cut.id for cut in chosen["test"]}
        return chosen

    def rows(self, cut: Any, split: Split, times: NDArray[np.float64], layers: Sequence[Array]) -> Rows:
        """See `Task`."""
        label = label_of(cut, self.config.label)
        return Rows([] if label is None else [self._class(label, cut.id)], [x.mean(axis=0)[None] for x in layers])

    def _class(self, label: str, cut_id: str) -> str:
        if not self.config.bands:
            return label
        try:
            return band(float(label), self.config.bands)
        except ValueError as error:
            raise DataError(f"task `{self.name}`: `{self.config.label}` of cut {cut_id} must be a number for `bands`, but is {label!r}") from error

    def score(self, features: Mapping[Split, Features], layer_names: Sequence[str]) -> Score:
        """See `Task`; the mean over seeds is that of one value, as no part is drawn."""
        train = np.asarray(features["train"].labels)
        if len(set(train)) < 2:
            raise DataError(f"task `{self.name}` needs two classes in the train split, but has {', '.join(sorted(set(train)))}")
        found: dict[str, dict[str, NDArray[np.bool_]]] = {}
        for i, name in enumerate(layer_names):
            centre = features["train"].layers[i].mean(axis=0)
            classify = RULES[self.config.rule](directions(features["train"].layers[i] - centre), train, self.config)
            splits: tuple[Split, ...] = ("valid", "test")
            found[name] = {s: classify(directions(features[s].layers[i] - centre)) == np.asarray(features[s].labels) for s in splits}
        by_layer = {name: {split: float(hits.mean()) for split, hits in splits.items()} for name, splits in found.items()}
        layer = max(by_layer, key=lambda name: by_layer[name]["valid"])
        hits, labels = found[layer]["test"], np.asarray(features["test"].labels)
        classes, counts = np.unique(labels, return_counts=True)
        details = {
            "items": len(hits),
            "classes": len(set(train)),
            "chance": round(float(counts.max() / counts.sum()), 6),
            "balanced": round(float(np.mean([hits[labels == name].mean() for name in classes])), 6),
            "rule": self.config.rule,
            "seeds": 1,
        }
        voices = [self._voices.get(cut_id, cut_id) for cut_id in features["test"].groups]  # a label belongs to a speaker
        interval = cluster_interval(hits.astype(float), voices, resamples=self.settings.resamples, seed=self.settings.seed)
        return Score("accuracy", True, float(hits.mean()), 0.0, interval, layer, by_layer, details)


def band(value: float, edges: Sequence[float]) -> str:
    """Name of the band of a number; a band has its lower edge."""
    place = bisect.bisect_right(edges, value)
    if place == 0:
        return f"below {edges[0]:g}"
    return f"{edges[-1]:g} and above" if place == len(edges) else f"{edges[place - 1]:g} to {edges[place]:g}"


Classify = Callable[[Array], NDArray[np.str_]]
"""(M, D) directions -> (M,) classes."""


def by_centroid(train: Array, labels: NDArray[np.str_], config: ProfilingConfig) -> Classify:
    """The class whose mean direction is nearest to a row."""
    del config
    classes = np.unique(labels)
    centres = directions(np.stack([train[labels == name].mean(axis=0) for name in classes]))
    return lambda unit: classes[(unit @ centres.T).argmax(axis=1)]


def by_neighbours(train: Array, labels: NDArray[np.str_], config: ProfilingConfig) -> Classify:
    """The class of most of the nearest train rows; equal votes go to the higher sum of cosines."""
    classes, numbers = np.unique(labels, return_inverse=True)
    count = min(config.neighbours, len(train))

    def classify(unit: Array) -> NDArray[np.str_]:
        chosen = []
        for start in range(0, len(unit), BLOCK):
            near = unit[start : start + BLOCK] @ train.T  # (B, M)
            index = np.argpartition(-near, count - 1, axis=1)[:, :count]
            cosine, voted = np.take_along_axis(near, index, axis=1), numbers[index]
            votes = np.stack([((1 + (cosine + 1) / (4 * count)) * (voted == k)).sum(axis=1) for k in range(len(classes))], axis=1)
            chosen.append(votes.argmax(axis=1))
        found: NDArray[np.str_] = classes[np.concatenate(chosen)]
        return found

    return classify


RULES: dict[str, Callable[[Array, NDArray[np.str_], ProfilingConfig], Classify]] = {"centroid": by_centroid, "knn": by_neighbours}
