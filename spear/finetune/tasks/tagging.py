"""Several classes per cut: mean over the frames, a linear layer, one sigmoid per class (SPEAR, arXiv 2510.25955, audio tagging)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from spear.bounds import within
from spear.errors import ConfigError, DataError
from spear.evaluation.metrics import average_precision, mean_average_precision
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
class TaggingConfig(FinetuneTaskConfig):
    """Audio tagging, as on AudioSet."""

    can_mix: ClassVar[bool] = True
    label_field: str = "label"
    """Custom field of the cut or of a supervision with the tags of the cut."""
    separator: str = ";"
    """Between tags."""
    dropout: float = 0.1
    """Of the mean before the linear layer."""
    balance: bool = False
    """Draw cuts of rare tags more often: a cut's weight is the sum over its tags of one over the tag's count."""

    def __post_init__(self) -> None:
        within("dropout", self.dropout, 0, 1)
        if not self.separator:
            raise ConfigError("`separator` must not be empty")

    def label(self, cut: Any) -> str | None:
        """See FinetuneTaskConfig."""
        return field_of(cut, self.label_field)

    def needs(self) -> str:
        """See FinetuneTaskConfig."""
        return f"it needs tags in `{self.label_field}`"

    def tags(self, label: str) -> list[str]:
        """The tags in a label."""
        return [tag.strip() for tag in label.split(self.separator) if tag.strip()]

    def inventory(self, labels: Iterable[str]) -> Inventory:
        """See FinetuneTaskConfig."""
        return {"classes": classes_of((tag for label in labels for tag in self.tags(label)), "tags")}

    def encode(self, label: str, inventory: Inventory) -> NDArray[Any] | None:
        """See FinetuneTaskConfig; tags that training does not have are left out."""
        tags = set(self.tags(label))
        return many_hot(tags, inventory["classes"])

    def draw_weights(self, labels: Sequence[str]) -> NDArray[np.float64] | None:
        """See FinetuneTaskConfig."""
        return inverse_frequency([self.tags(label) for label in labels]) if self.balance else None

    def build(self, dim: int, mix: LayerMix, inventory: Inventory) -> TaggingHead:
        """See FinetuneTaskConfig."""
        return TaggingHead(self, dim, mix, inventory["classes"])


def many_hot(tags: set[str], classes: Sequence[str]) -> NDArray[np.float32]:
    """(K,) 1 at the classes among `tags`, else 0."""
    return np.asarray([name in tags for name in classes], dtype=np.float32)


class TaggingHead(LinearHead):
    """Mean over valid frames -> one probability per tag."""

    metric = "mAP"
    higher_is_better = True

    def __init__(self, config: TaggingConfig, dim: int, mix: LayerMix, classes: Sequence[str]) -> None:
        super().__init__(mix, dim, classes, config.dropout)
        self.config = config

    def loss(self, frames: Tensor, lens: Tensor, batch: LabelledBatch) -> StepOutput:
        """See Head; binary cross-entropy, mean over tags."""
        scores, count = self.scores(frames, lens), lens.new_tensor(len(lens))
        total = F.binary_cross_entropy_with_logits(scores, batch.labels, reduction="sum") / len(self.classes)
        hits = batch.labels.gather(1, scores.argmax(dim=1)[:, None]).sum()
        return StepOutput(total, count, {"top1": sum_and_count(hits, count)})

    def predict(self, frames: Tensor, lens: Tensor) -> list[Any]:
        """(K,) probabilities."""
        return list(self.scores(frames, lens).sigmoid().cpu().numpy())

    def score(self, predictions: Sequence[Prediction], labels: dict[str, str]) -> dict[str, Any]:
        """Mean average precision over the tags that occur, and the share of cuts whose highest tag is theirs.

        Raises:
            DataError: no cut has a tag of training.
        """
        scores = np.stack([found.value for found in predictions])
        relevant = self._relevant(predictions, labels)
        if not relevant.any():
            raise DataError("at least one test cut must have a tag that training has, but none has", cause="labels")
        top = float(relevant[np.arange(len(scores)), scores.argmax(axis=1)].mean())
        return {"value": mean_average_precision(scores, relevant), "top1": top, "items": len(scores), "classes": len(self.classes)}

    def _relevant(self, predictions: Sequence[Prediction], labels: dict[str, str]) -> NDArray[np.bool_]:
        """(M, K) True where the tag belongs to the cut."""
        return np.stack([many_hot(set(self.config.tags(labels[found.id])), self.classes) > 0 for found in predictions])

    def lines(self, predictions: Sequence[Prediction], labels: dict[str, str]) -> list[str]:
        """Average precision per tag, the worst first."""
        scores = np.stack([found.value for found in predictions])
        relevant = self._relevant(predictions, labels)
        found = {name: average_precision(scores[:, k], relevant[:, k]) for k, name in enumerate(self.classes) if relevant[:, k].any()}
        return [f"{name}: average precision {value:.3f}" for name, value in sorted(found.items(), key=lambda item: (item[1], item[0]))]
