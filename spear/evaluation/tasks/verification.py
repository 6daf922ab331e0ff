"""Speaker verification without training: are two cuts of held-out speakers the same voice?"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from spear.bounds import at_least
from spear.errors import ConfigError, DataError
from spear.evaluation.metrics import equal_error_rate, min_detection_cost, trial_interval
from spear.evaluation.tasks.base import Array, Features, Rows, Score, Settings, Split, Task, TaskConfig
from spear.evaluation.tasks.utterances import known_speakers, label_of, pool
from spear.evaluation.trials import Trials, find_trials, read_trials
from spear.files import seed_from


@dataclass(frozen=True, kw_only=True, slots=True)
class VerificationConfig(TaskConfig):
    """Compare pairs of cuts by the cosine of their mean vectors."""

    num_trials: int = 2000
    """Trials of each kind (same speaker, other speaker) per seed; fewer where the cuts allow fewer pairs."""
    p_targets: list[float] = field(default_factory=lambda: [0.01, 0.05])
    """Priors of a same-speaker trial, each with its detection cost; VoxCeleb's are 0.05 and 0.01."""
    held_out: bool = True
    """Use only speakers that the train split lacks."""
    pooling: Literal["mean", "mean_std"] = "mean"
    """Mean over frames, or mean and standard deviation side by side."""
    trials: str | None = None
    """File of the test trials in the format of VoxCeleb, ``1 FILE FILE`` or ``0 FILE FILE`` a line; null: drawn. A FILE is the id of a cut, or a
    path whose suffix is dropped and whose ``/`` become ``-`` in the id. Variables and ``~`` are expanded; else it starts from the current folder."""
    normalization: Literal["none", "s", "as"] = "none"
    """Scores as they are, or ``s``: relative to those against a cohort, the mean vectors of train speakers; ``as``: to the highest of them."""
    cohort: int = 1000
    """Most speakers of the cohort, drawn by a hash of the name."""
    top: int = 200
    """``as``: highest cohort scores of each side that count; all where the cohort is smaller."""

    def __post_init__(self) -> None:
        TaskConfig.__post_init__(self)
        at_least("num_trials", self.num_trials, 1)
        at_least("cohort", self.cohort, 2)
        at_least("top", self.top, 2)
        if not self.p_targets or not all(0 < value < 1 for value in self.p_targets):
            raise ConfigError(f"`p_targets` must be at least one number, each between 0 and 1, but is {self.p_targets}")
        if self.trials == "":
            raise ConfigError("`trials` must be null or a file, but is empty")

    def build(self, name: str, settings: Settings) -> Task:
        """See `TaskConfig`."""
        return Verification(name, self, settings)


class Verification(Task):
    """Equal error rate and detection cost over trials; vectors are centred on the train split's mean."""

    config: VerificationConfig

    def __init__(self, name: str, config: VerificationConfig, settings: Settings) -> None:
        super().__init__(name, config, settings)
        self._listed = None if config.trials is None else read_trials(config.trials)
        self._known: set[str] = set()
        self._noted: set[str] = set()
        self._named: set[str] = set() if self._listed is None else self._listed.names()

    def wants(self, cut: Any) -> bool:
        """See `Task`."""
        return label_of(cut, "speaker") is not None

    def needs(self) -> str:
        """See `Task`."""
        return "it needs the supervision field `speaker`"

    def note(self, split: Split, cut: Any) -> None:
        """See `Task`: speakers of the train split."""
        if split == "train":
            self._noted |= known_speakers({"train": [cut]})

    def eligible(self, split: Split, cut: Any) -> bool:
        """See `Task`."""
        return super().eligible(split, cut) and (split != "test" or self._listed is None or cut.id in self._named)

    def limits(self, split: Split) -> tuple[int | None, float | None]:
        """See `Task`; of listed test cuts, all."""
        return super().limits(split) if split != "test" or self._listed is None else (None, None)

    def select(self, cuts: Mapping[Split, Sequence[Any]]) -> dict[Split, list[Any]]:
        """See `Task`; of the test split, where trials are listed, exactly the cuts that they name. Train speakers are known from all its cuts.

        Raises:
            DataError: a listed cut is missing, or its speaker is in train although speakers are to be held out.
        """
        self._known = self._noted | known_speakers(cuts) if self.config.held_out else set()
        if self._listed is None:
            return super().select(cuts)
        test = [cut for cut in cuts.get("test", ()) if cut.id in self._named and self.wants(cut)]
        try:
            find_trials(self._listed, [cut.id for cut in test])
        except DataError as error:
            raise DataError(f"task `{self.name}`: {error}") from error
        chosen = {**super().select({**cuts, "test": test}), "test": test}
        shared = sorted(self._known & {str(label_of(cut, "speaker")) for cut in test})
        if shared:
            raise DataError(f"task `{self.name}`: speaker {shared[0]!r} of the listed trials is in the train split, too (`held_out` is true)")
        return chosen

    def rows(self, cut: Any, split: Split, times: NDArray[np.float64], layers: Sequence[Array]) -> Rows:
        """See `Task`."""
        return Rows([str(label_of(cut, "speaker"))], [pool(x, self.config.pooling)[None] for x in layers])

    def score(self, features: Mapping[Split, Features], layer_names: Sequence[str]) -> Score:
        """See `Task`; the layer is the one with the least error on valid trials, and every seed draws its own test trials."""
        valid = self._drawn(features, "valid")[0]
        test = self._drawn(features, "test") if self._listed is None else [find_trials(self._listed, features["test"].groups)]
        by_layer: dict[str, dict[str, float]] = {}
        for i, name in enumerate(layer_names):
            pairs: list[tuple[Split, Trials]] = [("valid", valid), ("test", test[0])]
            by_layer[name] = {split: equal_error_rate(scores, found.same) for (split, found), scores in zip(pairs, self._scores(features, i, pairs))}
        layer = min(by_layer, key=lambda name: by_layer[name]["valid"])
        scored = self._scores(features, list(layer_names).index(layer), [("test", found) for found in test])
        speakers = np.unique(features["test"].labels, return_inverse=True)[1]
        return self._summed([(scores, found.same) for scores, found in zip(scored, test)], speakers[test[0].pairs], layer, by_layer)

    def _scores(self, features: Mapping[Split, Features], layer: int, wanted: Sequence[tuple[Split, Trials]]) -> list[NDArray[np.float64]]:
        """Scores (M,) of trials, each on its split, from one layer."""
        train = features["train"].layers[layer]
        centre = train.mean(axis=0)
        unit = {split: directions(features[split].layers[layer] - centre) for split in {split for split, _ in wanted}}
        found = [cosines(unit[split], trials) for split, trials in wanted]
        if self.config.normalization == "none":
            return found
        cohort = self._cohort(features["train"].labels, directions(train - centre))
        top = self.config.top if self.config.normalization == "as" else None
        return [normalised(scores, trials, unit[split], cohort, top) for scores, (split, trials) in zip(found, wanted)]

    def _summed(
        self,
        scored: list[tuple[NDArray[np.float64], NDArray[np.bool_]]],
        speakers: NDArray[np.int64],
        layer: str,
        by_layer: dict[str, dict[str, float]],
    ) -> Score:
        """The score of one (scores, same) pair per seed; `speakers` (M, 2) of the first one's trials."""
        rates = [equal_error_rate(*found) for found in scored]
        costs = {str(p): round(float(np.mean([min_detection_cost(*found, p_target=p) for found in scored])), 6) for p in self.config.p_targets}
        details = {"items": len(scored[0][1]), "chance": 0.5, "min_dcf": costs, "normalization": self.config.normalization, "seeds": len(scored)}
        interval = trial_interval(*scored[0], speakers, resamples=self.settings.resamples, seed=self.settings.seed)
        return Score("EER", False, float(np.mean(rates)), float(np.std(rates)), interval, layer, by_layer, details)

    def _drawn(self, features: Mapping[Split, Features], split: Split) -> list[Trials]:
        """Trials of every seed among the speakers of a split; of the first seed alone for valid."""
        known = self._known | set(features["train"].labels) if self.config.held_out else set()
        found, seeds = features[split], self.settings.seeds if split == "test" else self.settings.seeds[:1]
        try:
            return [
                draw_trials(found.groups, found.labels, self.config.num_trials, seed_from(seed, "trials", split), exclude=known) for seed in seeds
            ]
        except DataError as error:
            raise DataError(f"task `{self.name}`, {split} split: {error}") from error

    def _cohort(self, speakers: Sequence[str], unit: Array) -> Array:
        """Directions (S, D) of the mean unit vectors of at most ``cohort`` train speakers, one of `speakers` per row of `unit`."""
        names = sorted(set(speakers), key=lambda name: seed_from(self.settings.seed, "cohort", name))[: self.config.cohort]
        labels = np.asarray(speakers)
        return directions(np.stack([unit[labels == name].mean(axis=0) for name in names]))


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


def normalised(scores: NDArray[np.float64], trials: Trials, unit: Array, cohort: Array, top: int | None) -> NDArray[np.float64]:
    """Mean over both sides of (score - mean) / deviation of that side's cohort scores: s-norm, or with `top` adaptive s-norm.

    Args:
        scores: (M,) of the trials. unit: (N, D) directions of the items. cohort: (S, D) directions.
        top: highest cohort scores of each item that count; None for all.
    Source: Matejka et al., Interspeech 2017, section 2 (S-norm, and AS-norm1 with each side's own best cohort).
    """
    means, deviations = np.empty(len(unit)), np.empty(len(unit))
    for start in range(0, len(unit), 4096):
        found = unit[start : start + 4096].astype(np.float64) @ cohort.T.astype(np.float64)  # (B, S)
        if top is not None and top < found.shape[1]:
            found = np.partition(found, found.shape[1] - top, axis=1)[:, -top:]
        means[start : start + 4096], deviations[start : start + 4096] = found.mean(axis=1), found.std(axis=1)
    sides = [(scores - means[trials.pairs[:, k]]) / np.maximum(deviations[trials.pairs[:, k]], 1e-12) for k in (0, 1)]
    return np.asarray((sides[0] + sides[1]) / 2, dtype=np.float64)
