"""Stage 0, ``manifests``: audio of every corpus -> checked 16 kHz mono cuts."""

from __future__ import annotations

import gzip
import itertools
import json
import logging
import shutil
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from lhotse import CutSet
from lhotse.cut import MonoCut

from spear.config import to_json
from spear.data.corpora import SPLITS, CorpusConfig, ManifestsConfig, SourceItem
from spear.data.prepare import Prepared, prepare
from spear.data.scan import manifest_entries
from spear.errors import ArtifactError, DataError
from spear.files import read_json, seed_from, write_atomic, write_json, write_text
from spear.progress import Meter
from spear.stages.artifact import Artifact

if TYPE_CHECKING:
    from spear.recipe import Run

logger = logging.getLogger(__name__)
Given = TypeVar("Given")
Made = TypeVar("Made")
THREADS = 4
WAITING = 64  # cuts in flight, so that a corpus of any size needs the same memory
PART_ITEMS = 10_000
"""Items of a source in one part of a split; a stopped run goes on after the last whole part."""


def manifest_path(data: Path, corpus: str, split: str) -> Path:
    """Where the cuts of a corpus's split lie."""
    return data / "manifests" / f"{corpus}_cuts_{split}.jsonl.gz"


def find_manifest(data: Path, corpus: str, split: str) -> Path:
    """As `manifest_path`, of a manifest that is there.

    Raises:
        ArtifactError: it is not; names the stage to run.
    """
    path = manifest_path(data, corpus, split)
    if not path.exists():
        raise ArtifactError(f"{path} does not exist: run `spear manifests` first, with a {split} split")
    return path


def run(run: Run) -> None:
    """Write ``DATA/manifests``.

    Raises:
        ConfigError: the recipe does not know the domain of a corpus.
        DataError: too many cuts fail, an id is there twice, or a split ends up empty; the message names the first file.
        ArtifactError: the manifests were made from other inputs, or their audio lies elsewhere now.
    """
    config = run.recipe.manifests
    for corpus in run.corpora:
        run.teachers_of(corpus.domain)
        corpus.limits_s(config)
    folder = run.data / "manifests"
    artifact = Artifact(folder, kind="manifests", config=_identity(run.corpora, config), inputs={c.name: c.source.fingerprint() for c in run.corpora})
    if artifact.is_done():
        _check_place(run)
        return
    with artifact.making() as record:
        failures: list[dict[str, str]] = []
        for corpus in run.corpora:
            record.counts[corpus.name] = {}
            taken: set[int] = set()
            for split in corpus.source.splits():
                report = _make_split(run.data, corpus, split, config, taken)
                failures += report.pop("failures")
                record.audio_s += report.pop("audio_s")
                record.counts[corpus.name][split] = report
                logger.info("manifests: %s %s: %s", corpus.name, split, _summary(report))
        write_text(folder / "failures.jsonl", _lines(failures))


def _check_place(run: Run) -> None:
    """Look whether the first audio of every finished manifest is where it says; a moved folder of audio keeps its fingerprint."""
    for corpus in run.corpora:
        for split in corpus.source.splits():
            path = manifest_path(run.data, corpus.name, split)
            first = next(iter(CutSet.from_jsonl_lazy(path)), None) if path.exists() else None
            for source in first.recording.sources if first is not None else ():
                if source.type == "file" and not Path(source.source).exists():
                    message = f"{path} names {source.source}, which does not exist: put the audio back, or remove {path.parent}"
                    raise ArtifactError(f"{message} and make the stages from `manifests` on again")


def _identity(corpora: list[CorpusConfig], config: ManifestsConfig) -> dict[str, Any]:
    """Settings the cuts depend on. Sources are inputs, by their fingerprints, so that a moved folder stays the same."""
    keys = ("domain", "min_duration_s", "max_duration_s")
    named = {c.name: {key: getattr(c, key) for key in keys} for c in corpora}
    return {"corpora": named, "manifests": {key: value for key, value in to_json(config).items() if key != "max_failed_share"}}


def _make_split(data: Path, corpus: CorpusConfig, split: str, config: ManifestsConfig, taken: set[int]) -> dict[str, Any]:
    """Write one split's manifest and report; a split with a report is finished and only gives its ids.

    A source may have nothing for valid or test (a folder of few files): then there is no such manifest.
    """
    path = manifest_path(data, corpus.name, split)
    report_path = data / "manifests" / f"{corpus.name}_report_{split}.json"
    folder = data / "manifests" / f"{corpus.name}_parts_{split}"
    if report_path.exists():
        shutil.rmtree(folder, ignore_errors=True)
        taken.update(_keys(path) if path.exists() else ())
        found: dict[str, Any] = read_json(report_path)
        return found
    tally = _Tally()
    parts = _make_parts(folder, corpus, split, config, taken, tally)
    write_atomic(path, lambda temporary: _join(temporary, parts))
    report = tally.report()
    failed = len(tally.failures)
    share = failed / max(failed + tally.cuts, 1)
    if share > config.max_failed_share:
        write_text(data / "manifests" / "failures.jsonl", _lines(tally.failures))
        path.unlink()
        shutil.rmtree(folder)  # repaired files are to be looked at again
        first = tally.failures[0]
        raise DataError(
            f"corpus {corpus.name}, split {split}: {failed} of {failed + tally.cuts} cuts failed, a share of {share:.3g}, but `max_failed_share` is "
            f"{config.max_failed_share:g}; first: {first['path']}: {first['cause']} (all in {data / 'manifests' / 'failures.jsonl'})",
            cause=first["cause"],
        )
    if tally.cuts == 0:
        path.unlink()
        shutil.rmtree(folder, ignore_errors=True)
        if split == "train" or tally.skipped:
            raise DataError(f"corpus {corpus.name}, split {split}: no cut is left ({_summary(report)})", cause="empty")
        logger.warning("corpus %s: the source has nothing for the split %s", corpus.name, split)
    if tally.silent:
        share = 100 * tally.silent / tally.cuts
        logger.warning("corpus %s, split %s: %d of %d cuts are silent (%.1f %%)", corpus.name, split, tally.silent, tally.cuts, share)
    write_json(report_path, report)
    shutil.rmtree(folder, ignore_errors=True)
    return report


def _make_parts(folder: Path, corpus: CorpusConfig, split: str, config: ManifestsConfig, taken: set[int], tally: _Tally) -> list[Path]:
    """Files of the prepared cuts of a split, PART_ITEMS items of the source each; those that a stopped run left are taken as they are.

    Beside each is a file of its counts, written last, which all go into `tally`. Refuses an id that is in `taken` already.
    """
    files: list[Path] = []
    items = corpus.source.files(split)
    with Meter(f"manifests: {corpus.name} {split}", None, unit="cuts") as meter:
        while True:
            path = folder / f"{corpus.name}_{split}_{len(files):06d}.jsonl.gz"
            counts = path.with_name(f"{path.name}.json")
            if counts.exists():
                found = read_json(counts)
                next(itertools.islice(items, found["items"] - 1, None))  # go past them
                taken.update(_keys(path) if found["cuts"] else ())
            else:
                first = next(items, None)
                if first is None:
                    return files
                part = _Tally(tally.audio_s)
                some = itertools.chain([first], itertools.islice(items, PART_ITEMS - 1))
                cuts = _checked(corpus, some, config, taken, part, meter)
                write_atomic(path, lambda temporary, cuts=cuts: _write_cuts(temporary, cuts))  # type: ignore[misc]
                found = part.state()
                write_json(counts, found)
            tally.take(found)
            files.append(path)


def _checked(
    corpus: CorpusConfig, items: Iterable[SourceItem], config: ManifestsConfig, taken: set[int], tally: _Tally, meter: Meter
) -> Iterator[MonoCut]:
    """Prepared cuts of some items in their order, counted in `tally`; refuses an id that is in `taken` already."""

    def work(item: SourceItem) -> Prepared:
        return prepare(item, corpus, config)

    for prepared in ordered_map(work, items):
        tally.add(prepared)
        for cut in prepared.cuts:
            key = seed_from(cut.id)
            if key in taken:
                raise DataError(_twice(corpus, cut.id), cause="duplicate_id")
            taken.add(key)
            meter.advance(1, audio_s=cut.duration)
            yield cut


def _keys(path: Path) -> Iterator[int]:
    """What stands for the ids of a manifest in the set of those that are taken."""
    return (seed_from(entry.id) for entry in manifest_entries(path))


class _Tally:
    """Counts of one split, or of one part of it. audio_s: of the parts before it, as sums of floats depend on their order."""

    def __init__(self, audio_s: float = 0.0) -> None:
        self.items, self.cuts, self.silent, self.clipped, self.audio_s = 0, 0, 0, 0, audio_s
        self.skipped: Counter[str] = Counter()
        self.failures: list[dict[str, str]] = []

    def add(self, prepared: Prepared) -> None:
        """Count what became of one item."""
        self.items += 1
        self.cuts += len(prepared.cuts)
        self.silent += prepared.silent
        self.clipped += prepared.clipped
        self.audio_s += sum(cut.duration for cut in prepared.cuts)
        self.skipped += prepared.skipped
        self.failures += prepared.failures

    def state(self) -> dict[str, Any]:
        """JSON of all counts of a part."""
        return {key: getattr(self, key) for key in ("items", "cuts", "silent", "clipped", "audio_s", "skipped", "failures")}

    def take(self, part: dict[str, Any]) -> None:
        """Count the next part by its `state`."""
        for key in ("items", "cuts", "silent", "clipped"):
            setattr(self, key, getattr(self, key) + part[key])
        self.audio_s = part["audio_s"]
        self.skipped.update(part["skipped"])
        self.failures += part["failures"]

    def report(self) -> dict[str, Any]:
        """JSON of the counts."""
        causes = Counter(failure["cause"] for failure in self.failures)
        return {
            "cuts": self.cuts,
            "hours": round(self.audio_s / 3600, 6),
            "audio_s": round(self.audio_s, 6),
            "silent": self.silent,
            "clipped": self.clipped,
            "skipped": dict(sorted(self.skipped.items())),
            "failed": dict(sorted(causes.items())),
            "failures": self.failures,
        }


def ordered_map(work: Callable[[Given], Made], items: Iterable[Given]) -> Iterator[Made]:
    """Map over a few threads, results in order, at most WAITING items in flight."""
    with ThreadPoolExecutor(THREADS) as pool:
        waiting: deque[Future[Made]] = deque()
        try:
            for item in items:
                waiting.append(pool.submit(work, item))
                if len(waiting) >= WAITING:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()


def _twice(corpus: CorpusConfig, cut_id: str) -> str:
    """One line that names the places of an id that is there twice."""
    places = []
    for split in SPLITS:
        if split in corpus.source.splits():
            places += [f"{item.origin} ({split})" for item in corpus.source.files(split) if cut_id == item.id or cut_id.startswith(f"{item.id}-w")]
    return f"corpus {corpus.name}: cut id {cut_id!r} must be unique, but is there {len(places)} times: {' and '.join(places[:2])}"


def _write_cuts(path: Path, cuts: Iterable[MonoCut]) -> None:
    with gzip.open(path, "wb", compresslevel=1) as file:
        for cut in cuts:
            file.write((json.dumps(cut.to_dict(), ensure_ascii=False) + "\n").encode())


def _join(path: Path, parts: Iterable[Path]) -> None:
    """Write the lines of all parts; the bytes do not depend on where a part ends."""
    with path.open("wb") as raw, gzip.GzipFile(filename="", fileobj=raw, mode="wb", mtime=0) as file:
        for part in parts:
            with gzip.open(part, "rb") as source:
                for line in source:
                    file.write(line)


def _lines(failures: list[dict[str, str]]) -> str:
    return "".join(json.dumps(failure, ensure_ascii=False, sort_keys=True) + "\n" for failure in failures)


def _summary(report: dict[str, Any]) -> str:
    parts = [f"{report['cuts']} cuts", f"{report['hours']:.2f} h"]
    parts += [f"{number} {reason}" for group in ("skipped", "failed") for reason, number in report[group].items()]
    return ", ".join(parts)
