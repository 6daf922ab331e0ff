"""The contract of a student's encoder: log-mels in, features of every layer out."""

from __future__ import annotations

import abc
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn

from spear.errors import DataError
from spear.models.tracing import is_tracing
from spear.registry import Registry
from spear.types import EncoderOutput

FBANK_RATE_HZ = 100.0
"""Frames per second of the log-mels every encoder reads."""
FBANK_FIRST_FRAME_S = 0.005
"""Centre of the first log-mel frame in seconds."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StudentConfig(Registry):
    """Settings of an encoder; the table of encoders."""

    TABLE: ClassVar[dict[str, str]] = {
        "zipformer": "spear.models.zipformer.config:ZipformerConfig",
        "conformer": "spear.models.conformer:ConformerConfig",
        "transformer": "spear.models.transformer:TransformerConfig",
    }

    def build(self) -> Encoder:
        """Make the encoder with fresh weights drawn from torch's global generator."""
        raise NotImplementedError

    def grid(self) -> int:
        """Log-mel frames after which the encoder groups its frames anew.

        Where a window of a long recording starts at a multiple of it, its frames are grouped as in the whole recording.
        """
        return 2


class Encoder(nn.Module, abc.ABC):
    """Log-mels to frames of features.

    num_mel_bins: F of the input. sample_rate: of the audio the log-mels come from, in Hz. frame_rate_hz, first_frame_s: rate of
    the output and centre of its first frame. dim: width of the output. num_layers: number of hidden states, layer_dims: their
    widths. min_fbank_frames: shortest input. mask_emb: (F,) learned log-mel frame that stands for a masked one.
    """

    num_mel_bins: int
    sample_rate: int
    frame_rate_hz: float
    first_frame_s: float
    dim: int
    num_layers: int
    layer_dims: list[int]
    min_fbank_frames: int
    mask_emb: nn.Parameter

    @abc.abstractmethod
    def forward(self, features: Tensor, lens: Tensor) -> EncoderOutput:
        """Encode a padded batch.

        Args:
            features: (N, T, F) log-mels at 100 Hz. lens: (N,) int64 valid frames.
        Raises:
            DataError: an item is shorter than `min_fbank_frames` (cause ``too_short``).
        """

    def check_input(self, features: Tensor, lens: Tensor) -> None:
        """Refuse what `forward` cannot read; says nothing while the model is recorded for export.

        Raises:
            DataError: wrong number of bins (cause ``shape``), or an item shorter than `min_fbank_frames` (cause ``too_short``).
        """
        if is_tracing():
            return
        if features.ndim != 3 or features.shape[-1] != self.num_mel_bins:
            raise DataError(f"features must be (N, T, {self.num_mel_bins}), but are {tuple(features.shape)}", cause="shape")
        least, shortest = self.min_fbank_frames, features.shape[1]
        # reading lens from a GPU waits for it, which training cannot afford
        if shortest >= least and lens.numel() > 0 and (lens.device.type == "cpu" or not self.training):
            shortest = min(shortest, int(lens.min()))
        if shortest < least:
            raise DataError(f"an input has {shortest} log-mel frames, but the encoder needs at least {least}", cause="too_short")

    def set_batch_count(self, count: float) -> None:
        """Tell the schedules of the regularisers how far training is; an encoder without schedules ignores it."""
