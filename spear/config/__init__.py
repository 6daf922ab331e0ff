"""From YAML to frozen dataclasses: strict keys and types, includes, ``--set``."""

from spear.config.loader import load_config, load_yaml, to_json

__all__ = ["load_config", "load_yaml", "to_json"]
