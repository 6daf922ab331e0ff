"""Check a raw YAML value against a dataclass tree before it is decoded: keys, types, tags, suggestions."""

from __future__ import annotations

import difflib
import types
import typing
from collections.abc import Iterable
from dataclasses import MISSING, fields, is_dataclass
from typing import Any, Literal, Union, get_args, get_origin

import draccus
from draccus.utils import DecodingError, ParsingError

from spear.errors import ConfigError
from spear.registry import Registry


def normalise(annotation: Any, value: Any, source: str, path: str = "") -> Any:
    """Return `value` with floats and ints in their declared form.

    Args:
        annotation: the declared type. value: what YAML gave. source: file, for messages. path: dotted key so far.
    Raises:
        ConfigError: unknown or missing key, wrong type, unknown choice; names the full key path.
    """
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin in (Union, types.UnionType):
        return _union(arguments, value, source, path)
    if origin is Literal:
        if value not in arguments or isinstance(value, bool) != any(isinstance(a, bool) for a in arguments):
            raise _error(path, f"one of {_listed(arguments)}", value, source, closest(value, arguments))
        return value
    if origin in (list, tuple):
        if not isinstance(value, list):
            raise _error(path, "a list", value, source)
        return [normalise(arguments[0], item, source, f"{path}.{i}") for i, item in enumerate(value)]
    if origin is dict:
        if not isinstance(value, dict):
            raise _error(path, "a mapping", value, source)
        return {_key(key, path, source): normalise(arguments[1], item, source, _join(path, key)) for key, item in value.items()}
    if is_dataclass(annotation):
        return _dataclass(annotation, value, source, path)
    return _scalar(annotation, value, source, path)


def _dataclass(cls: Any, value: Any, source: str, path: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise _error(path, "a mapping", value, source)
    tag: dict[str, Any] = {}
    if issubclass(cls, Registry) and "TABLE" in cls.__dict__:
        if "type" not in value:
            raise ConfigError(f"`{_join(path, 'type')}` is missing: one of {_listed(cls.TABLE)} ({source})")
        tag, value = {"type": value["type"]}, {key: item for key, item in value.items() if key != "type"}
        try:
            cls = cls.get_choice_class(str(tag["type"]))
        except ConfigError as error:
            raise ConfigError(f"{error}{closest(tag['type'], cls.TABLE)} (`{_join(path, 'type')}` in {source})") from error
    hints = typing.get_type_hints(cls)
    known = [item.name for item in fields(cls) if item.init]
    for key in value:
        if key not in known:
            raise ConfigError(f"`{_join(path, key)}` is not a known key{closest(key, known)} ({source})")
    for item in fields(cls):
        if item.init and item.name not in value and item.default is MISSING and item.default_factory is MISSING:
            raise ConfigError(f"`{_join(path, item.name)}` is missing ({source})")
    checked = {key: normalise(hints[key], item, source, _join(path, key)) for key, item in value.items()}
    try:
        draccus.decode(cls, checked)  # runs the bounds of __post_init__ while the key path is known
    except (DecodingError, ParsingError, ConfigError) as error:
        raise ConfigError(f"{_rule(error)} ({f'`{path}` in ' if path else ''}{source})") from error
    return {**tag, **checked}


def _rule(error: BaseException) -> str:
    """The innermost ConfigError's text, else the first line of the error."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, ConfigError):
            return str(cause)
        cause = cause.__cause__
    return str(error).splitlines()[0]


def _union(options: tuple[Any, ...], value: Any, source: str, path: str) -> Any:
    if value is None and type(None) in options:
        return None
    errors: list[ConfigError] = []
    for option in options:
        if option is not type(None):
            try:
                return normalise(option, value, source, path)
            except ConfigError as error:
                errors.append(error)
    raise errors[0]


def _scalar(annotation: Any, value: Any, source: str, path: str) -> Any:
    if annotation is Any:
        return value
    if annotation is float:
        # YAML 1.1 reads 5e-4 as text
        if isinstance(value, str):
            try:
                return float(value)
            except ValueError as error:
                raise _error(path, "a number", value, source) from error
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            return float(value)
        raise _error(path, "a number", value, source)
    names = {int: "a whole number", bool: "true or false", str: "text"}
    if type(value) is not annotation:
        raise _error(path, names.get(annotation, f"a {annotation}"), value, source)
    return value


def _key(key: Any, path: str, source: str) -> str:
    if not isinstance(key, str):
        raise _error(path, "a mapping with text keys", key, source)
    return key


def _join(path: str, key: object) -> str:
    return f"{path}.{key}" if path else str(key)


def _listed(options: Iterable[object]) -> str:
    return ", ".join(str(option) for option in options)


def closest(value: object, options: Iterable[object]) -> str:
    """The end of an error message: the option that may have been meant; empty where none is alike."""
    found = difflib.get_close_matches(str(value), [str(option) for option in options], n=1, cutoff=0.5)
    return f"; did you mean `{found[0]}`?" if found else ""


def _error(path: str, rule: str, value: object, source: str, hint: str = "") -> ConfigError:
    return ConfigError(f"`{path or 'file'}` must be {rule}, but is {value!r}{hint} ({source})")
