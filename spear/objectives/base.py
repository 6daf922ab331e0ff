"""The contract of an objective: (StudentOutput, Batch) -> StepOutput."""

from __future__ import annotations

import abc
from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from spear.models.base import Encoder
from spear.models.student import Student
from spear.registry import Registry
from spear.types import Batch, FrameSpec, StepOutput, StudentOutput, TokenSpec


@dataclass(frozen=True, kw_only=True, slots=True)
class ObjectiveConfig(Registry):
    """Settings of an objective; the table of objectives."""

    TABLE: ClassVar[dict[str, str]] = {
        "masked_prediction": "spear.objectives.masked_prediction:MaskedPredictionConfig",
        "layer_distillation": "spear.objectives.layer_distillation:LayerDistillationConfig",
        "self_distillation": "spear.objectives.self_distillation:SelfDistillationConfig",
        "regression": "spear.objectives.regression:RegressionConfig",
    }

    def labels(self, domain: str) -> list[str]:
        """Names of the teachers whose tokens cuts of `domain` need.

        Raises:
            ConfigError: the objective does not know the domain.
        """
        raise NotImplementedError

    def domains(self) -> list[str]:
        """Cut domains that the settings name, sorted; empty where any will do."""
        return []

    def teachers(self) -> list[str]:
        """Names of all teachers whose tokens the objective reads, sorted."""
        raise NotImplementedError

    def frames(self, domain: str) -> list[str]:
        """Names of the teachers whose frames, not tokens, cuts of `domain` need; they run beside the student."""
        del domain
        return []

    def frame_teachers(self) -> list[str]:
        """Names of all teachers whose frames the objective reads, sorted; they need no quantizer."""
        return []

    def build(self, encoder: Encoder, specs: dict[str, TokenSpec]) -> Objective:
        """Make the objective for an encoder and the token stores of every teacher it reads."""
        raise NotImplementedError

    def build_on(self, encoder: Encoder, specs: dict[str, TokenSpec], frames: dict[str, FrameSpec]) -> Objective:
        """As `build`, with the teachers of `frame_teachers` besides; an objective without them ignores `frames`."""
        del frames
        return self.build(encoder, specs)


class Objective(nn.Module, abc.ABC):
    """Turns what the student says into a loss; owns the prediction heads.

    uses_all: every batch gives all heads a gradient, and the student's output, too.
    """

    uses_all: bool = False

    @abc.abstractmethod
    def forward(self, output: StudentOutput, batch: Batch) -> StepOutput:
        """Loss as a sum over targets, the number of targets, and metrics (see StepOutput)."""

    def after_step(self, step: int, student: Student) -> None:
        """Called once after every optimiser step, e.g. to move an EMA teacher; does nothing by default."""

    def resume(self, step: int, student: Student) -> None:
        """Called once where a run goes on from a checkpoint made after `step` updates, e.g. to freeze again what was frozen."""

    def discard_step(self) -> None:
        """Called instead where an update was left out since its loss or gradient was not finite: forget what its batches left behind."""
