"""Read the samples of a cut, strictly: what cannot be read as promised is a DataError with a cause, never silence.

Lhotse fills up to half a second of missing audio by mirroring what is there; here a file must hold what its manifest says.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from lhotse import Recording
from lhotse.audio.utils import AudioLoadingError, DurationMismatchError
from lhotse.augmentation import AudioTransform, Resample
from lhotse.cut import Cut
from lhotse.utils import compute_num_samples

from spear.data.fbank import HOP, SAMPLE_RATE, WINDOW
from spear.errors import DataError

MIN_S = WINDOW / SAMPLE_RATE
TOLERANCE_S = HOP / 2 / SAMPLE_RATE
DOWNMIX = "downmix"
"""Key of a cut's custom fields: the channels of its recording whose mean is its audio."""

Audio = npt.NDArray[np.float32]
_UNREADABLE = (AudioLoadingError, DurationMismatchError, OSError, EOFError, RuntimeError, ValueError, AssertionError)


def load_audio(cut: Cut, sample_rate: int = SAMPLE_RATE) -> Audio:
    """Samples of a cut as one channel.

    A MonoCut gives its channel, or the mean of the channels that its custom field ``downmix`` lists; a MultiCut gives the mean
    of its channels. Lhotse resamples where the recording has another rate.

    Args:
        cut: MonoCut or MultiCut. sample_rate: Hz of the result.
    Returns:
        (S,) float32 in [-1, 1], S = cut.duration * sample_rate rounded.
    Raises:
        DataError: with cause missing_file, decode, empty, too_short (less than 25 ms), length_mismatch (more than 5 ms off the
            manifest) or not_finite; names cut and file.
    """
    name = f"cut {cut.id} ({audio_path(cut)})"
    for source in cut.recording.sources:
        if source.type == "file" and not Path(source.source).is_file():
            raise DataError(f"{name}: the file does not exist", cause="missing_file")
    if cut.sampling_rate != sample_rate:
        cut = cut.resample(sample_rate)
    expected = compute_num_samples(cut.duration, sample_rate)
    if expected == 0:
        raise DataError(f"{name}: holds no audio", cause="empty")
    if expected < MIN_S * sample_rate:
        raise DataError(f"{name}: must last at least {MIN_S:g} s, but lasts {cut.duration:.4g} s", cause="too_short")
    try:
        channels = _read(cut.recording, _channels(cut), cut.start, cut.duration)  # (channels, S)
    except _UNREADABLE as error:
        raise DataError(f"{name}: cannot be decoded: {' '.join(str(error).split())[:200]}", cause="decode") from error
    audio = channels.mean(axis=0, dtype=np.float32) if len(channels) > 1 else channels[0].astype(np.float32, copy=False)
    if not np.isfinite(audio).all():
        raise DataError(f"{name}: {int((~np.isfinite(audio)).sum())} samples are not finite", cause="not_finite")
    if len(audio) == 0:
        raise DataError(f"{name}: holds no audio", cause="empty")
    missing = expected - len(audio)
    if abs(missing) > TOLERANCE_S * sample_rate:
        raise DataError(f"{name}: must hold {expected} samples at {sample_rate} Hz, but holds {len(audio)}", cause="length_mismatch")
    return np.pad(audio, (0, missing)) if missing > 0 else np.ascontiguousarray(audio[:expected])


def load_audio_file(path: Path, sample_rate: int = SAMPLE_RATE) -> Audio:
    """Samples of a whole audio file, channels averaged.

    Returns:
        (S,) float32 in [-1, 1] at `sample_rate`.
    Raises:
        DataError: as `load_audio`; names the file.
    """
    return load_audio(open_recording(path, path.stem).to_cut(), sample_rate)


def resample_audio(audio: Audio, source_rate: int, target_rate: int) -> Audio:
    """Samples (S,) at another rate, by the resampling that Lhotse applies to files."""
    return np.asarray(Resample(source_rate, target_rate)(audio[None], source_rate)[0], np.float32)


def open_recording(path: Path, recording_id: str) -> Recording:
    """Read a file's header.

    Raises:
        DataError: with cause missing_file, decode or empty; names the file.
    """
    if not path.is_file():
        raise DataError(f"{path} does not exist", cause="missing_file")
    if path.stat().st_size == 0:
        raise DataError(f"{path} holds no audio: the file is empty", cause="empty")
    try:
        recording = Recording.from_file(path, recording_id=recording_id)
    except _UNREADABLE as error:
        raise DataError(f"{path} cannot be decoded: {' '.join(str(error).split())[:200]}", cause="decode") from error
    if recording.num_samples <= 0:
        raise DataError(f"{path} holds no audio", cause="empty")
    return recording


def audio_path(cut: Cut) -> str:
    """Where a cut's audio comes from, for messages: its file, or the kind of its source."""
    source = cut.recording.sources[0]
    return str(source.source) if source.type in ("file", "url", "command") else f"recording {cut.recording.id}"


def _channels(cut: Cut) -> set[int]:
    downmix = (cut.custom or {}).get(DOWNMIX)
    if downmix:
        return set(downmix)
    return set(cut.channel) if isinstance(cut.channel, Iterable) else {cut.channel}


def _read(recording: Recording, channels: set[int], start_s: float, duration_s: float) -> Audio:
    """(channels, samples) of a stretch of a recording after its transforms, with the length that they give."""
    whole = abs(duration_s - recording.duration) < 1e-3
    transforms: list[Any] = [t if isinstance(t, AudioTransform) else AudioTransform.from_dict(t) for t in recording.transforms or []]
    offset, duration = start_s, None if whole else duration_s
    for transform in reversed(transforms):
        offset, duration = transform.reverse_timestamps(offset=offset, duration=duration, sampling_rate=recording.sampling_rate)
    rows: list[Audio] = []
    for source in recording.sources:
        wanted = [i for i, channel in enumerate(source.channels) if channel in channels]
        if wanted:
            samples = np.atleast_2d(source.load_audio(offset=offset, duration=duration, force_opus_sampling_rate=recording.sampling_rate))
            rows.append(samples[wanted])
    audio = rows[0] if len(rows) == 1 else np.concatenate(rows)
    for transform in transforms:
        audio = transform(audio, recording.sampling_rate)
    return np.asarray(audio)
