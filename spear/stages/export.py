"""Stage 6, ``export``: a run's checkpoints -> the encoder as a model folder, or in the format of another program."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from spear.config import to_json
from spear.errors import ArtifactError, CheckpointError
from spear.export.config import ExportConfig
from spear.export.encoder import AudioEncoder, build_encoder, save_encoder
from spear.export.icefall import require_zipformer, save_icefall
from spear.files import read_json, read_tensors, sha256_file, void
from spear.models.base import StudentConfig
from spear.stages.artifact import DONE, Artifact
from spear.teachers.base import TeacherConfig
from spear.training.checkpoint import AVERAGE, FOLDER, MODEL, averaged_weights, find_checkpoints, read_state

if TYPE_CHECKING:
    from spear.recipe import Run

logger = logging.getLogger(__name__)

PREFIX = "student.encoder."
"""Where the encoder's weights lie in those of the module that was trained."""
FOLDERS = {"hf": "export", "icefall": "export_icefall", "onnx": "export_onnx", "torch": "export_torch"}
"""Format -> folder below EXP. Each is an artifact of its own, and which one is wanted is no part of its identity."""
ICEFALL = "pretrained.pt"
FAR_OFF = 0.25
"""Share of the steps that should be averaged by which the mean may start early or late without a warning."""


class Choice(NamedTuple):
    """Which weights are exported.

    step, end: the checkpoint. averaged: whether they are a mean. start_step, start: it counts the steps after these; 0 and None for
    all of training.
    """

    step: int
    end: Path
    averaged: bool
    start_step: int = 0
    start: Path | None = None

    def files(self) -> dict[str, Path]:
        """The files that the weights depend on."""
        found = {"weights": self.end / MODEL}
        if self.averaged:
            found["average"] = self.end / AVERAGE
        if self.start is not None:
            found["average before"] = self.start / AVERAGE
        return found

    def text(self) -> str:
        """One phrase for the model card."""
        return f"mean over the steps {self.start_step} to {self.step}" if self.averaged else f"those of step {self.step}"


def run(run: Run) -> None:
    """Write ``EXP/export``, or the folder of another format, from ``EXP/checkpoints``.

    Raises:
        CheckpointError: there is no checkpoint, or not the one that `export` names, or it does not fit the recipe's student or the format.
    """
    form = run.recipe.export.format
    FORMATS[form].check(run)
    choice, folder = choose(run.exp, run.recipe.export), run.exp / FOLDERS[form]
    settings = {key: value for key, value in to_json(run.recipe.export).items() if key not in ("format", *FORMATS[form].ignored)}
    artifact = Artifact(
        folder,
        kind="export",
        config={"export": settings, "student": to_json(run.recipe.student, StudentConfig)},
        inputs={name: sha256_file(path) for name, path in choice.files().items()},
    )
    if artifact.is_done():
        return
    with artifact.making() as record:
        state = encoder_weights(choice)
        encoder = build_encoder(run.recipe.student, state, str(choice.end))
        seconds = read_state(choice.end).seconds
        checkpoint = {"step": choice.step, "weights": choice.text(), "hours_of_audio_heard": round(seconds / 3600, 3)}
        more = FORMATS[form].write(run, folder, encoder, checkpoint)
        record.counts.update(weights=len(state), parameters=sum(value.numel() for value in state.values()))
        record.audio_s = seconds
        record.extra.update(step=choice.step, averaged=choice.averaged, start_step=choice.start_step if choice.averaged else None, **more)
    logger.info("export: %s, %s weights -> %s", choice.text(), f"{record.counts['parameters']:,}", folder)


class Format(NamedTuple):
    """How one format is written.

    check: raises where it cannot be. write: (run, folder, encoder, facts of the checkpoint) -> what ``artifact.json`` says more.
    ignored: settings that the files do not depend on.
    """

    check: Callable[[Run], None]
    write: Callable[[Run, Path, AudioEncoder, dict[str, Any]], dict[str, Any]]
    ignored: tuple[str, ...] = ("precisions",)


def _write_hf(run: Run, folder: Path, encoder: AudioEncoder, checkpoint: dict[str, Any]) -> dict[str, Any]:
    save_encoder(folder, encoder.encoder, run.recipe.student, card_info(run, checkpoint))
    return {}


def _write_icefall(run: Run, folder: Path, encoder: AudioEncoder, checkpoint: dict[str, Any]) -> dict[str, Any]:
    del checkpoint
    save_icefall(folder / ICEFALL, encoder.encoder, run.recipe.student)
    return {}


def _write_onnx(run: Run, folder: Path, encoder: AudioEncoder, checkpoint: dict[str, Any]) -> dict[str, Any]:
    from spear.export.onnx import write_onnx, write_parity
    from spear.export.onnx_parity import check_onnx

    del checkpoint
    write_onnx(folder, encoder, run.recipe.export.precisions)
    report = check_onnx(folder, encoder, run.recipe.export.precisions)
    write_parity(folder, report)
    return {"parity": _largest(report)}


def _write_torch(run: Run, folder: Path, encoder: AudioEncoder, checkpoint: dict[str, Any]) -> dict[str, Any]:
    from spear.export.onnx import write_parity, write_program
    from spear.export.onnx_parity import check_program

    del run, checkpoint
    write_program(folder, encoder)
    report = check_program(folder, encoder)
    write_parity(folder, report)
    return {"parity": _largest(report)}


def _largest(report: dict[str, Any]) -> dict[str, float]:
    """File -> largest difference from torch."""
    return {name: found["largest_difference"] for name, found in report.items()}


def _check_onnx(run: Run) -> None:
    from spear.export.onnx import require_onnx

    del run
    require_onnx()


FORMATS: dict[str, Format] = {
    "hf": Format(lambda run: None, _write_hf),
    "icefall": Format(lambda run: void(require_zipformer(run.recipe.student)), _write_icefall),
    "onnx": Format(_check_onnx, _write_onnx, ()),
    "torch": Format(lambda run: None, _write_torch),
}
"""The formats by their names in `export.format`."""


def choose(exp: Path, config: ExportConfig) -> Choice:
    """Find the checkpoints that the settings name; where no mean can be made, say why and take the checkpoint's own weights.

    Raises:
        CheckpointError: there is no checkpoint, or not the one that is named.
    """
    folders = dict(find_checkpoints(exp))
    if not folders:
        raise CheckpointError(f"{exp / FOLDER} holds no finished checkpoint: run `spear pretrain` first")
    step = max(folders) if config.step is None else _named(folders, config.step, "step", exp)
    plain = Choice(step, folders[step], averaged=False)
    if config.use == "last":
        return plain
    period = max(read_state(folders[step]).average_period, 1)
    if not (folders[step] / AVERAGE).exists():
        return _fall_back(plain, f"it has no {AVERAGE}")
    if step < period:
        return _fall_back(plain, f"the first snapshot of the running average would be taken at step {period}")
    wanted = config.start(step)
    if wanted is None:
        return Choice(step, folders[step], averaged=True)
    earlier = [other for other in folders if other < step // period * period and (folders[other] / AVERAGE).exists()]
    if config.start_step is not None:
        start = _named(folders, config.start_step, "start_step", exp)
        if start not in earlier:
            return _fall_back(plain, f"no snapshot of the running average lies between step {start} and it")
    elif earlier:
        start = min(earlier, key=lambda other: abs(wanted - other))
        if abs(start - wanted) > FAR_OFF * (step - wanted):
            logger.warning(
                "export: the mean is over the steps %d to %d, %.0f %% of training, as no checkpoint is nearer to `export.average_share` %g",
                start,
                step,
                100 * (step - start) / step,
                config.average_share,
            )
    else:
        return _fall_back(plain, "there is no earlier checkpoint to average from (`export.start_step=0` would average over all of training)")
    return Choice(step, folders[step], averaged=True, start_step=start, start=folders[start])


def _named(folders: dict[int, Path], step: int, key: str, exp: Path) -> int:
    if step not in folders:
        known = ", ".join(map(str, sorted(folders)))
        raise CheckpointError(f"`export.{key}` must be a step with a checkpoint ({known}), but is {step} ({exp / FOLDER})")
    return step


def _fall_back(plain: Choice, reason: str) -> Choice:
    logger.warning("export: the weights of step %d are exported as they are, not averaged: %s", plain.step, reason)
    return plain


def encoder_weights(choice: Choice) -> dict[str, Tensor]:
    """The chosen weights of the encoder, float32, under its own names.

    Raises:
        CheckpointError: a checkpoint is damaged, or holds no encoder.
    """
    state = averaged_weights(choice.end, choice.start) if choice.averaged else _plain(choice.end)
    found = {key.removeprefix(PREFIX): value.to(torch.float32) for key, value in state.items() if key.startswith(PREFIX)}
    if not found:
        raise CheckpointError(f"{choice.end / MODEL} holds no weights under `{PREFIX}`")
    return found


def _plain(folder: Path) -> dict[str, Tensor]:
    try:
        return read_tensors(folder / MODEL)
    except ArtifactError as error:
        raise CheckpointError(str(error)) from error


def card_info(run: Run, checkpoint: dict[str, Any]) -> dict[str, Any]:
    """What a run's recipe and finished artifacts tell the model card; deterministic for the same run."""
    config: ExportConfig = run.recipe.export
    teachers = [
        {"name": name, **_known(to_json(teacher, TeacherConfig), ("type", "model", "layer"))} for name, teacher in run.recipe.teachers.items()
    ]
    counts = _finished(run.data / "manifests").get("counts", {})
    corpora = []
    for corpus in run.corpora:
        train = counts.get(corpus.name, {}).get("train", {})
        corpora.append({"name": corpus.name, "domain": corpus.domain, **_known(train, ("hours", "cuts"))})
    pretrain = _finished(run.exp)
    compute = _known(pretrain.get("measured", {}), ("wall_s", "gpu_hours", "peak_memory_mb", "peak_gpu_memory_mb"))
    return {
        "name": config.name or run.exp.resolve().name,
        "licence": config.licence,
        "licence_notes": list(config.licence_notes),
        "teachers": teachers,
        "corpora": corpora,
        "checkpoint": checkpoint,
        "compute": compute,
    }


def _finished(folder: Path) -> dict[str, Any]:
    """The record of a finished artifact; empty where there is none, as a card can do without."""
    found: dict[str, Any] = read_json(folder / DONE) if (folder / DONE).exists() else {}
    return found


def _known(values: dict[str, Any], keys: tuple[str, ...]) -> dict[str, Any]:
    return {key: values[key] for key in keys if values.get(key) is not None}
