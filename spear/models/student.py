"""The student: an encoder that sees a masked input while it trains."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from spear.models.base import FBANK_FIRST_FRAME_S, FBANK_RATE_HZ, Encoder
from spear.models.masking import MaskConfig, draw_masks
from spear.types import StudentOutput


def share_under_frames(mask: Tensor, num_frames: int, frame_rate_hz: float, first_frame_s: float) -> Tensor:
    """Share of the input frames under each output frame that is masked.

    Each output frame has as many input frames as the rates say (two at 50 Hz, four at 25 Hz), those centred on it or half a frame later.

    Args:
        mask: (N, T_in) bool at 100 Hz. num_frames: T of the output. frame_rate_hz, first_frame_s: of the output.
    Returns:
        (N, T) float32 in [0, 1]; input frames outside the mask count as not masked.
    """
    group = round(FBANK_RATE_HZ / frame_rate_hz)
    centre = (first_frame_s - FBANK_FIRST_FRAME_S) * FBANK_RATE_HZ
    start = max(0, math.ceil(centre - (group - 1) / 2 - 1e-6))
    needed = start + group * num_frames
    padded = nn.functional.pad(mask.float(), (0, max(0, needed - mask.shape[1])))
    return padded[:, start:needed].reshape(-1, num_frames, group).mean(dim=2)


class Student(nn.Module):
    """Masks the log-mels and encodes them."""

    def __init__(self, encoder: Encoder, masking: MaskConfig) -> None:
        super().__init__()
        self.encoder = encoder
        self.masking = masking

    def forward(self, features: Tensor, lens: Tensor, generator: torch.Generator | None = None) -> StudentOutput:
        """Encode a padded batch; masked only in training mode and with a generator.

        Args:
            features: (N, T, F) log-mels at 100 Hz. lens: (N,) valid frames. generator: on the CPU, draws the masks.
        Raises:
            DataError: an item is too short for the encoder.
        """
        time: Tensor | None = None
        if self.training and generator is not None:
            time, channel = draw_masks(self.masking, lens, features.shape[1], features.shape[2], generator)
            time, channel = time.to(features.device), channel.to(features.device)
            features = features.masked_fill(channel[:, None, :], 0.0)
            features = torch.where(time[:, :, None], self.encoder.mask_emb.to(features.dtype), features)
        out = self.encoder(features, lens)
        num_frames = out.features.shape[1]
        if time is None:
            share = torch.zeros(out.features.shape[:2], device=features.device)
        else:
            share = share_under_frames(time, num_frames, self.encoder.frame_rate_hz, self.encoder.first_frame_s)
        return StudentOutput(out.features, out.lens, out.hidden_states, share)
