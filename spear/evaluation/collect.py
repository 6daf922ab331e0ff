"""One pass of a model over the labelled cuts: every cut is embedded once, and each task keeps only what it needs."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from spear.data.batches import batches_of
from spear.errors import DataError
from spear.evaluation.embedders import Audio, Embedder
from spear.evaluation.spool import Budget, Spool
from spear.evaluation.tasks.base import SPLITS, Features, Split, Task
from spear.progress import Meter

LoadAudio = Callable[[Any, int], Audio]
"""(cut, sample rate) -> samples."""


class AudioCache:
    """Keeps the first hours of decoded audio in memory, since several models hear the same cuts.

    Args:
        load: reads one cut. limit_s: seconds of audio to keep (4 bytes a sample).
    """

    def __init__(self, load: LoadAudio, limit_s: float = 7200.0) -> None:
        self._load, self._left_s = load, limit_s
        self._kept: dict[tuple[str, int], Audio] = {}

    def __call__(self, cut: Any, sample_rate: int) -> Audio:
        """Samples of the cut at `sample_rate`."""
        found = self._kept.get((cut.id, sample_rate))
        if found is None:
            found = self._load(cut, sample_rate)
            if self._left_s >= cut.duration:
                self._left_s -= cut.duration
                self._kept[cut.id, sample_rate] = found
        return found


@dataclass(slots=True)
class Plan:
    """Which cuts each task reads, and the batches all models hear them in.

    users[split][cut id]: (task, split it takes the cut for) of every user of a cut of that split; the two splits are the same but for
    tasks that divide a split anew. batches[split]: cuts, equal in every run whatever is already scored.
    memory_bytes: items of one model that are held in memory; more lie in files.
    heard: model -> seconds of audio it embedded and the seconds that took, audio reading left out.
    """

    tasks: Mapping[str, Task]
    users: dict[Split, dict[str, list[tuple[str, Split]]]] = field(default_factory=dict)
    batches: dict[Split, list[list[Any]]] = field(default_factory=dict)
    memory_bytes: int = 1 << 31
    heard: dict[str, tuple[float, float]] = field(default_factory=dict)

    @classmethod
    def make(cls, tasks: Mapping[str, Task], cuts: Mapping[str, Mapping[Split, Sequence[Any]]], batch_s: float) -> Plan:
        """Select cuts for every task and lay them out in batches of like length.

        Args:
            tasks: name -> task. cuts: name -> split -> the cuts of the task's corpora.
            batch_s: most seconds per batch, padding included; a longer cut stands alone.
        Raises:
            DataError: a split has no labelled cut for a task, or two different cuts share an id.
        """
        plan = cls(tasks, {split: {} for split in SPLITS})
        known: dict[Split, dict[str, Any]] = {split: {} for split in SPLITS}
        every: dict[str, Any] = {}
        for name, task in tasks.items():
            source = {id(cut): split for split in SPLITS for cut in cuts[name].get(split, ())}
            selected = task.select(cuts[name])
            task.prepare(selected)
            for split, found in selected.items():
                for cut in found:
                    home = source[id(cut)]
                    if every.setdefault(cut.id, cut) is not cut:
                        raise DataError(f"two cuts, one of them of the {home} split, share the id {cut.id!r}", cause="duplicate_id")
                    known[home][cut.id] = cut
                    plan.users[home].setdefault(cut.id, []).append((name, split))
        for split in SPLITS:
            plan.batches[split] = batches_of(known[split].values(), batch_s)
        return plan

    def embed(self, embedder: Embedder, names: Sequence[str], load: LoadAudio, folder: Path) -> dict[str, dict[Split, Features]]:
        """Features of the named tasks for one model: task -> split -> Features.

        Args:
            folder: for what exceeds `memory_bytes`; the features read it as long as they live, then the caller removes it.
        """
        budget = Budget(self.memory_bytes)
        spools = {name: {split: Spool(folder / name / split, budget) for split in self.tasks[name].splits} for name in names}
        todo = [
            (split, batch)
            for split in SPLITS
            for batch in self.batches[split]
            if any(name in spools for cut in batch for name, _ in self.users[split][cut.id])
        ]
        audio_s = wall_s = 0.0
        with Meter(f"embed {embedder.name}", sum(len(batch) for _, batch in todo), unit="cuts") as meter:
            for split, batch in todo:
                audios = [load(cut, embedder.sample_rate) for cut in batch]
                start = time.perf_counter()
                found = embedder.embed_batch(audios)
                wall_s += time.perf_counter() - start
                audio_s += sum(cut.duration for cut in batch)
                for cut, layers in zip(batch, found):
                    times = embedder.times(len(layers[0]))
                    for name, use in self.users[split][cut.id]:
                        if name in spools:
                            spools[name][use].add(cut.id, self.tasks[name].rows(cut, use, times, layers))
                meter.advance(len(batch), audio_s=sum(cut.duration for cut in batch))
        self.heard[embedder.name] = audio_s, wall_s
        rate, size = embedder.frame_rate_hz, embedder.codebook_size
        return {name: {split: spool.features(rate, size) for split, spool in splits.items()} for name, splits in spools.items()}
