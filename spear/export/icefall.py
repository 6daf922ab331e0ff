"""icefall checkpoints: the settings of a Zipformer read off the shapes, and the way back to a file that icefall loads."""

from __future__ import annotations

import io
import logging
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from spear import __version__
from spear.errors import CheckpointError
from spear.export.layout import parse_student, student_fields
from spear.export.weights import ASR_HEADS, Split
from spear.files import write_bytes
from spear.models.base import Encoder, StudentConfig
from spear.models.zipformer.config import ZipformerConfig

logger = logging.getLogger(__name__)

POS_HEAD_DIM = 4
"""Positional width of a head in every published Zipformer. Shapes give only products with the number of heads; this one settles all."""
OPTIONS = (
    "output_downsampling_factor",
    "downsampling_factor",
    "num_encoder_layers",
    "feedforward_dim",
    "num_heads",
    "encoder_dim",
    "query_head_dim",
    "value_head_dim",
    "pos_head_dim",
    "pos_dim",
    "encoder_unmasked_dim",
    "cnn_module_kernel",
    "causal",
    "chunk_size",
    "left_context_frames",
)
"""Settings that icefall's training scripts take as command line options of the same names."""
_STACK = re.compile(r"encoder\.encoders\.(\d+)\.(encoder\.)?layers\.(\d+)\.")


def infer_student(state: Mapping[str, Tensor], source: str, options: Mapping[str, Any] | None = None) -> StudentConfig:
    """Sizes of the encoder whose state dict this is.

    Args:
        state: tensors under the encoder's own names. source: for messages. options: other content of the checkpoint, where icefall
            leaves the options of a training; the two that shapes do not tell are taken from it.
    Returns:
        a config whose network takes exactly these tensors. A causal model reads the whole utterance (write ``chunk_size`` and
        ``left_context_frames`` into ``config.json`` for another choice). Without options, positional heads have the published
        width, and feature masks hide at most half the channels.
    Raises:
        CheckpointError: a tensor that settles a size is missing, or the sizes contradict each other.
    """
    layers = _count_layers(state, source)
    positional = _option(options, "pos_head_dim", len(layers)) or [POS_HEAD_DIM] * len(layers)
    stacks = [_infer_stack(state, index, positional[index], source) for index in range(len(layers))]
    values: dict[str, Any] = {name: [stack[name] for stack in stacks] for name in stacks[0]}
    values["num_encoder_layers"] = layers
    unmasked = _option(options, "encoder_unmasked_dim", len(layers))
    values["encoder_unmasked_dim"] = unmasked or [width // 2 for width in values["encoder_dim"]]
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


def complete(split: Split, source: str) -> dict[str, Tensor]:
    """The encoder's weights; that of a speech recogniser, which knows no masks, gets a ``mask_emb`` of zeros.

    Args:
        split: weights of a checkpoint. source: for the log.
    """
    encoder, convolution, out = split.encoder, "encoder_embed.conv.7.weight", "encoder_embed.out.weight"
    if "mask_emb" in encoder or not any(name.startswith(ASR_HEADS) for name in split.heads) or not {convolution, out} <= encoder.keys():
        return encoder
    # four widths of the input give the same width behind the convolutions; 80 and 128 are second of theirs
    bins = 4 * (encoder[out].shape[1] // len(encoder[convolution])) + 4
    logger.warning("%s has no `mask_emb`, as a model that was trained without masks: taken as zeros for %d mel bins", source, bins)
    return {**encoder, "mask_emb": torch.zeros(bins)}


def save_icefall(path: Path, encoder: Encoder, student: StudentConfig) -> None:
    """Write an encoder as a checkpoint that icefall loads.

    The file is icefall's format and therefore a pickle, the only one that this package writes; it holds tensors, text and numbers
    only, and loads with ``weights_only=True``. The same encoder gives the same bytes.

    Args:
        path: a ``.pt`` file. encoder: its weights go under ``model``, with icefall's names, in float32. student: its config; the
            options of icefall's training scripts that build the same network lie beside ``model``, as icefall leaves them.
    Raises:
        CheckpointError: the encoder is no Zipformer, or a weight is not finite.
    """
    values = student_fields(require_zipformer(student))
    state = {key: value.detach().float().cpu().clone() for key, value in encoder.state_dict().items()}
    broken = sorted(key for key, value in state.items() if not bool(value.isfinite().all()))
    if broken:
        raise CheckpointError(f"{len(broken)} weights hold NaN or infinity: {', '.join(broken[:5])}")
    options = {name: values[name] if isinstance(values[name], bool) else str(values[name]) for name in OPTIONS}
    options |= {name: values[name] for name in ("output_downsampling_factor", "pos_dim")}
    buffer = io.BytesIO()
    torch.save({"model": state, **options, "feature_dim": values["num_mel_bins"], "spear_version": __version__}, buffer)
    write_bytes(path, buffer.getvalue())


def require_zipformer(student: StudentConfig) -> ZipformerConfig:
    """The config itself, if icefall can build its network.

    Raises:
        CheckpointError: it is no Zipformer.
    """
    if not isinstance(student, ZipformerConfig):
        raise CheckpointError(f"`student` must be of type zipformer for the format of icefall, but is {type(student).__name__}")
    return student


def _option(options: Mapping[str, Any] | None, name: str, count: int) -> list[int] | None:
    """A per-stack option of icefall's command line (text, comma-separated); None where there is none that fits `count` stacks."""
    try:
        values = [int(part) for part in str((options or {})[name]).split(",")]
    except (KeyError, ValueError):
        return None
    values = values * count if len(values) == 1 else values
    return values if len(values) == count else None


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


def _infer_stack(state: Mapping[str, Tensor], index: int, positional: int, source: str) -> dict[str, int]:
    prefix = _layer(state, index)

    def rows(name: str) -> int:
        return _shape(state, prefix + name, source)[0]

    causal = prefix + "conv_module1.depthwise_conv.chunkwise_conv.weight"
    kernel = _shape(state, causal if causal in state else prefix + "conv_module1.depthwise_conv.weight", source)[2]
    downsampling = state.get(f"encoder.encoders.{index}.downsample.bias")
    heads = _divide(rows("self_attn_weights.linear_pos.weight"), positional, "positional width", index, source)
    both = _divide(rows("self_attn_weights.in_proj.weight"), heads, "rows of self_attn_weights.in_proj", index, source)
    return {
        "downsampling_factor": 1 if downsampling is None else len(downsampling),
        "encoder_dim": rows("norm.bias"),
        "feedforward_dim": rows("feed_forward2.in_proj.weight"),
        "num_heads": heads,
        "query_head_dim": _divide(both - positional, 2, "rows of self_attn_weights.in_proj per head", index, source),
        "pos_head_dim": positional,
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
