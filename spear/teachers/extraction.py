"""From cuts to teacher frames: settings of the two extraction stages, how manifests are read, and the list of what failed."""

from __future__ import annotations

import gzip
import itertools
import json
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from spear.bounds import above, at_least
from spear.errors import ArtifactError, ConfigError, DataError
from spear.files import write_text
from spear.teachers.pipeline import Outcome


@dataclass(frozen=True, kw_only=True, slots=True)
class FeaturesConfig:
    """The sample of teacher frames that a quantizer is fitted on."""

    num_frames: int = 200_000
    """Frames in all, held-out ones included; fewer where the corpora have fewer."""
    heldout_share: float = 0.05
    """Share of the frames kept apart for the quantizer's card; they come from cuts of their own."""
    max_heldout_frames: int = 10_000
    """Upper limit of the held-out frames (the cap of the MVQ recipe, arXiv:2211.00508)."""
    frames_per_cut: int | None = None
    """Largest number of frames drawn from one cut; None: all of them."""
    domains: dict[str, list[str]] = field(default_factory=dict)
    """teacher -> cut domains to sample; default: the domains whose cuts use that teacher."""
    batch_seconds: float = 60.0
    """Audio in one forward pass of a teacher, padding included."""
    dtype: Literal["float32", "float16"] = "float32"
    """How frames are stored."""
    max_failed_share: float = 0.01
    """Largest share of the chosen cuts that may fail."""

    def __post_init__(self) -> None:
        at_least("num_frames", self.num_frames, 2)
        _share("heldout_share", self.heldout_share)
        above("heldout_share", self.heldout_share, 0)
        at_least("max_heldout_frames", self.max_heldout_frames, 1)
        if self.frames_per_cut is not None:
            at_least("frames_per_cut", self.frames_per_cut, 1)
        _share("max_failed_share", self.max_failed_share)
        above("batch_seconds", self.batch_seconds, 0)


@dataclass(frozen=True, kw_only=True, slots=True)
class TokensConfig:
    """Codes of every cut."""

    source: Literal["stored", "online"] = "stored"
    """``stored``: `spear tokens` makes them once. ``online``: teachers and quantizers run beside the student and label the audio that it hears,
    noise and other cuts included; the stages `tokens` and `shards` then make and keep none."""
    cuts_per_block: int = 256
    """Cuts in one file of codes; an interrupted run resumes at its last finished block."""
    batch_seconds: float | Literal["auto"] = 60.0
    """Audio in one forward pass of a teacher, padding included; ``auto``: as much as a GPU's memory holds, measured at the start of every
    teacher, and 10 on a CPU. It changes codes by float rounding only, but with ``auto`` the bytes of a store may depend on the GPU's free memory."""
    pairs: Literal["needed", "all"] = "needed"
    """``needed``: a corpus gets the tokens of the teachers its domain uses; ``all``: of every teacher."""
    max_failed_share: float = 0.001
    """Largest share of a manifest's cuts that may fail; a failed cut gets no tokens and is listed in failures.jsonl."""
    length_tolerance_frames: int = 1
    """Largest difference between the frames a teacher gives and those the cut's duration promises."""

    def __post_init__(self) -> None:
        if self.source not in ("stored", "online"):
            raise ConfigError(f"`source` must be stored or online, but is {self.source!r}")
        at_least("cuts_per_block", self.cuts_per_block, 1)
        at_least("length_tolerance_frames", self.length_tolerance_frames, 0)
        _share("max_failed_share", self.max_failed_share)
        if self.batch_seconds != "auto":
            above("batch_seconds", float(self.batch_seconds), 0)


def _share(key: str, value: float) -> None:
    if not 0 <= value < 1:
        raise ConfigError(f"`{key}` must be in [0, 1), but is {value}")


def read_cuts(path: Path) -> Iterator[Any]:
    """Cuts of a manifest, one by one.

    Raises:
        ArtifactError: there is no manifest. DataError: it cannot be read, or an id occurs twice.
    """
    from lhotse import CutSet

    if not path.exists():
        raise ArtifactError(f"{path} does not exist: run `spear manifests` first")
    seen: set[str] = set()
    try:
        for cut in CutSet.from_jsonl_lazy(path):
            if cut.id in seen:
                raise DataError(f"{path} holds the cut {cut.id} twice", cause="duplicate_id")
            seen.add(cut.id)
            yield cut
    except (OSError, EOFError, ValueError, KeyError, zlib.error) as error:
        raise DataError(f"{path} is not a readable manifest: {error}", cause="manifest") from error


def read_blocks(path: Path, size: int, wanted: Callable[[int], bool]) -> Iterator[tuple[int, list[Any]]]:
    """Consecutive groups of `size` cuts of a manifest with their numbers, the last one shorter; those not wanted are not parsed.

    Raises:
        ArtifactError: there is no manifest. DataError: it cannot be read, or an id occurs twice in what is parsed.
    """
    from lhotse.serialization import deserialize_item

    if not path.exists():
        raise ArtifactError(f"{path} does not exist: run `spear manifests` first")
    seen: set[str] = set()
    try:
        with gzip.open(path, "rb") as file:
            lines = (line for line in file if line.strip())
            for index in itertools.count():
                block = list(itertools.islice(lines, size))
                if not block:
                    return
                if not wanted(index):
                    continue
                cuts: list[Any] = [deserialize_item(json.loads(line)) for line in block]
                for cut in cuts:
                    if cut.id in seen:
                        raise DataError(f"{path} holds the cut {cut.id} twice", cause="duplicate_id")
                    seen.add(cut.id)
                yield index, cuts
    except (OSError, EOFError, ValueError, KeyError, zlib.error) as error:
        raise DataError(f"{path} is not a readable manifest: {error}", cause="manifest") from error


def count_cuts(path: Path) -> int:
    """Number of cuts in a manifest, without parsing them.

    Raises:
        ArtifactError: there is no manifest. DataError: it is not a gzip file.
    """
    try:
        with gzip.open(path, "rb") as file:
            return sum(1 for line in file if line.strip())
    except FileNotFoundError as error:
        raise ArtifactError(f"{path} does not exist: run `spear manifests` first") from error
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path} is not a readable manifest: {error}", cause="manifest") from error


def failure_of(outcome: Outcome, **where: str) -> dict[str, str]:
    """The line of failures.jsonl for a failed cut."""
    return {"id": outcome.cut_id, "cause": outcome.cause, "message": outcome.message, **where}


def count_causes(failures: Iterable[dict[str, str]]) -> dict[str, int]:
    """cause -> number of failed cuts."""
    causes = [failure["cause"] for failure in failures]
    return {cause: causes.count(cause) for cause in sorted(set(causes))}


def write_failures(folder: Path, failures: Sequence[dict[str, str]]) -> None:
    """Write ``failures.jsonl``; an empty one says that nothing failed."""
    write_text(folder / "failures.jsonl", "".join(json.dumps(failure, sort_keys=True, ensure_ascii=False) + "\n" for failure in failures))


def check_failures(folder: Path, failures: Sequence[dict[str, str]], total: int, max_share: float, key: str) -> None:
    """Stop where too many cuts failed, having written ``failures.jsonl``.

    Raises:
        DataError: more than `max_share` of `total` cuts failed; names the causes and one cut.
    """
    if len(failures) <= max_share * total:
        return
    write_failures(folder, failures)
    causes = ", ".join(f"{cause}: {count}" for cause, count in count_causes(failures).items())
    raise DataError(
        f"{len(failures)} of {total} cuts failed ({causes}), more than `{key}` {max_share:g} allows;"
        f" first: {failures[0]['message']}; all in {folder / 'failures.jsonl'}",
        cause="failures",
    )


def corpora_of(teacher: str, corpora: Sequence[Any], labels: Any, domains: Sequence[str] | None = None) -> list[Any]:
    """Corpora whose cuts use a teacher, in the order of the corpora file.

    Args:
        labels: domain -> names of teachers. domains: takes the place of that table where given.
    """
    if domains is not None:
        return [corpus for corpus in corpora if corpus.domain in domains]
    return [corpus for corpus in corpora if teacher in labels(corpus.domain)]
