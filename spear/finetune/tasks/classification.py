"""One class per cut: mean over the frames, a linear layer, cross-entropy."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from spear.bounds import within
from spear.evaluation.metrics import mean_average_precision
from spear.finetune.batch import LabelledBatch
from spear.finetune.layers import LayerMix
from spear.finetune.tasks.base import (
    FinetuneTaskConfig,
    Inventory,
    Prediction,
    classes_of,
    field_of,
    inverse_frequency,
    sum_and_count,
)
from spear.finetune.tasks.linear import LinearHead
from spear.types import StepOutput


@dataclass(frozen=True, kw_only=True, slots=True)
class ClassificationConfig(FinetuneTaskConfig):
    """Emotion, language, keyword, or any other label of a whole cut."""

    label_field: str = "label"
    """Custom field of the cut or of a supervision, or a field of a supervision such as ``speaker``, ``language`` or ``text``."""
    dropout: float = 0.1
    """Of the mean before the linear layer."""
    balance: bool = False
    """Draw cuts of rare classes more often, so that all classes are heard about equally often."""
    smoothing: float = 0.0
    """Share of the target that is spread over all classes."""

    def __post_init__(self) -> None:
        within("dropout", self.dropout, 0, 1)
        within("smoothing", self.smoothing, 0, 1)

    def label(self, cut: Any) -> str | None:
        """See FinetuneTaskConfig."""
        return field_of(cut, self.label_field)

    def needs(self) -> str:
        """See FinetuneTaskConfig."""
        return f"it needs the label `{self.label_field}`"

    def inventory(self, labels: Iterable[str]) -> Inventory:
        """See FinetuneTaskConfig."""
        return {"classes": classes_of(labels, "classes")}

    def encode(self, label: str, inventory: Inventory) -> NDArray[Any] | None:
        """See FinetuneTaskConfig; None for a class that training does not have."""
        classes = inventory["classes"]
        return np.asarray(classes.index(label)) if label in classes else None

    def draw_weights(self, labels: Sequence[str]) -> NDArray[np.float64] | None:
        """See FinetuneTaskConfig."""
        return inverse_frequency([[label] for label in labels]) if self.balance else None

    def build(self, dim: int, mix: LayerMix, inventory: Inventory) -> ClassificationHead:
        """See FinetuneTaskConfig."""
        return ClassificationHead(self, dim, mix, inventory["classes"])


class ClassificationHead(LinearHead):
    """Mean over valid frames -> class scores."""

    metric = "accuracy"
    higher_is_better = True

    def __init__(self, config: ClassificationConfig, dim: int, mix: LayerMix, classes: Sequence[str]) -> None:
        super().__init__(mix, dim, classes, config.dropout)
        self.config = config

    def loss(self, frames: Tensor, lens: Tensor, batch: LabelledBatch) -> StepOutput:
        """See Head."""
        scores, count = self.scores(frames, lens), lens.new_tensor(len(lens))
        total = F.cross_entropy(scores, batch.labels, reduction="sum", label_smoothing=self.config.smoothing)
        return StepOutput(total, count, {"accuracy": sum_and_count((scores.argmax(dim=1) == batch.labels).sum(), count)})

    def predict(self, frames: Tensor, lens: Tensor) -> list[Any]:
        """(K,) probabilities."""
        return list(self.scores(frames, lens).softmax(dim=1).cpu().numpy())

    def score(self, predictions: Sequence[Prediction], labels: dict[str, str]) -> dict[str, Any]:
        """Accuracy, and mean average precision over the classes."""
        scores = np.stack([found.value for found in predictions])
        wanted = np.asarray([self.classes.index(labels[found.id]) for found in predictions])
        relevant = wanted[:, None] == np.arange(len(self.classes))
        hits = scores.argmax(axis=1) == wanted
        return {"value": float(hits.mean()), "map": mean_average_precision(scores, relevant), "items": len(hits), "classes": len(self.classes)}

    def lines(self, predictions: Sequence[Prediction], labels: dict[str, str]) -> list[str]:
        """Confusions, the most frequent first."""
        pairs: dict[tuple[str, str], int] = {}
        for found in predictions:
            pair = labels[found.id], self.classes[int(np.argmax(found.value))]
            if pair[0] != pair[1]:
                pairs[pair] = pairs.get(pair, 0) + 1
        return [f"{wanted} heard as {heard}: {times}" for (wanted, heard), times in sorted(pairs.items(), key=lambda item: (-item[1], item[0]))]
