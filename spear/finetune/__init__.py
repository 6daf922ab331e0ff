"""Fine-tuning: an encoder and a small head on labelled cuts, trained by the trainer of pre-training."""

from spear.finetune.model import FinetunedModel, load_finetuned

__all__ = ["FinetunedModel", "load_finetuned"]
