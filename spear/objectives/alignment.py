"""Teacher frames to student frames, from declared rates and times, never from shapes."""

from __future__ import annotations

from fractions import Fraction
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from spear.errors import ConfigError
from spear.types import IGNORE, FrameSpec, TokenSpec

Align = Literal["index", "time", "interpolate"]
MAX_DENOMINATOR = 1000


class FrameMap(NamedTuple):
    """Which teacher frames belong to student frame t: ``floor(t * ratio + offset) + j`` for j in 0..group-1.

    ratio: teacher frames per student frame, exact. group: teacher frames predicted by each student frame.
    offset: in teacher frames, added before the floor. interpolated: each is the one before a point in time, and counts together
    with the one after it (`upper`), by their distances from that point (`share`).
    """

    ratio: Fraction
    group: int
    offset: Fraction
    interpolated: bool = False

    def indices(self, num_frames: int, *, upper: bool = False, device: torch.device | None = None) -> Tensor:
        """(T, group) int64 teacher frame of each student frame; may lie outside the teacher's length.

        Args:
            upper: take the frame after each point instead of the one before it; the same where the point is a frame's centre.
            device: where they are computed; None: the CPU.
        """
        units, unit = self._points(num_frames, device)
        first = torch.div(units + (unit - 1 if upper else 0), unit, rounding_mode="floor")
        return first[:, None] + torch.arange(self.group, device=device)

    def share(self, num_frames: int, device: torch.device | None = None) -> Tensor:
        """(T,) float32 in [0, 1): how much the frame after a point counts, its distance from the frame before it; that one has the rest."""
        units, unit = self._points(num_frames, device)
        return (units % unit).double().div(unit).float()

    def _points(self, num_frames: int, device: torch.device | None) -> tuple[Tensor, int]:
        """t * ratio + offset of every student frame, (T,) int64 in units of one over the second value."""
        p, q = self.ratio.numerator, self.ratio.denominator
        a, b = self.offset.numerator, self.offset.denominator
        return torch.arange(num_frames, dtype=torch.int64, device=device) * p * b + a * q, q * b


def frame_map(spec: TokenSpec | FrameSpec, frame_rate_hz: float, first_frame_s: float, align: Align) -> FrameMap:
    """How one teacher's token frames meet the student's frames.

    ``index`` (the paper): student frame t takes teacher frames floor(t*r) .. +ceil(r)-1 with r the ratio of the rates, so r = 2
    stacks two frames, r = 1/2 repeats each. ``time``: the group whose centre is nearest to the student frame's centre.
    ``interpolate``: a group of points centred there, one teacher frame apart, each between two teacher frames.

    Args:
        spec: rate (Hz) and first-frame time (s) of the tokens. frame_rate_hz, first_frame_s: of the student.
    Raises:
        ConfigError: a rate is not positive, or their ratio is no fraction with a denominator up to 1000.
    """
    if spec.frame_rate_hz <= 0 or frame_rate_hz <= 0:
        raise ConfigError(f"frame rates must be positive, but are {spec.frame_rate_hz} Hz (teacher) and {frame_rate_hz} Hz (student)")
    ratio = Fraction(spec.frame_rate_hz / frame_rate_hz).limit_denominator(MAX_DENOMINATOR)
    if abs(float(ratio) * frame_rate_hz - spec.frame_rate_hz) > 1e-9 * spec.frame_rate_hz:
        raise ConfigError(f"the ratio of {spec.frame_rate_hz} Hz to {frame_rate_hz} Hz must be a fraction with a denominator up to {MAX_DENOMINATOR}")
    group = max(1, -(-ratio.numerator // ratio.denominator))
    if align == "index":
        return FrameMap(ratio, group, Fraction(0))
    shift = Fraction((first_frame_s - spec.first_frame_s) * spec.frame_rate_hz).limit_denominator(MAX_DENOMINATOR)
    first = shift - Fraction(group - 1, 2)
    return FrameMap(ratio, group, first, interpolated=True) if align == "interpolate" else FrameMap(ratio, group, first + Fraction(1, 2))


def align_tokens(tokens: Tensor, lens: Tensor, frames: FrameMap, student_lens: Tensor, num_frames: int, *, upper: bool = False) -> Tensor:
    """Targets of every student frame.

    Args:
        tokens: (N, T_teacher, C) int64 at the teacher's rate, IGNORE past its length. lens: (N,) valid teacher frames.
        frames: the map of the two rates. student_lens: (N,) valid student frames. num_frames: T, student frames of the batch.
        upper: see `FrameMap.indices`.
    Returns:
        (N, T, group * C) int64, frame order then codebook order; IGNORE beyond either length.
    """
    n, t_teacher, c = tokens.shape
    if t_teacher == 0:
        return tokens.new_full((n, num_frames, frames.group * c), IGNORE)
    index = frames.indices(num_frames, upper=upper, device=tokens.device)  # (T, group)
    found = tokens[:, index.clamp(0, t_teacher - 1).flatten()].reshape(n, num_frames, frames.group, c)
    valid = (index >= 0) & (index < lens[:, None, None])  # (N, T, group)
    valid = valid & (torch.arange(num_frames, device=tokens.device)[:, None] < student_lens[:, None, None])
    return torch.where(valid[..., None], found, IGNORE).reshape(n, num_frames, frames.group * c)
