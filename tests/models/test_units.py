"""Every kind of student says which of its modules are layers."""

from __future__ import annotations

from typing import Any

import pytest

from spear.models.base import StudentConfig
from spear.training.parallel import units
from tests.export.tiny import SIZES

UNIFORM: dict[str, Any] = {"num_layers": 3, "dim": 16, "num_heads": 2, "feedforward_dim": 24}
SMALL: dict[str, dict[str, Any]] = {
    "zipformer": {**SIZES, "num_encoder_layers": (1, 2)},
    "conformer": {**UNIFORM, "conv_channels": (2, 3, 4), "kernel": 5},
    "transformer": {**UNIFORM, "conv_channels": (2, 3, 4)},
    "conv_transformer": {**UNIFORM, "conv_dim": 8},
}


@pytest.mark.parametrize("kind", StudentConfig.TABLE)
def test_student_has_as_many_training_units_as_layers(kind: str) -> None:
    encoder = StudentConfig.get_choice_class(kind)(**SMALL[kind]).build()
    assert len(units(encoder)) == encoder.num_layers == 3
