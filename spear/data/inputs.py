"""What students read: log-mels, or the samples themselves, both in frames of 10 ms."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from spear.data.fbank import HOP, fbank, num_fbank_frames
from spear.errors import DataError
from spear.types import LOG_EPSILON

SILENT_LOG_MEL = -15.942385152878742
"""Log-mel value of digital silence, ln(2**-23): the float32 epsilon is the floor."""


def sample_frames(audio: Tensor, width: int = HOP) -> Tensor:
    """Samples of one utterance in frames of one hop.

    Args:
        audio: (S,) float in [-1, 1] at 16 kHz. width: F, must be 160.
    Returns:
        (T, 160) float32 at 100 Hz with T = num_fbank_frames(S): up to 80 samples at the end are left out, or zeros are added.
    Raises:
        DataError: `audio` is not one-dimensional or is shorter than half a hop, or another width is asked for.
    """
    frames = num_fbank_frames(len(audio))
    if audio.dim() != 1 or frames == 0 or width != HOP:
        raise DataError(f"`audio` must have the shape (S,) with at least {HOP // 2} samples, but has {tuple(audio.shape)}", cause="too_short")
    samples = audio.float()[: frames * HOP]
    return F.pad(samples, (0, frames * HOP - len(samples))).view(frames, HOP)


class Input(NamedTuple):
    """One kind of input. make: (audio (S,), F) -> (T, F) at 100 Hz; padding: its value past the end; silence: that of digital silence."""

    make: Callable[[Tensor, int], Tensor]
    padding: float
    silence: float

    def batch(self, audio: Tensor, lens: Tensor, width: int) -> tuple[Tensor, Tensor]:
        """Each utterance of a padded batch on its own valid samples.

        Args:
            audio: (N, S) float in [-1, 1] at 16 kHz. lens: (N,) valid samples. width: F.
        Returns:
            features (N, T, F) float32, padded; lens (N,) int64 frames.
        """
        rows = [self.make(row[:length], width) for row, length in zip(audio, lens.tolist())]
        features = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=self.padding)
        return features, torch.tensor([len(row) for row in rows], dtype=torch.int64, device=audio.device)


INPUTS = {"fbank": Input(fbank, LOG_EPSILON, SILENT_LOG_MEL), "samples": Input(sample_frames, 0.0, 0.0)}
"""By the name that an encoder has as its `reads`."""
