"""Counting of speakers without training: the windows of a conversation are clustered, and the clusters are counted."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from spear.bounds import above, at_least
from spear.errors import DataError
from spear.evaluation.metrics import cluster_interval
from spear.evaluation.tasks.base import Array, Features, Rows, Score, Settings, Split, Task, TaskConfig
from spear.evaluation.tasks.utterances import known_speakers, label_of
from spear.evaluation.tasks.verification import directions
from spear.files import seed_from

THRESHOLDS = np.linspace(0.02, 1.3, 65)
"""Cosine distances tried on valid."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SpeakerCountConfig(TaskConfig):
    """Conversations are put together from single-speaker cuts; their windows are clustered by the cosines of mean vectors."""

    max_speakers: int = 4
    """Conversations have 1 to this many speakers, all numbers alike often."""
    num_conversations: int = 200
    """Conversations of a split, drawn with the first seed."""
    cuts_per_speaker: int = 2
    """Cuts of each speaker in a conversation."""
    window_s: float = 1.5
    """Length of a window, whose frames are averaged."""
    hop_s: float = 0.75
    """Distance between windows; a cut shorter than a window is one."""
    linkage: Literal["average", "complete"] = "average"
    """How the distance (1 - cosine) of two clusters is made of those of their windows."""
    min_windows: int = 2
    """Smaller clusters are not counted, unless all are."""
    held_out: bool = True
    """Use only speakers that the train split lacks."""

    def __post_init__(self) -> None:
        TaskConfig.__post_init__(self)
        at_least("max_speakers", self.max_speakers, 2)
        for key in ("num_conversations", "cuts_per_speaker", "min_windows"):
            at_least(key, getattr(self, key), 1)
        above("window_s", self.window_s, 0)
        above("hop_s", self.hop_s, 0)

    def build(self, name: str, settings: Settings) -> Task:
        """See `TaskConfig`."""
        return SpeakerCount(name, self, settings)


class Conversation(NamedTuple):
    """Numbers of its windows, and how many speakers it has."""

    windows: NDArray[np.int64]
    speakers: int


class SpeakerCount(Task):
    """Share of conversations whose speakers are counted right. Agglomerative clustering stops at a distance chosen on valid, with the layer."""

    config: SpeakerCountConfig

    def __init__(self, name: str, config: SpeakerCountConfig, settings: Settings) -> None:
        super().__init__(name, config, settings)
        self._known: set[str] = set()
        self._noted: set[str] = set()

    def wants(self, cut: Any) -> bool:
        """See `Task`; a cut of one speaker."""
        return len({supervision.speaker for supervision in cut.supervisions} - {None}) == 1

    def needs(self) -> str:
        """See `Task`."""
        return "it needs cuts with one `speaker`"

    def note(self, split: Split, cut: Any) -> None:
        """See `Task`: speakers of the train split."""
        if split == "train":
            self._noted |= known_speakers({"train": [cut]})

    def select(self, cuts: Mapping[Split, Sequence[Any]]) -> dict[Split, list[Any]]:
        """See `Task`; train speakers are known from all its cuts."""
        self._known = self._noted | known_speakers(cuts) if self.config.held_out else set()
        return super().select(cuts)

    def rows(self, cut: Any, split: Split, times: NDArray[np.float64], layers: Sequence[Array]) -> Rows:
        """See `Task`; one item per window."""
        spans = windows(times, self.config.window_s, self.config.hop_s)
        return Rows([str(label_of(cut, "speaker"))] * len(spans), [np.stack([x[a:b].mean(axis=0) for a, b in spans]) for x in layers])

    def score(self, features: Mapping[Split, Features], layer_names: Sequence[str]) -> Score:
        """See `Task`."""
        known = self._known | set(features["train"].labels) if self.config.held_out else set()
        drawn = {split: self._conversations(features[split], split, known) for split in ("valid", "test")}
        truth = {split: np.array([item.speakers for item in found]) for split, found in drawn.items()}
        by_layer: dict[str, dict[str, float]] = {}
        counted: dict[str, NDArray[np.int64]] = {}
        for i, name in enumerate(layer_names):
            centre = features["train"].layers[i].mean(axis=0)
            counts = {s: self._counts(directions(features[s].layers[i] - centre), found) for s, found in drawn.items()}  # type: ignore[index]
            wrong = np.abs(counts["valid"] - truth["valid"][:, None]).mean(axis=0)
            best = int(wrong.argmin())
            by_layer[name] = {split: float((found[:, best] == truth[split]).mean()) for split, found in counts.items()}
            counted[name] = counts["test"][:, best]
        layer = max(by_layer, key=lambda name: by_layer[name]["valid"])
        hits = counted[layer] == truth["test"]
        details = {
            "items": len(hits),
            "chance": round(1 / self.config.max_speakers, 6),
            "seeds": 1,
            "mean_absolute_error": round(float(np.abs(counted[layer] - truth["test"]).mean()), 6),
        }
        ids = [str(index) for index in range(len(hits))]
        interval = cluster_interval(hits.astype(float), ids, resamples=self.settings.resamples, seed=self.settings.seed)
        return Score("accuracy", True, float(hits.mean()), 0.0, interval, layer, by_layer, details)

    def _conversations(self, features: Features, split: str, known: set[str]) -> list[Conversation]:
        """Drawn conversations of a split."""
        by_speaker: dict[str, dict[str, list[int]]] = {}
        for number, (speaker, cut_id) in enumerate(zip(features.labels, features.groups)):
            if speaker not in known:
                by_speaker.setdefault(speaker, {}).setdefault(cut_id, []).append(number)
        if len(by_speaker) < self.config.max_speakers:
            rule = f"at least `max_speakers` {self.config.max_speakers} speakers" + (" that train lacks" if self.config.held_out else "")
            raise DataError(f"task `{self.name}` needs {rule} in the {split} split, but has {len(by_speaker)}")
        rng = np.random.default_rng(seed_from(self.settings.seeds[0], "conversations", split))
        names, found = sorted(by_speaker), []
        for index in range(self.config.num_conversations):
            count = 1 + index % self.config.max_speakers
            items: list[int] = []
            for place in rng.choice(len(names), count, replace=False):
                cuts = by_speaker[names[place]]
                chosen = rng.choice(sorted(cuts), min(self.config.cuts_per_speaker, len(cuts)), replace=False)
                items += [number for cut_id in chosen for number in cuts[str(cut_id)]]
            found.append(Conversation(np.array(sorted(items)), count))
        return found

    def _counts(self, unit: Array, found: Sequence[Conversation]) -> NDArray[np.int64]:
        """(M, H) speakers that each conversation seems to have at each of THRESHOLDS."""
        return np.stack([count_clusters(unit[item.windows], THRESHOLDS, self.config.linkage, self.config.min_windows) for item in found])


def windows(times: NDArray[np.float64], window_s: float, hop_s: float) -> list[tuple[int, int]]:
    """First and one-past-last frame of windows that lie wholly within the frames; all frames where there is none.

    Args:
        times: (T,) centres in seconds.
    """
    starts = np.arange(times[0], times[-1] - window_s + 1e-9, hop_s)
    spans = [(int(np.searchsorted(times, start - 1e-9)), int(np.searchsorted(times, start + window_s - 1e-9))) for start in starts]
    return [(first, last) for first, last in spans if last > first] or [(0, len(times))]


def count_clusters(unit: Array, thresholds: NDArray[np.float64], linkage: str, min_size: int) -> NDArray[np.int64]:
    """How many clusters of at least `min_size` rows agglomerative clustering leaves at each distance; at least one.

    Args:
        unit: (M, D) directions. thresholds: (H,) largest distance (1 - cosine) at which clusters are joined. linkage: average or complete.
    Returns:
        (H,) counts.
    """
    from scipy.cluster import hierarchy

    if len(unit) == 1:
        return np.ones(len(thresholds), dtype=np.int64)
    similarity = unit.astype(np.float64) @ unit.T.astype(np.float64)
    distances = (1 - similarity)[np.triu_indices(len(unit), 1)].clip(min=0)
    tree = hierarchy.linkage(distances, linkage)
    counts = []
    for threshold in thresholds:
        sizes = np.bincount(hierarchy.fcluster(tree, threshold, "distance"))[1:]
        counts.append(max(int((sizes >= min_size).sum()), 1) if (sizes >= min_size).any() else len(sizes))
    return np.array(counts, dtype=np.int64)
