"""The flat ``config.json`` of a model folder: encoder settings as plain JSON values, per-stack ones as comma-separated strings."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from spear.errors import CheckpointError
from spear.models.base import StudentConfig
from spear.models.conformer import ConformerConfig
from spear.models.conv_transformer import ConvTransformerConfig
from spear.models.transformer import TransformerConfig
from spear.models.zipformer.config import ZipformerConfig, per_stack

MODEL_TYPE = "spear"
PREFIX = "model."
STUDENT_TYPE = "student_type"
"""Key that says what kind of network a folder holds; absent, as in released folders, it is a Zipformer."""
STUDENTS: dict[str, type[StudentConfig]] = {
    "zipformer": ZipformerConfig,
    "conformer": ConformerConfig,
    "transformer": TransformerConfig,
    "conv_transformer": ConvTransformerConfig,
}
"""The kinds of networks that a folder can describe."""
REQUIRED = (
    "downsampling_factor",
    "num_encoder_layers",
    "encoder_dim",
    "feedforward_dim",
    "num_heads",
    "cnn_module_kernel",
    "output_downsampling_factor",
)
"""Keys without which a folder does not say what Zipformer it holds."""
UNIFORM_REQUIRED = ("num_layers", "dim", "num_heads", "feedforward_dim")
"""The same for the other networks."""
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

TRAINING_ONLY = (
    "encoder_unmasked_dim",
    "chunk_size",
    "left_context_frames",
    "dropout",
    "dropout_start",
    "dropout_end",
    "dropout_batches",
    "warmup_batches",
    "schedule_offset",
    "feature_mask",
)
"""Settings that may differ between a network and the one it starts from."""


def student_type(config: object) -> str:
    """Name of a network's kind, by its config.

    Raises:
        CheckpointError: a folder cannot describe it.
    """
    for name, kind in STUDENTS.items():
        if type(config) is kind:
            return name
    raise CheckpointError(f"`student` must be of type {', '.join(STUDENTS)} to be exported, but is {type(config).__name__}")


def student_fields(config: StudentConfig) -> dict[str, Any]:
    """Settings of an encoder as the values of a ``config.json``.

    Raises:
        CheckpointError: a folder cannot describe it.
    """
    name = student_type(config)
    values = {item.name: getattr(config, item.name) for item in fields(config)}
    if isinstance(config, ZipformerConfig):
        stacks = len(config.downsampling_factor)
        values |= {key: per_stack(key, values[key], stacks) for key in PER_STACK}
    else:
        values[STUDENT_TYPE] = name
    return {key: ",".join(map(str, value)) if isinstance(value, (list, tuple)) else value for key, value in values.items()}


def student_class(name: object, source: str) -> type[StudentConfig]:
    """The config class of a kind of network; None stands for a Zipformer.

    Raises:
        CheckpointError: there is no such kind.
    """
    kind = STUDENTS.get(str(name if name is not None else "zipformer"))
    if kind is None:
        raise CheckpointError(f"`{STUDENT_TYPE}` must be one of {', '.join(STUDENTS)}, but is {name!r} ({source})")
    return kind


def parse_student(values: Mapping[str, Any], source: str) -> StudentConfig:
    """Read an encoder's settings; keys that are not its own are left to others, absent ones have their default.

    Args:
        values: content of a ``config.json``, ours or a released one. source: its name for messages.
    Raises:
        CheckpointError: a required key is missing or a value does not fit.
    """
    kind = student_class(values.get(STUDENT_TYPE), source)
    required = REQUIRED if kind is ZipformerConfig else UNIFORM_REQUIRED
    missing = [key for key in required if values.get(key) is None]
    if missing:
        raise CheckpointError(f"{source} lacks {', '.join(f'`{key}`' for key in missing)}: it is not the config of a SPEAR encoder")
    defaults = kind()
    known: dict[str, Any] = {}
    for item in fields(kind):
        if values.get(item.name) is not None:
            known[item.name] = _decode(item.name, values[item.name], getattr(defaults, item.name), source)
    return kind(**known)


def check_same_network(wanted: StudentConfig, found: StudentConfig, source: str) -> None:
    """Refuse weights of a network that computes something else, even where the shapes agree.

    Args:
        wanted: what a recipe asks for. found: what the weights were trained in. source: of the weights, for messages.
    Raises:
        CheckpointError: the kinds or the sizes differ; every setting that does is named. How a network is trained may differ.
    """
    if student_type(wanted) != student_type(found):
        raise CheckpointError(f"`student.type` is {student_type(wanted)}, but {source} holds a {student_type(found)}")
    ours, theirs = student_fields(wanted), student_fields(found)
    different = [f"`student.{key}` is {ours[key]} and there {theirs[key]}" for key in ours if key not in TRAINING_ONLY and ours[key] != theirs[key]]
    if different:
        raise CheckpointError(f"{source} holds another network than the recipe's: {'; '.join(different)}")


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
