"""Masks over log-mels: spans or blocks of frames, and spans of mel bins."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from spear.errors import ConfigError


@dataclass(frozen=True, kw_only=True, slots=True)
class MaskConfig:
    """How much of the input is hidden; the defaults are those of SPEAR's dual-domain models (about 49 % of the frames)."""

    time_prob: float = 0.65
    """Spans per frame times their length; in block mode the probability of each block."""
    time_length: int = 10
    """Frames (100 Hz) of a span or block."""
    channel_prob: float = 0.25
    """Spans per mel bin times their length."""
    channel_length: int = 20
    """Mel bins of a span."""
    min_time_masks: int = 2
    """Spans or blocks an item has at least, where it is long enough for them."""
    mode: Literal["span", "block"] = "span"
    """``span``: overlapping spans at random frames (wav2vec 2.0). ``block``: each block of a fixed grid or not."""

    def __post_init__(self) -> None:
        for name in ("time_prob", "channel_prob"):
            if not 0.0 <= getattr(self, name) <= 1.0:
                raise ConfigError(f"`{name}` must be between 0 and 1, but is {getattr(self, name)}")
        for name in ("time_length", "channel_length"):
            if getattr(self, name) < 1:
                raise ConfigError(f"`{name}` must be at least 1, but is {getattr(self, name)}")
        if self.min_time_masks < 0:
            raise ConfigError(f"`min_time_masks` must be at least 0, but is {self.min_time_masks}")
        if self.mode not in ("span", "block"):
            raise ConfigError(f"`mode` must be span or block, but is {self.mode}")


def draw_masks(config: MaskConfig, lens: Tensor, num_frames: int, num_bins: int, generator: torch.Generator | None) -> tuple[Tensor, Tensor]:
    """Draw the masks of a batch.

    Padding is never masked, an item is never masked as a whole, and an item shorter than a span is not masked.

    Args:
        lens: (N,) int64 valid frames at 100 Hz. num_frames: T. num_bins: F. generator: on the CPU; None for torch's global one.
    Returns:
        time (N, T) bool, channel (N, F) bool, both on the CPU.
    """
    lens = lens.cpu()
    bins = torch.full_like(lens, num_bins)
    channel = span_mask(bins, num_bins, config.channel_prob, config.channel_length, 0, generator)
    draw = span_mask if config.mode == "span" else block_mask
    time = draw(lens, num_frames, config.time_prob, config.time_length, config.min_time_masks, generator)
    return time, channel


def span_mask(lens: Tensor, size: int, prob: float, length: int, min_spans: int, generator: torch.Generator | None) -> Tensor:
    """Overlapping spans at distinct random starts (wav2vec 2.0, arXiv 2006.11477, section 3.1).

    The number of spans is ``floor(prob * len / length + U[0, 1))``, at least `min_spans`, at most ``len // length``.

    Args:
        lens: (N,) int64 valid positions, on the CPU. size: width of the result.
    Returns:
        (N, size) bool.
    """
    most = lens // length
    count = (prob * lens / length + torch.rand(lens.shape[0], generator=generator)).long()
    count = torch.minimum(count.clamp(min=min_spans), most)
    starts = torch.maximum(lens - length, count + 1).clamp(max=size)
    order = _shuffled_ranks(starts, size, generator)
    begins = (order < count[:, None]).long()
    seen = torch.nn.functional.pad(begins.cumsum(dim=1), (length, 0))
    covered = seen[:, length:] > seen[:, : seen.shape[1] - length]
    return _spare_one(covered & _valid(lens, size), lens)


def block_mask(lens: Tensor, size: int, prob: float, length: int, min_blocks: int, generator: torch.Generator | None) -> Tensor:
    """Each of the ``len // length`` whole blocks with probability `prob`, and at least `min_blocks` of them where there are as many.

    The remainder after the last whole block is never masked.

    Args:
        lens: (N,) int64 valid positions, on the CPU. size: width of the result.
    Returns:
        (N, size) bool.
    """
    blocks = lens // length
    width = -(-size // length)
    keys = torch.rand(lens.shape[0], width, generator=generator)
    keys = keys.masked_fill(~_valid(blocks, width), 2.0)
    ranks = keys.argsort(dim=1).argsort(dim=1)
    chosen = (keys < prob) | (ranks < torch.minimum(blocks, torch.tensor(min_blocks))[:, None])
    masked = chosen.repeat_interleave(length, dim=1)[:, :size]
    return _spare_one(masked & _valid(lens, size), lens)


def _valid(lens: Tensor, size: int) -> Tensor:
    return torch.arange(size, device=lens.device) < lens[:, None]


def _shuffled_ranks(counts: Tensor, size: int, generator: torch.Generator | None) -> Tensor:
    """Ranks (N, size) of the first `counts` (N,) positions in a random order; the others rank behind them."""
    keys = torch.rand(counts.shape[0], size, generator=generator)
    return keys.masked_fill(~_valid(counts, size), 2.0).argsort(dim=1).argsort(dim=1)


def _spare_one(mask: Tensor, lens: Tensor) -> Tensor:
    """Unmask the last valid position of items that are masked as a whole; never changes others."""
    whole = mask.sum(dim=1) >= lens
    last = torch.arange(mask.shape[1]) == (lens - 1)[:, None]
    return mask & ~(whole[:, None] & last)
