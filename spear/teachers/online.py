"""Teachers that run beside the student: a batch with audio becomes a batch with tokens, or with the frames themselves."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from spear.data.audio import resample_audio
from spear.data.fbank import SAMPLE_RATE
from spear.teachers.base import Teacher
from spear.types import IGNORE, Batch, FrameSpec, TokenSpec


@dataclass(frozen=True)
class Target:
    """What one teacher gives a batch.

    teacher: frozen, on the device where it is to run. domains: of the cuts it hears; other cuts get nothing.
    spec: of the tokens that `encode`, frames (F, D) -> codes (F, C), makes; None for both: the frames themselves are the target.
    """

    teacher: Teacher
    domains: frozenset[str]
    spec: TokenSpec | None = None
    encode: Callable[[Tensor], Tensor] | None = None

    def frame_spec(self) -> FrameSpec:
        """Of its frames."""
        teacher = self.teacher
        return FrameSpec(teacher.dim, teacher.num_parts, teacher.frame_rate_hz, teacher.first_frame_s)


class Labeller:
    """Fills ``tokens`` or ``targets`` of a batch from its audio.

    A cut is labelled as if it were alone, so that where nothing was mixed into it, it gets the tokens that `spear tokens` would store, up to
    float rounding. Cuts too short for one frame of a teacher get none of it.

    Args:
        targets: teacher's name -> what it gives. batch_seconds: audio in one forward pass of a teacher, padding included.
        device: where results go and teachers lie.
    """

    def __init__(self, targets: Mapping[str, Target], *, batch_seconds: float, device: torch.device) -> None:
        self.targets, self.batch_seconds, self.device = dict(targets), batch_seconds, device

    def token_specs(self) -> dict[str, TokenSpec]:
        """Teacher -> what its tokens are."""
        return {name: target.spec for name, target in self.targets.items() if target.spec is not None}

    def frame_specs(self) -> dict[str, FrameSpec]:
        """Teacher -> what its frames are, of the teachers whose frames are the target."""
        return {name: target.frame_spec() for name, target in self.targets.items() if target.spec is None}

    @torch.no_grad()
    def __call__(self, batch: Batch) -> Batch:
        """The batch on the device, with its targets and without tokens that it had.

        Raises:
            ValueError: the batch has no audio.
        """
        if batch.audio is None or batch.audio_lens is None:
            raise ValueError("a batch must keep its audio to be labelled")
        audio, lens = batch.audio, batch.audio_lens.tolist()
        found = replace(batch.to(self.device), tokens={}, token_lens={}, targets={}, target_lens={}, second={}, second_share=None)
        heard: dict[int, list[Tensor]] = {}
        for name, target in self.targets.items():
            rate = target.teacher.sample_rate
            if rate not in heard:
                heard[rate] = [resampled(row[:samples], rate) for row, samples in zip(audio, lens)]
            rows = self._rows(target, heard[rate], batch.domains)
            if target.spec is None:
                found.targets[name], found.target_lens[name] = self._padded(rows, target.teacher.dim, 0.0)
            else:
                found.tokens[name], found.token_lens[name] = self._padded(rows, target.spec.num_codebooks, IGNORE)
        return found

    def _rows(self, target: Target, audio: Sequence[Tensor], domains: Sequence[str]) -> list[Tensor | None]:
        """Codes (T, C) or frames (T, D) of every cut, None where the teacher does not hear it."""
        rows: list[Tensor | None] = [None] * len(audio)
        usable = [i for i, item in enumerate(audio) if domains[i] in target.domains and target.teacher.num_frames(len(item)) > 0]
        for group in by_length(usable, audio, self.batch_seconds * target.teacher.sample_rate):
            lens = torch.tensor([len(audio[i]) for i in group], device=self.device)
            features, frames = target.teacher(nn.utils.rnn.pad_sequence([audio[i] for i in group], batch_first=True).to(self.device), lens)
            counts = frames.tolist()
            found = [item[:count] for item, count in zip(features, counts)]
            if target.encode is not None:
                found = list(target.encode(torch.cat(found)).to(self.device).split(counts))
            for i, row in zip(group, found):
                rows[i] = row
        return rows

    def _padded(self, rows: Sequence[Tensor | None], width: int, empty: float) -> tuple[Tensor, Tensor]:
        """(N, T, width) with T at least 1 and `empty` past each length, (N,) int64 lengths."""
        lens = [0 if row is None else len(row) for row in rows]
        dtype = torch.int64 if empty == IGNORE else torch.float32
        padded = torch.full((len(rows), max(1, *lens), width), empty, dtype=dtype, device=self.device)
        for place, row in zip(padded, rows):
            if row is not None:
                place[: len(row)] = row
        return padded, torch.tensor(lens, device=self.device)


def by_length(rows: Sequence[int], audio: Sequence[Tensor], max_samples: float) -> Iterator[list[int]]:
    """Rows of like lengths together, at most `max_samples` per group, padding counted; a longer one stands alone."""
    group: list[int] = []
    for i in sorted(rows, key=lambda i: len(audio[i])):
        if group and (len(group) + 1) * len(audio[i]) > max_samples:
            yield group
            group = []
        group.append(i)
    if group:
        yield group


def resampled(audio: Tensor, sample_rate: int) -> Tensor:
    """(S,) audio at 16 kHz as a teacher's sample rate wants it; as `spear.data.audio.load_audio` resamples files."""
    if sample_rate == SAMPLE_RATE:
        return audio
    return torch.from_numpy(np.ascontiguousarray(resample_audio(audio.cpu().numpy(), SAMPLE_RATE, sample_rate)))


class LabelledSource:
    """A source of batches with every batch labelled on its way; all else is the source's.

    Batches are labelled in the process that trains, one by one, while the loader's workers read ahead.

    Args:
        source: keeps audio. label: fills the targets.
    """

    def __init__(self, source: Any, label: Callable[[Batch], Batch]) -> None:
        self._source, self._label = source, label

    def __getattr__(self, name: str) -> Any:
        return getattr(self._source, name)

    def __len__(self) -> int:
        return len(self._source)

    def largest(self) -> Batch:
        """See `spear.data.source.TrainSource`."""
        return self._label(self._source.largest())

    def iterate(self, first: int, second: int) -> Iterator[Batch]:
        """Yield the source's batches, labelled."""
        batches: Any = self._source.iterate(first, second)
        with closing(batches):
            for batch in batches:
                yield self._label(batch)
