"""The tri-stage schedule of wav2vec 2.0 fine-tuning and SpidR: linear warm-up, hold, exponential decay."""

from __future__ import annotations

import math
from dataclasses import dataclass

from spear.bounds import within
from spear.errors import ConfigError
from spear.training.optim.base import Schedule, ScheduleConfig
from spear.training.optim.eden import warmup


@dataclass(frozen=True, kw_only=True, slots=True)
class TristageConfig(ScheduleConfig):
    """Shares of the run, and the factors at its ends. Source: arXiv:2006.11477, section 4.3."""

    warmup: float = 0.1
    """Share of the updates in warm-up."""
    hold: float = 0.4
    """Share of the updates at the base rate; the rest decays."""
    start: float = 0.01
    """Factor at update 0."""
    final: float = 0.05
    """Factor at the last update."""

    def __post_init__(self) -> None:
        within("warmup", self.warmup, 0, 1)
        within("hold", self.hold, 0, 1)
        within("start", self.start, 0, 1)
        if self.warmup + self.hold > 1 + 1e-9:
            raise ConfigError(f"`warmup` + `hold` must be at most 1, but is {self.warmup + self.hold:g}")
        if not 0 < self.final <= 1:
            raise ConfigError(f"`final` must be above 0 and at most 1, but is {self.final:g}")

    def build(self, max_steps: int) -> Schedule:
        """The schedule of a run of `max_steps` updates."""
        return Tristage(self, max_steps)


class Tristage:
    """Tri-stage over a fixed number of updates."""

    def __init__(self, config: TristageConfig, max_steps: int) -> None:
        self.config = config
        self.warmup_steps = config.warmup * max_steps
        self.decay_start = (config.warmup + config.hold) * max_steps
        self.decay_steps = max(max_steps - self.decay_start, 1e-9)

    def lr_factor(self, step: int, hours: float) -> float:
        """Factor on the base learning rate at update `step`; `hours` has no effect."""
        if step <= self.decay_start:
            return warmup(step, self.warmup_steps, self.config.start)
        done = min((step - self.decay_start) / self.decay_steps, 1.0)
        return math.exp(math.log(self.config.final) * done)
