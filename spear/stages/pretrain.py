"""Stage 5, ``pretrain``: shards -> checkpoints of a student, with `metrics.jsonl` and TensorBoard files."""

from __future__ import annotations

import logging
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from spear.config import to_json
from spear.data.source import TrainSource, ValidSource, make_sources
from spear.export.encoder import start_from
from spear.export.source import fingerprint_source, read_source
from spear.files import seed_from
from spear.models.base import Encoder
from spear.models.student import Student
from spear.objectives import PretrainModule
from spear.stages.artifact import Artifact, Record, fingerprint_of, read_artifact
from spear.stages.shards import check_teachers
from spear.training import Trainer, TrainingResult, World, process_group

if TYPE_CHECKING:
    from spear.recipe import Run

logger = logging.getLogger(__name__)

SETTINGS = ("seed", "student", "masking", "mixing", "sampling", "objective", "training")
"""Keys of the recipe that pre-training depends on; everything before it comes through the shards' fingerprints."""
FREE = {"sampling": ("num_workers", "prefetch"), "training": ("device", "keep_checkpoints", "find_unused_parameters")}
"""Settings that change how a run goes, but not what comes out; they may differ when it is continued."""


def run(run: Run) -> None:
    """Train the recipe's student on the shards of all corpora, into ``EXP``.

    Started by ``torchrun``, every process calls this; the first one writes.

    Raises:
        ArtifactError: shards are missing or unfinished, or EXP holds another run.
        StopRequested: a signal came and everything is saved.
    """
    with process_group(run.recipe.training.device) as world:
        artifact = Artifact(run.exp, kind="pretrain", config=_config(run), inputs=_inputs(run))
        if artifact.is_done():
            return
        with artifact.making(world.size) if world.is_main else nullcontext(Record()) as record:
            trainer, train, valid = make_trainer(run, artifact.fingerprint, world)
            _describe(record, trainer.run(), train, valid)


def make_trainer(run: Run, fingerprint: str, world: World) -> tuple[Trainer, TrainSource, ValidSource | None]:
    """Wire shards, student, objective and trainer of a run.

    Args:
        run: recipe, corpora and folders. fingerprint: guards the checkpoints. world: this process among those of the run.
    """
    recipe = run.recipe
    encoder = initial_encoder(run)
    train, valid = make_sources(
        run.data / "shards",
        {corpus.name: corpus.weight for corpus in run.corpora},
        sampling=recipe.sampling,
        mixing=recipe.mixing,
        seed=seed_from(recipe.seed, "batches"),
        teachers=recipe.objective.teachers(),
        only_noise=[corpus.name for corpus in run.corpora if run.is_noise(corpus.domain)],
        num_mel_bins=encoder.num_mel_bins,
    )
    module = PretrainModule(Student(encoder, recipe.masking), recipe.objective.build(encoder, train.builder.specs))
    seed = seed_from(recipe.seed, "training")
    kept = recipe.export.milestones(recipe.training.max_steps)
    trainer = Trainer(recipe.training, module, train, valid, run.exp, seed, fingerprint, world=world, description=_config(run), milestones=kept)
    return trainer, train, valid


def initial_encoder(run: Run) -> Encoder:
    """The student's encoder before its first update: random weights from the recipe's seed, or those of `init_from`.

    Raises:
        CheckpointError: `init_from` is no encoder, or another network than the recipe's student.
    """
    torch.manual_seed(seed_from(run.recipe.seed, "student"))
    encoder = run.recipe.student.build()
    if run.recipe.init_from is not None:
        source = _starting_point(run, run.recipe.init_from)
        start_from(encoder, run.recipe.student, source)
        logger.info("pretrain: the encoder starts with the weights of %s", source)
    return encoder


def _starting_point(run: Run, name: str) -> str | Path:
    """The file or folder that `init_from` names, below the run's data folder or as a path; else the name, a Hugging Face id."""
    return next((path for path in (run.data / name, Path(name).expanduser()) if path.exists()), name)


def _config(run: Run) -> dict[str, Any]:
    settings = to_json(run.recipe)
    kept = {key: settings[key] for key in SETTINGS}
    for key, names in FREE.items():
        kept[key] = {name: value for name, value in kept[key].items() if name not in names}
    return {**kept, "corpora": {corpus.name: corpus.weight for corpus in run.corpora}}


def _inputs(run: Run) -> dict[str, str]:
    for corpus in run.corpora:
        check_teachers(run, read_artifact(run.data / "shards" / corpus.name), run.labels(corpus.domain))
    found = {f"shards/{corpus.name}": fingerprint_of(run.data / "shards" / corpus.name) for corpus in run.corpora}
    if run.recipe.init_from is not None:
        found["init_from"] = fingerprint_source(read_source(_starting_point(run, run.recipe.init_from)))
    return found


def _describe(record: Record, result: TrainingResult, train: TrainSource, valid: ValidSource | None) -> None:
    record.audio_s = result.hours * 3600
    record.counts = {
        "steps": result.steps,
        "batches_per_epoch": train.batches_per_epoch,
        "train_cuts": sum(map(len, train.readers)),
        "valid_cuts": sum(map(len, valid.readers)) if valid is not None else 0,
    }
    record.extra = {"checkpoint": result.checkpoint.name, "valid": result.valid}
