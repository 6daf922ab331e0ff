"""Log-mel features of the student, and MFCCs, in plain torch.

The numbers follow Kaldi's ``compute-fbank-feats`` (25 ms povey windows every 10 ms at 16 kHz, edges mirrored,
no dither, no normalisation), as the released SPEAR encoders expect them.
"""

from __future__ import annotations

import math
from functools import lru_cache

import torch
from torch import Tensor

from spear.errors import DataError
from spear.types import LOG_EPSILON

SAMPLE_RATE = 16000
WINDOW, HOP, FFT = 400, 160, 512
PREEMPHASIS = 0.97
LOW_HZ, HIGH_HZ = 20.0, 7600.0
BLOCK_FRAMES, DEVICE_BLOCK_FRAMES = 512, 65536
"""Frames worked on at a time: on a CPU so many that the spectra stay in the cache of a core, elsewhere more, as each block costs its launches."""
MFCC_BINS, CEPSTRA, LIFTER = 23, 13, 22.0


def num_fbank_frames(samples: int) -> int:
    """Number of 100 Hz frames of `samples` samples at 16 kHz: one per started hop, rounded to the nearest."""
    return (samples + HOP // 2) // HOP


def fbank(audio: Tensor, num_mel_bins: int = 128) -> Tensor:
    """Log-mel energies of one utterance.

    Args:
        audio: (S,) float in [-1, 1] at 16 kHz, its valid samples only.
        num_mel_bins: F.
    Returns:
        (T, F) float32 at 100 Hz with T = num_fbank_frames(S); silence is ln(2**-23).
    Raises:
        DataError: `audio` is not one-dimensional or is shorter than half a hop (80 samples).
    """
    return _log_mels(audio, num_mel_bins, HIGH_HZ)


def fbank_batch(audio: Tensor, lens: Tensor, num_mel_bins: int = 128) -> tuple[Tensor, Tensor]:
    """Log-mel energies of a padded batch, each utterance on its own valid samples.

    Args:
        audio: (N, S) float in [-1, 1] at 16 kHz. lens: (N,) valid samples. num_mel_bins: F.
    Returns:
        features (N, T, F) float32 at 100 Hz, LOG_EPSILON past each length; lens (N,) int64 frames.
    Raises:
        DataError: an utterance is shorter than half a hop.
    """
    rows = [fbank(row[:length], num_mel_bins) for row, length in zip(audio, lens.tolist())]
    frames = [len(row) for row in rows]
    features = audio.new_full((len(rows), max(frames, default=0), num_mel_bins), LOG_EPSILON, dtype=torch.float32)
    for i, row in enumerate(rows):
        features[i, : len(row)] = row
    return features, torch.tensor(frames, dtype=torch.int64, device=audio.device)


def mfcc(audio: Tensor) -> Tensor:
    """Kaldi-like cepstra for a first round of clustering, as in HuBERT (arXiv:2106.07447, section III).

    13 liftered coefficients of 23 mel bins (20 Hz to 8 kHz), their deltas and the deltas of those.

    Args:
        audio: (S,) float in [-1, 1] at 16 kHz.
    Returns:
        (T, 39) float32 at 100 Hz.
    Raises:
        DataError: as `fbank`.
    """
    cepstra = _log_mels(audio, MFCC_BINS, SAMPLE_RATE / 2) @ _cosines(str(audio.device))  # (T, 13)
    first = _deltas(cepstra)
    return torch.cat([cepstra, first, _deltas(first)], dim=1)


def _log_mels(audio: Tensor, num_mel_bins: int, high_hz: float) -> Tensor:
    if audio.dim() != 1:
        raise DataError(f"`audio` must have the shape (S,), but has {tuple(audio.shape)}", cause="decode")
    frames = num_fbank_frames(len(audio))
    if frames == 0:
        raise DataError(f"`audio` must have at least {HOP // 2} samples at 16 kHz, but has {len(audio)}", cause="too_short")
    window = povey_window(str(audio.device))
    mels = mel_filters(num_mel_bins, high_hz, str(audio.device))
    floor = torch.finfo(torch.float32).eps
    with torch.autocast(audio.device.type, enabled=False):
        windows = _mirrored(audio.float(), frames).unfold(0, WINDOW, HOP)  # (T, 400), a view
        step = BLOCK_FRAMES if audio.device.type == "cpu" else DEVICE_BLOCK_FRAMES
        blocks = [_power(windows[start : start + step], window) @ mels for start in range(0, frames, step)]
        energies = torch.cat(blocks) if len(blocks) > 1 else blocks[0]
        return energies.clamp(min=floor).log()


def _power(frames: Tensor, window: Tensor) -> Tensor:
    """Power spectrum (t, 256) of windowed frames (t, 400), the bin at 8 kHz left out.

    The order of the operations is Kaldi's, so that quiet bands round as they do there.
    """
    frames = frames - frames.mean(dim=1, keepdim=True)
    # a frame's first sample has weight 0 in the window: its pre-emphasis need not be worked out
    frames[:, 1:] -= frames[:, :-1] * PREEMPHASIS
    spectrum = torch.fft.rfft(frames.mul_(window), n=FFT)[:, :-1]
    power: Tensor = spectrum.real.square().add_(spectrum.imag.square())
    return power


def _mirrored(audio: Tensor, frames: int) -> Tensor:
    """Pad (S,) to the samples that `frames` windows cover, mirrored at both edges with the edge sample repeated."""
    length = len(audio)
    left = (WINDOW - HOP) // 2
    total = (frames - 1) * HOP + WINDOW
    before = torch.arange(-left, 0, device=audio.device)
    after = torch.arange(length, max(total - left, length), device=audio.device)

    def mirror(index: Tensor) -> Tensor:
        index = index % (2 * length)
        return torch.where(index < length, index, 2 * length - 1 - index)

    return torch.cat([audio[mirror(before)], audio, audio[mirror(after)]])[:total]


@lru_cache(maxsize=16)
def povey_window(device: str) -> Tensor:
    """(400,) povey window: a symmetric Hann window to the power 0.85."""
    return torch.hann_window(WINDOW, periodic=False).pow(0.85).to(device)


@lru_cache(maxsize=16)
def mel_filters(num_mel_bins: int, high_hz: float, device: str) -> Tensor:
    """(256, F) triangles that are linear on the mel scale 1127 ln(1 + f / 700); the bin at 8 kHz has no weight.

    Worked out in single precision on purpose: near the feet of the triangles its rounding is part of the features that
    the released models were trained on.
    """
    low, high = (1127.0 * math.log(1.0 + hz / 700.0) for hz in (LOW_HZ, high_hz))
    points = low + torch.arange(num_mel_bins + 2) * ((high - low) / (num_mel_bins + 1))
    bins = 1127.0 * (1.0 + torch.arange(FFT // 2) * (SAMPLE_RATE / FFT) / 700.0).log()[:, None]  # (256, 1)
    rising = (bins - points[:-2]) / (points[1:-1] - points[:-2])
    falling = (points[2:] - bins) / (points[2:] - points[1:-1])
    filters: Tensor = torch.minimum(rising, falling).clamp(min=0).to(device)
    return filters


@lru_cache(maxsize=16)
def _cosines(device: str) -> Tensor:
    """(23, 13) orthonormal DCT-II times Kaldi's sine lifter."""
    n = torch.arange(MFCC_BINS, dtype=torch.float64)[:, None]
    k = torch.arange(CEPSTRA, dtype=torch.float64)[None]
    matrix = torch.cos(torch.pi / MFCC_BINS * (n + 0.5) * k) * (2.0 / MFCC_BINS) ** 0.5
    matrix[:, 0] = MFCC_BINS**-0.5
    liftered: Tensor = (matrix * (1.0 + 0.5 * LIFTER * torch.sin(torch.pi * k / LIFTER))).float().to(device)
    return liftered


def _deltas(frames: Tensor) -> Tensor:
    """Slope of each column of (T, D) over five frames, edge frames repeated."""
    padded = torch.cat([frames[:1], frames[:1], frames, frames[-1:], frames[-1:]])
    length = len(frames)
    near = padded[3 : 3 + length] - padded[1 : 1 + length]
    far = padded[4 : 4 + length] - padded[:length]
    slopes: Tensor = (near + 2 * far) / 10
    return slopes
