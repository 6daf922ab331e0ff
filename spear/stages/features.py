"""Stage `features`: a seeded sample of frozen teacher frames, enough to fit a quantizer."""

from __future__ import annotations

import heapq
import json
import logging
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from safetensors import safe_open
from torch import Tensor

from spear.config import to_json
from spear.errors import DataError
from spear.files import seed_from, sha256_file, write_tensors
from spear.progress import Meter
from spear.stages.artifact import Artifact, Record
from spear.stages.manifests import find_manifest
from spear.teachers.base import Teacher, default_device
from spear.teachers.extraction import (
    FeaturesConfig,
    check_failures,
    corpora_of,
    count_causes,
    failure_of,
    read_cuts,
    write_failures,
)
from spear.teachers.pipeline import extract_cuts

if TYPE_CHECKING:
    from spear.recipe import Run

logger = logging.getLogger(__name__)

FRAMES_PER_BLOCK = 20_000
SPARE_S = 60
"""Audio kept beyond what was asked for: the cut at the end of the held-out ones is shortened and its rest is not used."""
HELDOUT = "heldout.safetensors"


class Pick(NamedTuple):
    """One cut of the sample and how many of its frames are taken."""

    cut: Any
    frames: int


def run(run: Run) -> None:
    """Sample frames of every teacher into ``DATA/features/<teacher>/``: blocks ``frames-00000.safetensors`` {frames (M, D)} and a held-out one.

    Raises:
        SpearError: a teacher cannot be had, a manifest is missing, or too many cuts fail.
    """
    if not run.recipe.teachers:
        logger.info("features: the recipe names no teachers, nothing to do")
    for name in run.recipe.quantizers:
        _sample(run, name)


def _sample(run: Run, name: str) -> None:
    config = run.recipe.features
    corpora = corpora_of(name, run.corpora, run.labels, config.domains.get(name))
    if not corpora:
        raise DataError(f"no corpus has a domain that uses the teacher {name}: give its domains in `features.domains.{name}`", cause="empty")
    manifests = {corpus.name: find_manifest(run.data, corpus.name, "train") for corpus in corpora}
    teacher = run.recipe.teachers[name].build(run.data)
    settings = {key: value for key, value in to_json(config).items() if key not in ("batch_seconds", "max_failed_share", "domains")}
    inputs = {"teacher": teacher.fingerprint(), **{f"manifest.{corpus}": sha256_file(path) for corpus, path in manifests.items()}}
    folder = run.data / "features" / name
    artifact = Artifact(folder, kind="features", config={**settings, "seed": run.recipe.seed, "block_frames": FRAMES_PER_BLOCK}, inputs=inputs)
    if artifact.is_done():
        return
    heldout, train = plan(teacher, {corpus: read_cuts(path) for corpus, path in manifests.items()}, config, run.recipe.seed)
    with artifact.making() as record:
        _write(folder, teacher.to(default_device()), heldout, train, config, run.recipe.seed, record, name)
        record.extra = {
            "dim": teacher.dim,
            "frame_rate_hz": teacher.frame_rate_hz,
            "first_frame_s": teacher.first_frame_s,
            "settings": teacher.settings,
        }


def plan(teacher: Teacher, corpora: Mapping[str, Iterable[Any]], config: FeaturesConfig, seed: int) -> tuple[list[Pick], list[Pick]]:
    """Choose cuts by a hash of (seed, id), so that the order of the manifests does not matter.

    Args:
        corpora: corpus -> its cuts, with ids that only this corpus must not have twice.
    Returns:
        held-out picks and training picks: no cut is in both. An id of several corpora gets the corpus's name before it, ``CORPUS//ID``.
    Raises:
        DataError: fewer than two cuts are long enough.
    """
    heap: list[tuple[int, str, str, Pick]] = []
    total, enough = 0, config.num_frames + teacher.num_frames(SPARE_S * teacher.sample_rate)
    for corpus, cut in ((corpus, cut) for corpus, cuts in corpora.items() for cut in cuts):
        frames = teacher.num_frames(round(cut.duration * teacher.sample_rate))
        frames = min(frames, config.frames_per_cut or frames)
        if frames < 1:
            continue
        # the largest hash comes first out of the heap: what remains is always a prefix of the hash order
        heapq.heappush(heap, (-seed_from(seed, "features", cut.id), cut.id, corpus, Pick(cut, frames)))
        total += frames
        while total - heap[0][-1].frames >= enough and len(heap) > 2:
            total -= heapq.heappop(heap)[-1].frames
    heap.sort(reverse=True)
    ids = Counter(cut_id for _, cut_id, _, _ in heap)
    picks = [Pick(pick.cut.with_id(f"{corpus}//{cut_id}"), pick.frames) if ids[cut_id] > 1 else pick for _, cut_id, corpus, pick in heap]
    if len(picks) < 2:
        raise DataError(f"at least 2 cuts must be long enough for {teacher.name}, but {len(picks)} are", cause="empty")
    wanted = min(total, config.num_frames)
    num_heldout = max(1, min(int(config.heldout_share * wanted), config.max_heldout_frames))
    heldout, rest = _take(picks[:-1], num_heldout)
    train, _ = _take([*rest, picks[-1]], config.num_frames - sum(pick.frames for pick in heldout))
    return heldout, train


def _take(picks: Sequence[Pick], frames: int) -> tuple[list[Pick], list[Pick]]:
    """The first picks that make up `frames`, the last one shortened, and the picks left over."""
    taken: list[Pick] = []
    for index, pick in enumerate(picks):
        if frames <= 0:
            return taken, list(picks[index:])
        taken.append(Pick(pick.cut, min(pick.frames, frames)))
        frames -= pick.frames
    return taken, []


def _blocks(picks: Sequence[Pick]) -> list[list[Pick]]:
    """Consecutive picks, each group of at least FRAMES_PER_BLOCK frames but the last."""
    blocks: list[list[Pick]] = []
    size = FRAMES_PER_BLOCK
    for pick in picks:
        if size >= FRAMES_PER_BLOCK:
            blocks.append([])
            size = 0
        blocks[-1].append(pick)
        size += pick.frames
    return blocks


def _write(
    folder: Path, teacher: Teacher, heldout: list[Pick], train: list[Pick], config: FeaturesConfig, seed: int, record: Record, name: str
) -> None:
    files = {HELDOUT: heldout, **{f"frames-{index:05d}.safetensors": block for index, block in enumerate(_blocks(train))}}
    total = len(heldout) + len(train)
    frames, failures = {"train": 0, "heldout": 0}, []
    with Meter(f"features {name}", total, unit="cuts") as meter:
        for file, picks in files.items():
            path = folder / file
            if not path.exists():
                _write_block(path, teacher, picks, config, seed)
            found, failed = _read_block(path)
            failures += failed
            try:
                check_failures(folder, failures, total, config.max_failed_share, "features.max_failed_share")
            except DataError:
                path.unlink()
                raise
            frames["heldout" if file == HELDOUT else "train"] += found
            lost = {failure["id"] for failure in failed}
            audio_s = sum(pick.cut.duration for pick in picks if pick.cut.id not in lost)
            record.audio_s += audio_s
            meter.advance(len(picks), audio_s=audio_s)
    write_failures(folder, failures)
    record.counts = {
        "cuts": total - len(failures),
        "heldout_cuts": len(heldout),
        "frames": frames["train"],
        "heldout_frames": frames["heldout"],
        "failed": count_causes(failures),
    }


def _write_block(path: Path, teacher: Teacher, picks: list[Pick], config: FeaturesConfig, seed: int) -> None:
    wanted = {pick.cut.id: pick.frames for pick in picks}
    found: dict[str, Tensor] = {}
    failures: dict[str, dict[str, str]] = {}
    for outcomes in extract_cuts(teacher, [pick.cut for pick in picks], batch_seconds=config.batch_seconds, device=default_device()):
        for outcome in outcomes:
            if outcome.features is None:
                failures[outcome.cut_id] = failure_of(outcome)
            else:
                found[outcome.cut_id] = choose_frames(outcome.features.cpu(), wanted[outcome.cut_id], seed, outcome.cut_id)
    rows = [found[pick.cut.id] for pick in picks if pick.cut.id in found]
    frames = torch.cat([torch.zeros(0, teacher.dim), *rows]).to(getattr(torch, config.dtype))
    listed = [failures[pick.cut.id] for pick in picks if pick.cut.id in failures]
    write_tensors(path, {"frames": frames}, {"failures": json.dumps(listed, sort_keys=True)})


def choose_frames(features: Tensor, count: int, seed: int, cut_id: str) -> Tensor:
    """`count` frames of (T, D) in order of time, drawn without replacement from (seed, cut id); all where there are fewer."""
    if count >= len(features):
        return features
    generator = torch.Generator().manual_seed(seed_from(seed, "frames", cut_id))
    return features[torch.randperm(len(features), generator=generator)[:count].sort().values]


def _read_block(path: Path) -> tuple[int, list[dict[str, str]]]:
    with safe_open(path, framework="pt") as file:
        return int(file.get_slice("frames").get_shape()[0]), json.loads(file.metadata()["failures"])
