"""Load YAML into frozen dataclasses through draccus, with includes, ``--set`` and one-line errors."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

import draccus
import yaml

from spear.config.strict import normalise
from spear.errors import ConfigError

Config = TypeVar("Config")
INCLUDE = "include"


class _UniqueKeys(yaml.SafeLoader):
    """YAML's last of two equal keys would take the place of the first in silence."""

    def compose_mapping_node(self, anchor: Any) -> Any:
        """See yaml.SafeLoader; before merges, which may repeat keys."""
        node = super().compose_mapping_node(anchor)
        seen: set[object] = set()
        for key, _ in node.value:
            name = (key.tag, key.value) if isinstance(key, yaml.ScalarNode) else id(key)
            if name in seen:
                raise yaml.constructor.ConstructorError(None, None, f"the key {key.value!r} is there twice", key.start_mark)
            seen.add(name)
        return node


def load_yaml(path: Path, *, _seen: tuple[Path, ...] = ()) -> dict[str, Any]:
    """Read a YAML mapping, merged over the file its ``include:`` key names (relative to it).

    Raises:
        ConfigError: the file is missing, is not YAML, is no mapping, or includes itself.
    """
    path = path.resolve()
    if path in _seen:
        raise ConfigError(f"{path} includes itself")
    try:
        value = yaml.load(path.read_text(), Loader=_UniqueKeys)  # a safe loader
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from error
    value = {} if value is None else value
    if not isinstance(value, dict):
        raise ConfigError(f"{path} must hold a mapping, but holds a {type(value).__name__}")
    if INCLUDE not in value:
        return value
    base = load_yaml(path.parent / str(value.pop(INCLUDE)), _seen=(*_seen, path))
    merged = merge(base, value)
    return merged if isinstance(merged, dict) else value


def merge(base: Any, over: Any) -> Any:
    """Lay `over` on `base`, key by key.

    A mapping whose ``type`` differs replaces, null takes a mapping away, and everything else that is no mapping replaces.
    """
    if not isinstance(base, dict) or not isinstance(over, dict):
        return over
    if "type" in over and over["type"] != base.get("type", over["type"]):
        return over
    merged = {**base, **{key: merge(base.get(key), value) for key, value in over.items()}}
    return {key: value for key, value in merged.items() if not (value is None and isinstance(base.get(key), dict))}


def apply_set(value: dict[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """Apply ``a.b=c`` overrides; c is read as YAML.

    Raises:
        ConfigError: an override has no ``=``, or its path runs through something that is no mapping.
    """
    for override in overrides:
        path, equals, text = override.partition("=")
        if not equals or not path:
            raise ConfigError(f"`--set` must be key=value, but is {override!r}")
        keys = path.split(".")
        layer: Any = text
        try:
            layer = yaml.load(text, Loader=_UniqueKeys)  # a safe loader
        except yaml.YAMLError as error:
            raise ConfigError(f"`--set {path}` has a value that is not valid YAML: {text!r} ({getattr(error, 'problem', None) or error})") from error
        for key in reversed(keys):
            layer = {key: layer}
        here: Any = value
        for depth, key in enumerate(keys[:-1]):
            here = here.get(key, {}) if here is not None else {}
            if not isinstance(here, dict):
                raise ConfigError(f"`--set {path}`: `{'.'.join(keys[: depth + 1])}` is a value, not a mapping")
        value = merge(value, layer)
    return value


def load_config(cls: type[Config], path: Path, overrides: Sequence[str] = ()) -> Config:
    """Load a YAML file as `cls` (a dataclass tree with Registry families).

    Raises:
        ConfigError: one line with the key's full path, the rule, the value and, for an unknown key, a suggestion.
    """
    config: Config = draccus.decode(cls, normalise(cls, apply_set(load_yaml(path), overrides), str(path)))
    return config


def to_json(config: Any, family: type | None = None) -> Any:
    """JSON value of a config; for a variant name its `family`, so that ``type`` is kept."""
    return draccus.encode(config, family) if family is not None else draccus.encode(config)
