"""The two sources of a corpus: Lhotse manifests that exist already, and a folder of audio files."""

from __future__ import annotations

import os
import zlib
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

from lhotse import CutSet, Recording, SupervisionSegment
from lhotse.cut import Cut, MonoCut, MultiCut
from lhotse.serialization import deserialize_item

from spear.data.audio import open_recording
from spear.data.corpora import SPLITS, SourceConfig, SourceItem, expand
from spear.data.scan import Entry, manifest_entries
from spear.errors import ConfigError, DataError
from spear.files import check_names, seed_from, sha256_file, sha256_json

AUDIO_SUFFIXES = (".wav", ".flac", ".ogg", ".mp3")
HEADERS = 5000
"""Files of a folder that a quick look opens."""


@dataclass(frozen=True, kw_only=True, slots=True)
class CutsSource(SourceConfig):
    """Lhotse cut manifests, one per split; `valid` and `test` may be missing."""

    train: str
    """``.jsonl`` or ``.jsonl.gz`` of cuts; relative paths start from the corpora file's folder."""
    valid: str | None = None
    """Cuts that training is watched on."""
    test: str | None = None
    """Cuts that only the evaluation reads."""

    def resolved(self, folder: Path) -> CutsSource:
        """See SourceConfig."""
        paths = {split: getattr(self, split) for split in SPLITS}
        return replace(self, **{split: expand(path, folder) for split, path in paths.items() if path is not None})

    def splits(self) -> list[str]:
        """See SourceConfig."""
        return [split for split in SPLITS if getattr(self, split) is not None]

    def fingerprint(self) -> str:
        """SHA-256 over the manifests' bytes."""
        return sha256_json({split: sha256_file(_existing(self._path(split))) for split in self.splits()})

    def files(self, split: str) -> Iterator[SourceItem]:
        """See SourceConfig; a relative audio path that does not exist is tried from the manifest's folder.

        Raises:
            DataError: the manifest is missing or does not hold cuts.
        """
        path = _existing(self._path(split))
        number = 0
        try:
            for number, cut in enumerate(CutSet.from_jsonl_lazy(path), start=1):
                yield _item(path, number, cut)
        except (KeyError, TypeError, ValueError, AttributeError, EOFError, OSError, zlib.error) as error:
            raise DataError(f"{path} is not a manifest of cuts: item {number + 1}: {type(error).__name__}: {error}", cause="manifest") from error
        if number == 0:
            raise DataError(f"{path} holds no cuts", cause="manifest")

    def entries(self, split: str) -> Iterator[Entry]:
        """See SourceConfig."""
        path = _existing(self._path(split))
        return manifest_entries(path, lambda number, values: _item(path, number, deserialize_item(values)))

    def _path(self, split: str) -> Path:
        return Path(getattr(self, split))


@dataclass(frozen=True, kw_only=True, slots=True)
class FolderSource(SourceConfig):
    """Any folder of wav, flac, ogg and mp3 files; each file is a cut, its id is its path in the folder without the suffix."""

    path: str
    """The folder, searched with all its subfolders; relative paths start from the corpora file's folder."""
    valid_share: float = 0.05
    """Share of the files for the split valid, chosen by a hash of seed and id."""
    test_share: float = 0.05
    """Share of the files for the split test."""
    seed: int = 0
    """Of the choice of splits; a file's split depends on nothing else than this and its id."""
    label: Literal["none", "parent"] = "none"
    """``parent``: the name of a file's folder is its label."""

    def __post_init__(self) -> None:
        for key, share in (("valid_share", self.valid_share), ("test_share", self.test_share)):
            if not 0 <= share < 1:
                raise ConfigError(f"`{key}` must be at least 0 and less than 1, but is {share}")
        if self.valid_share + self.test_share >= 1:
            raise ConfigError(f"`valid_share` + `test_share` must be less than 1, but is {self.valid_share + self.test_share:g}")

    def resolved(self, folder: Path) -> FolderSource:
        """See SourceConfig."""
        return replace(self, path=expand(self.path, folder))

    def splits(self) -> list[str]:
        """See SourceConfig."""
        shares = {"train": 1.0, "valid": self.valid_share, "test": self.test_share}
        return [split for split in SPLITS if shares[split] > 0]

    def fingerprint(self) -> str:
        """SHA-256 over the names and sizes of the audio files, and over all settings but the path."""
        root = Path(self.path)
        shares = {"valid_share": float(self.valid_share), "test_share": float(self.test_share)}
        files = [[name, (root / name).stat().st_size] for name in self._names()]
        return sha256_json({"files": files, **shares, "seed": self.seed, "label": self.label})

    def files(self, split: str) -> Iterator[SourceItem]:
        """See SourceConfig; files are sorted by their path."""
        root = Path(self.path)
        for name in self._names():
            if self._split(_id_of(name)) == split:
                yield self._item(root / name, _id_of(name))

    def entries(self, split: str) -> Iterator[Entry]:
        """See SourceConfig; of many files, only every n-th is opened, so that about HEADERS are."""
        root, names = Path(self.path), self._names()
        every = -(-len(names) // HEADERS)
        for number, name in enumerate(names):
            cut_id = _id_of(name)
            if self._split(cut_id) != split:
                continue
            item = self._item(root / name, cut_id) if number % every == 0 else None
            cut = item.cut if item is not None else None
            seconds, rate = (cut.duration, cut.sampling_rate) if cut is not None else (0.0, 0)
            load = partial(self._item, root / name, cut_id)
            yield Entry(cut_id, seconds, rate, os.path.join(root, name).encode(), self.label == "parent", load)

    def _item(self, file: Path, cut_id: str) -> SourceItem:
        try:
            return SourceItem(cut_id, str(file), self._cut(open_recording(file, cut_id), file))
        except DataError as error:
            return SourceItem(cut_id, str(file), None, error.cause, str(error))

    def _names(self) -> list[str]:
        """Paths of all audio files below the folder, relative to it, sorted part by part."""
        root = _existing(Path(self.path), folder=True)
        start = len(os.path.join(root, ""))
        found = [os.path.join(folder, name)[start:] for folder, names in _folders(root) for name in names]
        found = [name for name in found if name.lower().endswith(AUDIO_SUFFIXES) and not os.path.basename(name).startswith(".")]
        if not found:
            raise DataError(f"{root} holds no audio files ({', '.join(AUDIO_SUFFIXES)})", cause="missing_file")
        check_names(found, str(root))
        return sorted(found, key=lambda name: name.split("/"))

    def _split(self, cut_id: str) -> str:
        place = seed_from(self.seed, "split", cut_id) / 2**63
        if place < self.valid_share:
            return "valid"
        return "test" if place < self.valid_share + self.test_share else "train"

    def _cut(self, recording: Recording, file: Path) -> Cut:
        cut = recording.to_cut()
        cut.id = recording.id
        if self.label == "parent":
            custom: dict[str, Any] = {"label": file.parent.name}
            channel = recording.channel_ids if isinstance(cut, MultiCut) else 0
            cut.supervisions = [SupervisionSegment(recording.id, recording.id, 0.0, recording.duration, channel=channel, custom=custom)]
        return cut


def _id_of(name: str) -> str:
    """The id of a file by its relative path: without its suffix, folders joined by two dashes."""
    return os.path.splitext(name)[0].replace("/", "--")


def _folders(root: Path) -> Iterator[tuple[str, list[str]]]:
    """(folder, names of its files) of `root` and all below it, each once: links to folders are followed last, and only to new ones."""
    seen: set[tuple[int, int]] = set()
    tops = deque([str(root)])
    while tops:
        for folder, inner, names in os.walk(tops.popleft()):
            place = os.stat(folder)
            if (place.st_dev, place.st_ino) in seen:
                inner.clear()
                continue
            seen.add((place.st_dev, place.st_ino))
            inner.sort()
            paths = (os.path.join(folder, name) for name in inner)
            tops.extend(path for path in paths if os.path.islink(path))
            yield folder, names


def _item(path: Path, number: int, cut: Any) -> SourceItem:
    """One cut of a manifest as an item."""
    if not isinstance(cut, (MonoCut, MultiCut)) or cut.recording is None:
        raise DataError(f"{path}: cut {number} is a {type(cut).__name__} without one recording", cause="manifest")
    cut = _anchored(cut, path.parent)
    source = cut.recording.sources[0]
    origin = str(source.source) if source.type != "memory" else str(path)
    check_names([origin], str(path))
    return SourceItem(cut.id, origin, cut)


def _existing(path: Path, *, folder: bool = False) -> Path:
    if not (path.is_dir() if folder else path.is_file()):
        raise DataError(f"{path} does not exist{' or is not a folder' if folder else ''}", cause="missing_file")
    return path


def _anchored(cut: Cut, folder: Path) -> Cut:
    """Give relative audio files an absolute path: from the working directory where they exist there, else from `folder`."""
    for source in cut.recording.sources:
        if source.type == "file":
            given = Path(source.source)
            if not given.is_absolute():
                source.source = os.path.abspath(given if given.exists() else folder / given)
    return cut
