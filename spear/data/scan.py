"""A quick look at all cuts of a split: ids, durations, rates and files without parsing what else a manifest says.

A million lines of a Lhotse manifest take some seconds and tens of megabytes: ids and files are kept as hashes, durations as float32.
"""

from __future__ import annotations

import gzip
import heapq
import json
import re
import zlib
from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from spear.data.corpora import SourceItem
from spear.errors import DataError

Hashes = npt.NDArray[np.int64]
TEXT = rb'"((?:[^"\\]|\\.)*)"'
NUMBER = rb"(-?[0-9][0-9.eE+-]*)"
CUT = re.compile(rb'\{"id": ?' + TEXT + rb', ?"start": ?' + NUMBER + rb', ?"duration": ?' + NUMBER + rb",")
FILE = re.compile(rb'"type": ?"file", ?"channels": ?\[[^\]]*\], ?"source": ?' + TEXT)
RATE = re.compile(rb'"sampling_rate": ?([0-9]+)')
KINDS = (b'"type": "MonoCut"}', b'"type": "MultiCut"}')
NO_LABELS = b'"supervisions": []'


class Entry(NamedTuple):
    """One cut of a source as a quick look sees it.

    seconds, sample_rate: 0 where only opening the file would tell. origin: its audio file, empty where there is none.
    labelled: whether it may have supervisions. load: makes the whole item.
    """

    id: str
    seconds: float
    sample_rate: int
    origin: bytes
    labelled: bool
    load: Callable[[], SourceItem]


@dataclass
class Scan:
    """What all cuts of one split come to."""

    split: str
    cuts: int = 0
    seconds: npt.NDArray[np.float32] = field(default_factory=lambda: np.zeros(0, np.float32))
    """(M,) durations, of those cuts whose duration is known."""
    ids: Hashes = field(default_factory=lambda: np.zeros(0, np.int64))
    """(cuts,) hashes of ids; of this process only, as Python's hashes are."""
    files: Hashes = field(default_factory=lambda: np.zeros(0, np.int64))
    """Sorted different hashes of audio files."""
    rates: Counter[int] = field(default_factory=Counter)
    """Sample rate in Hz -> cuts, where known."""
    sample: list[Entry] = field(default_factory=list)
    """Cuts spread over the split, chosen by a checksum of their ids, and the longest one first."""

    @property
    def hours(self) -> float:
        """Hours of audio; extrapolated from the cuts whose duration is known."""
        return float(self.seconds.mean(dtype=np.float64)) * self.cuts / 3600 if len(self.seconds) else 0.0


def scan(split: str, entries: Iterable[Entry], sample: int, see: Callable[[Entry], None] | None = None) -> Scan:
    """Look at every entry once.

    Args:
        split: its name. entries: of the split. sample: how many to keep. see: called with each.
    """
    ids, files, seconds = array("q"), array("q"), array("f")
    rates: Counter[int] = Counter()
    heap: list[tuple[int, int, Entry]] = []
    longest: Entry | None = None
    number = 0
    for number, entry in enumerate(entries, start=1):
        ids.append(hash(entry.id))
        if entry.origin:
            files.append(hash(entry.origin))
        if entry.seconds > 0:
            seconds.append(entry.seconds)
            if longest is None or entry.seconds > longest.seconds:
                longest = entry
        rates[entry.sample_rate] += 1
        place = -zlib.crc32(entry.id.encode())
        if len(heap) < sample:
            heapq.heappush(heap, (place, number, entry))
        elif place > heap[0][0]:
            heapq.heapreplace(heap, (place, number, entry))
        if see is not None:
            see(entry)
    chosen = [entry for _, _, entry in sorted(heap, key=lambda item: item[1]) if longest is None or entry.id != longest.id]
    rates.pop(0, None)
    return Scan(
        split,
        number,
        np.frombuffer(seconds, np.float32).copy() if seconds else np.zeros(0, np.float32),
        np.frombuffer(ids, np.int64).copy() if ids else np.zeros(0, np.int64),
        np.unique(np.frombuffer(files, np.int64)) if files else np.zeros(0, np.int64),
        rates,
        ([longest] if longest is not None else []) + chosen[: max(0, sample - (longest is not None))],
    )


def repeated(hashes: Iterable[Hashes]) -> set[int]:
    """Hashes that occur more than once in all arrays together."""
    joined = np.sort(np.concatenate([np.zeros(0, np.int64), *hashes]))
    return set(joined[1:][joined[1:] == joined[:-1]].tolist())


def _no_item(number: int, values: Any) -> SourceItem:
    raise ValueError(f"item {number} of a manifest that is only scanned: {values['id']}")


def manifest_entries(path: Path, make: Callable[[int, Any], SourceItem] = _no_item) -> Iterator[Entry]:
    """Entries of a Lhotse manifest of cuts, ``.jsonl`` or ``.jsonl.gz``.

    Lines as Lhotse writes them are read by a pattern, others by a JSON parser.

    Args:
        make: (number of the line from 1 on, parsed JSON) -> item, for `Entry.load`.
    Raises:
        DataError: the file cannot be read, or a line is no cut of one recording.
    """
    number = 0
    try:
        with gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb") as file:
            for line in file:
                if line.isspace():
                    continue
                number += 1
                yield _entry(line, number, path, make)
    except (OSError, EOFError, ValueError, KeyError, TypeError, IndexError, zlib.error) as error:
        raise DataError(f"{path} is not a manifest of cuts: item {number}: {type(error).__name__}: {error}", cause="manifest") from error
    if number == 0:
        raise DataError(f"{path} holds no cuts", cause="manifest")


def _entry(line: bytes, number: int, path: Path, make: Callable[[int, Any], SourceItem]) -> Entry:
    def load() -> SourceItem:
        return make(number, json.loads(line))

    found, rate = CUT.match(line), RATE.search(line)
    if found is not None and rate is not None and line.rstrip().endswith(KINDS):
        name, _, seconds = found.groups()
        cut_id = name.decode() if b"\\" not in name else json.loads(b'"' + name + b'"')
        file = FILE.search(line)
        return Entry(cut_id, float(seconds), int(rate[1]), file[1] if file is not None else b"", NO_LABELS not in line, load)
    cut = json.loads(line)
    if cut.get("type") not in ("MonoCut", "MultiCut") or not cut.get("recording"):
        raise DataError(f"{path}: cut {number} is a {cut.get('type')} without one recording", cause="manifest")
    source = cut["recording"]["sources"][0]
    origin = str(source["source"]).encode() if source["type"] == "file" else b""
    return Entry(str(cut["id"]), float(cut["duration"]), int(cut["recording"]["sampling_rate"]), origin, bool(cut.get("supervisions")), load)
