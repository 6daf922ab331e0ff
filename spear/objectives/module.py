"""Student and objective as the one module that a trainer optimises and DDP wraps."""

from __future__ import annotations

import torch
from torch import nn

from spear.models.student import Student
from spear.objectives.base import Objective
from spear.types import Batch, StepOutput


class PretrainModule(nn.Module):
    """``forward(batch, generator)`` runs the student on masked log-mels and the objective on its output.

    Args:
        student: masks and encodes. objective: owns the heads.
    """

    def __init__(self, student: Student, objective: Objective) -> None:
        super().__init__()
        self.student = student
        self.objective = objective
        self.step = 0

    @property
    def uses_all(self) -> bool:
        """Whether every training batch gives all parameters a gradient."""
        return self.student.encoder.uses_all and self.objective.uses_all

    def forward(self, batch: Batch, generator: torch.Generator | None = None) -> StepOutput:
        """Loss and metrics of one batch; `generator` draws the masks, None or eval mode means unmasked."""
        output = self.student(batch.features, batch.feature_lens, generator, batch.host_lens)
        result: StepOutput = self.objective(output, batch)
        return result

    def set_batch_count(self, count: float) -> None:
        """Move the student's scheduled floats to an adjusted batch count (facts of Zipformer, section 12.1)."""
        self.student.encoder.set_batch_count(count)

    def after_step(self, step: int) -> None:
        """Called once after every optimiser step."""
        self.step = step
        self.objective.after_step(step, self.student)

    def training_state(self) -> float:
        """Updates done, for checkpoints."""
        return float(self.step)

    def load_training_state(self, value: float) -> None:
        """Go on from a checkpoint."""
        self.step = int(value)
        self.objective.resume(self.step, self.student)

    def discard_step(self) -> None:
        """Called instead where an update was left out."""
        self.objective.discard_step()
