"""ABX on the phones of an alignment tier, for features and for tokens."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray

from spear.bounds import above, at_least
from spear.errors import ConfigError, DataError
from spear.evaluation.abx import Cell, Item, Limits, Mode, cell_errors, items_of, make_cells, pair_errors, used_items
from spear.evaluation.metrics import cluster_interval
from spear.evaluation.tasks.base import Array, Features, Rows, Score, Settings, Split, Task, TaskConfig, alignment_of
from spear.evaluation.tasks.segments import frames_of
from spear.evaluation.tasks.utterances import label_of
from spear.evaluation.units import assign, fit_units

MODES: tuple[Mode, ...] = ("within", "across")


@dataclass(frozen=True, kw_only=True, slots=True)
class AbxConfig(TaskConfig):
    """Error rate of ABX comparisons."""

    tier: str = "phone"
    """Name of the alignment tier; every cut needs a speaker, too."""
    mode: Literal["within", "across"] = "across"
    """The score; the other one is told beside it. ``across``: X is another speaker than A and B; ``within``: the same."""
    span: Literal["phone", "triphone"] = "triphone"
    """What an item covers: the phone alone, or also its neighbours."""
    context: Literal["within", "any"] = "within"
    """``within``: A, B and X have the same neighbours; ``any``: neighbours play no part."""
    num_units: int | None = None
    """Null: frames as they are. K: every frame is replaced by its nearest of K k-means centres, fitted on train: ABX of units."""
    max_seconds: float = 600.0
    """Seconds of whole cuts that a split gives, drawn with the evaluation's seed."""
    max_items: int = 10
    """Most items of one phone, context and speaker."""
    max_across: int = 5
    """Most speakers of X for one A and B."""
    max_cells: int = 10_000
    """Most comparisons of one speaker (or pair of speakers), context and pair of phones."""

    def __post_init__(self) -> None:
        TaskConfig.__post_init__(self)
        for key in ("max_items", "max_cells"):
            at_least(key, getattr(self, key), 2)
        at_least("max_across", self.max_across, 1)
        above("max_seconds", self.max_seconds, 0)
        if self.num_units is not None:
            at_least("num_units", self.num_units, 2)
        if self.span == "triphone" and self.context == "any":
            raise ConfigError("`context` must be within where `span` is triphone, as the neighbours are part of the item, but is any")

    def build(self, name: str, settings: Settings) -> Task:
        """See `TaskConfig`."""
        return Abx(name, self, settings)


@dataclass
class Comparisons:
    """What a split compares: items, numbered, and the cells of both modes."""

    items: list[Item]
    cells: dict[Mode, list[Cell]]
    by_cut: dict[str, list[int]] = dataclasses.field(default_factory=dict)


class Abx(Task):
    """The comparisons are laid out before any model is heard, so that all models are asked the same."""

    section, codes = "tokens", True
    config: AbxConfig

    def __init__(self, name: str, config: AbxConfig, settings: Settings) -> None:
        super().__init__(name, config, settings)
        self.splits = ("valid", "test") if config.num_units is None else ("train", "valid", "test")  # type: ignore[misc]
        self._plans: dict[Split, Comparisons] = {}

    def wants(self, cut: Any) -> bool:
        """See `Task`."""
        return bool(alignment_of(cut, self.config.tier)) and label_of(cut, "speaker") is not None

    def needs(self) -> str:
        """See `Task`."""
        return f"it needs the alignment tier `{self.config.tier}` and the supervision field `speaker`"

    def limits(self, split: Split) -> tuple[int | None, float | None]:
        """See `Task`."""
        del split
        return self.config.max_cuts, self.config.max_seconds

    def select(self, cuts: Mapping[Split, Sequence[Any]]) -> dict[Split, list[Any]]:
        """See `Task`; whole cuts, up to `max_seconds` of each split."""
        return {split: self.first_seconds(found, self.config.max_seconds) for split, found in Task.select(self, cuts).items()}

    def prepare(self, cuts: Mapping[Split, Sequence[Any]]) -> None:
        """Lay out the comparisons.

        Raises:
            DataError: a split allows none.
        """
        config = self.config
        for split in ("valid", "test"):
            items = [
                item
                for cut in sorted(cuts[split], key=lambda cut: cut.id)
                for item in items_of(cut.id, alignment_of(cut, config.tier), str(label_of(cut, "speaker")), span=config.span, context=config.context)
            ]
            limits = Limits(config.max_items, config.max_across, config.max_cells)
            cells = {mode: make_cells(items, mode, limits, self.settings.seed) for mode in MODES}
            if not cells[config.mode]:
                rule = f"finds nothing to compare {config.mode} speakers in the {split} split"
                raise DataError(f"task `{self.name}` {rule}: use more cuts, or `span: phone` and `context: any`")
            plan = Comparisons(items, cells)
            for i in used_items([cell for found in cells.values() for cell in found]):
                plan.by_cut.setdefault(items[i].cut, []).append(i)
            self._plans[split] = plan

    def rows(self, cut: Any, split: Split, times: NDArray[np.float64], layers: Sequence[Array]) -> Rows:
        """See `Task`: the frames of every item, labelled by its number; on train every frame."""
        if split == "train":
            return Rows([""] * len(times), list(layers))
        plan = self._plans[split]
        numbers = plan.by_cut.get(cut.id, [])
        ranges = [frames_of(times, plan.items[i].start, plan.items[i].end) for i in numbers]
        labels = [str(i) for i, (first, last) in zip(numbers, ranges) for _ in range(last - first)]
        return Rows(labels, [np.concatenate([x[:0], *(x[first:last] for first, last in ranges)]) for x in layers])

    def score(self, features: Mapping[Split, Features], layer_names: Sequence[str]) -> Score:
        """See `Task`; the layer with the least error on valid is chosen."""
        pairs: dict[str, dict[str, dict[Mode, dict[tuple[str, str], float]]]] = {}
        for layer, name in enumerate(layer_names):
            found = self._frames(features, layer)
            pairs[name] = {split: self._errors(features[split], found[split], split) for split in found}
        mode = self.config.mode
        by_layer = {name: {split: _mean(errors[mode]) for split, errors in found.items()} for name, found in pairs.items()}
        chosen = min(by_layer, key=lambda name: by_layer[name]["valid"])
        best = pairs[chosen]["test"]
        groups = ["/".join(sorted(pair)) for pair in best[mode]]
        interval = cluster_interval(np.array(list(best[mode].values())), groups, resamples=self.settings.resamples, seed=self.settings.seed)
        details: dict[str, Any] = {"chance": 0.5, "items": len(self._plans["test"].cells[mode]), "phone_pairs": len(best[mode]), "seeds": 1}
        for other in MODES:
            details[other] = round(_mean(best[other]), 6) if best[other] else None
        details["by_layer_other"] = {
            name: round(_mean(found["test"][other]), 6) for other in MODES if other != mode for name, found in pairs.items() if found["test"][other]
        }
        worst = sorted(best[mode].items(), key=lambda item: -item[1])[:10]
        details["hardest"] = [[*pair, round(error, 4)] for pair, error in worst]
        return Score(f"ABX {mode}", False, by_layer[chosen]["test"], 0.0, interval, chosen, by_layer, details)

    def _frames(self, features: Mapping[Split, Features], layer: int) -> dict[Split, NDArray[np.float32]]:
        splits: tuple[Split, ...] = ("valid", "test")
        if self.config.num_units is None or features["test"].discrete:
            return {split: np.asarray(features[split].layers[layer]) for split in splits}
        train = torch.from_numpy(np.array(features["train"].layers[layer])).to(self.settings.device)
        if len(train) < self.config.num_units:
            raise DataError(f"task `{self.name}` needs at least `num_units` {self.config.num_units} frames, but finds {len(train)}")
        mean, deviation = train.mean(0), train.std(0).clamp(min=1e-6)
        centres = fit_units((train - mean) / deviation, self.config.num_units, self.settings.seeds[0])
        found = {}
        for split in splits:
            x = torch.from_numpy(np.array(features[split].layers[layer])).to(self.settings.device)
            found[split] = assign((x - mean) / deviation, centres)[0].cpu().numpy().astype(np.float32)[:, None]
        return found

    def _errors(self, features: Features, frames: NDArray[np.float32], split: Split) -> dict[Mode, dict[tuple[str, str], float]]:
        plan = self._plans[split]
        numbers = np.array([int(label) for label in features.labels])
        starts, lens = np.zeros((2, len(plan.items)), np.int64)
        first = np.flatnonzero(np.concatenate([[True], numbers[1:] != numbers[:-1]]))
        starts[numbers[first]] = first
        lens[numbers[first]] = np.diff(np.append(first, len(numbers)))
        metric: Literal["angular", "mismatch"] = "mismatch" if features.discrete or self.config.num_units is not None else "angular"
        return {mode: pair_errors(cells, cell_errors(cells, frames, starts, lens, metric)) if cells else {} for mode, cells in plan.cells.items()}


def _mean(errors: Mapping[tuple[str, str], float]) -> float:
    return float(np.mean(list(errors.values())))
