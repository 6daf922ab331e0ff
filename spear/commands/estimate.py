"""What a run will take, stage by stage: hours and bytes predicted by ``spear preflight`` from its short measured runs."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from spear.commands.measure import Measured
from spear.data.scan import Scan
from spear.recipe import Run
from spear.stages.manifests import THREADS
from spear.types import TokenSpec

MANIFEST_BYTES_PER_CUT = 150
"""Of a compressed line, where no manifest is there to go by."""
TAR_BYTES = 2048
"""What a cut's tokens of one teacher take in shards beside the codes: heads and padding of a tar's member."""
FLAC_BYTES_PER_S = 20_000
"""Where none was measured."""
STATE_BYTES = 4 + 8 + 8
"""Of a parameter in a checkpoint: the weight, its running average in float64, two moments of the optimiser."""


class Need(NamedTuple):
    """Of one stage: what is done, hours on this machine by one process (None: not measured), bytes that stay."""

    stage: str
    what: str
    hours: float | None
    size: float


def say_estimate(run: Run, scans: dict[str, list[Scan]], specs: dict[str, TokenSpec], measured: Measured, say: Callable[[str], None]) -> int:
    """Say predicted hours and bytes per stage; returns 1 where the disk is too small, else 0."""
    needs = list(_needs(run, scans, specs, measured))
    for need in needs:
        took = "time not measured" if need.hours is None else f"about {need.hours:.2f} h here"
        say(f"note    {need.stage}: {need.what}, {took}, {need.size / 1e9:.2f} GB")
    total = sum(need.size for need in needs)
    known = [need.hours for need in needs if need.hours is not None]
    existing = next(path for path in (run.data, *run.data.resolve().parents, Path()) if path.exists())
    free = shutil.disk_usage(existing).free
    say(f"note    all together about {sum(known):.2f} h here on one process, and {total / 1e9:.2f} GB; {free / 1e9:.0f} GB are free in {existing}")
    if total > free:
        say(f"PROBLEM the disk of {existing} has {free / 1e9:.1f} GB free, but the stages need {total / 1e9:.1f} GB")
        return 1
    return 0


def _needs(run: Run, scans: dict[str, list[Scan]], specs: dict[str, TokenSpec], measured: Measured) -> Iterator[Need]:
    recipe = run.recipe
    cuts = sum(part.cuts for parts in scans.values() for part in parts)
    hours = sum(part.hours for parts in scans.values() for part in parts)
    kept = {name: sum(part.hours for part in parts if part.split != "test") for name, parts in scans.items()}
    reading = measured.read * min(THREADS, os.cpu_count() or 1)
    full = recipe.manifests.check_audio == "full"
    took = (hours / reading if reading else None) if full else None
    yield Need("manifests", f"{cuts} cuts, {hours:.1f} h of audio {'decoded' if full else 'looked at'}", took, _manifest_bytes(run, scans))
    for name, spec in specs.items():
        yield from _teacher_needs(run, name, spec, kept, measured)
    size = sum(kept.values()) * 3600 * (measured.flac_bytes_per_s or FLAC_BYTES_PER_S)
    token_size = sum(_token_bytes(run, name, spec, kept) + TAR_BYTES * _labelled_cuts(run, name, scans) for name, spec in specs.items())
    speed = 1 / (1 / measured.flac + 1 / measured.read) if measured.flac and measured.read else 0.0
    yield Need(
        "shards", f"{sum(kept.values()):.1f} h of audio as FLAC, with tokens", sum(kept.values()) / speed if speed else None, size + token_size
    )
    audio_h = recipe.training.max_steps * recipe.training.accumulation * recipe.sampling.max_batch_s / 3600
    checkpoints = recipe.training.keep_checkpoints + len(recipe.export.milestones(recipe.training.max_steps))
    state = measured.parameters * STATE_BYTES * checkpoints
    took = audio_h / measured.student if measured.student else None
    yield Need(
        "pretrain", f"{recipe.training.max_steps} updates, {audio_h:.1f} h of audio, {measured.parameters / 1e6:.1f} M parameters", took, state
    )
    yield Need("export", "one encoder", None, 4 * measured.parameters)


def _teacher_needs(run: Run, name: str, spec: TokenSpec, kept: dict[str, float], measured: Measured) -> Iterator[Need]:
    """Features, quantizer and tokens of one teacher."""
    config, speed = run.recipe.features, measured.teachers.get(name, 0.0)
    labelled = _labelled_hours(run, name, kept)
    sample_h = config.num_frames / spec.frame_rate_hz / 3600
    if config.frames_per_cut is not None:
        sample_h = max(sample_h, min(labelled, sample_h * 10 * spec.frame_rate_hz / config.frames_per_cut))  # cuts of about ten seconds
    sample_h = min(sample_h, labelled)
    frame_bytes = measured.dims.get(name, 0) * (4 if config.dtype == "float32" else 2)
    num_frames = min(config.num_frames, labelled * 3600 * spec.frame_rate_hz)
    yield Need("features", f"{sample_h:.1f} h of audio through {name}", sample_h / speed if speed else None, num_frames * frame_bytes)
    yield Need("quantizers", f"{name}, {spec.num_codebooks} x {spec.codebook_size} entries", None, 0.0)
    if run.recipe.tokens.source == "online":
        return
    both = measured.tokens.get(name) or speed
    what = f"{labelled:.1f} h of audio through {name}{'' if name in measured.tokens else ' (its quantizer is not fitted yet and not counted)'}"
    yield Need("tokens", what, labelled / both if both else None, _token_bytes(run, name, spec, kept))


def _manifest_bytes(run: Run, scans: dict[str, list[Scan]]) -> float:
    """Of the manifests: those of corpora that come as compressed manifests are about as large again."""
    size = 0.0
    for corpus in run.corpora:
        for part in scans.get(corpus.name, ()):
            given = Path(str(getattr(corpus.source, part.split, "")))
            known = given.suffix == ".gz" and given.is_file()
            size += given.stat().st_size if known else part.cuts * MANIFEST_BYTES_PER_CUT
    return size


def _labelled_cuts(run: Run, name: str, scans: dict[str, list[Scan]]) -> int:
    """Cuts whose tokens of a teacher are put into shards."""
    if run.recipe.tokens.source == "online":
        return 0
    labelled = (scans.get(corpus.name, ()) for corpus in run.corpora if name in run.teachers_of(corpus.domain))
    return sum(part.cuts for parts in labelled for part in parts if part.split != "test")


def _labelled_hours(run: Run, name: str, kept: dict[str, float]) -> float:
    return sum(kept.get(corpus.name, 0.0) for corpus in run.corpora if name in run.teachers_of(corpus.domain))


def _token_bytes(run: Run, name: str, spec: TokenSpec, kept: dict[str, float]) -> float:
    """Of a teacher's token stores."""
    if run.recipe.tokens.source == "online":
        return 0.0
    per_code = 1 if spec.codebook_size <= 2**8 else 2 if spec.codebook_size <= 2**15 else 4
    return _labelled_hours(run, name, kept) * 3600 * spec.frame_rate_hz * spec.num_codebooks * per_code
