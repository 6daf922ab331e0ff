"""Speaker verification without training: are two cuts of held-out speakers the same voice?"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from spear.bounds import at_least
from spear.errors import ConfigError, DataError
from spear.evaluation.metrics import equal_error_rate, min_detection_cost, trial_interval
from spear.evaluation.tasks.base import Array, Features, Rows, Score, Settings, Split, Task, TaskConfig
from spear.evaluation.tasks.utterances import label_of
from spear.files import seed_from


@dataclass(frozen=True, kw_only=True, slots=True)
class VerificationConfig(TaskConfig):
    """Compare pairs of cuts by the cosine of their mean vectors."""

    num_trials: int = 2000
    """Trials of each kind (same speaker, other speaker) per seed; fewer where the cuts allow fewer pairs."""
    p_target: float = 0.01
    """Prior of a same-speaker trial in the detection cost."""
    held_out: bool = True
    """Use only speakers that the train split lacks."""

    def __post_init__(self) -> None:
        TaskConfig.__post_init__(self)
        at_least("num_trials", self.num_trials, 1)
        if not 0 < self.p_target < 1:
            raise ConfigError(f"`p_target` must be between 0 and 1, but is {self.p_target}")

    def build(self, name: str, settings: Settings) -> Task:
        """See `TaskConfig`."""
        return Verification(name, self, settings)


class Trials(NamedTuple):
    """Pairs of items: (M, 2) indexes, and (M,) True where the speaker is the same."""

    pairs: NDArray[np.int64]
    same: NDArray[np.bool_]


class Verification(Task):
    """Equal error rate and detection cost over seeded trials; vectors are centred on the train split's mean."""

    config: VerificationConfig

    def wants(self, cut: Any) -> bool:
        """See `Task`."""
        return label_of(cut, "speaker") is not None

    def needs(self) -> str:
        """See `Task`."""
        return "it needs the supervision field `speaker`"

    def rows(self, cut: Any, split: Split, times: NDArray[np.float64], layers: Sequence[Array]) -> Rows:
        """See `Task`."""
        return Rows([str(label_of(cut, "speaker"))], [x.mean(axis=0)[None] for x in layers])

    def score(self, features: Mapping[Split, Features], layer_names: Sequence[str]) -> Score:
        """See `Task`; the layer is the one with the least error on valid trials, and every seed draws its own test trials."""
        seeds, settings = self.settings.seeds, self.settings
        known = set(features["train"].labels) if self.config.held_out else set()
        trials = {split: [self._trials(features[split], known, split, seed) for seed in seeds] for split in ("valid", "test")}
        by_layer: dict[str, dict[str, float]] = {}
        vectors: dict[str, Array] = {}
        for i, name in enumerate(layer_names):
            centre = features["train"].layers[i].mean(axis=0)
            valid, vectors[name] = (directions(features[split].layers[i] - centre) for split in ("valid", "test"))
            by_layer[name] = {
                "valid": equal_error_rate(cosines(valid, trials["valid"][0]), trials["valid"][0].same),
                "test": equal_error_rate(cosines(vectors[name], trials["test"][0]), trials["test"][0].same),
            }
        layer = min(by_layer, key=lambda name: by_layer[name]["valid"])
        scored = [(cosines(vectors[layer], found), found.same) for found in trials["test"]]
        rates = [equal_error_rate(*found) for found in scored]
        costs = [min_detection_cost(*found, p_target=self.config.p_target) for found in scored]
        details = {"items": len(scored[0][1]), "chance": 0.5, "min_dcf": round(float(np.mean(costs)), 6), "p_target": self.config.p_target}
        interval = trial_interval(*scored[0], resamples=settings.resamples, seed=settings.seed)
        return Score("EER", False, float(np.mean(rates)), float(np.std(rates)), interval, layer, by_layer, details)

    def _trials(self, features: Features, known: set[str], split: str, seed: int) -> Trials:
        try:
            return draw_trials(features.groups, features.labels, self.config.num_trials, seed_from(seed, "trials", split), exclude=known)
        except DataError as error:
            raise DataError(f"task `{self.name}`, {split} split: {error}") from error


def draw_trials(ids: Sequence[str], speakers: Sequence[str], num_trials: int, seed: int, *, exclude: set[str] | None = None) -> Trials:
    """Draw up to `num_trials` different pairs of each kind; speakers are drawn alike often, whatever their number of cuts.

    Args:
        ids, speakers: one per item. exclude: speakers that may not appear. The draw depends on the ids, never on their order.
    Raises:
        DataError: fewer than two speakers are left, or none of them has two items.
    """
    by_speaker: dict[str, list[int]] = {}
    for i in sorted(range(len(ids)), key=lambda i: ids[i]):
        if speakers[i] not in (exclude or ()):
            by_speaker.setdefault(speakers[i], []).append(i)
    groups = [by_speaker[name] for name in sorted(by_speaker)]
    several = [group for group in groups if len(group) > 1]
    if len(groups) < 2 or not several:
        raise DataError(f"trials need two speakers outside the train split, one of them with two cuts, but {len(groups)} speakers are left")
    rng = np.random.default_rng(seed)
    same = _all_if_few(itertools.chain.from_iterable(itertools.combinations(group, 2) for group in several), num_trials)
    other = _all_if_few(itertools.chain.from_iterable(itertools.product(*two) for two in itertools.combinations(groups, 2)), num_trials)
    most_same, most_other = len(same) or num_trials, len(other) or num_trials
    for _ in range(20 * num_trials):
        if len(same) == most_same and len(other) == most_other:
            break
        if len(same) < most_same:
            group = several[rng.integers(len(several))]
            first, second = (group[i] for i in rng.choice(len(group), 2, replace=False))
            same[min(first, second), max(first, second)] = None
        if len(other) < most_other:
            first, second = (groups[i][rng.integers(len(groups[i]))] for i in rng.choice(len(groups), 2, replace=False))
            other[min(first, second), max(first, second)] = None
    return Trials(np.array([*same, *other]), np.arange(len(same) + len(other)) < len(same))


def _all_if_few(pairs: Iterator[tuple[int, int]], limit: int) -> dict[tuple[int, int], None]:
    """Every pair where there are at most `limit`, as drawing the last of them would take long; else none."""
    found = list(itertools.islice(pairs, limit + 1))
    return {(min(pair), max(pair)): None for pair in found} if len(found) <= limit else {}


def directions(vectors: Array) -> Array:
    """Rows of (M, D) scaled to length 1."""
    norms = np.linalg.norm(vectors, axis=1, keepdims=True)
    return np.asarray(vectors / np.maximum(norms, 1e-12), dtype=np.float32)


def cosines(unit: Array, trials: Trials) -> NDArray[np.float64]:
    """Cosine of each trial's pair of unit rows, (M,)."""
    products = unit[trials.pairs[:, 0]].astype(np.float64) * unit[trials.pairs[:, 1]]
    return np.asarray(products.sum(axis=1), dtype=np.float64)
