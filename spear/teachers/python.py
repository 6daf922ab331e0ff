"""Your own code as a teacher: a function that makes a module, named by its dotted path."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from spear.errors import ConfigError
from spear.files import sha256_file
from spear.teachers.base import Teacher, TeacherConfig, verified
from spear.types import TeacherOutput

NUMBERS = {"sample_rate": int, "frame_rate_hz": float, "first_frame_s": float, "dim": int}


@dataclass(frozen=True, kw_only=True, slots=True)
class PythonConfig(TeacherConfig):
    """A module that a function of yours makes.

    It must be an ``nn.Module`` with the attributes `sample_rate`, `frame_rate_hz`, `first_frame_s` and `dim` (and `num_layers`, else 1), the
    method ``num_frames(samples) -> int``, and ``forward(audio (N, S), lens (N,)) -> (features (N, T, D), lens (N,))``.
    """

    factory: str
    """``package.module:function`` that can be imported; it is called with `options`."""
    options: dict[str, Any] = field(default_factory=dict)
    """Keyword arguments of the function: numbers, text, lists, mappings."""
    depends_on_padding: bool = True
    """Whether padding may change the output; with false it is measured on one signal, with true equal lengths are fed together."""

    def build(self, folder: Path | None = None) -> Teacher:
        """See TeacherConfig.build; `folder` plays no part: give your function absolute paths."""
        del folder
        function = self.function()
        try:
            module = function(**self.options)
        except (TypeError, ValueError, OSError, RuntimeError, KeyError, ImportError) as error:
            raise ConfigError(f"`factory` {self.factory} fails with `options` {self.options}: {' '.join(str(error).split())}") from error
        return verified(PythonTeacher(self, module, source_of(function)))

    def function(self) -> Callable[..., Any]:
        """What `factory` names.

        Raises:
            ConfigError: it cannot be imported or called.
        """
        name, _, attribute = self.factory.partition(":")
        if not name or not attribute:
            raise ConfigError(f"`factory` must be package.module:function, but is {self.factory!r}")
        try:
            found = getattr(importlib.import_module(name), attribute)
        except (ImportError, AttributeError) as error:
            raise ConfigError(f"`factory` {self.factory} cannot be imported: {error}") from error
        if not callable(found):
            raise ConfigError(f"`factory` {self.factory} must be a function, but is a {type(found).__name__}")
        function: Callable[..., Any] = found
        return function


def source_of(function: Callable[..., Any]) -> str:
    """SHA-256 of the file in which a function is written; empty where there is none."""
    try:
        path = inspect.getsourcefile(function)
    except TypeError:
        path = None
    return sha256_file(Path(path)) if path else ""


class PythonTeacher(Teacher):
    """A user's module behind the contract; its fingerprint covers weights, options and the file of the function."""

    def __init__(self, config: PythonConfig, module: Any, source: str) -> None:
        if not isinstance(module, nn.Module):
            raise ConfigError(f"`factory` {config.factory} must give an nn.Module, but gives a {type(module).__name__}")
        missing = [name for name in (*NUMBERS, "num_frames") if not hasattr(module, name)]
        if missing:
            raise ConfigError(f"what `factory` {config.factory} gives must have {missing[0]}, but has not")
        try:
            numbers: dict[str, Any] = {name: kind(getattr(module, name)) for name, kind in NUMBERS.items()}
            num_layers = int(getattr(module, "num_layers", 1))
        except (TypeError, ValueError) as error:
            raise ConfigError(f"{', '.join(NUMBERS)} of what `factory` {config.factory} gives must be numbers: {error}") from error
        super().__init__(
            name=config.factory,
            **numbers,
            num_layers=num_layers,
            depends_on_padding=config.depends_on_padding,
            settings={"type": "python", "factory": config.factory, "options": config.options, "source": source, **numbers},
        )
        self.model = module

    def num_frames(self, samples: int) -> int:
        """See Teacher.num_frames; the module's own rule."""
        found: Any = self.model
        return max(0, int(found.num_frames(samples)))

    def encode(self, audio: Tensor, lens: Tensor) -> TeacherOutput:
        """See Teacher.encode."""
        found = self.model(audio, lens)
        if not (isinstance(found, tuple) and len(found) == 2 and isinstance(found[0], Tensor) and found[0].ndim == 3):
            raise ConfigError(f"{self.name} must give (features (N, T, D), lens (N,)), but gives {type(found).__name__}")
        return TeacherOutput(found[0], torch.as_tensor(found[1]))
