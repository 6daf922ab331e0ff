"""Short measured runs of ``spear preflight``: how fast files are read, teachers hear, tokens are made and the student learns."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from spear.data.audio import load_audio
from spear.data.shards import flac_bytes
from spear.errors import DataError, SpearError
from spear.models.student import Student
from spear.objectives import PretrainModule
from spear.recipe import Run
from spear.teachers.base import Teacher, default_device, extract
from spear.training.precision import autocast
from spear.types import Batch, FrameSpec, TokenSpec

LISTEN_S = 20.0
"""Seconds of real audio that a teacher is measured on."""


@dataclass
class Measured:
    """Figures of this machine; speeds are seconds of audio per second."""

    read: float = 0.0
    """Decoding and checking a file, one thread."""
    flac: float = 0.0
    """Packing audio, one thread."""
    flac_bytes_per_s: float = 0.0
    """Bytes of packed audio per second of audio."""
    teachers: dict[str, float] = field(default_factory=dict)
    """Audio to frames."""
    tokens: dict[str, float] = field(default_factory=dict)
    """Audio to codes, where there is a quantizer."""
    dims: dict[str, int] = field(default_factory=dict)
    """Width of a teacher's frames."""
    student: float = 0.0
    """Forward and backward of the largest batch."""
    parameters: int = 0
    """Of student and heads."""


class Timer:
    """Seconds of audio over seconds of work."""

    def __init__(self) -> None:
        self.audio_s, self.wall_s = 0.0, 0.0

    def add(self, audio_s: float, start: float) -> None:
        """Count work on `audio_s` that began at `start` of the monotonic clock."""
        self.audio_s += audio_s
        self.wall_s += time.monotonic() - start

    @property
    def speed(self) -> float:
        """Seconds of audio per second."""
        return self.audio_s / max(self.wall_s, 1e-6)


def measure_packing(cuts: Sequence[Any], measured: Measured) -> None:
    """Note speed and size of FLAC on some cuts."""
    timer, size = Timer(), 0
    for cut in cuts:
        audio = load_audio(cut)
        start = time.monotonic()
        size += len(flac_bytes(audio))
        timer.add(cut.duration, start)
    if timer.audio_s:
        measured.flac, measured.flac_bytes_per_s = timer.speed, size / timer.audio_s


def listen(teacher: Teacher, cuts: Sequence[Any], quantizer: Any) -> tuple[float, float, list[Tensor]]:
    """Run a teacher, and its quantizer where there is one, on up to `LISTEN_S` of cuts; noise where there are none.

    Returns:
        Speeds of the teacher and of both together; codes (T, C) of every cut that is long enough.
    """
    device = default_device()
    audio = [torch.from_numpy(piece) for piece in _audio(cuts, teacher.sample_rate)]
    audio = [piece for piece in audio if teacher.num_frames(len(piece)) > 0]
    if not audio:
        audio = [0.1 * torch.randn(10 * teacher.sample_rate, generator=torch.Generator().manual_seed(0))]
    extract(teacher, [audio[0][: 2 * teacher.sample_rate]] if teacher.num_frames(2 * teacher.sample_rate) else audio[:1], device)  # warm up
    alone, both, codes = Timer(), Timer(), []
    for piece in audio:
        start = time.monotonic()
        (frames,) = extract(teacher, [piece], device)
        alone.add(len(piece) / teacher.sample_rate, start)
        if quantizer is not None:
            codes.append(torch.as_tensor(quantizer.encode(frames)).cpu())
            both.add(len(piece) / teacher.sample_rate, start)
    return alone.speed, both.speed if codes else 0.0, codes


def _audio(cuts: Sequence[Any], sample_rate: int) -> Iterator[Any]:
    """Audio of cuts until there are `LISTEN_S` seconds."""
    total = 0.0
    for cut in cuts:
        if total >= LISTEN_S:
            return
        total += cut.duration
        yield load_audio(cut, sample_rate)


def measure_student(run: Run, specs: dict[str, TokenSpec], frames: dict[str, FrameSpec], measured: Measured) -> None:
    """Train the student for one batch of ``sampling.max_batch_s`` of the longest cuts, then for one of the shortest.

    Raises:
        SpearError: the loss is not finite, or the batch does not fit into the memory.
    """
    recipe, device = run.recipe, default_device()
    torch.manual_seed(recipe.seed)
    encoder = recipe.student.build()
    module = PretrainModule(Student(encoder, recipe.masking), recipe.objective.build_on(encoder, specs, frames)).to(device)
    measured.parameters = sum(parameter.numel() for parameter in module.parameters())
    module.train()
    domains = [corpus.domain for corpus in run.corpora if not run.is_noise(corpus.domain)]
    if not domains:
        raise DataError("there is nothing to train on: all corpora only give noise", cause="empty")
    longest_s = min(recipe.manifests.max_duration_s, recipe.sampling.max_batch_s)
    lengths = [longest_s, min(max(recipe.manifests.min_duration_s, 0.5), longest_s)]
    if device.type == "cuda":
        lengths.insert(0, longest_s)  # the first pass of a GPU loads and chooses kernels; it is not the one that is timed
    for number, length_s in enumerate(lengths):
        batch = _random_batch(length_s, recipe.sampling.max_batch_s, domains, encoder.num_mel_bins, specs, frames).to(device)
        _wait(device)
        start = time.monotonic()
        try:
            with autocast(recipe.training.precision, device):
                output = module(batch, torch.Generator().manual_seed(0))
            (output.loss / output.count.clamp(min=1)).backward()  # type: ignore[no-untyped-call]
            _wait(device)
        except torch.OutOfMemoryError as error:
            raise SpearError(
                f"`sampling.max_batch_s` {recipe.sampling.max_batch_s:g} does not fit into the memory of {device}: choose less"
            ) from error
        if number == len(lengths) - 2:  # of the longest cuts
            measured.student = batch.seconds / max(time.monotonic() - start, 1e-6)
        if not torch.isfinite(output.loss):
            raise SpearError(f"the loss of a first batch is {output.loss.item()}")


def _wait(device: torch.device) -> None:
    """Let a GPU finish what it was given, so that the clock measures its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _random_batch(
    length_s: float, max_s: float, domains: list[str], num_mel_bins: int, specs: dict[str, TokenSpec], frames: dict[str, FrameSpec]
) -> Batch:
    """A batch of `max_s` seconds in cuts of `length_s`, with random tokens and frames."""
    items, num_frames = max(1, int(max_s / length_s)), int(length_s * 100)
    rates = {name: spec.frame_rate_hz for name, spec in specs.items()} | {name: spec.frame_rate_hz for name, spec in frames.items()}
    counts = {name: max(1, int(length_s * rate)) for name, rate in rates.items()}
    return Batch(
        ids=[str(i) for i in range(items)],
        domains=[domains[i % len(domains)] for i in range(items)],
        features=torch.randn(items, num_frames, num_mel_bins),
        feature_lens=torch.full((items,), num_frames),
        seconds=items * length_s,
        tokens={name: torch.randint(spec.codebook_size, (items, counts[name], spec.num_codebooks)) for name, spec in specs.items()},
        token_lens={name: torch.full((items,), counts[name]) for name in specs},
        targets={name: torch.randn(items, counts[name], spec.dim) for name, spec in frames.items()},
        target_lens={name: torch.full((items,), counts[name]) for name in frames},
    )
