"""The names that hearvalidator and heareval look up in TensorFlow while they run a PyTorch model; nothing computes."""

from __future__ import annotations

import importlib.machinery
from types import SimpleNamespace
from typing import Any

__spec__ = importlib.machinery.ModuleSpec("tensorflow", None)
__version__ = "0.0.0"
float32 = "float32"


class Module:
    """No PyTorch model is one."""


def _no_gpu(*_: Any, **__: Any) -> bool:
    return False


test = SimpleNamespace(is_gpu_available=_no_gpu)
