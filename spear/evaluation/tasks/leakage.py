"""How much of the speaker is left in single phones: a probe for the speaker on the mean of every phone's frames."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from spear.errors import ConfigError, DataError
from spear.evaluation.heads import HeadName
from spear.evaluation.tasks.base import Array, Rows, Settings, Split, Task, TaskConfig, alignment_of
from spear.evaluation.tasks.segments import SegmentClassification, SegmentsConfig
from spear.evaluation.tasks.utterances import label_of

SHARES: dict[Split, float] = {"train": 0.6, "valid": 0.2, "test": 0.2}


@dataclass(frozen=True, kw_only=True, slots=True)
class LeakageConfig(TaskConfig):
    """Classify the speaker from single segments."""

    tier: str = "phone"
    """Name of the alignment tier whose segments are the items."""
    split: Literal["train", "valid", "test"] = "test"
    """Its cuts are divided anew, 60 % to train, 20 % to choose and 20 % to score, as all three need the same speakers."""
    head: HeadName = "linear"
    """The probe: ``linear``, ``mlp`` (one hidden layer) or ``knn`` (nearest neighbours, no training)."""

    def __post_init__(self) -> None:
        TaskConfig.__post_init__(self)
        if not self.tier:
            raise ConfigError("`tier` must name an alignment tier, but is empty")

    def build(self, name: str, settings: Settings) -> Task:
        """See `TaskConfig`."""
        return Leakage(name, self, settings)


class Leakage(SegmentClassification):
    """One item per segment, its speaker as the label; every cut is in one part only."""

    def __init__(self, name: str, config: LeakageConfig, settings: Settings) -> None:
        super().__init__(name, SegmentsConfig(domain=config.domain, corpora=config.corpora, tier=config.tier, head=config.head), settings)
        self._split, self._most = config.split, config.max_cuts

    def wants(self, cut: Any) -> bool:
        """See `Task`."""
        return super().wants(cut) and label_of(cut, "speaker") is not None

    def needs(self) -> str:
        """See `Task`."""
        return f"it needs the alignment tier `{self.config.tier}` and the supervision field `speaker`"

    def eligible(self, split: Split, cut: Any) -> bool:
        """See `Task`."""
        return split == self._split and self.wants(cut)

    def limits(self, split: Split) -> tuple[int | None, float | None]:
        """See `Task`."""
        del split
        return self._most, None

    def select(self, cuts: Mapping[Split, Sequence[Any]]) -> dict[Split, list[Any]]:
        """See `Task`: cuts of one split, divided per speaker.

        Raises:
            DataError: no speaker has three cuts.
        """
        by_speaker: dict[str, list[Any]] = {}
        found = [cut for cut in cuts.get(self._split, ()) if self.wants(cut)]
        for cut in sorted(found, key=self.place)[: self._most]:
            by_speaker.setdefault(str(label_of(cut, "speaker")), []).append(cut)
        chosen: dict[Split, list[Any]] = {split: [] for split in SHARES}
        for group in by_speaker.values():
            if len(group) >= len(SHARES):
                ends = [max(1, round(len(group) * SHARES["valid"])), 2 * max(1, round(len(group) * SHARES["valid"]))]
                for split, part in zip(("valid", "test", "train"), (group[: ends[0]], group[ends[0] : ends[1]], group[ends[1] :])):
                    chosen[split].extend(part)  # type: ignore[index]
        if not chosen["train"]:
            raise DataError(f"task `{self.name}` finds no speaker with three labelled cuts in the {self._split} split ({self.needs()})")
        return chosen

    def rows(self, cut: Any, split: Split, times: NDArray[np.float64], layers: Sequence[Array]) -> Rows:
        """See `Task`."""
        found = super().rows(cut, split, times, layers)
        return Rows([str(label_of(cut, "speaker"))] * len(found.labels), found.layers)

    def prepare(self, cuts: Mapping[Split, Sequence[Any]]) -> None:
        """See `Task`."""
        self._segments = {split: sum(len(alignment_of(cut, self.config.tier)) for cut in found) for split, found in cuts.items()}
