"""Checks on what users hand to an encoder, and the way from a waveform to hidden states.

`AudioEncoder` and the Hugging Face model share these functions, so that both give the same numbers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from spear.data.fbank import HOP
from spear.data.inputs import INPUTS
from spear.errors import DataError
from spear.models.base import Encoder
from spear.types import EncoderOutput

MAX_ABS = 10.0
"""Largest absolute sample taken for audio in [-1, 1] with overshoot; integers by mistake lie far above."""


def min_samples(encoder: Encoder) -> int:
    """Fewest samples from which the encoder makes one frame; shorter audio is padded to it with silence."""
    return encoder.min_fbank_frames * HOP - HOP // 2


def encode_audio(encoder: Encoder, audio: Any, lens: Any = None) -> EncoderOutput:
    """Checked waveforms through log-mels and the encoder.

    Args:
        audio: (N, S) or (S,) floating, samples in [-1, 1] at ``encoder.sample_rate``. lens: (N,) valid samples; None: all.
    Returns:
        the encoder's output; frames past ``lens`` are as computed and carry no meaning.
    Raises:
        DataError: see `check_audio`.
    """
    audio, lens = check_audio(audio, lens, _weight(encoder).device)
    audio, lens = pad_short(audio, lens, min_samples(encoder))
    features, feature_lens = INPUTS[encoder.reads].batch(audio, lens, encoder.num_mel_bins)
    return _encode(encoder, features, feature_lens)


def encode_features(encoder: Encoder, features: Any, lens: Any = None) -> EncoderOutput:
    """Checked log-mels through the encoder.

    Args:
        features: (N, T, F) or (T, F) log-mels at 100 Hz as of `spear.data.fbank`. lens: (N,) valid frames; None: all.
            Whatever lies past a length is replaced by the padding value, and a batch is cut to its longest length.
    Returns:
        as `encode_audio`; fewer frames than the encoder needs are filled up with silence.
    Raises:
        DataError: wrong shape, type or lengths, or a valid value that is not finite.
    """
    features, lens = check_features(features, lens, encoder)
    features = features[:, : int(lens.max())]
    steps = torch.arange(features.shape[1], device=features.device)
    past = (steps >= lens[:, None])[:, :, None]  # (N, T, 1)
    _check_finite(features, past, "features")
    kind = INPUTS[encoder.reads]
    features = features.masked_fill(past, kind.padding)
    least = encoder.min_fbank_frames
    if int(lens.min()) < least:
        features = F.pad(features, (0, 0, 0, max(least - features.shape[1], 0)), value=kind.padding)
        steps = torch.arange(features.shape[1], device=features.device)
        fill = (steps >= lens[:, None]) & (steps < least)
        features = features.masked_fill(fill[:, :, None], kind.silence)
        lens = lens.clamp(min=least)
    return _encode(encoder, features, lens)


def by_length(lens: Tensor, encode: Callable[[Tensor, int], EncoderOutput]) -> EncoderOutput:
    """Encode the items of a batch in groups of equal length, so that none of them meets padding.

    Args:
        lens: (N,) int64. encode: the rows of a group (M,) and their length -> their output.
    Returns:
        the outputs in the order of the items, padded with zeros to the longest.
    """
    groups = [(lens == length).nonzero()[:, 0] for length in lens.unique().tolist()]
    parts = [encode(rows, int(lens[rows[0]])) for rows in groups]

    def join(tensors: list[Tensor]) -> Tensor:
        out = tensors[0].new_zeros((len(lens), max(part.shape[1] for part in tensors), tensors[0].shape[2]))
        for part, rows in zip(tensors, groups):
            out[rows, : part.shape[1]] = part
        return out

    frames = parts[0].lens.new_zeros(len(lens))
    for part, rows in zip(parts, groups):
        frames[rows] = part.lens
    states = tuple(join([part.hidden_states[layer] for part in parts]) for layer in range(len(parts[0].hidden_states)))
    return EncoderOutput(join([part.features for part in parts]), frames, states)


def _encode(encoder: Encoder, features: Tensor, lens: Tensor) -> EncoderOutput:
    """Run the encoder; weights in half precision run under autocast, which keeps norms and position tables in float32."""
    weight = _weight(encoder)
    if weight.dtype not in (torch.bfloat16, torch.float16):
        plain: EncoderOutput = encoder(features.to(weight.dtype), lens)
        return plain
    with torch.autocast(weight.device.type, dtype=weight.dtype):
        output: EncoderOutput = encoder(features, lens)
    return EncoderOutput(output.features.to(weight.dtype), output.lens, tuple(state.to(weight.dtype) for state in output.hidden_states))


def _weight(encoder: Encoder) -> Tensor:
    return next(encoder.parameters())


def check_audio(audio: Any, lens: Any, device: torch.device) -> tuple[Tensor, Tensor]:
    """Bring audio and lengths into the form the front end reads.

    Args:
        audio: (N, S) or (S,) floating tensor or array. lens: (N,) whole numbers or None.
    Returns:
        audio (N, S) float32 and lens (N,) int64 on `device`.
    Raises:
        DataError: not floating, wrong shape, empty, a length outside 1..S, or a valid sample that is not finite or far outside [-1, 1].
    """
    audio = _floating(audio, "audio", device)
    if audio.dim() == 1:
        audio = audio[None]
    if audio.dim() != 2:
        raise DataError(f"`audio` must have the shape (N, S) or (S,), but has {tuple(audio.shape)}", cause="decode")
    if audio.numel() == 0:
        raise DataError(f"`audio` must not be empty, but has the shape {tuple(audio.shape)}", cause="empty")
    lens = check_lens(lens, len(audio), audio.shape[1], device)
    past = torch.arange(audio.shape[1], device=device) >= lens[:, None]  # (N, S)
    _check_finite(audio, past, "audio")
    peak = audio.abs().masked_fill(past, 0.0).amax(dim=1)
    if bool((peak > MAX_ABS).any()):
        item = int(peak.argmax())
        reached = f"item {item} reaches {float(peak[item]):.6g}"
        raise DataError(f"`audio` must lie in [-1, 1], but {reached}: divide integer samples by their full scale", cause="range")
    return audio, lens


def check_features(features: Any, lens: Any, encoder: Encoder) -> tuple[Tensor, Tensor]:
    """Bring log-mels (N, T, F) or (T, F) and their lengths (N,) into the form the encoder reads, on its device.

    Raises:
        DataError: wrong shape, type or lengths.
    """
    features = _floating(features, "features", _weight(encoder).device)
    if features.dim() == 2:
        features = features[None]
    if features.dim() != 3 or features.shape[2] != encoder.num_mel_bins:
        raise DataError(f"`features` must have the shape (N, T, {encoder.num_mel_bins}), but has {tuple(features.shape)}", cause="decode")
    return features, check_lens(lens, len(features), features.shape[1], features.device)


def check_lens(lens: Any, items: int, longest: int, device: torch.device) -> Tensor:
    """Lengths as (N,) int64, each in 1..longest.

    Raises:
        DataError: the shape, the type or a value is wrong; the message names the item.
    """
    if lens is None:
        if longest < 1:
            raise DataError("the input must have at least one frame or sample, but has none", cause="empty")
        return torch.full((items,), longest, dtype=torch.int64, device=device)
    lens = torch.as_tensor(lens, device=device)
    if lens.shape != (items,):
        raise DataError(f"`lens` must have the shape ({items},), but has {tuple(lens.shape)}", cause="length_mismatch")
    if lens.is_floating_point() or lens.is_complex() or lens.dtype == torch.bool:
        raise DataError(f"`lens` must hold whole numbers, but is {str(lens.dtype).removeprefix('torch.')}", cause="length_mismatch")
    whole: Tensor = lens.to(torch.int64)
    wrong = ((whole < 1) | (whole > longest)).nonzero()
    if len(wrong):
        item = int(wrong[0])
        raise DataError(f"`lens` must lie between 1 and {longest}, but item {item} has {int(whole[item])}", cause="length_mismatch")
    return whole


def _floating(value: Any, name: str, device: torch.device) -> Tensor:
    if not isinstance(value, (Tensor, np.ndarray)):
        raise DataError(f"`{name}` must be a tensor or an array, but is a {type(value).__name__}", cause="decode")
    if isinstance(value, np.ndarray):
        if value.dtype.kind not in "fiub":
            raise DataError(f"`{name}` must be floating, but is {value.dtype}", cause="decode")
        value = np.array(value, dtype=value.dtype.newbyteorder("="))  # a copy that is contiguous, writable and in native order
    tensor: Tensor = torch.as_tensor(value, device=device)
    if not tensor.is_floating_point():
        kind = str(tensor.dtype).removeprefix("torch.")
        raise DataError(f"`{name}` must be floating, but is {kind}: divide integer samples by their full scale", cause="range")
    single: Tensor = tensor.float()
    return single


def _check_finite(value: Tensor, past: Tensor, name: str) -> None:
    wrong = (~(value.isfinite() | past)).flatten(1).any(dim=1).nonzero()
    if len(wrong):
        raise DataError(f"`{name}` must be finite, but item {int(wrong[0])} holds NaN or infinity", cause="not_finite")


def pad_short(audio: Tensor, lens: Tensor, least: int) -> tuple[Tensor, Tensor]:
    """Lengthen utterances (N, S) below `least` samples with silence on the right; longer ones stay as they are."""
    if int(lens.min()) >= least:
        return audio, lens
    audio = audio.masked_fill(torch.arange(audio.shape[1], device=audio.device) >= lens[:, None], 0.0)
    return F.pad(audio, (0, max(least - audio.shape[1], 0))), lens.clamp(min=least)


def read_audio(path: Path | str, sample_rate: int) -> Tensor:
    """Read one file as mono at `sample_rate`.

    Args:
        path: anything libsndfile reads, any rate, any number of channels (they are averaged).
    Returns:
        (S,) float32, S = ceil(samples * sample_rate / rate of the file).
    Raises:
        DataError: the file is missing, cannot be decoded, is empty or holds values that are not finite; names the file.
    """
    try:
        import soundfile
        from scipy.signal import resample_poly
    except ImportError as error:
        raise DataError(f"reading {path} needs the packages soundfile and scipy: {error}", cause="decode") from error
    if not Path(path).is_file():
        raise DataError(f"{path} is not a file", cause="missing_file")
    try:
        samples, rate = soundfile.read(str(path), dtype="float32", always_2d=True)
    except (soundfile.LibsndfileError, OSError) as error:
        raise DataError(f"{path} cannot be decoded: {' '.join(str(error).split())}", cause="decode") from error
    mono = samples.mean(axis=1)
    if not len(mono):
        raise DataError(f"{path} has no samples", cause="empty")
    if not np.isfinite(mono).all():
        raise DataError(f"{path} holds NaN or infinity", cause="not_finite")
    if rate != sample_rate:
        divisor = math.gcd(rate, sample_rate)
        mono = resample_poly(mono, sample_rate // divisor, rate // divisor)
    return torch.from_numpy(np.ascontiguousarray(mono, dtype=np.float32))


def read_batch(paths: Sequence[Path | str], sample_rate: int) -> tuple[Tensor, Tensor]:
    """Read files as one zero-padded batch: audio (N, S) float32, lens (N,) int64 (see `read_audio`)."""
    if not paths:
        raise DataError("at least one audio file is needed, but none is given", cause="missing_file")
    rows = [read_audio(path, sample_rate) for path in paths]
    lens = torch.tensor([len(row) for row in rows], dtype=torch.int64)
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True), lens
