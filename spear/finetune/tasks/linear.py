"""The head that tasks on whole cuts share: mean over the valid frames, dropout, one linear layer."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from spear.finetune.layers import LayerMix
from spear.finetune.tasks.base import Head, masked_mean


class LinearHead(Head):
    """One number per class; what it means is the task's.

    Args:
        mix: of the encoder's layers. dim: its width D. classes: names of the K classes. dropout: of the mean.
    """

    def __init__(self, mix: LayerMix, dim: int, classes: Sequence[str], dropout: float) -> None:
        super().__init__(mix)
        self.classes = list(classes)
        self.dropout = nn.Dropout(dropout)
        self.output = nn.Linear(dim, len(self.classes))

    def scores(self, frames: Tensor, lens: Tensor) -> Tensor:
        """(N, T, D) -> (N, K) float32 logits."""
        logits: Tensor = self.output(self.dropout(masked_mean(frames, lens)))
        return logits.float()
