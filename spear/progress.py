"""Progress of long steps: a bar in a terminal, one line a minute elsewhere."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Iterable, Iterator
from typing import TypeVar

from rich.progress import BarColumn, Progress, TextColumn

logger = logging.getLogger(__name__)
LINE_EVERY_S = 60.0

Item = TypeVar("Item")


def clock(seconds: float) -> str:
    """Seconds as ``h:mm:ss``."""
    whole = int(seconds)
    return f"{whole // 3600}:{whole // 60 % 60:02d}:{whole % 60:02d}"


class Meter:
    """Counts work done and says how fast it goes and when it ends.

    Use as a context manager; call ``advance(items, audio_s=...)``. `total` is the number of items, None if unknown.
    """

    def __init__(self, title: str, total: int | None, *, unit: str = "items", every_s: float = LINE_EVERY_S) -> None:
        self.title, self.total, self.unit, self.every_s = title, total, unit, every_s
        self.done, self.skipped, self.audio_s = 0, 0, 0.0
        self.start = self.last = time.monotonic()
        self._bar: Progress | None = None

    def __enter__(self) -> Meter:
        self.start = self.last = time.monotonic()
        if sys.stderr.isatty():
            self._bar = Progress(TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[text]}"))
            self._bar.start()
            self._task = self._bar.add_task(self.title, total=self.total, text="")
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.stop()
        logger.info("%s: %s", self.title, self.text(final=True))

    def advance(self, items: int = 1, *, audio_s: float = 0.0) -> None:
        """Count `items` more done, `audio_s` seconds of audio in them."""
        self.done += items
        self.audio_s += audio_s
        if self._bar is not None:
            self._bar.update(self._task, completed=self.done, text=self.text())
        elif time.monotonic() - self.last >= self.every_s:
            self.last = time.monotonic()
            logger.info("%s: %s", self.title, self.text())

    def text(self, *, final: bool = False) -> str:
        """One line: done of total, rate, audio hours, time left (or time taken)."""
        elapsed = max(time.monotonic() - self.start, 1e-9)
        of = f"/{self.total}" if self.total is not None else ""
        parts = [f"{self.done}{of} {self.unit}", f"{self.done / elapsed:.1f}/s"]
        if self.audio_s:
            parts.append(f"{self.audio_s / 3600:.2f} h audio ({self.audio_s / elapsed:.0f}x real time)")
        if final:
            parts.append(f"in {clock(elapsed)}")
        elif self.total and self.done:
            parts.append(f"{clock(elapsed / self.done * max(self.total - self.done, 0))} left")
        return ", ".join(parts)


def track(items: Iterable[Item], title: str, total: int | None = None, *, unit: str = "items") -> Iterator[Item]:
    """Yield `items` under a Meter, one at a time."""
    with Meter(title, total, unit=unit) as meter:
        for item in items:
            yield item
            meter.advance()
