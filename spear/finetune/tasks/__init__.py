"""What an encoder can be fine-tuned to: one file per task, a line in the table of `base`."""

from spear.finetune.tasks.base import FinetuneTaskConfig, Head

__all__ = ["FinetuneTaskConfig", "Head"]
