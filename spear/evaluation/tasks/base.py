"""The contract of a task: which cuts it uses, what it keeps of their frames, and its score."""

from __future__ import annotations

import abc
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from spear.errors import ConfigError, DataError
from spear.files import seed_from
from spear.registry import Registry

Split = Literal["train", "valid", "test"]
SPLITS: tuple[Split, ...] = ("train", "valid", "test")
Array = NDArray[np.float32]


class Rows(NamedTuple):
    """Items of one cut: labels, one per item, and per layer an (M, D_l) float32 array."""

    labels: list[str]
    layers: list[Array]


@dataclass(slots=True)
class Features:
    """Items of one split for one model.

    labels: M words; groups: M cut ids; layers: one (M, D_l) float32 array per layer, some of them mapped from files.
    frame_rate_hz: of the model, 0 where it does not matter. codebook_size: K where the layers hold codes, 0 for features.
    """

    labels: list[str]
    groups: list[str]
    layers: list[Array]
    frame_rate_hz: float = 0.0
    codebook_size: int = 0

    @classmethod
    def join(cls, parts: Mapping[str, Rows]) -> Features:
        """Put the items of cuts (id -> Rows) together, in the order of the ids.

        Raises:
            DataError: there is no item at all.
        """
        ids = [cut_id for cut_id in sorted(parts) if parts[cut_id].labels]
        if not ids:
            raise DataError("no labelled item was found")
        labels = [label for cut_id in ids for label in parts[cut_id].labels]
        groups = [cut_id for cut_id in ids for _ in parts[cut_id].labels]
        count = len(parts[ids[0]].layers)
        return cls(labels, groups, [np.concatenate([parts[cut_id].layers[i] for cut_id in ids]) for i in range(count)])

    @property
    def discrete(self) -> bool:
        """Whether the layers hold codes (whole numbers)."""
        return self.codebook_size > 0

    def numbers(self) -> NDArray[np.int64]:
        """(M,) number of each item's cut, in the order of the ids."""
        return np.unique(np.asarray(self.groups), return_inverse=True)[1].astype(np.int64)


@dataclass(frozen=True, slots=True)
class Settings:
    """What all tasks of an evaluation share (see `EvaluationConfig`)."""

    seed: int = 0
    seeds: tuple[int, ...] = (0,)
    max_train_frames: int = 50_000
    max_test_frames: int = 50_000
    learning_rates: tuple[float, ...] = (0.01,)
    weight_decays: tuple[float, ...] = (0.0,)
    steps: int = 400
    batch_size: int = 512
    resamples: int = 500
    device: str = "cpu"


@dataclass(slots=True)
class Score:
    """Result of one model on one task.

    value: on test, the mean over seeds, of the layer that is best on valid; std: over the seeds; ci: 95 % bootstrap interval.
    by_layer: layer name -> {"valid", "test"}, of the first seed. details: further numbers, such as the number of items.
    """

    metric: str
    higher_is_better: bool
    value: float
    std: float
    ci: tuple[float, float]
    layer: str
    by_layer: dict[str, dict[str, float]]
    details: dict[str, Any] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """JSON value with numbers rounded to six digits."""
        return {
            "metric": self.metric,
            "higher_is_better": self.higher_is_better,
            "value": round(self.value, 6),
            "std": round(self.std, 6),
            "ci": [round(end, 6) for end in self.ci],
            "layer": self.layer,
            "by_layer": {name: {split: round(x, 6) for split, x in found.items()} for name, found in self.by_layer.items()},
            **self.details,
        }


@dataclass(frozen=True, kw_only=True, slots=True)
class TaskConfig(Registry):
    """Settings of a task; the table of tasks."""

    TABLE: ClassVar[dict[str, str]] = {
        "abx": "spear.evaluation.tasks.abx:AbxConfig",
        "ctc": "spear.evaluation.tasks.ctc:CtcConfig",
        "frames": "spear.evaluation.tasks.frames:FramesConfig",
        "leakage": "spear.evaluation.tasks.leakage:LeakageConfig",
        "profiling": "spear.evaluation.tasks.profiling:ProfilingConfig",
        "segments": "spear.evaluation.tasks.segments:SegmentsConfig",
        "speaker_count": "spear.evaluation.tasks.speaker_count:SpeakerCountConfig",
        "units": "spear.evaluation.tasks.units:UnitsConfig",
        "utterances": "spear.evaluation.tasks.utterances:UtterancesConfig",
        "verification": "spear.evaluation.tasks.verification:VerificationConfig",
    }
    domain: str | None = None
    """Corpora of this domain only; null takes any."""
    corpora: list[str] = field(default_factory=list)
    """Names of the corpora; empty takes all of the domain."""
    max_cuts: int | None = None
    """Most cuts per split, drawn with the evaluation's seed; null takes all."""

    def __post_init__(self) -> None:
        if self.max_cuts is not None and self.max_cuts < 1:
            raise ConfigError(f"`max_cuts` must be at least 1 or null, but is {self.max_cuts}")

    def build(self, name: str, settings: Settings) -> Task:
        """Make the task under its name in the recipe."""
        raise NotImplementedError


class Task(abc.ABC):
    """Picks items out of cuts and scores a model on them.

    Attributes: splits it reads; section of the report that shows it, ``probes`` or ``tokens``; codes: whether it also judges tokens
    themselves, whose "layers" are codebooks.
    """

    splits: ClassVar[tuple[Split, ...]] = SPLITS
    section: ClassVar[str] = "probes"
    codes: ClassVar[bool] = False

    def __init__(self, name: str, config: TaskConfig, settings: Settings) -> None:
        self.name, self.config, self.settings = name, config, settings

    @abc.abstractmethod
    def wants(self, cut: Any) -> bool:
        """Whether the cut carries the labels the task needs."""

    @abc.abstractmethod
    def rows(self, cut: Any, split: Split, times: NDArray[np.float64], layers: Sequence[Array]) -> Rows:
        """Items of one cut from its frames: `times` (T,) centres in seconds, `layers` (T, D_l) each."""

    @abc.abstractmethod
    def score(self, features: Mapping[Split, Features], layer_names: Sequence[str]) -> Score:
        """Train on train, choose on valid, score once on test.

        Raises:
            DataError: the labels do not make a task, e.g. a single class.
        """

    def select(self, cuts: Mapping[Split, Sequence[Any]]) -> dict[Split, list[Any]]:
        """Labelled cuts of every split, at most ``max_cuts`` of each, drawn by a hash of the id so that order plays no part.

        Raises:
            DataError: a split has no labelled cut.
        """
        chosen: dict[Split, list[Any]] = {}
        for split in self.splits:
            found = [cut for cut in cuts.get(split, ()) if self.wants(cut)]
            if not found:
                raise DataError(f"task `{self.name}` finds no labelled cut in the {split} split ({self.needs()})")
            if self.config.max_cuts is not None and len(found) > self.config.max_cuts:
                found = sorted(found, key=self.place)[: self.config.max_cuts]
            chosen[split] = found
        return chosen

    def place(self, cut: Any) -> int:
        """The place of a cut among others, by a hash of its id, where not all of them are taken."""
        return seed_from(self.settings.seed, "cuts", self.name, cut.id)

    def note(self, split: Split, cut: Any) -> None:
        """Called with every cut of the task's corpora, train first, before any is left out; tasks that must know of all of them note it here."""
        del split, cut

    def eligible(self, split: Split, cut: Any) -> bool:
        """Whether `select` may choose a cut of a split; `note` has seen it, and every train cut before those of other splits."""
        return split in self.splits and self.wants(cut)

    def limits(self, split: Split) -> tuple[int | None, float | None]:
        """Most cuts that `select` takes of a split in the order of `place`, and the seconds it takes of them as `first_seconds` does; None: all."""
        del split
        return self.config.max_cuts, None

    def needs(self) -> str:
        """The label the task reads, in words."""
        return "it needs supervisions"

    def first_seconds(self, cuts: Sequence[Any], limit_s: float) -> list[Any]:
        """Cuts in the order of a hash of their ids, as many as fit into `limit_s` seconds together, at least one."""
        chosen: list[Any] = []
        for cut in sorted(cuts, key=self.place):
            limit_s -= cut.duration
            if chosen and limit_s < 0:
                break
            chosen.append(cut)
        return chosen

    def prepare(self, cuts: Mapping[Split, Sequence[Any]]) -> None:
        """Called once with the selected cuts before any embedding; tasks that thin out their items count them here."""
        del cuts


def alignment_of(cut: Any, tier: str) -> list[tuple[float, float, str]]:
    """Segments (start, end, symbol) of a tier in seconds from the cut's start, ordered, without empty ones."""
    found = [
        (float(item.start), float(item.start) + float(item.duration), str(item.symbol))
        for supervision in cut.supervisions
        for item in (supervision.alignment or {}).get(tier, ())
        if item.duration > 0
    ]
    return sorted(found)
