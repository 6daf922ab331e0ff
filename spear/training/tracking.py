"""The record of a run: ``metrics.jsonl`` (deterministic), ``timing.jsonl`` (not) and whoever else is told."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from spear.errors import ArtifactError
from spear.files import make_folder, write_text, writing
from spear.training.sinks import Sink, TensorBoard, WeightsAndBiases

logger = logging.getLogger(__name__)
METRICS, TIMING = "metrics.jsonl", "timing.jsonl"
SINKS: dict[str, Callable[[], Sink]] = {"tensorboard": TensorBoard, "wandb": WeightsAndBiases}
"""The table of those who can be told."""


class Tracker:
    """Writes records of one run; ``metrics.jsonl`` of a killed and resumed run equals that of one never killed, byte by byte.

    Args:
        folder: of the run. sinks: names in `SINKS`.
    """

    def __init__(self, folder: Path, sinks: Sequence[str] = ("tensorboard",)) -> None:
        self.folder, self.names = folder, sinks
        self._sinks: list[Sink] = []

    def start(self, step: int) -> None:
        """Begin at `step`: records of later steps, which an earlier process made after its last checkpoint, are dropped."""
        make_folder(self.folder)
        path = self.folder / METRICS
        kept = [line for line, record in read_records(path) if record["step"] <= step]
        write_text(path, "".join(f"{line}\n" for line in kept))
        for name in self.names:
            sink = SINKS[name]()
            sink.start(self.folder, step)
            self._sinks.append(sink)

    def close(self) -> None:
        """End what `start` began."""
        for sink in self._sinks:
            sink.close()
        self._sinks = []

    def metrics(self, split: str, step: int, values: Mapping[str, float]) -> None:
        """Append deterministic values of ``train`` or ``valid``; what is not finite is written as null."""
        finite = {name: value if math.isfinite(value) else None for name, value in values.items()}
        self._append(METRICS, {"step": step, "split": split, **finite})
        self._scalars(split, step, values)

    def timing(self, step: int, values: Mapping[str, float]) -> None:
        """Append speeds, times and memory."""
        self._append(TIMING, {"step": step, **{name: float(f"{value:.6g}") for name, value in values.items()}})
        self._scalars("timing", step, values)

    def _append(self, name: str, record: Mapping[str, Any]) -> None:
        path = self.folder / name
        with writing(path), path.open("a") as file:
            file.write(json.dumps(record, allow_nan=False) + "\n")

    def _scalars(self, split: str, step: int, values: Mapping[str, float]) -> None:
        for sink in self._sinks:
            sink.scalars(split, step, values)


def read_records(path: Path) -> list[tuple[str, dict[str, Any]]]:
    """Lines of a records file with their values; a last line that was cut short is left out, a missing file has none.

    Raises:
        ArtifactError: another line is not a record.
    """
    if not path.exists():
        return []
    *lines, rest = path.read_text().split("\n")
    if rest:
        logger.info("%s ends in the middle of a line, which is dropped", path)
    found = []
    for number, line in enumerate(lines, 1):
        try:
            record = json.loads(line)
            found.append((line, {**record, "step": int(record["step"])}))
        except (ValueError, KeyError, TypeError) as error:
            raise ArtifactError(f"{path} line {number} is not a record of a step: {error}") from error
    return found


def last_record(path: Path, split: str) -> dict[str, Any]:
    """The last record of a split, empty where there is none."""
    return next((record for _, record in reversed(read_records(path)) if record.get("split") == split), {})
