"""Transformers configuration of an exported encoder."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from transformers import PretrainedConfig

from spear.export.layout import STUDENT_TYPE, parse_student, student_class
from spear.models.base import StudentConfig


class SpearConfig(PretrainedConfig):
    """Sizes of the encoder, and what its frames mean.

    Keyword arguments are those of `ZipformerConfig`, per-stack values as comma-separated strings as in the released models,
    and ``sample_rate``, ``frame_rate_hz``, ``first_frame_s``. What is left out has the encoder's default. With ``student_type``
    the sizes are those of another network's config.
    """

    model_type = "spear"

    def __init__(self, **values: Any) -> None:
        name = values.pop(STUDENT_TYPE, None)
        if name is not None:
            setattr(self, STUDENT_TYPE, name)
        defaults = student_class(name, "config.json")()
        for item in fields(defaults):
            value = values.pop(item.name, getattr(defaults, item.name))
            setattr(self, item.name, list(value) if isinstance(value, tuple) else value)
        self.sample_rate: int = values.pop("sample_rate", 16000)
        self.frame_rate_hz: float | None = values.pop("frame_rate_hz", None)
        self.first_frame_s: float | None = values.pop("first_frame_s", None)
        super().__init__(**values)

    def student(self) -> StudentConfig:
        """The encoder's own config.

        Raises:
            CheckpointError: a value cannot be read.
        """
        name = getattr(self, STUDENT_TYPE, None)
        known = {item.name: getattr(self, item.name) for item in fields(student_class(name, "config.json"))}
        return parse_student({**known, STUDENT_TYPE: name}, "config.json")
