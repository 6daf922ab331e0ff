"""A stage's folder: guarded by the fingerprints of its inputs, finished last and atomically."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from spear.errors import ArtifactError
from spear.files import make_folder, read_json, sha256_json, write_json, writing
from spear.stages import STAGES
from spear.stages.session import LOCK, Cost, added_up, check_free, locked, noting

logger = logging.getLogger(__name__)

DONE, UNFINISHED = "artifact.json", "unfinished.json"
PARTS = "parts"
"""Below an unfinished folder: lock and account of each of several workers."""
REUSED = {
    "manifests": ("*_report_*.json", "*_parts_*"),
    "features": ("*.safetensors",),
    "quantizers": ("fit*.safetensors",),
    "tokens": ("block-*",),
    "shards": ("*_parts",),
    "convert": ("block-*", "shar"),
    "encode": (".done",),
}
"""Stage -> files that it takes for made where it finds them, and that must therefore come with a record of what they were made from."""


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
        counted: of `config`, what must not differ; the rest is only noted.
    """

    def __init__(
        self,
        folder: Path,
        *,
        kind: str,
        config: Any,
        inputs: dict[str, str],
        version: int = 1,
        counted: Callable[[Any], Any] = lambda config: config,
    ) -> None:
        self.folder, self.counted = folder, counted
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
            shutil.rmtree(self.folder / PARTS, ignore_errors=True)
        logger.info("%s: finished already, nothing to do (%s)", self.identity["kind"], self.folder)
        return True

    def _check(self, found: dict[str, Any]) -> None:
        if found.get("fingerprint") == self.fingerprint:
            return
        old = {key: found.get(key) for key in self.identity}
        changes = list(differences(self._counted(old), self._counted(self.identity)))
        if not changes and found.get("fingerprint") == sha256_json(old):
            return
        raise ArtifactError(
            f"{self.folder} was made from other inputs: {'; '.join(changes[:3]) or 'its fingerprint differs'}"
            f"{f' and {len(changes) - 3} more' if len(changes) > 3 else ''}; remove that folder or choose another one"
        )

    def _counted(self, identity: dict[str, Any]) -> dict[str, Any]:
        return {**identity, "config": self.counted(identity["config"] or {})}

    def _require_record(self) -> None:
        """Refuse files of a stage of which nothing says what they were made from; call it under the lock.

        Raises:
            ArtifactError: names one of them and what to do.
        """
        if any((place / name).exists() for place in (self.folder, *self._parts()) for name in (DONE, UNFINISHED)):
            return
        found = next((path for pattern in REUSED.get(self.identity["kind"], ()) for path in sorted(self.folder.glob(pattern))), None)
        if found is not None:
            raise ArtifactError(
                f"{self.folder} holds {found.name}, but neither {DONE} nor {UNFINISHED} to say what it was made from: "
                f"bring {DONE} back, or remove the folder to make it again"
            )

    def _remove_leftovers(self) -> None:
        """Remove the temporary files that a killed process left (see `spear.files.write_atomic`)."""
        for path in self.folder.glob(".*.tmp"):
            if path.is_file():
                path.unlink()

    @contextmanager
    def making(self, processes: int = 1, *, finishing: bool = False) -> Iterator[Record]:
        """Guard the folder while a stage fills it; on a clean exit, write ``artifact.json``.

        A folder that another set of inputs left unfinished is refused; one with the same inputs is resumed, and its cost so far counts,
        that of all workers (see `part`) included.

        Args:
            processes: that work on the folder together; only one of them may call this.
            finishing: everything is made by workers already, and only the end is left to do; they may still be about to leave.
        Raises:
            ArtifactError: other inputs, or the folder holds files without a record. BusyError: another process is at work on the folder.
        """
        make_folder(self.folder)
        with locked(self.folder):
            self._require_record()
            if not finishing:
                for place in self._parts():
                    check_free(place)
            guard, done = self.folder / UNFINISHED, self.folder / DONE
            before = self._checked(guard)
            if before:
                logger.info("%s: %s %s", self.identity["kind"], "finishing" if finishing else "resuming", self.folder)
            elif done.exists():  # another process finished between our looking and our locking
                before = self._checked(done)
            if not finishing:
                self._remove_leftovers()
            record, cost = Record(), Cost(before.get("measured", {}), processes)
            workers = [self._checked(place / UNFINISHED).get("measured", {}) for place in self._parts()]
            identity = {**self.identity, "fingerprint": self.fingerprint}
            with noting(lambda: write_json(guard, {**identity, "measured": cost.so_far()})):
                yield record
            found = {
                **identity,
                "counts": record.counts,
                "audio_s": round(record.audio_s, 3),
                **({"extra": record.extra} if record.extra else {}),
                "measured": added_up([cost.so_far(), *workers]) if workers else cost.so_far(),
            }
            write_json(done, found)
            guard.unlink(missing_ok=True)
            self._remove_leftovers()
            shutil.rmtree(self.folder / PARTS, ignore_errors=True)

    @contextmanager
    def part(self, index: int, count: int) -> Iterator[None]:
        """Guard one worker's share of the folder while others fill theirs; ``making`` finishes the folder and counts the cost of all.

        Args:
            index, count: which share of how many; two processes never work on one, and never on shares of different counts.
        Raises:
            ArtifactError: the folder, or another share of it, was begun from other inputs, or it holds files without a record.
            BusyError: another process works on this share or on the whole folder.
        """
        place = make_folder(self.folder / PARTS / f"{index:05d}-of-{count:05d}")
        with locked(place):
            self._require_record()
            check_free(self.folder)
            self._checked(self.folder / UNFINISHED)
            for other in self._parts():
                self._checked(other / UNFINISHED)
                if not other.name.endswith(f"-of-{count:05d}"):
                    check_free(other)
            cost = Cost(self._checked(place / UNFINISHED).get("measured", {}))
            identity = {**self.identity, "fingerprint": self.fingerprint}

            def note() -> None:
                write_json(place / UNFINISHED, {**identity, "measured": cost.so_far()})

            with noting(note):
                yield
            note()

    @contextmanager
    def reopening(self) -> Iterator[None]:
        """Turn a finished folder into an unfinished one while something in it is put away to be made again; waits for other processes.

        Raises:
            ArtifactError: it was made from other inputs.
        """
        make_folder(self.folder)
        with locked(self.folder, wait=True):
            if self._checked(self.folder / DONE):
                with writing(self.folder):
                    (self.folder / DONE).replace(self.folder / UNFINISHED)
            yield

    def _parts(self) -> list[Path]:
        return sorted(path for path in (self.folder / PARTS).glob("*") if path.is_dir())

    def _checked(self, path: Path) -> dict[str, Any]:
        """A record of this folder, empty where there is none yet; raises ArtifactError where its inputs differ."""
        if not path.exists():
            return {}
        found: dict[str, Any] = read_json(path)
        self._check(found)
        return found


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
