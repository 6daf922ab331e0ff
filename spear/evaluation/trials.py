"""Lists of verification trials: pairs of cuts, and whether the speaker is the same."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from spear.errors import DataError

LABELS = {"1": True, "0": False, "target": True, "nontarget": False}


class Trials(NamedTuple):
    """Pairs of items: (M, 2) indexes, and (M,) True where the speaker is the same."""

    pairs: NDArray[np.int64]
    same: NDArray[np.bool_]


class TrialList(NamedTuple):
    """Trials as a file names them: M pairs of names, and M times whether the speaker is the same."""

    pairs: list[tuple[str, str]]
    same: list[bool]

    def names(self) -> set[str]:
        """What a cut of the list may be called: the names as they stand, and as `cut_id` turns them."""
        written = {name for pair in self.pairs for name in pair}
        return written | {cut_id(name) for name in written}


def cut_id(name: str) -> str:
    """The id of the cut of a file: its path without the suffix, ``-`` for ``/``, so that id1/video/00001.wav is id1-video-00001."""
    return str(PurePosixPath(name).with_suffix("")).replace("/", "-")


def read_trials(name: str) -> TrialList:
    """Read ``LABEL FILE FILE`` lines; a label is 1 or target for the same speaker, 0 or nontarget for another. Empty lines are skipped.

    Args:
        name: of the file; variables and ``~`` are expanded.
    Raises:
        DataError: it cannot be read, a line has another form (named by its number), or one of the two kinds is missing.
    """
    path = Path(os.path.expanduser(os.path.expandvars(name)))
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()  # with or without the mark that some editors put first
    except (OSError, ValueError) as error:
        raise DataError(f"`trials` {name} cannot be read: {error}", cause="missing_file") from error
    found = TrialList([], [])
    for number, line in enumerate(lines, 1):
        parts = line.split()
        if not parts:
            continue
        if len(parts) != 3 or parts[0] not in LABELS:
            raise DataError(f"line {number} of `trials` {name} must be 0 or 1 and two files, but is {line[:80]!r}", cause="manifest")
        found.pairs.append((parts[1], parts[2]))
        found.same.append(LABELS[parts[0]])
    if len(set(found.same)) < 2:
        raise DataError(
            f"`trials` {name} must have trials of the same and of another speaker, but has {len(found.same)} of one kind", cause="manifest"
        )
    return found


def find_trials(listed: TrialList, ids: Sequence[str]) -> Trials:
    """The trials by the numbers of items.

    Args:
        ids: M ids of cuts, one item each.
    Raises:
        DataError: a cut of the list is missing; names one and says how many.
    """
    index = {name: i for i, name in enumerate(ids)}
    missing = sorted({name for pair in listed.pairs for name in pair if name not in index and cut_id(name) not in index})
    if missing:
        raise DataError(f"the listed trials name {len(missing)} cuts that the test split lacks, such as {missing[0]}", cause="missing_cut")
    pairs = [[index[name] if name in index else index[cut_id(name)] for name in pair] for pair in listed.pairs]
    return Trials(np.array(pairs, dtype=np.int64), np.array(listed.same, dtype=bool))
