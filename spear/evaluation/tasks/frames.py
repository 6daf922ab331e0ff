"""Frame classification: the symbol of the aligned segment that holds the frame's centre."""

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
class FramesConfig(TaskConfig):
    """Classify every frame by an alignment tier."""

    tier: str = "phone"
    """Name of the alignment tier."""
    head: HeadName = "linear"
    """The probe: ``linear``, ``mlp`` (one hidden layer) or ``knn`` (nearest neighbours, no training)."""

    def __post_init__(self) -> None:
        TaskConfig.__post_init__(self)
        if not self.tier:
            raise ConfigError("`tier` must name an alignment tier, but is empty")

    def build(self, name: str, settings: Settings) -> Task:
        """See `TaskConfig`."""
        return FrameClassification(name, self, settings)


class FrameClassification(Classification):
    """Frames outside any segment are dropped; large splits are thinned to the frame limits by a generator seeded per cut."""

    config: FramesConfig

    def __init__(self, name: str, config: FramesConfig, settings: Settings) -> None:
        super().__init__(name, config, settings)
        self._labelled_s: dict[Split, float] = {}
        self.head = config.head

    def wants(self, cut: Any) -> bool:
        """See `Task`."""
        return bool(alignment_of(cut, self.config.tier))

    def needs(self) -> str:
        """See `Task`."""
        return f"it needs the alignment tier `{self.config.tier}`"

    def prepare(self, cuts: Mapping[Split, Sequence[Any]]) -> None:
        """Sum the labelled seconds of each split; with the frame rate they give the share of frames to keep."""
        self._labelled_s = {
            split: sum(end - start for cut in found for start, end, _ in alignment_of(cut, self.config.tier)) for split, found in cuts.items()
        }

    def rows(self, cut: Any, split: Split, times: NDArray[np.float64], layers: Sequence[Array]) -> Rows:
        """See `Task`."""
        labels = label_frames(times, alignment_of(cut, self.config.tier))
        kept = np.array([label is not None for label in labels], dtype=bool)
        limit = self.settings.max_train_frames if split == "train" else self.settings.max_test_frames
        rate = 1 / (times[1] - times[0]) if len(times) > 1 else 1.0
        share = limit / max(self._labelled_s.get(split, 0.0) * rate, 1.0)
        if share < 1:
            kept &= np.random.default_rng(seed_from(self.settings.seed, "frames", cut.id)).random(len(kept)) < share
        return Rows([label for label, keep in zip(labels, kept) if keep and label is not None], [x[kept] for x in layers])


def label_frames(times: NDArray[np.float64], segments: Sequence[tuple[float, float, str]]) -> list[str | None]:
    """Symbol of the segment [start, end) that holds each centre, None outside; where segments overlap, the later start wins as long as it lasts.

    Args:
        times: (T,) seconds. segments: (start, end, symbol), ordered by start.
    """
    labels: list[str | None] = [None] * len(times)
    edges = np.searchsorted(times + 1e-9, np.array([(start, end) for start, end, _ in segments]).reshape(-1, 2))
    for (first, last), (_, _, symbol) in zip(edges.tolist(), segments):
        labels[first:last] = [symbol] * max(0, last - first)
    return labels
