"""``spear import``: released SPEAR folders and icefall checkpoints as export folders."""

from __future__ import annotations

import logging
from pathlib import Path

from spear.errors import CheckpointError
from spear.export.encoder import build_encoder, find_folder, read_config, save_encoder
from spear.export.icefall import infer_student
from spear.export.layout import parse_student
from spear.export.weights import encoder_state, read_icefall, read_weights

logger = logging.getLogger(__name__)


def import_model(src: Path, out: Path) -> None:
    """Write an export folder from an encoder that was trained elsewhere; training heads are dropped and logged.

    Args:
        src: a folder in the Hugging Face layout (``config.json`` with comma-separated values, weights with or without ``model.``
            prefixes), a Hugging Face id, or an icefall ``.pt`` checkpoint (its ``model`` entry; sizes are read off the shapes).
        out: the folder to write.
    Raises:
        CheckpointError: `src` is neither, or weights are missing, left over or of another shape.
    """
    if src.suffix in (".pt", ".pth", ".ckpt") or src.is_file():
        state, dropped = encoder_state(read_icefall(src), str(src))
        student = infer_student(state, str(src))
        what = f"Imported from the icefall checkpoint {src.name}."
    else:
        folder = find_folder(src)
        if out.exists() and out.resolve() == folder.resolve():
            raise CheckpointError(f"`OUT` must be another folder than `SRC`, but both are {src}")
        state, dropped = encoder_state(read_weights(folder), str(src))
        student = parse_student(read_config(folder), f"{src}/config.json")
        what = f"Imported from {src.name}."
    encoder = build_encoder(student, state, str(src))
    if dropped:
        what += f" {len(dropped)} weights of training heads were left out."
    save_encoder(out, encoder.encoder, student, {"name": out.resolve().name, "source": what})
    logger.info("import: %d weights of %s -> %s", len(state), src, out)
