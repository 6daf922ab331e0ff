"""From YAML to frozen dataclasses: strict keys and types, includes, ``--set``."""

from spear.config.loader import load_config, load_yaml, to_json
from spear.config.strict import closest

__all__ = ["closest", "load_config", "load_yaml", "to_json"]
