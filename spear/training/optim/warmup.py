"""Linear warm-up followed by a constant rate, a linear decay (HuBERT, WavLM) or half a cosine."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from spear.bounds import at_least, within
from spear.training.optim.base import Schedule, ScheduleConfig
from spear.training.optim.eden import warmup


@dataclass(frozen=True, kw_only=True, slots=True)
class ConstantConfig(ScheduleConfig):
    """Linear warm-up from 0, then the base rate."""

    FITS_ANY_LENGTH: ClassVar[bool] = True

    warmup_steps: int = 0
    """Updates of warm-up."""

    def __post_init__(self) -> None:
        at_least("warmup_steps", self.warmup_steps, 0)

    def lr_factor(self, step: int, hours: float) -> float:
        """Factor on the base learning rate at update `step`; `hours` has no effect."""
        return warmup(step, self.warmup_steps, 0.0)

    def build(self, max_steps: int) -> Schedule:
        """The schedule; it does not depend on the length of the run."""
        return self


@dataclass(frozen=True, kw_only=True, slots=True)
class LinearConfig(ScheduleConfig):
    """Linear warm-up from 0, then linear decay. Default warm-up as in HuBERT (arXiv:2106.07447, section IV-C)."""

    warmup: float = 0.08
    """Share of the updates in warm-up."""
    final: float = 0.0
    """Factor at the last update."""

    def __post_init__(self) -> None:
        within("warmup", self.warmup, 0, 1)
        within("final", self.final, 0, 1)

    def build(self, max_steps: int) -> Schedule:
        """The schedule of a run of `max_steps` updates."""
        return WarmupDecay(self.warmup, self.final, max_steps, cosine=False)


@dataclass(frozen=True, kw_only=True, slots=True)
class CosineConfig(ScheduleConfig):
    """Linear warm-up from 0, then half a cosine (arXiv:1608.03983 without restarts)."""

    warmup: float = 0.08
    """Share of the updates in warm-up."""
    final: float = 0.0
    """Factor at the last update."""

    def __post_init__(self) -> None:
        within("warmup", self.warmup, 0, 1)
        within("final", self.final, 0, 1)

    def build(self, max_steps: int) -> Schedule:
        """The schedule of a run of `max_steps` updates."""
        return WarmupDecay(self.warmup, self.final, max_steps, cosine=True)


class WarmupDecay:
    """Linear warm-up, then a decay to `final` at the last update.

    Args:
        share: of the updates in warm-up. final: factor at the end. max_steps: length of the run. cosine: else linear.
    """

    def __init__(self, share: float, final: float, max_steps: int, *, cosine: bool) -> None:
        self.warmup_steps = share * max_steps
        self.decay_steps = max(max_steps - self.warmup_steps, 1e-9)
        self.final, self.cosine = final, cosine

    def lr_factor(self, step: int, hours: float) -> float:
        """Factor on the base learning rate at update `step`; `hours` has no effect."""
        if step < self.warmup_steps:
            return step / self.warmup_steps
        left = 1.0 - min((step - self.warmup_steps) / self.decay_steps, 1.0)
        if self.cosine:
            left = 0.5 * (1.0 - math.cos(math.pi * left))
        return self.final + (1.0 - self.final) * left
