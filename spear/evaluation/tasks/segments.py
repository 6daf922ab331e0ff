"""Segment classification: the mean of the frames of each aligned segment, e.g. words."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from spear.errors import ConfigError
from spear.evaluation.heads import HeadName
from spear.evaluation.tasks.base import Array, Rows, Settings, Split, Task, TaskConfig, alignment_of
from spear.evaluation.tasks.classification import Classification
from spear.files import seed_from


@dataclass(frozen=True, kw_only=True, slots=True)
class SegmentsConfig(TaskConfig):
    """Classify the segments of an alignment tier."""

    tier: str = "word"
    """Name of the alignment tier."""
    head: HeadName = "linear"
    """The probe: ``linear``, ``mlp`` (one hidden layer) or ``knn`` (nearest neighbours, no training)."""

    def __post_init__(self) -> None:
        TaskConfig.__post_init__(self)
        if not self.tier:
            raise ConfigError("`tier` must name an alignment tier, but is empty")

    def build(self, name: str, settings: Settings) -> Task:
        """See `TaskConfig`."""
        return SegmentClassification(name, self, settings)


class SegmentClassification(Classification):
    """One item per segment: the mean of the frames whose centres it holds, or the nearest frame where it holds none.

    Large splits are thinned to the frame limits by a generator seeded per cut.
    """

    config: SegmentsConfig

    def __init__(self, name: str, config: SegmentsConfig, settings: Settings) -> None:
        super().__init__(name, config, settings)
        self._segments: dict[Split, int] = {}
        self.head = config.head

    def prepare(self, cuts: Mapping[Split, Sequence[Any]]) -> None:
        """Count the segments of each split, which give the share to keep."""
        self._segments = {split: sum(len(alignment_of(cut, self.config.tier)) for cut in found) for split, found in cuts.items()}

    def wants(self, cut: Any) -> bool:
        """See `Task`."""
        return bool(alignment_of(cut, self.config.tier))

    def needs(self) -> str:
        """See `Task`."""
        return f"it needs the alignment tier `{self.config.tier}`"

    def rows(self, cut: Any, split: Split, times: NDArray[np.float64], layers: Sequence[Array]) -> Rows:
        """See `Task`."""
        segments = alignment_of(cut, self.config.tier)
        limit = self.settings.max_train_frames if split == "train" else self.settings.max_test_frames
        share = limit / max(self._segments.get(split, 0), 1)
        if share < 1:
            kept = np.random.default_rng(seed_from(self.settings.seed, "segments", cut.id)).random(len(segments)) < share
            segments = [segment for segment, keep in zip(segments, kept) if keep]
        if not segments:
            return Rows([], [x[:0] for x in layers])
        ranges = [frames_of(times, start, end) for start, end, _ in segments]
        pooled = [np.stack([x[first:last].mean(axis=0) for first, last in ranges]) for x in layers]
        return Rows([symbol for _, _, symbol in segments], pooled)


def frames_of(times: NDArray[np.float64], start: float, end: float) -> tuple[int, int]:
    """First and one-past-last frame whose centre lies in [start, end) seconds; the nearest frame where there is none."""
    first, last = (int(i) for i in np.searchsorted(times + 1e-9, [start, end], side="left"))
    if first < last:
        return first, last
    nearest = int(np.abs(times - (start + end) / 2).argmin())
    return nearest, nearest + 1
