"""State dicts of others: names brought into ours, heads set aside, differences listed and never ignored."""

from __future__ import annotations

import logging
import pathlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from spear.errors import ArtifactError, CheckpointError
from spear.files import read_json, read_tensors

logger = logging.getLogger(__name__)

PREFIXES = ("module.", "model.")
HEADS = ("codebook_loss_net.", "codebook_loss_heads.", "audio_tagging_proj.")
"""Training-time heads that released and icefall checkpoints may carry; an encoder has no place for them."""
ASR_HEADS = ("decoder.embedding.", "decoder.conv.", "joiner.", "simple_am_proj.", "simple_lm_proj.", "ctc_output.", "attention_decoder.")
"""The rest of icefall's speech recognisers. Their encoders are trained without masks and have no ``mask_emb``."""
ENTRIES = ("model", "model_avg")
"""Weights that an icefall checkpoint may hold: those of its last update, and their mean over all of training so far."""
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"


def read_weights(folder: Path) -> dict[str, Tensor]:
    """All tensors of a model folder, one file or several with an index.

    Raises:
        CheckpointError: there are none, or a file is damaged.
    """
    try:
        if (folder / WEIGHTS).exists():
            return read_tensors(folder / WEIGHTS)
        if not (folder / INDEX).exists():
            raise CheckpointError(f"{folder} has no {WEIGHTS}")
        names = sorted(set(read_json(folder / INDEX)["weight_map"].values()))
        return {key: value for name in names for key, value in read_tensors(folder / Path(name).name).items()}
    except ArtifactError as error:
        raise CheckpointError(str(error)) from error


class Split(NamedTuple):
    """encoder: tensors under the encoder's own names. heads: those of training heads, under theirs."""

    encoder: dict[str, Tensor]
    heads: dict[str, Tensor]


def read_icefall(path: Path, entry: str | None = None) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Weights and plain values of an icefall checkpoint, read without running code from it.

    Args:
        entry: ``model`` or ``model_avg``; None: the first of them that is there.
    Returns:
        the tensors of the entry, and what else the checkpoint holds, such as the options of its training.
    Raises:
        CheckpointError: the file is missing, damaged, holds more than tensors, paths and plain values, or lacks the entry.
    """
    # icefall stores its options, among them paths
    paths = [(kind, f"{module}.{kind.__name__}") for kind in (pathlib.PosixPath, pathlib.PurePosixPath) for module in ("pathlib", "pathlib._local")]
    try:
        with torch.serialization.safe_globals(paths):  # type: ignore[arg-type]
            content: Any = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise CheckpointError(f"{path} does not exist") from error
    except Exception as error:  # torch raises many kinds of errors for damaged or unsafe files
        raise CheckpointError(f"{path} cannot be read as tensors and plain values: {' '.join(str(error).split())[:200]}") from error
    content = content if isinstance(content, Mapping) else {}
    found = [name for name in (ENTRIES if entry is None else (entry,)) if _is_state(content.get(name))]
    if not found:
        raise CheckpointError(f"{path} has no `{entry or ENTRIES[0]}` with tensors: it is not an icefall checkpoint{_has(content)}")
    return dict(content[found[0]]), {key: value for key, value in content.items() if key not in ENTRIES}


def _is_state(value: Any) -> bool:
    return isinstance(value, Mapping) and len(value) > 0 and all(isinstance(item, Tensor) for item in value.values())


def _has(content: Mapping[str, Any]) -> str:
    states = [name for name in ENTRIES if _is_state(content.get(name))]
    return f" with that entry, only with `{states[0]}`" if states else ""


def split_heads(state: Mapping[str, Tensor], source: str) -> Split:
    """Bring names into the encoder's own and set the heads aside.

    Args:
        state: names with or without leading ``module.`` and ``model.`` parts. source: for messages.
    Returns:
        the encoder's tensors and those of the heads, whose names are logged.
    Raises:
        CheckpointError: two names become the same.
    """
    encoder: dict[str, Tensor] = {}
    heads: dict[str, Tensor] = {}
    for key, value in state.items():
        name = key
        while name.startswith(PREFIXES):
            name = name.partition(".")[2]
        target = heads if name.startswith(HEADS + ASR_HEADS) else encoder
        if name in target:
            raise CheckpointError(f"{source} holds `{name}` twice, under different prefixes")
        target[name] = value
    if heads:
        names = sorted(key for key in state if any(key.endswith(name) for name in heads))
        logger.info("%s: %d weights belong to training heads and not to the encoder: %s", source, len(heads), ", ".join(names))
    return Split(encoder, heads)


def load_strictly(module: nn.Module, state: Mapping[str, Tensor], source: str) -> None:
    """Load every weight of `module` from `state`.

    Raises:
        CheckpointError: a weight is missing, left over or has another shape; the message lists the first of each.
    """
    own = module.state_dict()
    missing = sorted(own.keys() - state.keys())
    extra = sorted(state.keys() - own.keys())
    common = sorted(own.keys() & state.keys())
    shapes = [f"{key} {tuple(state[key].shape)} for {tuple(own[key].shape)}" for key in common if state[key].shape != own[key].shape]
    problems = [_listed(names, what) for what, names in (("missing", missing), ("left over", extra), ("of another shape", shapes)) if names]
    if problems:
        raise CheckpointError(f"{source} does not fit the encoder; weights {'; '.join(problems)}")
    module.load_state_dict(dict(state), strict=True)


def _listed(names: list[str], what: str) -> str:
    return f"{what} ({len(names)}): {', '.join(names[:5])}{', ...' if len(names) > 5 else ''}"
