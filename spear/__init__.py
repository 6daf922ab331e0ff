"""spear: one encoder for speech and sound, distilled from any number of frozen teachers."""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"

_EXPORTS = {"load_encoder": "spear.export", "load_quantizer": "spear.quantizers"}


def __getattr__(name: str) -> Any:
    """Import the public functions and subpackages on first use, so that ``import spear`` stays quick."""
    if name in _EXPORTS:
        return getattr(importlib.import_module(_EXPORTS[name]), name)
    if name in {"quantizers", "teachers", "models", "evaluation", "export"}:
        return importlib.import_module(f"spear.{name}")
    raise AttributeError(f"module 'spear' has no attribute {name!r}")
