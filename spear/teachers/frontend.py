"""Spectrogram front ends of teachers, on any device and without torchaudio, so that a result does not depend on what else is installed."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

FRAME_SAMPLES, HOP_SAMPLES, FFT_SAMPLES = 400, 160, 512
KALDI_FLOOR = 1.192092955078125e-07


def num_kaldi_frames(samples: int) -> int:
    """Frames of 25 ms every 10 ms at 16 kHz that lie wholly within the audio."""
    return max(0, (samples - FRAME_SAMPLES) // HOP_SAMPLES + 1)


@lru_cache(maxsize=8)
def mel_filters(
    num_mel_bins: int, sample_rate: int, low_hz: float, *, kaldi: bool, fft_samples: int = FFT_SAMPLES, high_hz: float | None = None
) -> Tensor:
    """(fft / 2 + 1, F) float64 triangular filters up to `high_hz` (the Nyquist frequency): Kaldi's, triangular in mel, or HTK's, in Hz."""
    from transformers.audio_utils import mel_filter_bank

    filters = mel_filter_bank(
        num_frequency_bins=fft_samples // 2 + 1,
        num_mel_filters=num_mel_bins,
        min_frequency=low_hz,
        max_frequency=high_hz or sample_rate / 2,
        sampling_rate=sample_rate,
        norm=None,
        mel_scale="kaldi" if kaldi else "htk",
        triangularize_in_mel_space=kaldi,
    )
    return torch.as_tensor(filters, dtype=torch.float64)


def kaldi_log_mel(audio: Tensor, *, num_mel_bins: int, sample_rate: int, window: str, scale: float = 1.0) -> Tensor:
    """Log-mel energies as the feature extractors of w2v-BERT (povey, scale 2^15) and AST (hann) make them.

    Frames of 400 samples every 160 without padding, mean removed, pre-emphasis 0.97, FFT 512, power, floor 2^-23, natural log.

    Args:
        audio: (S,) float32, S >= 400.
    Returns:
        (T, F) float32, T = floor((S - 400) / 160) + 1.
    """
    frames = (audio.double() * scale).unfold(0, FRAME_SAMPLES, HOP_SAMPLES)
    frames = frames - frames.mean(dim=1, keepdim=True)
    frames = torch.cat([frames[:, :1] * (1 - 0.97), frames[:, 1:] - 0.97 * frames[:, :-1]], dim=1)
    shape = torch.hann_window(FRAME_SAMPLES, periodic=False, dtype=torch.float64, device=audio.device)
    shape = shape.pow(0.85) if window == "povey" else shape
    power = torch.fft.rfft(frames * shape, n=FFT_SAMPLES).abs().square()  # (T, 257)
    energies = power @ mel_filters(num_mel_bins, sample_rate, 20.0, kaldi=True).to(audio.device)
    log_mel: Tensor = energies.clamp(min=KALDI_FLOOR).log().float()
    return log_mel


def decibel_mel(
    audio: Tensor,
    *,
    num_mel_bins: int,
    sample_rate: int,
    fft_samples: int = FFT_SAMPLES,
    low_hz: float = 0.0,
    high_hz: float | None = None,
    top_db: float = 120.0,
) -> Tensor:
    """Mel energies in dB as the front ends of Dasheng (the defaults) and ATST make them, relative to this recording alone.

    Centred frames (reflected ends) of a periodic Hann window of `fft_samples` every 160 samples, HTK filters from `low_hz` to `high_hz` (the
    Nyquist frequency), 10 log10 with floor 1e-10, at most `top_db` below the recording's maximum.

    Args:
        audio: (S,) float32, S > fft_samples / 2.
    Returns:
        (F, T) float32, T = floor(S / 160) + 1.
    """
    window = torch.hann_window(fft_samples, dtype=torch.float64, device=audio.device)
    spectrum = torch.stft(audio.double(), fft_samples, HOP_SAMPLES, window=window, center=True, pad_mode="reflect", return_complex=True)
    filters = mel_filters(num_mel_bins, sample_rate, low_hz, kaldi=False, fft_samples=fft_samples, high_hz=high_hz).to(audio.device)
    level = 10.0 * (filters.T @ spectrum.abs().square()).clamp(min=1e-10).log10()
    return level.clamp(min=float(level.max()) - top_db).float()
