"""Do discrete units stand for phones? k-means units of every layer, or a teacher's tokens, against an alignment tier."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from spear.bounds import above, at_least
from spear.errors import DataError
from spear.evaluation.tasks.base import SPLITS, Array, Features, Rows, Score, Settings, Split, Task, TaskConfig, alignment_of
from spear.evaluation.tasks.frames import label_frames
from spear.evaluation.units import assign, contingency, fit_units, pnmi, pnmi_interval, purities, usage


@dataclass(frozen=True, kw_only=True, slots=True)
class UnitsConfig(TaskConfig):
    """Mutual information of units and phones."""

    tier: str = "phone"
    """Name of the alignment tier."""
    num_units: int = 100
    """K of the k-means that is fitted on every layer of a model; tokens are judged as they are."""
    max_seconds: float = 600.0
    """Seconds of whole cuts that a split gives, drawn with the evaluation's seed."""

    def __post_init__(self) -> None:
        TaskConfig.__post_init__(self)
        at_least("num_units", self.num_units, 2)
        above("max_seconds", self.max_seconds, 0)

    def build(self, name: str, settings: Settings) -> Task:
        """See `TaskConfig`."""
        return Units(name, self, settings)


class Units(Task):
    """Phone-normalised mutual information, purities and bit rates; every seed fits its own units."""

    section, codes = "tokens", True
    config: UnitsConfig

    def wants(self, cut: Any) -> bool:
        """See `Task`."""
        return bool(alignment_of(cut, self.config.tier))

    def needs(self) -> str:
        """See `Task`."""
        return f"it needs the alignment tier `{self.config.tier}`"

    def limits(self, split: Split) -> tuple[int | None, float | None]:
        """See `Task`."""
        del split
        return self.config.max_cuts, self.config.max_seconds

    def select(self, cuts: Mapping[Split, Sequence[Any]]) -> dict[Split, list[Any]]:
        """See `Task`; whole cuts, up to `max_seconds` of each split."""
        return {split: self.first_seconds(found, self.config.max_seconds) for split, found in Task.select(self, cuts).items()}

    def rows(self, cut: Any, split: Split, times: NDArray[np.float64], layers: Sequence[Array]) -> Rows:
        """See `Task`: every frame with its phone, an empty label outside any."""
        return Rows([label or "" for label in label_frames(times, alignment_of(cut, self.config.tier))], list(layers))

    def score(self, features: Mapping[Split, Features], layer_names: Sequence[str]) -> Score:
        """See `Task`; units are fitted on train, the layer is chosen on valid."""
        names = sorted({label for label in features["train"].labels if label})
        if len(names) < 2:
            raise DataError(f"task `{self.name}` needs at least two symbols in its train split, but finds {names}")
        judged = {name: i for i, name in enumerate(layer_names) if not features["train"].discrete or features["train"].layers[i].shape[1] == 1}
        seeds = self.settings.seeds
        found = {name: self._streams(features, i, seeds[0]) for name, i in judged.items()}
        by_layer = {name: {str(split): self._pnmi(features[split], x, names) for split, x in units.items()} for name, units in found.items()}
        chosen = max(by_layer, key=lambda name: by_layer[name]["valid"])
        test = features["test"]
        values = [by_layer[chosen]["test"]]
        if not test.discrete:
            values += [self._pnmi(test, self._streams(features, judged[chosen], seed)["test"], names) for seed in seeds[1:]]
        details = self._details(test, found[chosen]["test"], names)
        details["layers"] = {name: self._details(test, units["test"], names) for name, units in found.items()}
        details["mean_over_layers"] = round(float(np.mean([value["test"] for value in by_layer.values()])), 6)
        units, phones, kept = self._known(test, found[chosen]["test"], names)
        interval = pnmi_interval(units, phones, test.numbers()[kept], resamples=min(self.settings.resamples, 200), seed=self.settings.seed)
        return Score("PNMI", True, float(np.mean(values)), float(np.std(values)), interval, chosen, by_layer, details)

    def _streams(self, features: Mapping[Split, Features], layer: int, seed: int) -> dict[Split, NDArray[np.int64]]:
        """Units of every frame of valid and test."""
        if features["test"].discrete:
            return {split: np.asarray(features[split].layers[layer][:, 0]).astype(np.int64) for split in SPLITS[1:]}
        train, valid, test = (torch.from_numpy(np.array(features[split].layers[layer])).to(self.settings.device) for split in SPLITS)
        if len(train) < self.config.num_units:
            raise DataError(f"task `{self.name}` needs at least `num_units` {self.config.num_units} frames, but finds {len(train)}")
        mean, deviation = train.mean(0), train.std(0).clamp(min=1e-6)
        centres = fit_units((train - mean) / deviation, self.config.num_units, seed)
        return {split: assign((x - mean) / deviation, centres)[0].cpu().numpy() for split, x in zip(SPLITS[1:], (valid, test))}

    @staticmethod
    def _known(features: Features, units: NDArray[np.int64], names: Sequence[str]) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.bool_]]:
        """Units and phone numbers of the labelled frames, and which frames those are; symbols that train lacks come after the others."""
        index = {name: i for i, name in enumerate([*names, *sorted(set(features.labels) - set(names) - {""})])}
        phones = np.array([index.get(label, -1) for label in features.labels])
        return units[phones >= 0], phones[phones >= 0], phones >= 0

    def _pnmi(self, features: Features, units: NDArray[np.int64], names: Sequence[str]) -> float:
        return pnmi(contingency(*self._known(features, units, names)[:2]))

    def _details(self, features: Features, units: NDArray[np.int64], names: Sequence[str]) -> dict[str, Any]:
        known, phones, _ = self._known(features, units, names)
        phone, cluster = purities(contingency(known, phones))
        size = features.codebook_size or self.config.num_units
        numbers = {"phone_purity": phone, "cluster_purity": cluster, **usage(units, features.numbers(), features.frame_rate_hz, size)}
        return {"items": len(known), "classes": len(names), **{key: round(value, 4) for key, value in numbers.items()}}
