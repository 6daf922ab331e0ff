"""Settings of the Zipformer encoder."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from spear.errors import ConfigError
from spear.models.base import StudentConfig
from spear.models.zipformer.scheduled_float import Schedule, schedule

if TYPE_CHECKING:
    from spear.models.zipformer.encoder import ZipformerEncoder

PerStack = int | tuple[int, ...]
_PER_STACK = (
    "num_encoder_layers",
    "encoder_dim",
    "encoder_unmasked_dim",
    "feedforward_dim",
    "num_heads",
    "query_head_dim",
    "pos_head_dim",
    "value_head_dim",
    "cnn_module_kernel",
)


@dataclass(frozen=True, kw_only=True, slots=True)
class StackConfig:
    """What one stack is made of; see ZipformerConfig for the words."""

    downsampling: int
    num_layers: int
    dim: int
    unmasked_dim: int
    feedforward_dim: int
    num_heads: int
    query_head_dim: int
    pos_head_dim: int
    value_head_dim: int
    kernel: int
    pos_dim: int
    causal: bool
    dropout: Schedule | float
    warmup_begin: float = 0.0
    """Batch count at which the first layer starts to be used more often."""
    warmup_end: float = 1.0
    """Batch count at which the last layer is used fully."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ZipformerConfig(StudentConfig):
    """Zipformer (arXiv 2310.11230); the defaults are SPEAR Base (arXiv 2510.25955, 93.3 M parameters).

    Options of a stack are one number for all stacks or a list with one number per stack.
    """

    num_mel_bins: int = 128
    """Bins of the log-mel input."""
    conv_channels: tuple[int, ...] = (8, 32, 128)
    """Channels of the three convolutions of the front end."""
    downsampling_factor: tuple[int, ...] = (1, 2, 4, 8, 4, 2, 1)
    """Reduction of the frame rate inside each stack, relative to 50 Hz; its length is the number of stacks."""
    num_encoder_layers: int | tuple[int, ...] = (1, 2, 3, 3, 1, 1, 1)
    """Layers of each stack."""
    encoder_dim: int | tuple[int, ...] = 512
    """Width of each stack."""
    encoder_unmasked_dim: int | tuple[int, ...] = 256
    """Channels of each stack that the feature mask never hides."""
    feedforward_dim: int | tuple[int, ...] = 1536
    """Hidden width of the second feed-forward module; the first has 3/4 and the third 5/4 of it."""
    num_heads: int | tuple[int, ...] = 8
    """Attention heads."""
    query_head_dim: int | tuple[int, ...] = 32
    """Width of queries and keys per head."""
    pos_head_dim: int | tuple[int, ...] = 4
    """Width of the positional queries per head."""
    value_head_dim: int | tuple[int, ...] = 12
    """Width of values per head."""
    cnn_module_kernel: int | tuple[int, ...] = (31, 31, 15, 15, 15, 31, 31)
    """Length of the depthwise filters over time, odd."""
    pos_dim: int = 48
    """Width of the positional encoding, even."""
    output_downsampling_factor: int = 1
    """1 for features at 50 Hz, 2 for 25 Hz."""
    causal: bool = False
    """Chunk-causal convolutions and chunk masks, for streaming."""
    chunk_size: int | tuple[int, ...] = (8,)
    """Frames of a chunk at 50 Hz, -1 for no chunks; training draws one per batch, evaluation takes the first."""
    left_context_frames: int | tuple[int, ...] = (128,)
    """Frames at 50 Hz before a chunk that it may see, -1 for all; training draws one per batch, evaluation takes the first."""
    dropout_start: float = 0.3
    """Dropout at batch count 0."""
    dropout_end: float = 0.1
    """Dropout from `dropout_batches` on."""
    dropout_batches: float = 20000.0
    """Batch count at which dropout has reached its final value."""
    warmup_batches: float = 4000.0
    """Batch count until which the layers are brought in one after another."""
    schedule_offset: float = 0.0
    """Added to the batch count of all schedules; a short run takes a large one and keeps the settings of late training."""
    feature_mask: bool = True
    """Hide the channels beyond `encoder_unmasked_dim` of random items in training."""

    def __post_init__(self) -> None:
        _check_front(self)
        stacks = self.stacks()
        for stack in stacks:
            _check_stack(stack)
        if self.causal:
            _check_chunks(self.chunk_sizes, self.left_contexts, stacks)

    @property
    def chunk_sizes(self) -> tuple[int, ...]:
        """`chunk_size` as a tuple."""
        return (self.chunk_size,) if isinstance(self.chunk_size, int) else tuple(self.chunk_size)

    @property
    def left_contexts(self) -> tuple[int, ...]:
        """`left_context_frames` as a tuple."""
        return (self.left_context_frames,) if isinstance(self.left_context_frames, int) else tuple(self.left_context_frames)

    @property
    def dropout(self) -> Schedule:
        """Dropout over the batch count; 0 in eval mode."""
        return schedule((0, self.dropout_start), (self.dropout_batches, self.dropout_end))

    def stacks(self) -> list[StackConfig]:
        """One StackConfig per stack.

        Raises:
            ConfigError: an option has neither one number nor one per stack.
        """
        count = len(self.downsampling_factor)
        columns = {name: per_stack(name, getattr(self, name), count) for name in _PER_STACK}
        return [
            StackConfig(
                downsampling=self.downsampling_factor[i],
                num_layers=columns["num_encoder_layers"][i],
                dim=columns["encoder_dim"][i],
                unmasked_dim=columns["encoder_unmasked_dim"][i],
                feedforward_dim=columns["feedforward_dim"][i],
                num_heads=columns["num_heads"][i],
                query_head_dim=columns["query_head_dim"][i],
                pos_head_dim=columns["pos_head_dim"][i],
                value_head_dim=columns["value_head_dim"][i],
                kernel=columns["cnn_module_kernel"][i],
                pos_dim=self.pos_dim,
                causal=self.causal,
                dropout=self.dropout,
                warmup_begin=self.warmup_batches * (i + 1) / (count + 1),
                warmup_end=self.warmup_batches * (i + 2) / (count + 1),
            )
            for i in range(count)
        ]

    def grid(self) -> int:
        """See StudentConfig; twice the least common multiple of all reductions of the frame rate, and of a causal encoder's chunk."""
        chunk = self.chunk_sizes[0] if self.causal and self.chunk_sizes[0] > 0 else 1
        return 2 * math.lcm(*self.downsampling_factor, self.output_downsampling_factor, chunk)

    def build(self) -> ZipformerEncoder:
        """Make the encoder with fresh weights drawn from torch's global generator."""
        from spear.models.zipformer.encoder import ZipformerEncoder  # the encoder's file needs this one

        return ZipformerEncoder(self)


def per_stack(name: str, value: PerStack, count: int) -> tuple[int, ...]:
    """`value` as one number for each of `count` stacks.

    Raises:
        ConfigError: a list of another length.
    """
    values = (value,) if isinstance(value, int) else tuple(value)
    if len(values) not in (1, count):
        raise ConfigError(f"`{name}` must have 1 value or {count} (one per stack of `downsampling_factor`), but has {len(values)}")
    return values * count if len(values) == 1 else values


def _require(holds: bool, name: str, rule: str, value: object) -> None:
    if not holds:
        raise ConfigError(f"`{name}` must be {rule}, but is {value}")


def _check_front(config: ZipformerConfig) -> None:
    _require(config.num_mel_bins >= 7, "num_mel_bins", "at least 7", config.num_mel_bins)
    channels = config.conv_channels
    _require(len(channels) == 3 and min(channels) > 0, "conv_channels", "three positive numbers", list(channels))
    factors = config.downsampling_factor
    _require(len(factors) > 0 and min(factors) > 0, "downsampling_factor", "at least one positive number", list(factors))
    _require(config.output_downsampling_factor in (1, 2), "output_downsampling_factor", "1 or 2", config.output_downsampling_factor)
    _require(config.pos_dim > 0 and config.pos_dim % 2 == 0, "pos_dim", "even and positive", config.pos_dim)
    for name in ("dropout_start", "dropout_end"):
        _require(0.0 <= getattr(config, name) < 1.0, name, "at least 0 and below 1", getattr(config, name))
    for name in ("dropout_batches", "warmup_batches"):
        _require(getattr(config, name) > 0.0, name, "positive", getattr(config, name))
    _require(config.schedule_offset >= 0.0, "schedule_offset", "at least 0", config.schedule_offset)


def _check_stack(stack: StackConfig) -> None:
    for name in ("num_heads", "query_head_dim", "pos_head_dim", "value_head_dim"):
        _require(getattr(stack, name) > 0, name, "positive", getattr(stack, name))
    _require(stack.num_layers > 0, "num_encoder_layers", "positive", stack.num_layers)
    _require(stack.dim > 1, "encoder_dim", "at least 2", stack.dim)
    _require(stack.feedforward_dim > 1, "feedforward_dim", "at least 2", stack.feedforward_dim)
    _require(0 <= stack.unmasked_dim <= stack.dim, "encoder_unmasked_dim", f"between 0 and the stack's width {stack.dim}", stack.unmasked_dim)
    _require(stack.kernel > 0 and stack.kernel % 2 == 1, "cnn_module_kernel", "odd and positive", stack.kernel)


def _check_chunks(sizes: tuple[int, ...], contexts: tuple[int, ...], stacks: list[StackConfig]) -> None:
    _require(len(sizes) > 0 and all(s > 0 or s == -1 for s in sizes), "chunk_size", "positive or -1", list(sizes))
    _require(len(contexts) > 0 and all(c >= 0 or c == -1 for c in contexts), "left_context_frames", "at least 0, or -1", list(contexts))
    for size in sizes:
        if size == -1:
            continue
        for stack in stacks:
            _require(size % stack.downsampling == 0, "chunk_size", f"a multiple of the downsampling factor {stack.downsampling}", size)
            reach = stack.kernel // 2 * stack.downsampling
            for context in contexts:
                seen = size * max(1, context // size)
                _require(context == -1 or seen >= reach, "left_context_frames", f"at least the {reach} frames a convolution sees", context)
