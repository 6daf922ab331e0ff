"""Fixtures shared by all tests."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

torch.set_num_threads(int(os.environ.get("SPEAR_TEST_THREADS", "1")))
ROOT = Path(__file__).resolve().parent.parent


def _shared(variable: str, name: str) -> Path:
    folder = Path(os.environ.get(variable, ROOT.parent / "shared" / name))
    if not folder.is_dir():
        pytest.skip(f"{variable} is not set and {folder} does not exist")
    return folder


@pytest.fixture(scope="session")
def fixtures() -> Path:
    """Folder of reference outputs; skips where it is absent."""
    return _shared("SPEAR_FIXTURES", "fixtures")


@pytest.fixture(scope="session")
def real_audio() -> Path:
    """Folder of real recordings; skips where it is absent."""
    return _shared("SPEAR_DATA", "data")
