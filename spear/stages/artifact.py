"""A stage's folder: guarded by the fingerprints of its inputs, finished last and atomically."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from spear.errors import ArtifactError
from spear.files import make_folder, read_json, sha256_json, write_json
from spear.stages import STAGES
from spear.stages.session import LOCK, Cost, locked, noting

logger = logging.getLogger(__name__)

DONE, UNFINISHED = "artifact.json", "unfinished.json"


@dataclass
class Record:
    """What a stage says about its folder: deterministic values only; times and memory are measured apart."""

    counts: dict[str, Any] = field(default_factory=dict)
    audio_s: float = 0.0
    extra: dict[str, Any] = field(default_factory=dict)


class Artifact:
    """One folder that one stage writes.

    Args:
        folder: where the files go. kind: the stage's word.
        config: JSON value of every setting the content depends on.
        inputs: name -> fingerprint of everything else it depends on.
        version: raised when the format changes.
    """

    def __init__(self, folder: Path, *, kind: str, config: Any, inputs: dict[str, str], version: int = 1) -> None:
        self.folder = folder
        self.identity: dict[str, Any] = {"kind": kind, "version": version, "config": config, "inputs": inputs}
        self.fingerprint = sha256_json(self.identity)

    def is_done(self) -> bool:
        """Whether the folder is finished with exactly these inputs.

        Raises:
            ArtifactError: the folder is finished, but from other inputs; the message names the first that differs.
        """
        path = self.folder / DONE
        if not path.exists():
            return False
        self._check(read_json(path))
        with suppress(OSError):  # a finished folder on a read-only disk is good as it is
            self._remove_leftovers()
            for name in (UNFINISHED, LOCK):  # of a process that was killed at its very end
                if (self.folder / name).exists():
                    (self.folder / name).unlink()
        logger.info("%s: finished already, nothing to do (%s)", self.identity["kind"], self.folder)
        return True

    def _check(self, found: dict[str, Any]) -> None:
        if found.get("fingerprint") == self.fingerprint:
            return
        changes = list(differences({key: found.get(key) for key in self.identity}, self.identity))
        raise ArtifactError(
            f"{self.folder} was made from other inputs: {'; '.join(changes[:3]) or 'its fingerprint differs'}"
            f"{f' and {len(changes) - 3} more' if len(changes) > 3 else ''}; remove that folder or choose another one"
        )

    def _remove_leftovers(self) -> None:
        """Remove the temporary files that a killed process left (see `spear.files.write_atomic`)."""
        for path in self.folder.glob(".*.tmp"):
            if path.is_file():
                path.unlink()

    @contextmanager
    def making(self, processes: int = 1) -> Iterator[Record]:
        """Guard the folder while a stage fills it; on a clean exit, write ``artifact.json``.

        A folder that another set of inputs left unfinished is refused; one with the same inputs is resumed, and its cost so far counts.

        Args:
            processes: that work on the folder together; only one of them may call this.
        Raises:
            ArtifactError: other inputs, or another process is at work on the folder.
        """
        make_folder(self.folder)
        with locked(self.folder):
            guard = self.folder / UNFINISHED
            found: dict[str, Any] = {}
            if guard.exists():
                found = read_json(guard)
                self._check(found)
                logger.info("%s: resuming %s", self.identity["kind"], self.folder)
            self._remove_leftovers()
            record, cost = Record(), Cost(found.get("measured", {}), processes)
            identity = {**self.identity, "fingerprint": self.fingerprint}
            with noting(lambda: write_json(guard, {**identity, "measured": cost.so_far()})):
                yield record
            done = {
                **identity,
                "counts": record.counts,
                "audio_s": round(record.audio_s, 3),
                **({"extra": record.extra} if record.extra else {}),
                "measured": cost.so_far(),
            }
            write_json(self.folder / DONE, done)
            guard.unlink(missing_ok=True)


def differences(old: Any, new: Any, path: str = "") -> Iterator[str]:
    """Yield ``key: was OLD, is NEW`` for every leaf that differs between two JSON values."""
    if isinstance(old, dict) and isinstance(new, dict):
        for key in sorted({*old, *new}):
            yield from differences(old.get(key), new.get(key), f"{path}.{key}" if path else str(key))
    elif old != new:
        yield f"`{path}` was {_short(old)}, is {_short(new)}"


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 40 else f"{text[:12]}…"


def read_artifact(folder: Path) -> dict[str, Any]:
    """The record of a finished folder.

    Raises:
        ArtifactError: the folder is missing or unfinished; the message names the stage to run.
    """
    path = folder / DONE
    if not path.exists():
        state = "is unfinished" if folder.exists() else "does not exist"
        stage = next((part for part in reversed(folder.parts) if part in STAGES), "pretrain")
        raise ArtifactError(f"{folder} {state}: run `spear {stage}` first")
    found: dict[str, Any] = read_json(path)
    return found


def fingerprint_of(folder: Path) -> str:
    """Fingerprint of a finished folder (see `read_artifact`)."""
    return str(read_artifact(folder)["fingerprint"])
