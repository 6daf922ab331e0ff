"""Encoders of equal layers at one frame rate, behind the Zipformer's front end: what the ablations of the encoder share."""

from __future__ import annotations

import abc
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from spear.errors import ConfigError
from spear.models.base import FBANK_FIRST_FRAME_S, Encoder, StudentConfig
from spear.models.rotary import rotation
from spear.models.zipformer.chunks import padding_mask
from spear.models.zipformer.scheduled_float import set_batch_count
from spear.models.zipformer.subsampling import MIN_FRAMES, Conv2dSubsampling
from spear.types import EncoderOutput


@dataclass(frozen=True, kw_only=True, slots=True)
class UniformConfig(StudentConfig):
    """Sizes that a Transformer and a Conformer share."""

    num_mel_bins: int = 128
    """Bins of the log-mel input."""
    conv_channels: tuple[int, ...] = (8, 32, 128)
    """Channels of the three convolutions of the front end."""
    num_layers: int = 12
    """Layers."""
    dim: int = 768
    """Width of the frames."""
    num_heads: int = 12
    """Attention heads; `dim` is a multiple of twice their number."""
    feedforward_dim: int = 3328
    """Hidden width of a feed-forward module."""
    dropout: float = 0.1
    """Dropout of attention weights, hidden activations and branches."""
    schedule_offset: float = 0.0
    """Added to the batch count of the front end's schedules, as in a Zipformer."""

    def __post_init__(self) -> None:
        _require(self.num_mel_bins >= 7, "num_mel_bins", "at least 7", self.num_mel_bins)
        channels = self.conv_channels
        _require(len(channels) == 3 and min(channels) > 0, "conv_channels", "three positive numbers", list(channels))
        for name in ("num_layers", "dim", "num_heads", "feedforward_dim"):
            _require(getattr(self, name) > 0, name, "positive", getattr(self, name))
        _require(self.dim % (2 * self.num_heads) == 0, "dim", f"a multiple of {2 * self.num_heads} (twice `num_heads`)", self.dim)
        _require(0.0 <= self.dropout < 1.0, "dropout", "at least 0 and below 1", self.dropout)
        _require(self.schedule_offset >= 0.0, "schedule_offset", "at least 0", self.schedule_offset)


def _require(holds: bool, name: str, rule: str, value: object) -> None:
    if not holds:
        raise ConfigError(f"`{name}` must be {rule}, but is {value}")


class UniformLayer(nn.Module, abc.ABC):
    """One of the equal layers."""

    training_unit = True  # recomputed and spread over processes as one

    @abc.abstractmethod
    def forward(self, x: Tensor, positions: tuple[Tensor, Tensor], visible: Tensor | None, padding: Tensor | None) -> tuple[Tensor, Tensor]:
        """One layer.

        Args:
            x: (N, T, D). positions: see `spear.models.rotary.rotation`. visible: (N, 1, 1, T) bool, True at keys that exist;
            None: all do. padding: (N, T) bool, its opposite.
        Returns:
            (N, T, D) of the layer, and of its last feed-forward module before dropout, scale and addition.
        """


class UniformEncoder(Encoder):
    """Log-mels at 100 Hz to features at 50 Hz.

    The front end is the Zipformer's `Conv2dSubsampling`, so that a comparison of students is one of their layers alone.

    Args:
        config: sizes. layers: the equal layers. norm: applied to the output of the last one.
    """

    min_fbank_frames = MIN_FRAMES
    sample_rate = 16000
    frame_rate_hz = 50.0
    first_frame_s = FBANK_FIRST_FRAME_S + 0.04
    taps = ("block_output", "ffn_pre_residual")
    front_end = ("encoder_embed",)
    uses_all = True

    def __init__(self, config: UniformConfig, layers: list[UniformLayer], norm: nn.Module) -> None:
        super().__init__()
        self.config = config
        self.num_mel_bins = config.num_mel_bins
        self.dim = config.dim
        self.num_layers = config.num_layers
        self.layer_dims = [config.dim] * config.num_layers
        self.mask_emb = nn.Parameter(torch.empty(config.num_mel_bins).normal_())
        self.encoder_embed = Conv2dSubsampling(config.num_mel_bins, config.dim, tuple(config.conv_channels), config.dropout)
        self.layers = nn.ModuleList(layers)
        self.norm = norm

    def forward(self, features: Tensor, lens: Tensor) -> EncoderOutput:
        """Encode a padded batch.

        Args:
            features: (N, T, F) log-mels at 100 Hz, padded with LOG_EPSILON. lens: (N,) int64 valid frames.
        Returns:
            features (N, T50, D); hidden_states: (N, T50, D) of every layer, at the tap. Padded frames hold values without meaning.
        Raises:
            DataError: wrong number of bins (cause ``shape``), or an item of less than 9 frames (cause ``too_short``).
        """
        self.check_input(features, lens)
        x, lens = self.encoder_embed(features, lens)
        padding = padding_mask(lens, x.shape[1])
        visible = None if padding is None else ~padding[:, None, None, :]
        positions = rotation(x.shape[1], self.dim // self.config.num_heads, x.device)
        hidden = []
        for layer in self.layers:
            x, branch = layer(x, positions, visible, padding)
            hidden.append({"block_output": x, "ffn_pre_residual": branch}[self.tap])
        return EncoderOutput(self.norm(x), lens, tuple(hidden))

    def set_batch_count(self, count: float) -> None:
        """Move the front end's schedules to `count` plus the offset of the config."""
        set_batch_count(self, count + self.config.schedule_offset)
