"""Stage 2, ``quantizers``: sampled teacher frames -> a fitted quantizer per teacher, with its card and plots."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from spear.config import to_json
from spear.errors import ArtifactError, DataError
from spear.files import read_tensors, seed_from
from spear.quantizers.base import QuantizerConfig
from spear.quantizers.card import card, write_card
from spear.stages.artifact import Artifact, fingerprint_of, read_artifact

if TYPE_CHECKING:
    from spear.recipe import Run

logger = logging.getLogger(__name__)

CHECKPOINT = "fit.safetensors"
HELDOUT = "heldout.safetensors"


def run(run: Run) -> None:
    """Fit the quantizer of every teacher into ``DATA/quantizers/<teacher>/``.

    Raises:
        ArtifactError: the features are unfinished, damaged or of other inputs. DataError: they are too few or not finite.
    """
    if not run.recipe.teachers:
        logger.info("quantizers: the recipe names no teachers, nothing to do")
    for name in run.recipe.teachers:
        _fit(run, name)


def _fit(run: Run, name: str) -> None:
    config = run.recipe.quantizers[name]
    seed = seed_from(run.recipe.seed, "quantizer", name)
    features, folder = run.data / "features" / name, run.data / "quantizers" / name
    artifact = Artifact(
        folder,
        kind="quantizers",
        config={"quantizer": to_json(config, QuantizerConfig), "seed": seed},
        inputs={"features": fingerprint_of(features), "teacher": read_artifact(features)["inputs"]["teacher"]},
    )
    if artifact.is_done():
        return
    train, heldout = read_frames(features)
    checkpoint = folder / CHECKPOINT
    with artifact.making() as record:
        try:
            quantizer = config.fit(train, heldout, seed=seed, checkpoint=checkpoint)
            found = card(quantizer, heldout)
        except DataError as error:
            raise DataError(f"{features}: {error}", cause=error.cause) from error
        quantizer.save(folder)
        write_card(folder, found, quantizer, heldout)
        checkpoint.unlink(missing_ok=True)
        record.counts = {"frames": len(train), "heldout_frames": len(heldout)}
        record.extra = {"relative_loss": found["relative_loss"], "quantizer": quantizer.fingerprint()}
    logger.info("quantizers: %s has a relative loss of %.4f at %g bits per frame", name, found["relative_loss"], found["bits_per_frame"])


def read_frames(folder: Path) -> tuple[Tensor, Tensor]:
    """Training frames (M, D) and held-out frames (H, D), float32, of a features folder.

    Raises:
        ArtifactError: a file is missing, damaged or lacks its frames.
    """
    paths = sorted(folder.glob("frames-*.safetensors"))
    if not paths:
        raise ArtifactError(f"{folder} has no frames-*.safetensors: remove the folder and run `spear features` again")
    blocks = [_read(path) for path in [*paths, folder / HELDOUT]]
    widths = {block.shape[1] for block in blocks}
    if len(widths) > 1:
        raise ArtifactError(f"{folder} has frames of several widths, {', '.join(str(width) for width in sorted(widths))}")
    return torch.cat(blocks[:-1]), blocks[-1]


def _read(path: Path) -> Tensor:
    frames = read_tensors(path).get("frames")
    if frames is None or frames.dim() != 2:
        raise ArtifactError(
            f"{path} must have a tensor `frames` of shape (frames, channels), but has {'none' if frames is None else tuple(frames.shape)}"
        )
    return frames.float()
