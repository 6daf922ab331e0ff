"""Audio through a teacher without waiting: files of the coming batches are decoded while the teacher hears this one."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from spear.data.batches import batches_of
from spear.errors import DataError, SpearError
from spear.teachers.base import Teacher

READERS = max(1, min(4, (os.cpu_count() or 1) // 2))
"""Threads that decode."""
AHEAD = READERS + 1
"""Batches decoded, or being so, before they are needed."""
CPU_SECONDS = 10.0
"""Fastest batch of a WavLM-Base on two cores (docs/performance.md)."""

Loaded = list[tuple[Any, Tensor | DataError]]


class Outcome(NamedTuple):
    """What became of one cut: frames (T, D) on the teacher's device, or why there are none."""

    cut_id: str
    features: Tensor | None
    audio_s: float
    cause: str = ""
    message: str = ""


class Part(NamedTuple):
    """One batch of a group of cuts: the group's number and cuts, what became of the batch's, and whether it is the group's last."""

    group: int
    cuts: Sequence[Any]
    outcomes: list[Outcome]
    last: bool


def extract_cuts(
    teacher: Teacher, cuts: Sequence[Any], *, batch_seconds: float, device: torch.device, tolerance_frames: int = 1
) -> Iterator[list[Outcome]]:
    """Frames of cuts, one list of outcomes per batch; see `extract_groups`."""
    for part in extract_groups(teacher, [(0, cuts)], batch_seconds=batch_seconds, device=device, tolerance_frames=tolerance_frames):
        yield part.outcomes


def extract_groups(
    teacher: Teacher, groups: Iterable[tuple[int, Sequence[Any]]], *, batch_seconds: float, device: torch.device, tolerance_frames: int = 1
) -> Iterator[Part]:
    """Frames of groups of cuts, batch after batch; the next batches are decoded while the teacher works, also those of the next group.

    The batches of a group depend on its cuts and `batch_seconds` only, so that a resumed run computes the same numbers. A batch that does
    not fit into the device's memory is halved.

    Raises:
        SpearError: a cut alone does not fit into the device's memory.
    """
    planned = _plan(groups, batch_seconds)
    with ThreadPoolExecutor(READERS) as readers:
        waiting: deque[tuple[int, Sequence[Any], bool, Future[Loaded]]] = deque()
        try:
            while True:
                while len(waiting) < AHEAD and (planned_next := next(planned, None)) is not None:
                    index, cuts, batch, last = planned_next
                    waiting.append((index, cuts, last, readers.submit(_load, batch, teacher.sample_rate)))
                if not waiting:
                    return
                index, cuts, last, loaded = waiting.popleft()
                yield Part(index, cuts, _run(teacher, loaded.result(), device, tolerance_frames), last)
        finally:
            for *_, loaded in waiting:
                loaded.cancel()


def _plan(groups: Iterable[tuple[int, Sequence[Any]]], batch_seconds: float) -> Iterator[tuple[int, Sequence[Any], list[Any], bool]]:
    """Number and cuts of the group, cuts of the batch, and whether it is the group's last."""
    for index, cuts in groups:
        batches = batches_of(cuts, batch_seconds)
        for number, batch in enumerate(batches, start=1):
            yield index, cuts, batch, number == len(batches)


def _load(cuts: list[Any], sample_rate: int) -> Loaded:
    from spear.data.audio import load_audio

    loaded: Loaded = []
    for cut in cuts:
        try:
            loaded.append((cut, torch.from_numpy(load_audio(cut, sample_rate))))
        except DataError as error:
            loaded.append((cut, error))
    return loaded


def _run(teacher: Teacher, loaded: Loaded, device: torch.device, tolerance_frames: int) -> list[Outcome]:
    outcomes: list[Outcome] = []
    good: list[tuple[Any, Tensor]] = []
    for cut, item in loaded:
        if isinstance(item, DataError):
            outcomes.append(Outcome(cut.id, None, 0.0, item.cause, str(item)))
        elif teacher.num_frames(len(item)) < 1:
            text = f"the cut {cut.id} of {len(item)} samples is too short for one frame of {teacher.name}"
            outcomes.append(Outcome(cut.id, None, 0.0, "too_short", text))
        else:
            good.append((cut, item))
    for (cut, _), item in zip(good, _frames(teacher, [item for _, item in good], device)):
        outcomes.append(_judge(teacher, cut, item, tolerance_frames))
    return outcomes


def _frames(teacher: Teacher, audio: list[Tensor], device: torch.device) -> list[Tensor]:
    """Frames (T, D) of every item, in halves where the memory does not hold all."""
    if not audio:
        return []
    lens = torch.tensor([len(item) for item in audio], device=device)
    try:
        features, frames = teacher(nn.utils.rnn.pad_sequence(audio, batch_first=True).to(device), lens)
        return [item[:count] for item, count in zip(features, frames.tolist())]
    except torch.OutOfMemoryError as error:
        if len(audio) == 1:
            seconds = len(audio[0]) / teacher.sample_rate
            raise SpearError(f"a cut of {seconds:.1f} s does not fit into the memory of {device} with {teacher.name}") from error
    half = len(audio) // 2
    return _frames(teacher, audio[:half], device) + _frames(teacher, audio[half:], device)


def _judge(teacher: Teacher, cut: Any, features: Tensor, tolerance_frames: int) -> Outcome:
    """Hold the frames of a cut against its duration, and make sure that they are finite."""
    promised = teacher.num_frames(round(cut.duration * teacher.sample_rate))
    if abs(len(features) - promised) > tolerance_frames:
        text = f"the cut {cut.id} must give {promised} frames of {teacher.name} for its {cut.duration:g} s, but gives {len(features)}"
        return Outcome(cut.id, None, 0.0, "length_mismatch", text)
    if not bool(features.isfinite().all()):
        return Outcome(cut.id, None, 0.0, "not_finite", f"{teacher.name} gives frames that are not finite for the cut {cut.id}")
    return Outcome(cut.id, features, float(cut.duration))


def find_batch_seconds(teacher: Teacher, longest_s: float, device: torch.device, *, share: float = 0.7, most_s: float = 1600.0) -> float:
    """Audio in one forward pass that fills a GPU's memory, measured on noise as long as the longest cut.

    Args:
        teacher: on the device. longest_s: of the cuts, in seconds. device: where it runs. share: of the free memory to use; the rest is for
            the quantizer and for what other lengths need. most_s: more gains nothing.
    Returns:
        Seconds, at least `longest_s`; on a CPU `CPU_SECONDS`, as larger batches leave its caches.
    """
    if device.type != "cuda":
        return max(CPU_SECONDS, longest_s)
    samples = max(1, int(longest_s * teacher.sample_rate))
    peaks = []
    for items in (1, 3):  # one batch alone would count what does not grow
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        audio = 0.1 * torch.randn(items, samples, device=device)
        try:
            teacher(audio, torch.full((items,), samples, device=device))
        except torch.OutOfMemoryError:
            return longest_s
        peaks.append(torch.cuda.max_memory_allocated(device) - before)
    del audio
    torch.cuda.empty_cache()  # what torch holds on to is not free for the device
    per_item = max(1.0, (peaks[1] - peaks[0]) / 2)
    free, _ = torch.cuda.mem_get_info(device)
    fit = int((share * free - (peaks[0] - per_item)) / per_item)
    return max(longest_s, min(most_s, fit * longest_s))
