"""Stands in for `spear.models.zipformer.kernels` in exported code, which carries no compiled loops."""

from __future__ import annotations

from typing import Any


def swoosh_loops() -> Any:
    """No loops."""
    return None


def k2_kernels() -> Any:
    """No kernels."""
    return None


def depthwise_loop() -> Any:
    """No loop."""
    return None
