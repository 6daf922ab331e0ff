"""Tables of variants: a ``type:`` tag in YAML names a config class that is imported on first use."""

from __future__ import annotations

import importlib
from typing import Any, ClassVar

from draccus.choice_types import CHOICE_TYPE_KEY, ChoiceRegistryBase
from draccus.parsers.decoding import decode, decode_choice_class
from draccus.parsers.encoding import encode, encode_dataclass

from spear.errors import ConfigError


class Registry(ChoiceRegistryBase):
    """Base of every family of configs.

    A family sets ``TABLE = {"tag": "package.module:ConfigClass"}``; a variant is one file and one line there.
    Private code needs no table: ``type: my_package.my_module:MyConfig``.
    """

    TABLE: ClassVar[dict[str, str]] = {}
    _choice_registry: ClassVar[dict[str, Any]] = {}

    @classmethod
    def get_choice_class(cls, name: str) -> Any:
        """Import and return the config class behind a tag.

        Raises:
            ConfigError: unknown tag, or the class cannot be imported.
        """
        target = cls.TABLE.get(name, name)
        module, _, attribute = target.partition(":")
        if not attribute:
            raise ConfigError(f"`type` must be one of {', '.join(sorted(cls.TABLE))} or `package.module:Class`, but is {name!r}")
        try:
            found = getattr(importlib.import_module(module), attribute)
        except (ImportError, AttributeError) as error:
            raise ConfigError(f"`type` {name!r} cannot be imported: {error}") from error
        if not issubclass(found, cls):
            raise ConfigError(f"`type` {name!r} must be a {cls.__name__}, but is {found.__name__}")
        return found

    @classmethod
    def get_known_choices(cls) -> dict[str, Any]:
        """All tags of the family with their classes."""
        return {name: cls.get_choice_class(name) for name in cls.TABLE}

    @classmethod
    def get_choice_name(cls, subcls: type) -> str:
        """The tag of a config class: its table name, else ``module:Class``.

        Raises:
            ValueError: `subcls` is the family itself (draccus then reads the tag from the data).
        """
        if "TABLE" in subcls.__dict__:
            raise ValueError(f"{subcls.__name__} is a family, not a variant")
        target = f"{subcls.__module__}:{subcls.__qualname__}"
        for name, value in cls.TABLE.items():
            if value == target:
                return name
        return target

    @classmethod
    def default_choice_name(cls) -> str | None:
        """No default: a recipe names its variants."""
        return None


def _encode(config: Registry, declared_type: Any = None) -> dict[str, Any]:
    """A variant as JSON always carries its tag, whatever the field that holds it was declared as."""
    return {CHOICE_TYPE_KEY: config.get_choice_name(type(config)), **encode_dataclass(config)}


# draccus knows only direct subclasses of its own registries as families
decode.register(Registry, decode_choice_class, include_subclasses=True)
encode.register(Registry, _encode, include_subclasses=True)
