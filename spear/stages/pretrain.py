"""Stage 5, ``pretrain``: shards -> checkpoints of a student, with `metrics.jsonl` and TensorBoard files."""

from __future__ import annotations

import logging
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch

from spear.config import to_json
from spear.data.source import TrainSource, ValidSource, make_sources
from spear.errors import ArtifactError
from spear.export.encoder import start_from
from spear.export.source import fingerprint_source, read_source
from spear.files import read_json, seed_from
from spear.models.base import Encoder
from spear.models.student import Student
from spear.models.zipformer.compiled import compile_layers
from spear.objectives import PretrainModule
from spear.stages.agreement import check_shards
from spear.stages.artifact import DONE, UNFINISHED, Artifact, Record, fingerprint_of, read_artifact
from spear.stages.online import inputs_of, make_labeller
from spear.teachers.online import LabelledSource, Labeller
from spear.training import Trainer, TrainingResult, World, process_group
from spear.training.distributed import pick_device

if TYPE_CHECKING:
    from spear.recipe import Run

logger = logging.getLogger(__name__)

SETTINGS = ("seed", "student", "masking", "mixing", "sampling", "objective", "training")
"""Keys of the recipe that pre-training depends on; everything before it comes through the shards' fingerprints."""
FREE = {
    "sampling": ("num_workers", "prefetch"),
    "training": (
        *("device", "parallel", "recompute", "compile", "find_unused_parameters"),
        *("log_every", "validate_every", "save_every", "keep_checkpoints", "trackers", "max_skipped"),
    ),
}
"""Settings that change how a run goes, but not the weights that come out; they may differ when it is continued. `training.max_steps` is one,
too, where the schedule fits a run of any length. `training.accumulation` stands in the identity as the batches of an update, those of all
processes together, so that a run goes on with another number of processes where the product stays."""
PROCESSES = "processes"
"""Where the record of a finished run says how many there were, if there were several."""


def run(run: Run) -> None:
    """Train the recipe's student on the shards of all corpora, into ``EXP``.

    Started by ``torchrun``, every process calls this; the first one writes.

    Raises:
        ArtifactError: shards are missing or unfinished, or EXP holds another run.
        StopRequested: a signal came and everything is saved.
    """
    with process_group(run.recipe.training.device) as world:
        labeller = make_labeller(run, pick_device(run.recipe.training.device, world))
        artifact = Artifact(run.exp, kind="pretrain", config=_config(run, _processes(run, world)), inputs={**_inputs(run), **inputs_of(labeller)})
        if _is_done(run, artifact, world):
            return
        with artifact.making(world.size) if world.is_main else nullcontext(Record()) as record:
            trainer, train, valid = make_trainer(run, artifact.fingerprint, world, labeller)
            _describe(record, trainer.run(), train, valid)
            if world.size > 1:
                record.extra[PROCESSES] = world.size


def make_trainer(run: Run, fingerprint: str, world: World, labeller: Labeller | None = None) -> tuple[Trainer, TrainSource, ValidSource | None]:
    """Wire shards, student, objective and trainer of a run.

    Args:
        run: recipe, corpora and folders. fingerprint: guards the checkpoints. world: this process among those of the run.
        labeller: teachers that run beside the student (see `spear.stages.online`).
    """
    recipe = run.recipe
    encoder = initial_encoder(run)
    train, valid = make_sources(
        run.data / "shards",
        {corpus.name: corpus.weight for corpus in run.corpora},
        sampling=recipe.sampling,
        mixing=recipe.mixing,
        seed=seed_from(recipe.seed, "batches"),
        teachers=[name for name in recipe.objective.teachers() if recipe.tokens.source == "stored"],
        only_noise=[corpus.name for corpus in run.corpora if run.is_noise(corpus.domain)],
        num_mel_bins=encoder.num_mel_bins,
        reads=encoder.reads,
        keep_audio=labeller is not None,
    )
    specs = {**train.builder.specs, **(labeller.token_specs() if labeller is not None else {})}
    objective = recipe.objective.build_on(encoder, specs, labeller.frame_specs() if labeller is not None else {})
    module = PretrainModule(Student(encoder, recipe.masking), objective)
    if recipe.training.compile:
        compile_layers(encoder)
    if labeller is not None:
        train, valid = cast(TrainSource, LabelledSource(train, labeller)), valid and cast(ValidSource, LabelledSource(valid, labeller))
    seed = seed_from(recipe.seed, "training")
    kept = recipe.export.milestones(recipe.training.max_steps)
    trainer = Trainer(
        recipe.training, module, train, valid, run.exp, seed, fingerprint, world=world, description=_config(run, world.size), milestones=kept
    )
    return trainer, train, valid


def _is_done(run: Run, artifact: Artifact, world: World) -> bool:
    """Whether the run is finished; one that is to be longer than it was is opened again. Every process must call it.

    Raises:
        ArtifactError: EXP holds another run, a longer one, one of other batches, or one whose schedule does not allow more updates.
    """
    _check_continued(run, _processes(run, world))
    if not artifact.is_done():
        return False
    done, wanted = int(read_artifact(run.exp)["counts"]["steps"]), run.recipe.training.max_steps
    if done > wanted:
        raise ArtifactError(f"{run.exp} holds {done} updates, but `training.max_steps` is {wanted}: take {done} or more, or another folder")
    if done == wanted:
        return True
    world.barrier()  # all have read the record
    if world.is_main:
        logger.info("pretrain: the run of %d updates is lengthened to %d", done, wanted)
        with artifact.reopening():
            pass
    world.barrier()
    return False


def _processes(run: Run, world: World) -> int:
    """Processes that the identity counts: those of this run, or those that a finished one had where nothing is left to train."""
    if (run.exp / DONE).exists():
        record, training = read_json(run.exp / DONE), run.recipe.training
        had = int(record.get("extra", {}).get(PROCESSES, 1))
        begun = record["config"].get("training", {}).get("accumulation")
        if record["counts"].get("steps") == training.max_steps and begun == had * training.accumulation:
            return had
    return world.size


def _check_continued(run: Run, processes: int) -> None:
    """Say so where nothing differs from the run in EXP but its batches per update, or its length, on which the schedule depends.

    Raises:
        ArtifactError: it does.
    """
    training = run.recipe.training
    record = next((run.exp / name for name in (DONE, UNFINISHED) if (run.exp / name).exists()), None)
    if record is None:
        return
    before, now = read_json(record).get("config", {}), _config(run, processes)
    settings = before.get("training", {})
    batches = int(settings.get("accumulation", 0))
    if batches != now["training"]["accumulation"] and {**before, "training": {**settings, "accumulation": now["training"]["accumulation"]}} == now:
        fits = f"set `training.accumulation` to {batches // processes}" if batches % processes == 0 else "take a number of processes that divides it"
        present = f"{processes} process{'es' if processes > 1 else ''} with `training.accumulation` {training.accumulation}"
        raise ArtifactError(
            f"{run.exp} was begun with {batches} batches per update, but {present} "
            f"make {now['training']['accumulation']}: the product must stay; {fits}, or take another folder"
        )
    begun = settings.get("max_steps")
    if training.schedule.FITS_ANY_LENGTH or begun == training.max_steps:
        return
    if {**before, "training": {**settings, "max_steps": training.max_steps}} == now:
        kind = now["training"]["schedule"]["type"]
        raise ArtifactError(
            f"{run.exp} was begun with `training.max_steps` {begun}, which is now {training.max_steps}: the schedule `{kind}` falls over the whole "
            "run, so that its length cannot change; take another folder, or from the start a schedule that fits any length (eden, eden2, constant)"
        )


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


def _config(run: Run, processes: int = 1) -> dict[str, Any]:
    """Settings of the identity; `training.accumulation` is that of all `processes` together."""
    settings = to_json(run.recipe)
    kept = {key: settings[key] for key in SETTINGS}
    for key, names in FREE.items():
        kept[key] = {name: value for name, value in kept[key].items() if name not in names}
    if run.recipe.training.schedule.FITS_ANY_LENGTH:
        del kept["training"]["max_steps"]
    kept["training"]["accumulation"] *= processes
    return {**kept, "corpora": {corpus.name: corpus.weight for corpus in run.corpora}}


def _inputs(run: Run) -> dict[str, str]:
    for corpus in run.corpora:
        check_shards(run, corpus)
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
    if result.flops:
        record.extra["petaflops"] = float(f"{result.flops / 1e15:.4g}")
