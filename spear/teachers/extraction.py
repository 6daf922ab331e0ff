"""From cuts to teacher frames: settings of the two extraction stages, batches of like lengths, and what became of every cut."""

from __future__ import annotations

import gzip
import itertools
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from spear.bounds import above, at_least
from spear.data.batches import batches_of
from spear.errors import ArtifactError, ConfigError, DataError, SpearError
from spear.files import write_text
from spear.teachers.base import Teacher


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

    cuts_per_block: int = 256
    """Cuts in one file of codes; an interrupted run resumes at its last finished block."""
    batch_seconds: float = 60.0
    """Audio in one forward pass of a teacher, padding included."""
    pairs: Literal["needed", "all"] = "needed"
    """``needed``: a corpus gets the tokens of the teachers its domain uses; ``all``: of every teacher."""
    max_failed_share: float = 0.001
    """Largest share of a manifest's cuts that may fail; a failed cut gets no tokens and is listed in failures.jsonl."""
    length_tolerance_frames: int = 1
    """Largest difference between the frames a teacher gives and those the cut's duration promises."""

    def __post_init__(self) -> None:
        at_least("cuts_per_block", self.cuts_per_block, 1)
        at_least("length_tolerance_frames", self.length_tolerance_frames, 0)
        _share("max_failed_share", self.max_failed_share)
        above("batch_seconds", self.batch_seconds, 0)


def _share(key: str, value: float) -> None:
    if not 0 <= value < 1:
        raise ConfigError(f"`{key}` must be in [0, 1), but is {value}")


class Outcome(NamedTuple):
    """What became of one cut: frames (T, D) on the teacher's device, or why there are none."""

    cut_id: str
    features: Tensor | None
    audio_s: float
    cause: str = ""
    message: str = ""


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
    except (OSError, EOFError, ValueError, KeyError) as error:
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
    except (OSError, EOFError, ValueError, KeyError) as error:
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
    except (OSError, EOFError) as error:
        raise DataError(f"{path} is not a readable manifest: {error}", cause="manifest") from error


def extract_cuts(
    teacher: Teacher, cuts: Sequence[Any], *, batch_seconds: float, device: torch.device, tolerance_frames: int = 1
) -> Iterator[list[Outcome]]:
    """Frames of cuts, one list of outcomes per batch; the next batch is decoded while the teacher works.

    The batches depend on `cuts` and `batch_seconds` only, so that a resumed run computes the same numbers.

    Raises:
        SpearError: a batch does not fit into the device's memory.
    """
    batches = batches_of(cuts, batch_seconds)
    with ThreadPoolExecutor(max_workers=1) as reader:
        pending = [reader.submit(_load, batch, teacher.sample_rate) for batch in batches[:1]]
        for index in range(len(batches)):
            loaded = pending.pop().result()
            if index + 1 < len(batches):
                pending.append(reader.submit(_load, batches[index + 1], teacher.sample_rate))
            try:
                yield _run(teacher, loaded, device, tolerance_frames)
            except torch.OutOfMemoryError as error:
                raise SpearError(f"`batch_seconds` {batch_seconds:g} does not fit into the memory of {device}: choose less") from error


def _load(cuts: list[Any], sample_rate: int) -> list[tuple[Any, Tensor | DataError]]:
    from spear.data.audio import load_audio

    loaded: list[tuple[Any, Tensor | DataError]] = []
    for cut in cuts:
        try:
            loaded.append((cut, torch.from_numpy(load_audio(cut, sample_rate))))
        except DataError as error:
            loaded.append((cut, error))
    return loaded


def _run(teacher: Teacher, loaded: list[tuple[Any, Tensor | DataError]], device: torch.device, tolerance_frames: int) -> list[Outcome]:
    outcomes: list[Outcome] = []
    audio: list[Tensor] = []
    good: list[Any] = []
    for cut, item in loaded:
        if isinstance(item, DataError):
            outcomes.append(Outcome(cut.id, None, 0.0, item.cause, str(item)))
        elif teacher.num_frames(len(item)) < 1:
            text = f"the cut {cut.id} of {len(item)} samples is too short for one frame of {teacher.name}"
            outcomes.append(Outcome(cut.id, None, 0.0, "too_short", text))
        else:
            audio.append(item)
            good.append(cut)
    if not good:
        return outcomes
    lens = torch.tensor([len(item) for item in audio], device=device)
    features, frames = teacher(nn.utils.rnn.pad_sequence(audio, batch_first=True).to(device), lens)
    finite = features.isfinite().flatten(1).all(dim=1).tolist()
    for cut, item, count, whole in zip(good, features, frames.tolist(), finite):
        promised = teacher.num_frames(round(cut.duration * teacher.sample_rate))
        if abs(count - promised) > tolerance_frames:
            text = f"the cut {cut.id} must give {promised} frames of {teacher.name} for its {cut.duration:g} s, but gives {count}"
            outcomes.append(Outcome(cut.id, None, 0.0, "length_mismatch", text))
        elif not whole:
            outcomes.append(Outcome(cut.id, None, 0.0, "not_finite", f"{teacher.name} gives frames that are not finite for the cut {cut.id}"))
        else:
            outcomes.append(Outcome(cut.id, item[:count], float(cut.duration)))
    return outcomes


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
