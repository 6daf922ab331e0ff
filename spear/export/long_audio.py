"""Recordings of any length through an encoder: overlapping windows, one after the other, in bounded memory.

The seam rule. Windows of ``window_s`` begin every ``window_s - overlap_s``, at times where the encoder's groups of frames begin anyway; the
last one is moved back so that it is whole. Each output frame comes from one window: neighbours are cut in the middle of their overlap,
so a frame has at least about half of it as context on both sides. Log-mels are those of the whole recording, bit for bit.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor

from spear.data.fbank import HOP, num_fbank_frames
from spear.data.inputs import INPUTS, Input
from spear.errors import ConfigError, DataError
from spear.export.audio import check_audio
from spear.models.base import FBANK_RATE_HZ
from spear.types import EncoderOutput

WINDOW_S, OVERLAP_S = 30.0, 8.0
LEAST_OVERLAP_S = 0.1
"""A window's front end gives no frames for its last 70 ms; those are the next window's."""
MARGIN = 3
"""Log-mel frames on either side of a window whose samples are read, so that none of its own frames sees a mirrored edge."""
REACH = 10
"""Half width of `scipy.signal.resample_poly`'s filter, in periods of the lower of the two rates."""


@runtime_checkable
class Samples(Protocol):
    """A mono recording at the encoder's rate that can be read in pieces."""

    def __len__(self) -> int:
        """Samples in all."""

    def read(self, start: int, stop: int) -> Any:
        """(stop - start,) floating samples."""


class Loaded:
    """A recording in memory: audio (S,)."""

    def __init__(self, audio: Any) -> None:
        if not isinstance(audio, (Tensor, np.ndarray)) or audio.ndim != 1:
            shape = tuple(audio.shape) if isinstance(audio, (Tensor, np.ndarray)) else type(audio).__name__
            raise DataError(f"a long recording must be a tensor or an array of the shape (S,), but is {shape}", cause="decode")
        self.audio = audio

    def __len__(self) -> int:
        return len(self.audio)

    def read(self, start: int, stop: int) -> Any:
        """See Samples."""
        return self.audio[start:stop]


class AudioFile:
    """A file of any rate and number of channels, read in pieces as mono (channels averaged) at `sample_rate`.

    A piece is what `spear.export.audio.read_audio` gives there, up to rounding.

    Raises:
        DataError: the file is missing, cannot be decoded or is empty; names the file.
    """

    def __init__(self, path: Path | str, sample_rate: int) -> None:
        import soundfile

        if not Path(path).is_file():
            raise DataError(f"{path} is not a file", cause="missing_file")
        try:
            info = soundfile.info(str(path))
        except (soundfile.LibsndfileError, OSError) as error:
            raise DataError(f"{path} cannot be decoded: {' '.join(str(error).split())}", cause="decode") from error
        if not info.frames:
            raise DataError(f"{path} has no samples", cause="empty")
        divisor = math.gcd(info.samplerate, sample_rate)
        self.path, self.frames = path, int(info.frames)
        self.up, self.down = sample_rate // divisor, int(info.samplerate) // divisor

    def __len__(self) -> int:
        return (self.frames * self.up + self.down - 1) // self.down

    def read(self, start: int, stop: int) -> Tensor:
        """See Samples; float32."""
        from scipy.signal import resample_poly

        margin = -(-REACH * max(self.up, self.down) // self.up) + 1
        first = max(0, start * self.down // self.up - margin) // self.down * self.down
        last = min(self.frames, -(-stop * self.down // self.up) + margin)
        mono = self._decode(first, last)
        if self.up != self.down:
            mono = resample_poly(mono, self.up, self.down)
        begin = start - first * self.up // self.down
        return torch.from_numpy(np.ascontiguousarray(mono[begin : begin + stop - start], dtype=np.float32))

    def _decode(self, first: int, last: int) -> Any:
        import soundfile

        try:
            samples, _ = soundfile.read(str(self.path), start=first, stop=last, dtype="float32", always_2d=True)
        except (soundfile.LibsndfileError, OSError) as error:
            raise DataError(f"{self.path} cannot be decoded: {' '.join(str(error).split())}", cause="decode") from error
        if len(samples) != last - first:
            raise DataError(f"{self.path} ends after {first + len(samples)} of {self.frames} samples", cause="length_mismatch")
        if not np.isfinite(samples).all():
            raise DataError(f"{self.path} holds NaN or infinity", cause="not_finite")
        return samples.mean(axis=1)


def window_starts(num_frames: int, window: int, hop: int, grid: int) -> list[int]:
    """First log-mel frames of the windows over a recording.

    Args:
        num_frames: of the recording. window, hop: in frames, `hop` a multiple of `grid`. grid: every start is a multiple of it.
    Returns:
        rising starts; every window is `window` long but the last, which ends with the recording and is less than `grid` longer (the
        only window of a recording that is shorter: as long as that).
    """
    starts = [0]
    while num_frames - starts[-1] >= window + grid:
        starts.append(min(starts[-1] + hop, (num_frames - window) // grid * grid))
    return starts


def encode_windows(
    encode: Callable[[Tensor], EncoderOutput],
    samples: Samples,
    *,
    num_mel_bins: int,
    frame_rate_hz: float,
    grid: int,
    window_s: float = WINDOW_S,
    overlap_s: float = OVERLAP_S,
    reads: str = "fbank",
) -> Iterator[EncoderOutput]:
    """Encode a recording window by window; the pieces joined are its frames.

    Args:
        encode: log-mels (1, T, F) -> output whose features and hidden states have one rate. samples: the recording.
        num_mel_bins: F. frame_rate_hz: of the output. grid: see `spear.models.base.StudentConfig.grid`. window_s, overlap_s: see above.
        reads: kind of the encoder's input.
    Returns:
        pieces (1, T, D) in order, each made when it is asked for; memory holds one window, and no gradients.
    Raises:
        ConfigError: the overlap is below 0.1 s or more than half the window, or the hop is shorter than `grid`.
        DataError: samples are not finite or out of range.
    """
    window = round(window_s * FBANK_RATE_HZ)
    hop = (window - math.ceil(overlap_s * FBANK_RATE_HZ)) // grid * grid
    if not LEAST_OVERLAP_S <= overlap_s <= window_s / 2 or hop < grid:
        rule = f"at least {LEAST_OVERLAP_S:g}, at most half of `window_s` {window_s:g} and at least {grid / FBANK_RATE_HZ:g} less than it"
        raise ConfigError(f"`overlap_s` must be {rule}, but is {overlap_s:g}")
    return _pieces(encode, samples, window, hop, grid, (INPUTS[reads], num_mel_bins), round(FBANK_RATE_HZ / frame_rate_hz))


def _pieces(
    encode: Callable[[Tensor], EncoderOutput], samples: Samples, window: int, hop: int, grid: int, kind: tuple[Input, int], ratio: int
) -> Iterator[EncoderOutput]:
    frames = num_fbank_frames(len(samples))
    starts = window_starts(frames, window, hop, grid)
    begin = 0
    for i, start in enumerate(starts):
        is_last = i == len(starts) - 1
        with torch.no_grad():
            output = encode(_input_frames(samples, start, frames if is_last else start + window, *kind)[None])
        origin = start // ratio
        end = origin + output.features.shape[1]
        if not is_last:
            end = (starts[i + 1] // ratio + end) // 2
        yield _cut(output, begin - origin, end - origin)
        begin = end


def _input_frames(samples: Samples, start: int, stop: int, kind: Input, num_mel_bins: int) -> Tensor:
    """(stop - start, F): the input frames `start` to `stop` of the whole recording."""
    first = max(0, start - MARGIN)
    piece, _ = check_audio(samples.read(first * HOP, min(len(samples), (stop + MARGIN) * HOP)), None, torch.device("cpu"))
    return kind.make(piece[0], num_mel_bins)[start - first : stop - first]


def _cut(output: EncoderOutput, begin: int, end: int) -> EncoderOutput:
    states = tuple(state[:, begin:end] for state in output.hidden_states)
    return EncoderOutput(output.features[:, begin:end], torch.full_like(output.lens, end - begin), states)


def join_pieces(pieces: Iterable[EncoderOutput], *, hidden_states: bool) -> EncoderOutput:
    """Pieces (1, T_i, D) of a recording as one output (1, T, D); without hidden states unless they are asked for."""
    kept = [piece if hidden_states else piece._replace(hidden_states=()) for piece in pieces]
    states = tuple(torch.cat(layer, dim=1) for layer in zip(*(piece.hidden_states for piece in kept)))
    features = torch.cat([piece.features for piece in kept], dim=1)
    return EncoderOutput(features, torch.full_like(kept[0].lens, features.shape[1]), states)
