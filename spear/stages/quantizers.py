"""Stage 2, ``quantizers``: sampled teacher frames -> a fitted quantizer per teacher, with its card and plots."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor

from spear.config import to_json
from spear.errors import ArtifactError, DataError
from spear.files import seed_from
from spear.quantizers.base import Quantizer, QuantizerConfig
from spear.quantizers.card import card, write_card
from spear.quantizers.frame_source import FrameSource
from spear.stages.artifact import Artifact, fingerprint_of, read_artifact
from spear.training import World, process_group
from spear.types import CodecCodebooks

if TYPE_CHECKING:
    from spear.recipe import Run

logger = logging.getLogger(__name__)

CHECKPOINT = "fit.safetensors"
HELDOUT = "heldout.safetensors"


def run(run: Run) -> None:
    """Fit the quantizer of every teacher into ``DATA/quantizers/<teacher>/``. Processes that torchrun starts share the reading and searching.

    Raises:
        ArtifactError: the features are unfinished, damaged or of other inputs. DataError: they are too few or not finite.
    """
    if not run.recipe.quantizers:
        logger.info("quantizers: the recipe names none, nothing to do")
    with process_group("cpu") as world:
        for name in run.recipe.quantizers:
            _fit(run, name, world)


def _fit(run: Run, name: str, world: World) -> None:
    config = run.recipe.quantizers[name]
    seed = seed_from(run.recipe.seed, "quantizer", name)
    features, folder = run.data / "features" / name, run.data / "quantizers" / name
    teacher = read_artifact(features)["inputs"]["teacher"]
    artifact = Artifact(
        folder,
        kind="quantizers",
        config={"quantizer": to_json(config, QuantizerConfig), "seed": seed},
        inputs={"features": fingerprint_of(features), "teacher": teacher},
    )
    done = artifact.is_done()
    world.barrier()  # all have looked before one of them changes the folder
    if done:
        return
    source, heldout = open_frames(features, world)
    checkpoint = folder / CHECKPOINT
    known = config.knowing(lambda: _codebooks(run, name, teacher))

    def fitted() -> Quantizer:
        try:
            return known.fit_source(source, heldout, seed=seed, checkpoint=checkpoint)
        except DataError as error:
            raise DataError(f"{features}: {error}", cause=error.cause) from error

    if not world.is_main:
        fitted()
        return
    with artifact.making(world.size) as record:
        quantizer = fitted()
        found = card(quantizer, heldout)
        quantizer.save(folder)
        write_card(folder, found, quantizer, heldout)
        for path in folder.glob(f"{checkpoint.stem}*{checkpoint.suffix}"):
            path.unlink()
        record.counts = {"frames": len(source), "heldout_frames": len(heldout)}
        record.extra = {"relative_loss": found["relative_loss"], "quantizer": quantizer.fingerprint()}
    logger.info("quantizers: %s has a relative loss of %.4f at %g bits per frame", name, found["relative_loss"], found["bits_per_frame"])


def _codebooks(run: Run, name: str, fingerprint: str) -> CodecCodebooks:
    """The codebooks of the teacher that the features were made by.

    Raises:
        ArtifactError: the recipe's teacher is another one. ConfigError: it has no codebooks.
    """
    teacher = run.recipe.teachers[name].build(run.data)
    if teacher.fingerprint() != fingerprint:
        features = run.data / "features" / name
        raise ArtifactError(f"{features} was made with another teacher than `teachers.{name}`: remove it and run `spear features` again")
    return teacher.codebooks()


def open_frames(folder: Path, world: World | None = None) -> tuple[FrameSource, Tensor]:
    """Training frames (M, D) of a features folder, left on the disk, and its held-out frames (H, D), float32.

    Raises:
        ArtifactError: a file is missing, damaged or lacks its frames.
    """
    paths = sorted(folder.glob("frames-*.safetensors"))
    if not paths:
        raise ArtifactError(f"{folder} has no frames-*.safetensors: remove the folder and run `spear features` again")
    every = FrameSource([*paths, folder / HELDOUT])  # finds files that do not fit together
    source = FrameSource(paths, world)
    return source, every.read(len(source), len(every))


def read_frames(folder: Path) -> tuple[Tensor, Tensor]:
    """Training frames (M, D) and held-out frames (H, D), float32, of a features folder, in memory.

    Raises:
        ArtifactError: a file is missing, damaged or lacks its frames.
    """
    source, heldout = open_frames(folder)
    return source.read(0, len(source)), heldout
