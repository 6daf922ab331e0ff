"""Encoder settings as flat JSON values and back."""

from __future__ import annotations

import json

import pytest

from spear.errors import CheckpointError
from spear.export.layout import REQUIRED, parse_student, student_fields
from spear.models.zipformer.config import ZipformerConfig
from tests.export.tiny import tiny_config


@pytest.mark.parametrize(
    "config",
    [
        ZipformerConfig(),
        tiny_config(num_heads=4, causal=True, chunk_size=(8, 16, -1), left_context_frames=(64, -1)),
        ZipformerConfig(
            downsampling_factor=(1,), num_encoder_layers=2, encoder_dim=64, encoder_unmasked_dim=64, cnn_module_kernel=7, dropout_end=0.0
        ),
    ],
)
def test_layout_round_trip_keeps_the_network(config: ZipformerConfig) -> None:
    values = json.loads(json.dumps(student_fields(config)))
    found = parse_student(values, "config.json")
    assert found.stacks() == config.stacks()
    assert student_fields(found) == values
    assert (found.chunk_sizes, found.left_contexts, found.causal) == (config.chunk_sizes, config.left_contexts, config.causal)


def test_layout_writes_one_number_per_stack() -> None:
    values = student_fields(ZipformerConfig())
    assert values["encoder_dim"] == ",".join(["512"] * 7)
    assert values["downsampling_factor"] == "1,2,4,8,4,2,1"
    assert values["conv_channels"] == "8,32,128"
    assert values["causal"] is False


def test_layout_reads_lists_strings_and_single_numbers() -> None:
    values = {
        **student_fields(tiny_config()),
        "encoder_dim": [32, 48],
        "num_heads": 4,
        "feedforward_dim": "64",
        "chunk_size": 8,
        "torch_dtype": "float32",
    }
    stacks = parse_student(values, "config.json").stacks()
    assert [(stack.dim, stack.num_heads, stack.feedforward_dim) for stack in stacks] == [(32, 4, 64), (48, 4, 64)]


@pytest.mark.parametrize("key", REQUIRED)
def test_layout_raises_checkpoint_error_when_a_size_is_missing(key: str) -> None:
    values = student_fields(tiny_config())
    del values[key]
    with pytest.raises(CheckpointError, match=f"my.json lacks `{key}`"):
        parse_student(values, "my.json")


@pytest.mark.parametrize(("key", "value"), [("pos_dim", "wide"), ("causal", "yes"), ("encoder_dim", "32,,48"), ("num_heads", [None])])
def test_layout_raises_checkpoint_error_when_a_value_does_not_fit(key: str, value: object) -> None:
    with pytest.raises(CheckpointError, match=f"`{key}` must be whole numbers"):
        parse_student({**student_fields(tiny_config()), key: value}, "config.json")
