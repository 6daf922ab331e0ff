"""Bounds of settings, with one message for all: `key` must be RULE, but is VALUE."""

from __future__ import annotations

from spear.errors import ConfigError


def at_least(name: str, value: float, low: float) -> None:
    """Raise ConfigError where a setting is below its bound."""
    if not value >= low:
        raise ConfigError(f"`{name}` must be at least {low:g}, but is {value}")


def above(name: str, value: float, low: float) -> None:
    """Raise ConfigError where a setting is not above its bound."""
    if not value > low:
        raise ConfigError(f"`{name}` must be above {low:g}, but is {value}")


def within(name: str, value: float, low: float, high: float) -> None:
    """Raise ConfigError where a setting is outside [low, high]."""
    if not low <= value <= high:
        raise ConfigError(f"`{name}` must be between {low:g} and {high:g}, but is {value}")
