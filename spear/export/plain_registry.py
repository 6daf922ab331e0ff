"""Stands in for ``spear.registry`` in exported model code: configs there are built by name, never from tags."""

from __future__ import annotations

from typing import ClassVar


class Registry:
    """Base of config families, without the reading of tagged YAML."""

    TABLE: ClassVar[dict[str, str]] = {}
