"""Loads the scripts of egs/, which are no package, by their path."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

EGS = Path(__file__).resolve().parents[2] / "egs"
Load = Callable[[str], ModuleType]


def load_script(path: str) -> ModuleType:
    """Import ``egs/PATH`` as a module of its own."""
    name = "egs_" + path.replace("/", "_").removesuffix(".py")
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, EGS / path)
        assert spec is not None
        assert spec.loader is not None
        sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[name])
    return sys.modules[name]


@pytest.fixture(scope="session")
def egs() -> Path:
    """The folder egs/."""
    return EGS


@pytest.fixture(scope="session")
def script() -> Load:
    """``script("mini/local/make_speech.py")`` imports that file."""
    return load_script
