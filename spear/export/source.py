"""Where encoders come from: model folders, Hugging Face ids and icefall checkpoints, all read into one form."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from spear.errors import ArtifactError, CheckpointError
from spear.export.icefall import complete, infer_student
from spear.export.layout import MODEL_TYPE, parse_student
from spear.export.weights import read_icefall, read_weights, split_heads
from spear.files import read_json
from spear.models.base import StudentConfig

CHECKPOINTS = (".pt", ".pth", ".ckpt")


class Source(NamedTuple):
    """An encoder as it was found.

    student: its config. encoder: its weights under its own names. heads: weights of training heads, under theirs.
    name: for messages. is_icefall: whether it is a checkpoint of icefall.
    """

    student: StudentConfig
    encoder: dict[str, Tensor]
    heads: dict[str, Tensor]
    name: str
    is_icefall: bool


def read_source(path_or_id: str | Path, *, revision: str | None = None, entry: str | None = None) -> Source:
    """Read config and weights of an encoder.

    Args:
        path_or_id: a folder in the Hugging Face layout, ours or a released one; a Hugging Face id; or an icefall checkpoint (``.pt``).
        revision: branch, tag or commit of an id. entry: of a checkpoint ``model`` or ``model_avg``; None: the first that is there.
    Raises:
        CheckpointError: nothing is there, it cannot be read, or it is no encoder of ours.
    """
    path = Path(path_or_id)
    if path.suffix in CHECKPOINTS and not path.is_dir():
        state, options = read_icefall(path, entry)
        split = split_heads(state, str(path))
        encoder = complete(split, str(path))
        return Source(infer_student(encoder, str(path), options), encoder, split.heads, str(path), True)
    if entry is not None:
        raise CheckpointError(f"only an icefall checkpoint has a choice of weights ({entry}), but {path_or_id} is a folder or an id")
    folder = find_folder(path_or_id, revision)
    config = read_config(folder)
    split = split_heads(read_weights(folder), str(folder))
    return Source(parse_student(config, str(folder / "config.json")), split.encoder, split.heads, str(folder), False)


def fingerprint_source(source: Source) -> str:
    """SHA-256 over names, types and values of an encoder's weights, the same wherever they lie."""
    digest = hashlib.sha256()
    for name in sorted(source.encoder):
        value = source.encoder[name].detach().cpu().contiguous()
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}\n".encode())
        digest.update(value.flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def read_config(folder: Path) -> dict[str, Any]:
    """The ``config.json`` of a SPEAR model folder.

    Raises:
        CheckpointError: it is missing, no JSON object, or that of another kind of model.
    """
    try:
        config = read_json(folder / "config.json")
    except ArtifactError as error:
        raise CheckpointError(str(error)) from error
    if not isinstance(config, dict):
        raise CheckpointError(f"{folder / 'config.json'} must hold a JSON object")
    kind = config.get("model_type", MODEL_TYPE)
    if kind != MODEL_TYPE:
        raise CheckpointError(f"`model_type` must be {MODEL_TYPE!r}, but is {kind!r} ({folder / 'config.json'})")
    return config


def find_folder(path_or_id: str | Path, revision: str | None = None) -> Path:
    """A local model folder as it is, or the downloaded (or cached) copy of a Hugging Face id.

    Raises:
        CheckpointError: neither exists, or the hub cannot be reached.
    """
    path = Path(path_or_id)
    if path.is_dir():
        return path
    name = str(path_or_id)
    if path.exists():
        raise CheckpointError(f"{path} is not a folder, nor does its name end in {', '.join(CHECKPOINTS)} as an icefall checkpoint's does")
    if path.is_absolute() or name.startswith((".", "~")) or name.count("/") != 1:
        raise CheckpointError(f"{path} does not exist")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=["*.json", "*.safetensors"]))
    except (HfHubHTTPError, HFValidationError, OSError, ValueError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise CheckpointError(f"{name} is no folder and cannot be fetched from the Hugging Face hub: {reason}") from error
