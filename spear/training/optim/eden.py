"""Eden and Eden2: learning rates that fall with a power of the updates made and the audio seen.

Source: the schedules of the Zipformer (arXiv:2310.11230, section 3.5) as SPEAR (arXiv:2510.25955) uses them, with hours of
audio in place of epochs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from spear.bounds import above, at_least, within
from spear.training.optim.base import Schedule, ScheduleConfig


@dataclass(frozen=True, kw_only=True, slots=True)
class EdenConfig(ScheduleConfig):
    """Eden: ``((b^2 + B^2) / B^2)^-0.25 * ((h^2 + H^2) / H^2)^-0.25 * warmup(b)``, b updates and h hours of audio."""

    FITS_ANY_LENGTH: ClassVar[bool] = True

    lr_steps: float = 7500.0
    """B, updates after which the rate begins to fall."""
    lr_hours: float = 75000.0
    """H, hours of audio after which the rate begins to fall."""
    warmup_steps: float = 500.0
    """Updates of linear warm-up."""
    warmup_start: float = 0.5
    """Factor at update 0."""

    def __post_init__(self) -> None:
        above("lr_steps", self.lr_steps, 0)
        above("lr_hours", self.lr_hours, 0)
        at_least("warmup_steps", self.warmup_steps, 0)
        within("warmup_start", self.warmup_start, 0, 1)

    def lr_factor(self, step: int, hours: float) -> float:
        """Factor on the base learning rate at update `step` after `hours` of audio."""
        by_step = ((step**2 + self.lr_steps**2) / self.lr_steps**2) ** -0.25
        by_hours = ((hours**2 + self.lr_hours**2) / self.lr_hours**2) ** -0.25
        return float(by_step * by_hours * warmup(step, self.warmup_steps, self.warmup_start))

    def build(self, max_steps: int) -> Schedule:
        """The schedule; it does not depend on the length of the run."""
        return self


@dataclass(frozen=True, kw_only=True, slots=True)
class Eden2Config(ScheduleConfig):
    """Eden2: ``((b^2 + B^2) / B^2)^-0.5 * warmup(b)``, blind to the amount of audio."""

    FITS_ANY_LENGTH: ClassVar[bool] = True

    lr_steps: float = 7500.0
    """B, updates after which the rate begins to fall."""
    warmup_steps: float = 500.0
    """Updates of linear warm-up."""
    warmup_start: float = 0.5
    """Factor at update 0."""

    def __post_init__(self) -> None:
        above("lr_steps", self.lr_steps, 0)
        at_least("warmup_steps", self.warmup_steps, 0)
        within("warmup_start", self.warmup_start, 0, 1)

    def lr_factor(self, step: int, hours: float) -> float:
        """Factor on the base learning rate at update `step`; `hours` has no effect."""
        return float(((step**2 + self.lr_steps**2) / self.lr_steps**2) ** -0.5 * warmup(step, self.warmup_steps, self.warmup_start))

    def build(self, max_steps: int) -> Schedule:
        """The schedule; it does not depend on the length of the run."""
        return self


def warmup(step: float, warmup_steps: float, start: float) -> float:
    """Linear from `start` at step 0 to 1 at `warmup_steps`, then 1."""
    return 1.0 if step >= warmup_steps else start + (1.0 - start) * step / warmup_steps
