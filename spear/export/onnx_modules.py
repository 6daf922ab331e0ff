"""An encoder, its log-mels and its streaming step as modules that can be recorded: tensors in, tensors out, no branch on a value."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from spear.data.fbank import FFT, HIGH_HZ, HOP, PREEMPHASIS, WINDOW, mel_filters, povey_window
from spear.models.base import Encoder
from spear.models.zipformer.encoder import ZipformerEncoder
from spear.models.zipformer.streaming import LayerState, StreamState, ZipformerStream
from spear.types import LOG_EPSILON

CACHES = LayerState._fields


class RecordableEncoder(nn.Module):
    """Log-mels to frames.

    Args:
        encoder: in eval mode.
    """

    def __init__(self, encoder: Encoder) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, fbank: Tensor, fbank_lens: Tensor) -> tuple[Tensor, Tensor]:
        """fbank (N, T, F) at 100 Hz, fbank_lens (N,) -> features (N, T', D) and lens (N,) at the encoder's rate."""
        past = torch.arange(fbank.shape[1], device=fbank.device) >= fbank_lens[:, None]
        out = self.encoder(fbank.masked_fill(past[:, :, None], LOG_EPSILON), fbank_lens)
        return out.features, out.lens


class RecordableFbank(nn.Module):
    """`spear.data.fbank.fbank_batch` without loops over the batch, the Fourier transform as a product with its matrix.

    The matrix product is done in double precision: a sum of 400 products in single precision would differ from the fast transform in quiet bands.

    Args:
        num_mel_bins: F.
    """

    offsets: Tensor
    window: Tensor
    fourier: Tensor
    mels: Tensor

    def __init__(self, num_mel_bins: int) -> None:
        super().__init__()
        angles = torch.arange(WINDOW, dtype=torch.float64)[:, None] * torch.arange(FFT // 2, dtype=torch.float64) * (2 * math.pi / FFT)
        self.register_buffer("offsets", torch.arange(WINDOW) - (WINDOW - HOP) // 2)
        self.register_buffer("window", povey_window("cpu"))
        self.register_buffer("fourier", torch.cat([angles.cos(), angles.sin()], dim=1))  # (400, 512)
        self.register_buffer("mels", mel_filters(num_mel_bins, HIGH_HZ, "cpu"))

    def forward(self, audio: Tensor, audio_lens: Tensor) -> tuple[Tensor, Tensor]:
        """audio (N, S) in [-1, 1] at 16 kHz, audio_lens (N,) at least 80 -> fbank (N, T, F) at 100 Hz, fbank_lens (N,)."""
        lens = (audio_lens + HOP // 2) // HOP
        frames = (audio.shape[1] + HOP // 2) // HOP
        places = torch.arange(frames, device=audio.device)[:, None] * HOP + self.offsets  # (T, 400)
        length = audio_lens[:, None, None]
        # mirrored at both edges of each utterance, the edge sample repeated
        mirrored = torch.remainder(places[None], 2 * length)
        mirrored = torch.where(mirrored < length, mirrored, 2 * length - 1 - mirrored)  # (N, T, 400)
        windows = audio.gather(1, mirrored.flatten(1)).unflatten(1, (frames, WINDOW))
        windows = windows - windows.mean(dim=2, keepdim=True)
        windows = torch.cat([windows[..., :1], windows[..., 1:] - windows[..., :-1] * PREEMPHASIS], dim=2) * self.window
        parts = (windows.double() @ self.fourier).float()
        real, imaginary = parts[..., : FFT // 2], parts[..., FFT // 2 :]
        energies = (real.square() + imaginary.square()) @ self.mels
        features = energies.clamp(min=torch.finfo(torch.float32).eps).log()
        past = torch.arange(frames, device=audio.device) >= lens[:, None]
        return features.masked_fill(past[:, :, None], LOG_EPSILON), lens


class RecordableStep(nn.Module):
    """One step of `ZipformerStream`, its state as flat tensors.

    Attributes:
        state_names: of the state's tensors, in order.
    Args:
        encoder: a causal Zipformer in eval mode. chunk_size, left_context_frames: see ZipformerStream.
    """

    def __init__(self, encoder: ZipformerEncoder, chunk_size: int | None = None, left_context_frames: int | None = None) -> None:
        super().__init__()
        self.encoder = encoder
        self.stream = ZipformerStream(encoder, chunk_size, left_context_frames)
        self.state_names = ["embed", "processed", *(f"layer{i}_{name}" for i in range(encoder.num_layers) for name in CACHES)]

    def start(self, batch_size: int) -> list[Tensor]:
        """The state before the first step."""
        return flat(self.stream.start(batch_size))

    def forward(self, fbank: Tensor, fbank_lens: Tensor, state: list[Tensor]) -> tuple[Tensor, ...]:
        """fbank (N, step_frames, F), fbank_lens (N,) valid frames, state -> features (N, T, D), lens (N,), the new state."""
        out = self.stream.step(fbank, fbank_lens, unflat(state))
        return out.features, out.lens, *flat(out.state)


def flat(state: StreamState) -> list[Tensor]:
    """The tensors of a stream's state in one row."""
    return [state.embed, state.processed, *(cache for layer in state.layers for cache in layer)]


def unflat(tensors: list[Tensor]) -> StreamState:
    """Undo `flat`."""
    size, rest = len(CACHES), tensors[2:]
    return StreamState(tensors[0], tensors[1], [LayerState(*rest[i : i + size]) for i in range(0, len(rest), size)])
