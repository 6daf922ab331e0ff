"""Settings of the export stage."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from spear.errors import ConfigError

PRECISIONS = ("fp32", "fp16", "int8")


@dataclass(frozen=True, kw_only=True, slots=True)
class ExportConfig:
    """Which weights become the exported encoder, and what its card says."""

    use: Literal["average", "last"] = "average"
    """``average``: the mean of the weights over a stretch of training; ``last``: the weights of the checkpoint as they are."""
    step: int | None = None
    """Checkpoint to export; none: the last one."""
    start_step: int | None = None
    """With ``use: average``: the mean is over the steps after this checkpoint, 0 for all of training; none: `average_share` decides."""
    average_share: float = 0.25
    """With ``use: average`` and no `start_step`: about this last share of the steps is averaged, from the checkpoint nearest to its start.
    Pre-training keeps that checkpoint, however few it keeps (`training.keep_checkpoints`)."""
    format: Literal["hf", "icefall", "onnx", "torch"] = "hf"
    """``hf``: a model folder, ``EXP/export``; beside it ``icefall``: a checkpoint that icefall loads, ``EXP/export_icefall/pretrained.pt``;
    ``onnx``: files for ONNX Runtime, ``EXP/export_onnx``; ``torch``: a recorded program, ``EXP/export_torch/encoder.pt2``."""
    precisions: tuple[str, ...] = ("fp32", "fp16", "int8")
    """With ``format: onnx``: which files are written."""
    name: str | None = None
    """Title of the model card; none: the name of the run's folder."""
    licence: str | None = None
    """Licence of the weights as an SPDX word; none: the card says that it is still open."""
    licence_notes: tuple[str, ...] = ()
    """Sentences for the card, e.g. what the licences of teachers and corpora ask for."""

    def __post_init__(self) -> None:
        for name, value in (("step", self.step), ("start_step", self.start_step)):
            if value is not None and value < 0:
                raise ConfigError(f"`{name}` must be 0 or more, but is {value}")
        if not self.precisions or not set(self.precisions) <= set(PRECISIONS):
            raise ConfigError(f"`precisions` must be some of {', '.join(PRECISIONS)}, but is {', '.join(self.precisions) or 'empty'}")
        if not 0 < self.average_share <= 1:
            raise ConfigError(f"`average_share` must be more than 0 and at most 1, but is {self.average_share}")
        if self.start_step is not None and self.use != "average":
            raise ConfigError(f"`start_step` needs `use: average`, but `use` is {self.use}")
        if self.start_step is not None and self.step is not None and self.start_step >= self.step:
            raise ConfigError(f"`start_step` must be smaller than `step`, but is {self.start_step} and not below {self.step}")

    def start(self, step: int) -> float | None:
        """Where the mean over the steps up to `step` should begin; None where no earlier checkpoint is needed: all of training, or no mean."""
        if self.use != "average":
            return None
        wanted = step * (1 - self.average_share) if self.start_step is None else float(self.start_step)
        return wanted or None

    def milestones(self, max_steps: int) -> list[float]:
        """Steps of a run of `max_steps` whose nearest checkpoints this export reads, besides the last one."""
        start = self.start(max_steps if self.step is None else self.step)
        return [float(wanted) for wanted in (self.step, start) if wanted is not None]

    def check(self, max_steps: int, save_every: int) -> None:
        """Check that a run will have the checkpoints that are named.

        Raises:
            ConfigError: `step` or `start_step` is none of the updates that are saved.
        """
        for name, value in (("step", self.step), ("start_step", self.start_step)):
            if value and (value > max_steps or (value % save_every and value != max_steps)):
                rule = f"a step with a checkpoint, a multiple of `training.save_every` {save_every} up to `training.max_steps` {max_steps}"
                raise ConfigError(f"`export.{name}` must be {rule}, but is {value}")
