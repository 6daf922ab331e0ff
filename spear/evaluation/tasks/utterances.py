"""Utterance classification: one vector per cut, pooled over its frames."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from spear.errors import ConfigError
from spear.evaluation.heads import HeadName
from spear.evaluation.tasks.base import Array, Rows, Settings, Split, Task, TaskConfig
from spear.evaluation.tasks.classification import Classification


@dataclass(frozen=True, kw_only=True, slots=True)
class UtterancesConfig(TaskConfig):
    """Classify whole cuts."""

    label: str = "label"
    """`speaker`, `gender`, `text` or `language` of the supervision, else the key of its custom fields."""
    pooling: Literal["mean", "mean_std"] = "mean"
    """Mean over frames, or mean and standard deviation side by side."""
    head: HeadName = "linear"
    """The probe: ``linear``, ``mlp`` (one hidden layer) or ``knn`` (nearest neighbours, no training)."""
    separator: str | None = None
    """Where labels join several classes, what stands between them; the score is then mean average precision."""

    def __post_init__(self) -> None:
        TaskConfig.__post_init__(self)
        if not self.label:
            raise ConfigError("`label` must name a field of the supervision, but is empty")
        if self.separator == "":
            raise ConfigError("`separator` must be null or at least one character, but is empty")
        if self.separator is not None and self.head == "knn":
            raise ConfigError("`head` must be linear or mlp where a `separator` gives items several labels, but is knn")

    def build(self, name: str, settings: Settings) -> Task:
        """See `TaskConfig`."""
        return UtteranceClassification(name, self, settings)


class UtteranceClassification(Classification):
    """One item per cut."""

    config: UtterancesConfig

    def __init__(self, name: str, config: UtterancesConfig, settings: Settings) -> None:
        super().__init__(name, config, settings)
        self.separator, self.head = config.separator, config.head

    def wants(self, cut: Any) -> bool:
        """See `Task`."""
        return label_of(cut, self.config.label) is not None

    def needs(self) -> str:
        """See `Task`."""
        return f"it needs the supervision field `{self.config.label}`"

    def rows(self, cut: Any, split: Split, times: NDArray[np.float64], layers: Sequence[Array]) -> Rows:
        """See `Task`."""
        label = label_of(cut, self.config.label)
        return Rows([] if label is None else [label], [pool(x, self.config.pooling)[None] for x in layers])


def label_of(cut: Any, field: str) -> str | None:
    """The label of the first supervision that has one."""
    for supervision in cut.supervisions:
        found = getattr(supervision, field) if field in {"speaker", "text", "language", "gender"} else (supervision.custom or {}).get(field)
        if found is not None:
            return str(found)
    return None


def transcript_of(cut: Any) -> str | None:
    """The texts of all supervisions in the order of their starts; None where there is none, or one of them has no text."""
    texts = [part.text for part in sorted(cut.supervisions, key=lambda part: float(part.start))]
    return None if not texts or None in texts else " ".join(texts)


def known_speakers(cuts: Mapping[Split, Sequence[Any]]) -> set[str]:
    """Speakers of the train split, of all its cuts."""
    found = (label_of(cut, "speaker") for cut in cuts.get("train", ()))
    return {speaker for speaker in found if speaker is not None}


def pool(frames: Array, pooling: Literal["mean", "mean_std"]) -> Array:
    """(T, D) -> (D,) mean, or (2 D,) mean and standard deviation."""
    mean = frames.mean(axis=0)
    return mean if pooling == "mean" else np.concatenate([mean, frames.std(axis=0)])
