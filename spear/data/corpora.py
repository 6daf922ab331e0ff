"""What a run trains on: corpora, each with a name, a domain, a weight and a source of cuts."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal

from lhotse.cut import Cut

from spear.bounds import within
from spear.data.sampler import SamplingConfig, check_weights
from spear.errors import ConfigError
from spear.registry import Registry

if TYPE_CHECKING:
    from spear.data.scan import Entry

SPLITS = ("train", "valid", "test")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")


@dataclass(frozen=True, kw_only=True, slots=True)
class SourceConfig(Registry):
    """Where the cuts of a corpus come from; the table of sources."""

    TABLE: ClassVar[dict[str, str]] = {
        "cuts": "spear.data.sources:CutsSource",
        "folder": "spear.data.sources:FolderSource",
    }

    def resolved(self, folder: Path) -> SourceConfig:
        """The same source with absolute paths: environment variables expanded, relative paths starting from `folder`."""
        raise NotImplementedError

    def splits(self) -> list[str]:
        """The splits the source has, in the order train, valid, test."""
        raise NotImplementedError

    def fingerprint(self) -> str:
        """Changes whenever the source would give other cuts.

        Raises:
            DataError: a file or folder it names does not exist.
        """
        raise NotImplementedError

    def files(self, split: str) -> Iterator[SourceItem]:
        """Cuts of one split in the source's order, as they are (any rate, any number of channels, unchecked)."""
        raise NotImplementedError

    def entries(self, split: str) -> Iterator[Entry]:
        """The same cuts, as far as a quick look tells (see `spear.data.scan`); by default what `files` gives."""
        from spear.data.scan import Entry

        for item in self.files(split):
            cut = item.cut
            seconds, rate = (float(cut.duration), int(cut.sampling_rate)) if cut is not None else (0.0, 0)
            yield Entry(item.id, seconds, rate, item.origin.encode(), True, partial(_given, item))


def _given(item: SourceItem) -> SourceItem:
    return item


@dataclass(frozen=True, slots=True)
class SourceItem:
    """One thing a source gives: a cut, or the reason why its file could not become one."""

    id: str
    """Of the cut, unique in a corpus."""
    origin: str
    """File it comes from, for messages."""
    cut: Cut | None = None
    """Cut of any kind; None where the file is unreadable."""
    cause: str = ""
    """Short cause of the failure (see DataError)."""
    message: str = ""
    """One line about the failure."""


@dataclass(frozen=True, kw_only=True, slots=True)
class CorpusConfig:
    """One corpus."""

    name: str
    """Letters, digits, ``_``, ``-`` and ``.``; names its files."""
    domain: str
    """What the audio is, e.g. ``speech``, ``audio`` or ``noise``; recipes give teachers and mixing by domain."""
    source: SourceConfig
    """Where its cuts come from."""
    weight: float = 1.0
    """Factor on the hours of its training split when corpora are mixed, 2 hears everything twice an epoch; or hours (`CorporaConfig.weights`)."""
    min_duration_s: float | None = None
    """Overrides the recipe's shortest cut in seconds for this corpus."""
    max_duration_s: float | None = None
    """Overrides the recipe's longest cut in seconds for this corpus."""

    def __post_init__(self) -> None:
        for key, value in (("name", self.name), ("domain", self.domain)):
            if not _NAME.fullmatch(value):
                raise ConfigError(f"`{key}` must be made of letters, digits, `_`, `-` and `.`, but is {value!r}")
        if not 0 <= self.weight < float("inf"):
            raise ConfigError(f"`weight` must be 0 or more, but is {self.weight} (corpus {self.name})")
        for key, limit in (("min_duration_s", self.min_duration_s), ("max_duration_s", self.max_duration_s)):
            if limit is not None and not 0 < limit < float("inf"):
                raise ConfigError(f"`{key}` must be more than 0, but is {limit} (corpus {self.name})")

    def limits_s(self, config: ManifestsConfig) -> tuple[float, float]:
        """Shortest and longest cut of this corpus in seconds.

        Raises:
            ConfigError: the shortest is longer than half the longest.
        """
        low = config.min_duration_s if self.min_duration_s is None else self.min_duration_s
        high = config.max_duration_s if self.max_duration_s is None else self.max_duration_s
        _check_limits(low, high, f" (corpus {self.name})")
        return low, high


@dataclass(frozen=True, kw_only=True, slots=True)
class CorporaConfig:
    """A corpora file."""

    corpora: list[CorpusConfig]
    """At least one; names are unique."""
    weights: Literal["factors", "hours"] | None = None
    """What every `weight` is, in place of the recipe's `sampling.weights`; none: as the recipe says."""

    def __post_init__(self) -> None:
        if not self.corpora:
            raise ConfigError("`corpora` must name at least one corpus, but is empty")
        seen: set[str] = set()
        for corpus in self.corpora:
            if corpus.name in seen:
                raise ConfigError(f"`corpora` must have unique names, but {corpus.name!r} is there twice")
            seen.add(corpus.name)

    def resolved(self, folder: Path) -> CorporaConfig:
        """The same corpora with absolute paths, relative ones starting from `folder` (the corpora file's)."""
        return replace(self, corpora=[replace(corpus, source=corpus.source.resolved(folder)) for corpus in self.corpora])

    def sampling(self, config: SamplingConfig) -> SamplingConfig:
        """A recipe's `sampling` with this file's word on what its weights are.

        Raises:
            ConfigError: a weight is too large for a factor.
        """
        chosen = config if self.weights is None else replace(config, weights=self.weights)
        check_weights({corpus.name: corpus.weight for corpus in self.corpora}, chosen)
        return chosen


@dataclass(frozen=True, kw_only=True, slots=True)
class ManifestsConfig:
    """How audio becomes checked cuts."""

    min_duration_s: float = 0.5
    """Shorter cuts are left out and counted."""
    max_duration_s: float = 32.0
    """Longer cuts are split or left out, see `long`."""
    long: Literal["split", "skip"] = "split"
    """A longer cut becomes equal windows ``<id>-w0000``, ``<id>-w0001``, ...; or is left out and counted."""
    check_audio: Literal["full", "header"] = "full"
    """Decode every file, or only look whether it exists and its header agrees with the manifest."""
    max_failed_share: float = 0.001
    """Share of unreadable cuts (out of all of a corpus) above which the stage stops."""
    silence_peak: float = 1e-4
    """Largest absolute sample below which a cut counts as silent; it is kept and counted."""
    exclude: list[str] = field(default_factory=list)
    """Ids of cuts to leave out, e.g. those known to be broken; windows of long ones by theirs."""

    def __post_init__(self) -> None:
        _check_limits(self.min_duration_s, self.max_duration_s, "")
        within("max_failed_share", self.max_failed_share, 0, 1)
        within("silence_peak", self.silence_peak, 0, 1)


def _check_limits(low: float, high: float, where: str) -> None:
    if not 0.025 <= low < float("inf"):
        raise ConfigError(f"`min_duration_s` must be at least 0.025, one window of features, but is {low:g}{where}")
    if not 2 * low <= high < float("inf"):
        raise ConfigError(f"`max_duration_s` must be at least twice `min_duration_s` ({low:g}), but is {high:g}{where}")


def expand(path: str, folder: Path) -> str:
    """An absolute path from one of a corpora file: variables and ``~`` expanded, relative to `folder`.

    Raises:
        ConfigError: an environment variable is not set.
    """
    expanded = os.path.expanduser(os.path.expandvars(path))
    unset = re.search(r"\$\{?(\w+)", expanded)
    if unset:
        raise ConfigError(f"environment variable {unset.group(1)} is not set, but the path {path!r} names it")
    return os.path.normpath(folder / expanded)
