"""Stage `tokens`: audio -> teacher -> codes in one pass, nothing else stored."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from spear.config import to_json
from spear.data.token_store import TokenWriter
from spear.errors import ArtifactError, DataError
from spear.files import sha256_file
from spear.progress import Meter
from spear.quantizers.card import entry_counts
from spear.stages.artifact import Artifact, Record, fingerprint_of, read_artifact
from spear.stages.manifests import find_manifest, manifest_path
from spear.teachers.base import Teacher, TeacherConfig, default_device
from spear.teachers.extraction import (
    TokensConfig,
    check_failures,
    corpora_of,
    count_causes,
    count_cuts,
    extract_cuts,
    failure_of,
    read_cuts,
    write_failures,
)
from spear.types import TokenSpec

if TYPE_CHECKING:
    from spear.recipe import Run

logger = logging.getLogger(__name__)

SPLITS = ("train", "valid")
COLLAPSED_SHARE, COLLAPSED_MIN_FRAMES = 0.999, 1000


def run(run: Run) -> None:
    """Write ``DATA/tokens/<teacher>/<corpus>/<split>/`` for every pair of teacher and corpus that the recipe needs.

    Raises:
        SpearError: an input is missing or does not fit, too many cuts fail, or a codebook has collapsed.
    """
    if not run.recipe.teachers:
        logger.info("tokens: the recipe names no teachers, nothing to do")
    for name in run.recipe.teachers:
        corpora = corpora_of(name, run.corpora, run.teachers_of)
        if not corpora:
            logger.info("tokens: no corpus uses the teacher %s", name)
            continue
        tokenizer = load_tokenizer(run, name)
        for corpus, split in itertools.product(corpora, SPLITS):
            if split != "train" and not manifest_path(run.data, corpus.name, split).exists():
                logger.info("tokens: %s has no %s cuts", corpus.name, split)
                continue
            path = find_manifest(run.data, corpus.name, split)
            _tokenize(run, tokenizer, path, run.data / "tokens" / name / corpus.name / split, f"{name} {corpus.name} {split}")


@dataclass(frozen=True)
class Tokenizer:
    """A frozen teacher with the quantizer fitted on it."""

    name: str
    teacher: Teacher
    quantizer: Any
    spec: TokenSpec
    device: torch.device

    def encode(self, features: Tensor) -> Tensor:
        """Codes (F, C) on the CPU of teacher frames (F, D)."""
        return torch.as_tensor(self.quantizer.encode(features)).cpu()


def load_tokenizer(run: Run, name: str) -> Tokenizer:
    """The teacher and quantizer of a recipe, checked against each other.

    Raises:
        ArtifactError: the quantizer is not finished, or was fitted on another teacher.
    """
    from spear.quantizers import load_quantizer

    folder = run.data / "quantizers" / name
    fingerprint = fingerprint_of(folder)
    device = default_device()
    teacher = run.recipe.teachers[name].build(run.data)
    if read_artifact(folder)["inputs"].get("teacher") != teacher.fingerprint():
        features = run.data / "features" / name
        raise ArtifactError(
            f"{folder} was fitted on another teacher than `teachers.{name}`: remove {features} and {folder}, then run both stages again"
        )
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


def _tokenize(run: Run, tokenizer: Tokenizer, manifest: Path, folder: Path, title: str) -> None:
    config = run.recipe.tokens
    total = count_cuts(manifest)
    artifact = Artifact(
        folder,
        kind="tokens",
        config={
            "cuts_per_block": config.cuts_per_block,
            "length_tolerance_frames": config.length_tolerance_frames,
            "teachers": {tokenizer.name: to_json(run.recipe.teachers[tokenizer.name], TeacherConfig)},
        },
        inputs={
            "teacher": tokenizer.spec.teacher_fingerprint,
            "quantizer": tokenizer.spec.quantizer_fingerprint,
            "manifest": sha256_file(manifest),
        },
    )
    if artifact.is_done():
        return
    with artifact.making() as record, Meter(f"tokens {title}", total, unit="cuts") as meter:
        _fill(tokenizer, manifest, folder, config, total, record, meter)


def _fill(tokenizer: Tokenizer, manifest: Path, folder: Path, config: TokensConfig, total: int, record: Record, meter: Meter) -> None:
    writer = TokenWriter(folder, tokenizer.spec)
    histogram = torch.zeros(tokenizer.spec.num_codebooks, tokenizer.spec.codebook_size, dtype=torch.int64)
    failures: list[dict[str, str]] = []
    failed_blocks: list[int] = []
    num_blocks = num_cuts = 0
    for index, cuts in enumerate(blocks_of(read_cuts(manifest), config.cuts_per_block)):
        done = writer.finished(index)
        if done is None:
            _write_block(tokenizer, writer, index, cuts, config)
            done = writer.finished(index) or {}
        failures += done["failures"]
        failed_blocks += [index] if done["failures"] else []
        try:
            check_failures(folder, failures, total, config.max_failed_share, "tokens.max_failed_share")
        except DataError:
            for block in failed_blocks:
                writer.discard(block)
            raise
        histogram += entry_counts(writer.codes(index), tokenizer.spec.codebook_size)
        record.audio_s += done["audio_s"]
        meter.advance(len(cuts), audio_s=done["audio_s"])
        num_blocks, num_cuts = index + 1, num_cuts + len(done["ids"])
    check_collapse(histogram, f"{folder.parent.parent.name}")
    write_failures(folder, failures)
    writer.close(num_blocks)
    record.counts = {"cuts": num_cuts, "frames": int(histogram[0].sum()), "failed": count_causes(failures)}
    record.extra = {"codes_used": [int(n) for n in (histogram > 0).sum(dim=1)], "entropy_bits": entropy_bits(histogram)}


def blocks_of(cuts: Iterator[Any], size: int) -> Iterator[list[Any]]:
    """Consecutive lists of `size` cuts, the last one shorter."""
    while block := list(itertools.islice(cuts, size)):
        yield block


def _write_block(tokenizer: Tokenizer, writer: TokenWriter, index: int, cuts: list[Any], config: TokensConfig) -> None:
    codes: dict[str, Tensor] = {}
    failed: dict[str, dict[str, str]] = {}
    for outcomes in extract_cuts(
        tokenizer.teacher,
        cuts,
        batch_seconds=config.batch_seconds,
        device=tokenizer.device,
        tolerance_frames=config.length_tolerance_frames,
    ):
        failed.update({outcome.cut_id: failure_of(outcome) for outcome in outcomes if outcome.features is None})
        good = [(outcome.cut_id, outcome.features) for outcome in outcomes if outcome.features is not None]
        if good:
            rows = tokenizer.encode(torch.cat([features for _, features in good])).split([len(features) for _, features in good])
            codes.update({cut_id: item for (cut_id, _), item in zip(good, rows)})
    kept = [cut for cut in cuts if cut.id in codes]
    writer.write(
        index,
        [cut.id for cut in kept],
        [codes[cut.id] for cut in kept],
        failures=[failed[cut.id] for cut in cuts if cut.id in failed],
        audio_s=round(sum(cut.duration for cut in kept), 6),
    )


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
