"""Settings of a training run."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from spear.bounds import above, at_least
from spear.errors import ConfigError
from spear.training.distributed import Device
from spear.training.optim.base import OptimizerConfig, ScheduleConfig
from spear.training.optim.eden import EdenConfig
from spear.training.optim.scaled_adam import ScaledAdamConfig

Precision = Literal["fp32", "bf16"]


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainingConfig:
    """How a module is trained; defaults are those of SPEAR Base (arXiv:2510.25955)."""

    max_steps: int = 400_000
    """Updates of the run."""
    precision: Precision = "bf16"
    """`bf16`: forward passes under autocast, weights in float32; `fp32`: everything in float32."""
    device: Device = "auto"
    """`auto`: CUDA where there is a GPU."""
    accumulation: int = 1
    """Batches per process and update."""
    log_every: int = 50
    """Updates between two records of training metrics."""
    validate_every: int = 3000
    """Updates between two validations; the last update is always validated."""
    save_every: int = 4000
    """Updates between two checkpoints; the last update is always saved."""
    keep_checkpoints: int = 10
    """Checkpoints kept, the last ones, beside the one or two that `export` reads. Each takes about 20 bytes per parameter."""
    average_period: int = 200
    """Updates between two snapshots of the running weight average."""
    reference_s: float = 600.0
    """Seconds of audio per update for which scheduled floats of the student were tuned; their batch count is seconds seen over this."""
    optimizer: OptimizerConfig = field(default_factory=ScaledAdamConfig)
    """Optimiser with its base learning rate. Gradients are those of the mean loss per target."""
    schedule: ScheduleConfig = field(default_factory=EdenConfig)
    """Factor on the learning rate over updates and hours of audio."""
    find_unused_parameters: bool = True
    """Several processes: allow parameters that a batch does not use, such as the head of a teacher of another domain."""
    num_threads: int | None = None
    """CPU threads per process; null leaves torch's choice. Results on the CPU may depend on it in the last bits."""

    def __post_init__(self) -> None:
        for name in ("max_steps", "accumulation", "log_every", "validate_every", "save_every", "keep_checkpoints", "average_period"):
            at_least(name, getattr(self, name), 1)
        above("reference_s", self.reference_s, 0)
        if self.num_threads is not None:
            at_least("num_threads", self.num_threads, 1)
        for name, value, choices in (("precision", self.precision, ("fp32", "bf16")), ("device", self.device, ("auto", "cpu", "cuda"))):
            if value not in choices:
                raise ConfigError(f"`{name}` must be one of {', '.join(choices)}, but is {value!r}")
