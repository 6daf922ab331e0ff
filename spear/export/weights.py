"""State dicts of others: names brought into ours, heads set aside, differences listed and never ignored."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from spear.errors import ArtifactError, CheckpointError
from spear.files import read_json, read_tensors

logger = logging.getLogger(__name__)

PREFIXES = ("module.", "model.")
HEADS = ("codebook_loss_net.", "codebook_loss_heads.", "audio_tagging_proj.")
"""Training-time heads that released and icefall checkpoints may carry; an encoder has no place for them."""
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


def read_icefall(path: Path) -> dict[str, Tensor]:
    """The ``model`` entry of an icefall checkpoint, read without running code from it.

    Raises:
        CheckpointError: the file is missing, damaged, holds more than tensors and plain values, or has no ``model``.
    """
    try:
        content: Any = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise CheckpointError(f"{path} does not exist") from error
    except Exception as error:  # torch raises many kinds of errors for damaged or unsafe files
        raise CheckpointError(f"{path} cannot be read as tensors and plain values: {' '.join(str(error).split())[:200]}") from error
    state = content.get("model") if isinstance(content, Mapping) else None
    if not isinstance(state, Mapping) or not state or not all(isinstance(value, Tensor) for value in state.values()):
        raise CheckpointError(f"{path} has no `model` with tensors: it is not an icefall checkpoint")
    return dict(state)


def encoder_state(state: Mapping[str, Tensor], source: str) -> tuple[dict[str, Tensor], list[str]]:
    """Bring names into the encoder's own and set the heads aside.

    Args:
        state: names with or without leading ``module.`` and ``model.`` parts. source: for messages.
    Returns:
        the encoder's tensors and the sorted names of the heads that were dropped (also logged).
    Raises:
        CheckpointError: two names become the same.
    """
    kept: dict[str, Tensor] = {}
    dropped: list[str] = []
    for key, value in state.items():
        name = key
        while name.startswith(PREFIXES):
            name = name.partition(".")[2]
        if name.startswith(HEADS):
            dropped.append(key)
        elif name in kept:
            raise CheckpointError(f"{source} holds `{name}` twice, under different prefixes")
        else:
            kept[name] = value
    if dropped:
        logger.info("%s: dropped %d weights of training heads: %s", source, len(dropped), ", ".join(sorted(dropped)))
    return kept, sorted(dropped)


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
