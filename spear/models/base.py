"""The contract of a student's encoder: frames of 10 ms in, features of every layer out."""

from __future__ import annotations

import abc
import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from spear.errors import ConfigError, DataError
from spear.models.tracing import is_tracing
from spear.registry import Registry
from spear.types import EncoderOutput

FBANK_RATE_HZ = 100.0
"""Frames per second of the log-mels every encoder reads."""
FBANK_FIRST_FRAME_S = 0.005
"""Centre of the first log-mel frame in seconds."""
STEM_RATE_HZ = 50.0
HIDDEN_RATE_HZ = 50.0
"""Frames per second of the hidden states of every encoder."""
STEM_FRAMES = 7
"""Log-mel frames that the Zipformer's front end takes before its first output (its first output is centred on the fifth)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StudentConfig(Registry):
    """Settings of an encoder; the table of encoders."""

    TABLE: ClassVar[dict[str, str]] = {
        "zipformer": "spear.models.zipformer.config:ZipformerConfig",
        "conformer": "spear.models.conformer:ConformerConfig",
        "transformer": "spear.models.transformer:TransformerConfig",
        "conv_transformer": "spear.models.conv_transformer:ConvTransformerConfig",
    }

    def build(self) -> Encoder:
        """Make the encoder with fresh weights drawn from torch's global generator."""
        raise NotImplementedError

    def grid(self) -> int:
        """Log-mel frames after which the encoder groups its frames anew.

        Where a window of a long recording starts at a multiple of it, its frames are grouped as in the whole recording.
        """
        return 2


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


class Encoder(nn.Module, abc.ABC):
    """Log-mels, or samples, to frames of features.

    reads: kind of its input, a key of `spear.data.inputs.INPUTS`. num_mel_bins: F of the input. sample_rate: of the audio that the
    input comes from, in Hz. frame_rate_hz, first_frame_s: rate of the output and centre of its first frame. dim: width of the output.
    num_layers: number of hidden states, layer_dims: their widths. min_fbank_frames: shortest input, in frames of 10 ms. mask_emb: learned
    frame that stands for a masked one. taps: names of the points at which the layers can be read, see `read_at`. front_end: names of the
    submodules that turn the input into frames. position_parts: names of the submodules between front end and layers that tell frames where
    they are. trusts_input: the caller has checked the input, and the encoder must not wait for a GPU to do so. runs_all_layers: every batch
    runs every layer, also one that is skipped, as weights that are spread over processes want it. uses_all: every training batch gives all
    parameters a gradient where its output is used.
    """

    reads: str = "fbank"
    num_mel_bins: int
    sample_rate: int
    frame_rate_hz: float
    first_frame_s: float
    dim: int
    num_layers: int
    layer_dims: list[int]
    min_fbank_frames: int
    mask_emb: nn.Parameter
    taps: tuple[str, ...] = ("block_output",)
    tap: str = "block_output"
    front_end: tuple[str, ...] = ()
    position_parts: tuple[str, ...] = ()
    trusts_input: bool = False
    runs_all_layers: bool = False
    uses_all: bool = False

    @abc.abstractmethod
    def forward(self, features: Tensor, lens: Tensor) -> EncoderOutput:
        """Encode a padded batch.

        Args:
            features: (N, T, F) log-mels at 100 Hz, or what the encoder reads. lens: (N,) int64 valid frames.
        Raises:
            DataError: an item is shorter than `min_fbank_frames` (cause ``too_short``).
        """

    def output_frames(self, frames: int) -> int:
        """Exact number of frames of the output for `frames` of the input, 0 where that is too short.

        By default that of the Zipformer's front end, floor((frames - 7) / 2) at 50 Hz, rounded up at lower rates.
        """
        return -(-max(0, (frames - STEM_FRAMES) // 2) // round(STEM_RATE_HZ / self.frame_rate_hz))

    def mask_size(self, features: Tensor, lens: Tensor) -> tuple[Tensor, int, int]:
        """What masks are drawn over: valid frames (N,), all frames, channels; by default those of the input."""
        return lens, features.shape[1], features.shape[2]

    def forward_masked(self, features: Tensor, lens: Tensor, time: Tensor, channel: Tensor) -> EncoderOutput:
        """As `forward`, with frames hidden behind `mask_emb` and channels behind zeros.

        Args:
            time: (N, T) bool, channel: (N, F) bool, of the size that `mask_size` says.
        """
        features = features.masked_fill(channel[:, None, :], 0.0)
        output: EncoderOutput = self(torch.where(time[:, :, None], self.mask_emb.to(features.dtype), features), lens)
        return output

    def masked_share(self, time: Tensor, num_frames: int) -> Tensor:
        """(N, T) float32, the share of the masked under each of the `num_frames` output frames, for `time` as in `forward_masked`."""
        return share_under_frames(time, num_frames, self.frame_rate_hz, self.first_frame_s)

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
        if shortest >= least and lens.numel() > 0 and (lens.device.type == "cpu" or not (self.training or self.trusts_input)):
            shortest = min(shortest, int(lens.min()))
        if shortest < least:
            raise DataError(f"an input has {shortest} log-mel frames, but the encoder needs at least {least}", cause="too_short")

    def set_batch_count(self, count: float) -> None:
        """Tell the schedules of the regularisers how far training is; an encoder without schedules ignores it."""

    def read_at(self, tap: str) -> None:
        """Choose what `hidden_states` are from now on.

        Args:
            tap: ``block_output``, what a layer hands to the next one, or ``ffn_pre_residual``, what its (last) feed-forward module
            gives before it is added to the layer's stream.
        Raises:
            ConfigError: the encoder cannot be read there.
        """
        if tap not in self.taps:
            raise ConfigError(f"`tap` must be one of {', '.join(self.taps)} for a {type(self).__name__}, but is {tap!r}")
        self.tap = tap

    def in_front_end(self, name: str) -> bool:
        """Whether the parameter or buffer `name` belongs to the front end."""
        return name.startswith(tuple(f"{part}." for part in self.front_end))

    def in_positions(self, name: str) -> bool:
        """Whether the parameter or buffer `name` gives positions."""
        return name.startswith(tuple(f"{part}." for part in self.position_parts))
