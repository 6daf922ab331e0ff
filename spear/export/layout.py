"""The flat ``config.json`` of a model folder: encoder settings as plain JSON values, per-stack ones as comma-separated strings."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from spear.errors import CheckpointError
from spear.models.zipformer.config import ZipformerConfig, per_stack

MODEL_TYPE = "spear"
PREFIX = "model."
REQUIRED = (
    "downsampling_factor",
    "num_encoder_layers",
    "encoder_dim",
    "feedforward_dim",
    "num_heads",
    "cnn_module_kernel",
    "output_downsampling_factor",
)
"""Keys without which a folder does not say what network it holds."""
PER_STACK = (
    "num_encoder_layers",
    "encoder_dim",
    "encoder_unmasked_dim",
    "feedforward_dim",
    "num_heads",
    "query_head_dim",
    "pos_head_dim",
    "value_head_dim",
    "cnn_module_kernel",
)
"""Settings that are written with one number per stack, as the released code reads them."""


def student_fields(config: ZipformerConfig) -> dict[str, Any]:
    """Settings of an encoder as the values of a ``config.json``."""
    stacks = len(config.downsampling_factor)
    values = {item.name: getattr(config, item.name) for item in fields(config)}
    values |= {name: per_stack(name, values[name], stacks) for name in PER_STACK}
    return {name: ",".join(map(str, value)) if isinstance(value, (list, tuple)) else value for name, value in values.items()}


def parse_student(values: Mapping[str, Any], source: str) -> ZipformerConfig:
    """Read an encoder's settings; keys that are not its own are left to others, absent ones have their default.

    Args:
        values: content of a ``config.json``, ours or a released one. source: its name for messages.
    Raises:
        CheckpointError: a required key is missing or a value does not fit.
    """
    missing = [key for key in REQUIRED if values.get(key) is None]
    if missing:
        raise CheckpointError(f"{source} lacks {', '.join(f'`{key}`' for key in missing)}: it is not the config of a SPEAR encoder")
    defaults = ZipformerConfig()
    known: dict[str, Any] = {}
    for item in fields(ZipformerConfig):
        if values.get(item.name) is not None:
            known[item.name] = _decode(item.name, values[item.name], getattr(defaults, item.name), source)
    return ZipformerConfig(**known)


def _decode(name: str, value: Any, default: Any, source: str) -> Any:
    """A JSON value in the form of the field's default: a tuple of whole numbers, or a scalar."""
    try:
        if isinstance(default, tuple) or isinstance(value, (list, tuple)) or (isinstance(value, str) and not isinstance(default, str)):
            parts = value.split(",") if isinstance(value, str) else value if isinstance(value, (list, tuple)) else [value]
            numbers = tuple(int(part) for part in parts)
            return numbers if isinstance(default, tuple) or len(numbers) > 1 else numbers[0]
        return type(default)(value) if isinstance(default, (int, float)) else value
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"`{name}` must be whole numbers separated by commas, but is {value!r} ({source})") from error
