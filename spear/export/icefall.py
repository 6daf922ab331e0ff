"""The settings of a Zipformer, read off the shapes of an icefall checkpoint, which carries none."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from spear.errors import CheckpointError
from spear.export.layout import parse_student
from spear.models.zipformer.config import ZipformerConfig

POS_HEAD_DIM = 4
"""Positional width of a head in every published Zipformer. Shapes give only products with the number of heads; this one settles all."""
_STACK = re.compile(r"encoder\.encoders\.(\d+)\.(encoder\.)?layers\.(\d+)\.")


def infer_student(state: Mapping[str, Tensor], source: str) -> ZipformerConfig:
    """Sizes of the encoder whose state dict this is.

    Args:
        state: tensors under the encoder's own names. source: for messages.
    Returns:
        a config whose network takes exactly these tensors. What shapes do not tell: a causal model reads the whole utterance (write
        ``chunk_size`` and ``left_context_frames`` into ``config.json`` for another choice), training never masks half the channels.
    Raises:
        CheckpointError: a tensor that settles a size is missing, or the sizes contradict each other.
    """
    layers = _count_layers(state, source)
    stacks = [_infer_stack(state, index, source) for index in range(len(layers))]
    values: dict[str, Any] = {name: [stack[name] for stack in stacks] for name in stacks[0]}
    values["num_encoder_layers"] = layers
    values["encoder_unmasked_dim"] = [width // 2 for width in values["encoder_dim"]]
    for name in ("query_head_dim", "pos_head_dim", "value_head_dim"):
        if len(set(values[name])) == 1:
            values[name] = values[name][0]
    values["pos_dim"] = _shape(state, _layer(state, 0) + "self_attn_weights.linear_pos.weight", source)[1]
    values["num_mel_bins"] = _shape(state, "mask_emb", source)[0]
    values["conv_channels"] = [_shape(state, f"encoder_embed.conv.{i}.weight", source)[0] for i in (0, 4, 7)]
    values["output_downsampling_factor"] = 2 if "encoder.downsample_output.bias" in state else 1
    values["causal"] = _layer(state, 0) + "conv_module1.depthwise_conv.causal_conv.weight" in state
    if values["causal"]:
        values["chunk_size"] = values["left_context_frames"] = -1
    return parse_student(values, source)


def _count_layers(state: Mapping[str, Tensor], source: str) -> list[int]:
    found: dict[int, set[int]] = {}
    for key in state:
        match = _STACK.match(key)
        if match:
            found.setdefault(int(match[1]), set()).add(int(match[3]))
    if not found or sorted(found) != list(range(len(found))) or any(sorted(layers) != list(range(len(layers))) for layers in found.values()):
        raise CheckpointError(f"{source} holds no Zipformer: expected layers `encoder.encoders.0.layers.0.*` and on, without gaps")
    return [len(found[index]) for index in sorted(found)]


def _layer(state: Mapping[str, Tensor], stack: int) -> str:
    plain = f"encoder.encoders.{stack}.layers.0."
    return plain if any(key.startswith(plain) for key in state) else f"encoder.encoders.{stack}.encoder.layers.0."


def _infer_stack(state: Mapping[str, Tensor], index: int, source: str) -> dict[str, int]:
    prefix = _layer(state, index)

    def rows(name: str) -> int:
        return _shape(state, prefix + name, source)[0]

    causal = prefix + "conv_module1.depthwise_conv.chunkwise_conv.weight"
    kernel = _shape(state, causal if causal in state else prefix + "conv_module1.depthwise_conv.weight", source)[2]
    downsampling = state.get(f"encoder.encoders.{index}.downsample.bias")
    heads = _divide(rows("self_attn_weights.linear_pos.weight"), POS_HEAD_DIM, "positional width", index, source)
    both = _divide(rows("self_attn_weights.in_proj.weight"), heads, "rows of self_attn_weights.in_proj", index, source)
    return {
        "downsampling_factor": 1 if downsampling is None else len(downsampling),
        "encoder_dim": rows("norm.bias"),
        "feedforward_dim": rows("feed_forward2.in_proj.weight"),
        "num_heads": heads,
        "query_head_dim": _divide(both - POS_HEAD_DIM, 2, "rows of self_attn_weights.in_proj per head", index, source),
        "pos_head_dim": POS_HEAD_DIM,
        "value_head_dim": _divide(rows("self_attn1.in_proj.weight"), heads, "rows of self_attn1.in_proj", index, source),
        "cnn_module_kernel": kernel,
    }


def _divide(value: int, by: int, what: str, stack: int, source: str) -> int:
    if value < by or value % by:
        raise CheckpointError(f"{source}: the {what} of stack {stack} must be a multiple of {by}, but is {value}")
    return value // by


def _shape(state: Mapping[str, Tensor], key: str, source: str) -> tuple[int, ...]:
    if key not in state:
        raise CheckpointError(f"{source} lacks `{key}`, from which a size is read")
    return tuple(state[key].shape)
