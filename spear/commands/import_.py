"""``spear import``: released SPEAR folders and icefall checkpoints as export folders."""

from __future__ import annotations

import logging
from pathlib import Path

from spear.errors import CheckpointError
from spear.export.encoder import build_encoder, save_encoder
from spear.export.source import read_source
from spear.files import write_tensors

logger = logging.getLogger(__name__)

HEADS = "heads.safetensors"


def import_model(src: Path, out: Path, weights: str | None = None, *, keep_heads: bool = False) -> None:
    """Write an export folder from an encoder that was trained elsewhere; training heads are logged, and dropped or kept.

    Args:
        src: a folder in the Hugging Face layout (``config.json`` with comma-separated values, weights with or without ``model.``
            prefixes), a Hugging Face id, or an icefall ``.pt`` checkpoint (sizes are read off the shapes).
        out: the folder to write. weights: of an icefall checkpoint ``model`` or ``model_avg``; None: the first that is there.
        keep_heads: write the training heads to ``heads.safetensors``, under their own names; no part of this package reads them.
    Raises:
        CheckpointError: `src` is neither, or weights are missing, left over or of another shape.
    """
    if out.exists() and src.is_dir() and out.resolve() == src.resolve():
        raise CheckpointError(f"`OUT` must be another folder than `SRC`, but both are {src}")
    found = read_source(src, entry=weights)
    encoder = build_encoder(found.student, found.encoder, found.name)
    kind = "the icefall checkpoint " if found.is_icefall else ""
    part = f", {weights}" if weights is not None else ""
    what = f"Imported from {kind}{src.name}{part}."
    if found.heads:
        what += f" {len(found.heads)} weights of training heads were {f'kept in {HEADS}' if keep_heads else 'left out'}."
    save_encoder(out, encoder.encoder, found.student, {"name": out.resolve().name, "source": what})
    (out / HEADS).unlink(missing_ok=True)
    if found.heads and keep_heads:
        write_tensors(out / HEADS, found.heads, {"format": "pt"})
    logger.info("import: %d weights of %s -> %s", len(found.encoder), src, out)
