"""Settings of a training run."""

from __future__ import annotations

from dataclasses import dataclass, field

from spear.bounds import above, at_least
from spear.errors import ConfigError
from spear.training.distributed import Device
from spear.training.optim.base import OptimizerConfig, ScheduleConfig
from spear.training.optim.eden import EdenConfig
from spear.training.optim.scaled_adam import ScaledAdamConfig
from spear.training.parallel import Kind
from spear.training.precision import Precision
from spear.training.tracking import SINKS


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainingConfig:
    """How a module is trained; defaults are those of SPEAR Base (arXiv:2510.25955)."""

    max_steps: int = 400_000
    """Updates of the run."""
    precision: Precision = "bf16"
    """`bf16` and `fp16`: forward passes under autocast, weights in float32, for fp16 with a loss scale that adapts; `fp32`: all in float32."""
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
    max_skipped: int = 10
    """Updates of a run that may be left out because the loss or the gradient is not finite; one more ends it. Their batches are kept."""
    average_period: int = 200
    """Updates between two snapshots of the running weight average."""
    reference_s: float = 600.0
    """Seconds of audio per update for which scheduled floats of the student were tuned; their batch count is seconds seen over this."""
    optimizer: OptimizerConfig = field(default_factory=ScaledAdamConfig)
    """Optimiser with its base learning rate. Gradients are those of the mean loss per target."""
    schedule: ScheduleConfig = field(default_factory=EdenConfig)
    """Factor on the learning rate over updates and hours of audio."""
    parallel: Kind = "ddp"
    """Several processes: `ddp`, each holds everything; `fsdp`, weights, gradients and optimiser state are spread over them layer by layer."""
    recompute: bool = False
    """Keep only the inputs of the student's layers and compute the rest again in the backward pass: less memory, about a third more work."""
    compile: bool = False
    """Let `torch.compile` translate the student's layers, minutes at the start of a run. On a CPU it gains next to nothing; needs a C++ compiler
    there, and Triton on a GPU."""
    find_unused_parameters: bool | None = None
    """`ddp`: search every batch for parameters that it does not use, which takes time; null: only where student or objective may leave some
    without a gradient."""
    trackers: list[str] = field(default_factory=lambda: ["tensorboard"])
    """Who is told the metrics beside `metrics.jsonl`: `tensorboard`, `wandb`."""
    num_threads: int | None = None
    """CPU threads per process; null leaves torch's choice. Results on the CPU may depend on it in the last bits."""

    def __post_init__(self) -> None:
        at_least("max_skipped", self.max_skipped, 0)
        for name in self.trackers:
            if name not in SINKS:
                raise ConfigError(f"`trackers` must be among {', '.join(SINKS)}, but has {name!r}")
        for name in ("max_steps", "accumulation", "log_every", "validate_every", "save_every", "keep_checkpoints", "average_period"):
            at_least(name, getattr(self, name), 1)
        above("reference_s", self.reference_s, 0)
        if self.compile and (self.recompute or self.parallel != "ddp"):
            other = "recompute" if self.recompute else f"parallel: {self.parallel}"
            raise ConfigError(f"`compile` must be false with `{other}`: the two do not go together")
        if self.num_threads is not None:
            at_least("num_threads", self.num_threads, 1)
        choices_of = {"precision": ("fp32", "bf16", "fp16"), "device": ("auto", "cpu", "cuda"), "parallel": ("ddp", "fsdp")}
        for name, choices in choices_of.items():
            value = getattr(self, name)
            if value not in choices:
                raise ConfigError(f"`{name}` must be one of {', '.join(choices)}, but is {value!r}")
