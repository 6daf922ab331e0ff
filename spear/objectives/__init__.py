"""What the student is asked to do: objectives over its output and a batch's targets."""

from spear.objectives.base import Objective, ObjectiveConfig
from spear.objectives.module import PretrainModule

__all__ = ["Objective", "ObjectiveConfig", "PretrainModule"]
