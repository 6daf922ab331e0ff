"""Of the cuts of whole corpora, read one by one, only those that tasks may choose stay in memory."""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from spear.evaluation.tasks.base import SPLITS, Split, Task

SLACK_S = 1.0
"""Seconds kept beyond a limit, so that the rounding of sums plays no part."""


class Kept:
    """Cuts of one split, offered one by one, that a task's `Task.select` may choose: it chooses the same of these as of all.

    That is all that are eligible, or the first by `Task.place` up to `Task.limits`, and one more where there are more.
    """

    def __init__(self, task: Task, split: Split) -> None:
        self._task, self._split = task, split
        self._most, self._seconds = task.limits(split)
        self._heap: list[tuple[int, int, Any]] = []
        self._count, self._total_s = 0, 0.0

    def __len__(self) -> int:
        return len(self._heap)

    def offer(self, cut: Any) -> None:
        """Keep a cut if it may be chosen, and let go of those that no longer may."""
        self._task.note(self._split, cut)
        if not self._task.eligible(self._split, cut):
            return
        bounded = self._most is not None or self._seconds is not None
        # the largest hash comes first out of the heap, of equal ones the latest
        item = (-self._task.place(cut), -self._count, cut) if bounded else (0, -self._count, cut)
        self._count += 1
        if not bounded:
            self._heap.append(item)
            return
        heapq.heappush(self._heap, item)
        self._total_s += cut.duration
        while self._spare():
            self._total_s -= heapq.heappop(self._heap)[2].duration

    def _spare(self) -> bool:
        """Whether the last of the kept cuts can no longer be chosen."""
        if self._most is not None and len(self._heap) > self._most + 1:
            return True
        return self._seconds is not None and self._total_s - self._heap[0][2].duration > self._seconds + SLACK_S

    def cuts(self) -> list[Any]:
        """The kept cuts in the order they came in."""
        return [cut for _, _, cut in sorted(self._heap, key=lambda item: -item[1])]


def keep_cuts(
    tasks: Mapping[str, Task], users: Mapping[str, Sequence[str]], read: Callable[[str, Split], Iterable[Any]]
) -> dict[str, dict[Split, list[Any]]]:
    """Cuts for every task to choose from, with `Task.select`; every split of every corpus is read once.

    Args:
        tasks: name -> task. users: corpus -> names of the tasks that read it, in the order in which corpora are read.
        read: (corpus, split) -> its cuts, one by one.
    Returns:
        task -> split -> cuts, in the order of the corpora; tasks share the objects.
    """
    found: dict[str, dict[Split, list[Any]]] = {name: {} for name in tasks}
    for split in SPLITS:  # train first, as tasks note its speakers
        kept = {name: Kept(task, split) for name, task in tasks.items()}
        for corpus, names in users.items():
            wanted = [kept[name] for name in names]
            for cut in read(corpus, split):
                for part in wanted:
                    part.offer(cut)
        for name, part in kept.items():
            found[name][split] = part.cuts()
    return found
