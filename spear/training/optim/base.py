"""The families of optimisers and learning-rate schedules, and the parameter groups they share."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

from torch import nn
from torch.optim import Optimizer

from spear.errors import ConfigError
from spear.registry import Registry


@dataclass(frozen=True, kw_only=True, slots=True)
class OptimizerConfig(Registry):
    """Settings of an optimiser; the table of optimisers."""

    TABLE: ClassVar[dict[str, str]] = {
        "scaled_adam": "spear.training.optim.scaled_adam:ScaledAdamConfig",
        "adamw": "spear.training.optim.adamw:AdamWConfig",
    }

    def build(self, module: nn.Module) -> Optimizer:
        """Make the optimiser of all parameters of `module` that need a gradient, on the devices they are on."""
        raise NotImplementedError


class Schedule(Protocol):
    """A learning-rate schedule: a pure function of progress, so a resumed run needs no schedule state."""

    def lr_factor(self, step: int, hours: float) -> float:
        """The factor on the base learning rate.

        Args:
            step: number of the update, counted from 1. hours: hours of audio seen, that of this update included.
        """


@dataclass(frozen=True, kw_only=True, slots=True)
class ScheduleConfig(Registry):
    """Settings of a schedule; the table of schedules."""

    TABLE: ClassVar[dict[str, str]] = {
        "eden": "spear.training.optim.eden:EdenConfig",
        "eden2": "spear.training.optim.eden:Eden2Config",
        "tristage": "spear.training.optim.tristage:TristageConfig",
        "constant": "spear.training.optim.warmup:ConstantConfig",
        "linear": "spear.training.optim.warmup:LinearConfig",
        "cosine": "spear.training.optim.warmup:CosineConfig",
    }

    FITS_ANY_LENGTH: ClassVar[bool] = False
    """Whether the schedule is the same for a run of any length, so that a finished one can be lengthened."""

    def build(self, max_steps: int) -> Schedule:
        """Make the schedule of a run of `max_steps` updates."""
        raise NotImplementedError


def parameter_groups(module: nn.Module, lr: float) -> list[dict[str, Any]]:
    """Parameters that need a gradient, grouped by learning rate.

    Any submodule may carry a float attribute ``lr_scale``; a parameter's learning rate is `lr` times the scales of all
    modules it lies in. Groups come in the order of their first parameter.

    Args:
        module: whose parameters. lr: learning rate where no module sets a scale.
    Returns:
        one dict per distinct rate, with keys ``params`` and ``lr``.
    Raises:
        ConfigError: nothing to optimise.
    """
    groups: dict[float, list[nn.Parameter]] = {}
    seen: set[nn.Parameter] = set()
    for scale, parameter in _scaled(module, 1.0):
        if parameter.requires_grad and parameter not in seen:
            seen.add(parameter)
            groups.setdefault(lr * scale, []).append(parameter)
    if not groups:
        raise ConfigError("the module has no parameters that need a gradient")
    return [{"params": parameters, "lr": rate} for rate, parameters in groups.items()]


def _scaled(module: nn.Module, scale: float) -> Iterator[tuple[float, nn.Parameter]]:
    scale = scale * float(getattr(module, "lr_scale", 1.0))
    for parameter in module.parameters(recurse=False):
        yield scale, parameter
    for child in module.children():
        yield from _scaled(child, scale)


def check_betas(betas: tuple[float, ...]) -> None:
    """Raise ConfigError unless `betas` are two decay rates in [0, 1)."""
    if len(betas) != 2 or not all(0.0 <= beta < 1.0 for beta in betas):
        raise ConfigError(f"`betas` must be two numbers in [0, 1), but is {list(betas)}")
