"""Training: the loop, its checkpoints and records, optimisers and schedules; knows protocols, no teacher, student or corpus."""

from spear.training.config import TrainingConfig
from spear.training.distributed import World, process_group
from spear.training.trainer import Trainer, TrainingResult

__all__ = ["Trainer", "TrainingConfig", "TrainingResult", "World", "process_group"]
