"""Stage `tokens`: audio -> teacher -> codes in one pass, nothing else stored."""

from __future__ import annotations

import functools
import itertools
import logging
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from spear.data.scan import manifest_entries
from spear.data.token_store import TokenWriter
from spear.errors import ArtifactError, ConfigError, DataError
from spear.files import sha256_file
from spear.progress import Meter
from spear.quantizers.card import entry_counts
from spear.stages.agreement import check_quantizer, teacher_settings, without_location
from spear.stages.artifact import Artifact, Record, fingerprint_of, read_artifact
from spear.stages.manifests import find_manifest, manifest_path
from spear.stages.session import BusyError
from spear.teachers.base import Teacher
from spear.teachers.extraction import (
    TokensConfig,
    check_failures,
    corpora_of,
    count_causes,
    count_cuts,
    failure_of,
    read_blocks,
    write_failures,
)
from spear.teachers.pipeline import Part, extract_groups, find_batch_seconds
from spear.training.distributed import World, pick_device, this_process
from spear.types import TokenSpec

if TYPE_CHECKING:
    from spear.recipe import Run

logger = logging.getLogger(__name__)

SPLITS = ("train", "valid")
COLLAPSED_SHARE, COLLAPSED_MIN_FRAMES = 0.999, 1000


@dataclass(frozen=True)
class Share:
    """The blocks of every store that this process makes: `index`, `index` + `count`, ..."""

    index: int = 0
    count: int = 1

    def __contains__(self, block: object) -> bool:
        return isinstance(block, int) and block % self.count == self.index

    @property
    def title(self) -> str:
        """For log lines; empty where this process is alone."""
        return f" (worker {self.index} of {self.count})" if self.count > 1 else ""


def share_of(world: World, num_shards: int = 1, shard: int = 0) -> Share:
    """The share of one process: machines are numbered by `shard`, the processes that ``torchrun`` starts on each by their rank.

    Raises:
        ConfigError: `shard` is not one of 0 .. `num_shards` - 1.
    """
    if num_shards < 1 or not 0 <= shard < num_shards:
        raise ConfigError(f"`--shard` must be between 0 and {max(num_shards, 1) - 1} (one less than `--num-shards`), but is {shard}")
    return Share(shard * world.size + world.rank, num_shards * world.size)


def run(run: Run, *, num_shards: int = 1, shard: int = 0, retry_failed: bool = False) -> None:
    """Write ``DATA/tokens/<teacher>/<corpus>/<split>/`` for every pair of teacher and corpus that the recipe needs.

    Several processes share the work block by block; the one that finds all blocks made finishes a store.

    Args:
        num_shards, shard: of how many machines (or groups of processes) this is which. retry_failed: make blocks with failed cuts again.
    Raises:
        SpearError: an input is missing or does not fit, too many cuts fail, or a codebook has collapsed.
    """
    world = this_process()
    share, device = share_of(world, num_shards, shard), pick_device("auto", world)
    if not run.recipe.teachers or run.recipe.tokens.source == "online":
        reason = "names no teachers" if not run.recipe.teachers else "labels batches online"
        logger.info("tokens: the recipe %s, nothing to do", reason)
        return
    if device.type == "cuda":
        torch.cuda.set_device(device)
    for name in run.recipe.quantizers:
        corpora = corpora_of(name, run.corpora, run.teachers_of)
        if not corpora:
            logger.info("tokens: no corpus uses the teacher %s", name)
            continue
        tokenizer = load_tokenizer(run, name, device)
        for corpus, split in itertools.product(corpora, SPLITS):
            if split != "train" and not manifest_path(run.data, corpus.name, split).exists():
                logger.info("tokens: %s has no %s cuts", corpus.name, split)
                continue
            path = find_manifest(run.data, corpus.name, split)
            _tokenize(run, tokenizer, path, run.data / "tokens" / name / corpus.name / split, share, retry_failed)


@dataclass(frozen=True)
class Tokenizer:
    """A frozen teacher with the quantizer fitted on it."""

    name: str
    teacher: Teacher
    quantizer: Any
    spec: TokenSpec
    device: torch.device

    def encode(self, features: Tensor) -> Tensor:
        """Codes (F, C), where the quantizer is, of teacher frames (F, D)."""
        return torch.as_tensor(self.quantizer.encode(features))


def load_tokenizer(run: Run, name: str, device: torch.device) -> Tokenizer:
    """The teacher and quantizer of a recipe, checked against each other.

    Raises:
        ArtifactError: the quantizer is not finished, or was fitted on another teacher or with other settings.
    """
    from spear.quantizers import load_quantizer

    folder = run.data / "quantizers" / name
    fingerprint = fingerprint_of(folder)
    teacher = run.recipe.teachers[name].build(run.data)
    if read_artifact(folder)["inputs"].get("teacher") != teacher.fingerprint():
        features = run.data / "features" / name
        raise ArtifactError(
            f"{folder} was fitted on another teacher than `teachers.{name}`: remove {features} and {folder}, then run both stages again"
        )
    check_quantizer(run, name)
    quantizer: Any = load_quantizer(folder)
    if quantizer.dim != teacher.dim:
        raise ArtifactError(f"{folder} takes frames of width {quantizer.dim}, but the teacher {name} gives {teacher.dim}")
    if isinstance(quantizer, torch.nn.Module):
        quantizer = quantizer.to(device)
    spec = TokenSpec(
        num_codebooks=int(quantizer.num_codebooks),
        codebook_size=int(quantizer.codebook_size),
        frame_rate_hz=teacher.frame_rate_hz,
        first_frame_s=teacher.first_frame_s,
        teacher_fingerprint=teacher.fingerprint(),
        quantizer_fingerprint=fingerprint,
    )
    return Tokenizer(name, teacher.to(device), quantizer, spec, device)


def _tokenize(run: Run, tokenizer: Tokenizer, manifest: Path, folder: Path, share: Share, retry_failed: bool) -> None:
    config, title = run.recipe.tokens, f"tokens {' '.join(folder.parts[-3:])}{share.title}"
    artifact = Artifact(
        folder,
        kind="tokens",
        config={
            "cuts_per_block": config.cuts_per_block,
            "length_tolerance_frames": config.length_tolerance_frames,
            "teachers": teacher_settings(run, [tokenizer.name]),
        },
        inputs={
            "teacher": tokenizer.spec.teacher_fingerprint,
            "quantizer": tokenizer.spec.quantizer_fingerprint,
            "manifest": sha256_file(manifest),
        },
        counted=without_location,
    )
    writer = TokenWriter(folder, tokenizer.spec)
    job = Job(tokenizer, manifest, writer, config, count_cuts(manifest))
    if retry_failed:
        _reopen(artifact, job, share)
    if artifact.is_done():
        return
    if share.count == 1:
        with artifact.making() as record:
            _fill(job, share, title)
            _finish(job, record)
        return
    if job.missing(share):
        with artifact.part(share.index, share.count):
            _fill(job, share, title)
    try:
        _require_all(job)
        with artifact.making(finishing=True) as record:
            _require_all(job)  # under the lock: another process may have put failed blocks away
            _finish(job, record)
    except (IncompleteError, BusyError) as error:
        logger.info("%s: this share is made; %s", title, error)


@dataclass(frozen=True)
class Job:
    """One token store to be filled: blocks 0 .. num_blocks - 1 of the cuts of a manifest."""

    tokenizer: Tokenizer
    manifest: Path
    writer: TokenWriter
    config: TokensConfig
    num_cuts: int

    @functools.cached_property
    def batch_seconds(self) -> float:
        """Audio in one forward pass; ``auto`` is measured here, once."""
        if self.config.batch_seconds != "auto":
            return float(self.config.batch_seconds)
        longest_s = max(entry.seconds for entry in manifest_entries(self.manifest))
        found = find_batch_seconds(self.tokenizer.teacher, longest_s, self.tokenizer.device)
        logger.info("tokens: `tokens.batch_seconds` auto is %.0f for %s on %s", found, self.tokenizer.name, self.tokenizer.device)
        return found

    @property
    def num_blocks(self) -> int:
        """Blocks of a finished store."""
        return -(-self.num_cuts // self.config.cuts_per_block)

    def missing(self, share: Share) -> list[int]:
        """Blocks of a share that are still to be made."""
        return [index for index in range(self.num_blocks) if index in share and not self.writer.is_finished(index)]


class IncompleteError(Exception):
    """Blocks of other processes are not there yet."""


def _require_all(job: Job) -> None:
    missing = len(job.missing(Share()))
    if missing:
        raise IncompleteError(f"{missing} of {job.num_blocks} blocks are still to be made by others")


def _reopen(artifact: Artifact, job: Job, share: Share) -> None:
    """Put away the blocks of a share in which cuts failed, so that they are made again."""
    failed = _failures(job, [index for index in range(job.num_blocks) if index in share])
    if not failed:
        return
    logger.info("tokens: %d blocks of %s with failed cuts are made again", len(failed), artifact.folder)
    with artifact.reopening():
        job.writer.reopen()
        for index in failed:
            job.writer.discard(index)


def _fill(job: Job, share: Share, title: str) -> None:
    """Make the missing blocks of a share.

    Raises:
        DataError: more cuts failed than the recipe allows, in this share alone.
    """
    writer, config = job.writer, job.config
    missing = set(job.missing(share))
    failures = _failures(job, [index for index in range(job.num_blocks) if index in share and index not in missing])
    tokenizer, block = job.tokenizer, _Block()
    written: Future[tuple[int, int]] | None = None

    def note(done_block: Future[tuple[int, int]] | None) -> None:
        if done_block is None:
            return
        index, num_cuts = done_block.result()
        done = writer.finished(index) or {}
        if done["failures"]:
            failures[index] = done["failures"]
            _check_failures(job, failures)
        meter.advance(num_cuts, audio_s=done["audio_s"])

    with Meter(title, min(len(missing) * config.cuts_per_block, job.num_cuts), unit="cuts") as meter, ThreadPoolExecutor(1) as scribe:
        _check_failures(job, failures)
        blocks = read_blocks(job.manifest, config.cuts_per_block, missing.__contains__)
        settings: dict[str, Any] = {"device": tokenizer.device, "tolerance_frames": config.length_tolerance_frames}
        for part in extract_groups(tokenizer.teacher, blocks, batch_seconds=job.batch_seconds, **settings):
            block.add(tokenizer, part)
            if part.last:
                note(written)
                written, block = scribe.submit(block.write, writer, part), _Block()
        note(written)


def _failures(job: Job, blocks: Iterable[int]) -> dict[int, list[dict[str, str]]]:
    """Number of a finished block -> its failed cuts, where it has any."""
    found = ((index, (job.writer.finished(index) or {}).get("failures")) for index in blocks)
    return {index: failures for index, failures in found if failures}


def _check_failures(job: Job, failures: dict[int, list[dict[str, str]]]) -> None:
    """Stop where too many cuts failed; the blocks they belong to are made again by the next run."""
    listed = [failure for index in sorted(failures) for failure in failures[index]]
    try:
        check_failures(job.writer.folder, listed, job.num_cuts, job.config.max_failed_share, "tokens.max_failed_share")
    except DataError:
        for index in failures:
            job.writer.discard(index)
        raise


def _finish(job: Job, record: Record) -> None:
    """Check the whole store, of which every block is there, and describe it.

    Raises:
        DataError: too many cuts failed, an id occurs twice, or a codebook has collapsed.
    """
    writer, spec = job.writer, job.tokenizer.spec
    histogram = torch.zeros(spec.num_codebooks, spec.codebook_size, dtype=torch.int64)
    failures: dict[int, list[dict[str, str]]] = {}
    seen: set[str] = set()
    for index in range(job.num_blocks):
        done = writer.finished(index) or {}
        if done["failures"]:
            failures[index] = done["failures"]
        for cut_id in [*done["ids"], *(failure["id"] for failure in done["failures"])]:
            if cut_id in seen:
                raise DataError(f"{job.manifest} holds the cut {cut_id} twice", cause="duplicate_id")
            seen.add(cut_id)
        histogram += entry_counts(writer.codes(index), spec.codebook_size)
        record.audio_s += done["audio_s"]
    _check_failures(job, failures)
    check_collapse(histogram, f"{writer.folder.parent.parent.name}")
    listed = [failure for index in sorted(failures) for failure in failures[index]]
    write_failures(writer.folder, listed)
    writer.close(job.num_blocks)
    record.counts = {"cuts": len(seen) - len(listed), "frames": int(histogram[0].sum()), "failed": count_causes(listed)}
    record.extra = {"codes_used": [int(n) for n in (histogram > 0).sum(dim=1)], "entropy_bits": entropy_bits(histogram)}


class _Block:
    """Codes and failures of the cuts of one block, batch by batch."""

    def __init__(self) -> None:
        self.codes: dict[str, Tensor] = {}
        self.failed: dict[str, dict[str, str]] = {}

    def add(self, tokenizer: Tokenizer, part: Part) -> None:
        """Encode the frames of one batch."""
        self.failed.update({outcome.cut_id: failure_of(outcome) for outcome in part.outcomes if outcome.features is None})
        good = [(outcome.cut_id, outcome.features) for outcome in part.outcomes if outcome.features is not None]
        if good:
            codes = tokenizer.encode(torch.cat([features for _, features in good])).cpu()
            rows = codes.split([len(features) for _, features in good])
            self.codes.update({cut_id: item for (cut_id, _), item in zip(good, rows)})

    def write(self, writer: TokenWriter, part: Part) -> tuple[int, int]:
        """Write the block that `part` ends; returns its number and how many cuts it has."""
        kept = [cut for cut in part.cuts if cut.id in self.codes]
        writer.write(
            part.group,
            [cut.id for cut in kept],
            [self.codes[cut.id] for cut in kept],
            failures=[self.failed[cut.id] for cut in part.cuts if cut.id in self.failed],
            audio_s=round(sum(cut.duration for cut in kept), 6),
        )
        return part.group, len(part.cuts)


def check_collapse(histogram: Tensor, name: str) -> None:
    """Make sure that no codebook says the same thing all the time; too few frames say nothing.

    Raises:
        DataError: names the codebook and its one entry.
    """
    frames = int(histogram[0].sum())
    if frames < COLLAPSED_MIN_FRAMES:
        return
    for book, counts in enumerate(histogram):
        most = int(counts.argmax())
        if int(counts[most]) > COLLAPSED_SHARE * frames:
            share = 100 * int(counts[most]) / frames
            raise DataError(
                f"codebook {book} of the quantizer {name} has collapsed: entry {most} has {share:.2f} % of {frames} frames", cause="collapsed"
            )


def entropy_bits(histogram: Tensor) -> list[float]:
    """Entropy of each codebook's use in bits; at most log2 K."""
    shares = histogram.double() / histogram.sum(dim=1, keepdim=True).clamp(min=1)
    return [round(abs(float(value)), 4) for value in (shares * shares.clamp(min=1e-300).log2()).sum(dim=1)]
