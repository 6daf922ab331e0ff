"""Segment classification: the mean of the frames of each aligned segment, e.g. words."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from spear.errors import ConfigError
from spear.evaluation.tasks.base import Array, Rows, Settings, Split, Task, TaskConfig, alignment_of
from spear.evaluation.tasks.classification import Classification


@dataclass(frozen=True, kw_only=True, slots=True)
class SegmentsConfig(TaskConfig):
    """Classify the segments of an alignment tier."""

    tier: str = "word"
    """Name of the alignment tier."""

    def __post_init__(self) -> None:
        TaskConfig.__post_init__(self)
        if not self.tier:
            raise ConfigError("`tier` must name an alignment tier, but is empty")

    def build(self, name: str, settings: Settings) -> Task:
        """See `TaskConfig`."""
        return SegmentClassification(name, self, settings)


class SegmentClassification(Classification):
    """One item per segment: the mean of the frames whose centres it holds, or the nearest frame where it holds none."""

    config: SegmentsConfig

    def wants(self, cut: Any) -> bool:
        """See `Task`."""
        return bool(alignment_of(cut, self.config.tier))

    def needs(self) -> str:
        """See `Task`."""
        return f"it needs the alignment tier `{self.config.tier}`"

    def rows(self, cut: Any, split: Split, times: NDArray[np.float64], layers: Sequence[Array]) -> Rows:
        """See `Task`."""
        segments = alignment_of(cut, self.config.tier)
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
