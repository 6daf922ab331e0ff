"""The contract of a fine-tuning task: labels out of cuts, a head on frames, a score on test cuts."""

from __future__ import annotations

import abc
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from spear.errors import DataError
from spear.finetune.batch import LabelledBatch
from spear.finetune.layers import LayerMix
from spear.objectives.base import Objective
from spear.registry import Registry
from spear.types import Batch, StepOutput, StudentOutput

Inventory = dict[str, Any]
"""What a task must know of the training labels, a JSON value: classes, or a tokenizer."""


class Prediction(NamedTuple):
    """A head's answer to one cut. id: of the cut. value: text, (K,) scores or a (D,) vector, as the task says."""

    id: str
    value: Any


@dataclass(frozen=True, kw_only=True, slots=True)
class FinetuneTaskConfig(Registry):
    """Settings of a task; the table of tasks."""

    TABLE: ClassVar[dict[str, str]] = {
        "ctc": "spear.finetune.tasks.ctc:CTCConfig",
        "rnnt": "spear.finetune.tasks.rnnt:RNNTConfig",
        "tagging": "spear.finetune.tasks.tagging:TaggingConfig",
        "classification": "spear.finetune.tasks.classification:ClassificationConfig",
        "verification": "spear.finetune.tasks.verification:SpeakerConfig",
    }
    can_mix: ClassVar[bool] = False
    """Whether labels can be mixed with shares."""

    def label(self, cut: Any) -> str | None:
        """The cut's label as it stands in the manifest; None where it has none."""
        raise NotImplementedError

    def needs(self) -> str:
        """The label the task reads, in words."""
        raise NotImplementedError

    def inventory(self, labels: Iterable[str]) -> Inventory:
        """What is to be known of the training labels.

        Raises:
            DataError: they make no task, e.g. a single class.
        """
        raise NotImplementedError

    def encode(self, label: str, inventory: Inventory) -> NDArray[Any] | None:
        """The target of a label: (U,) symbols, (K,) float32 shares of classes, or () a class. None: it cannot be expressed."""
        raise NotImplementedError

    def scorable(self, label: str, inventory: Inventory) -> bool:
        """Whether a test cut with this label can be scored."""
        return self.encode(label, inventory) is not None

    def draw_weights(self, labels: Sequence[str]) -> NDArray[np.float64] | None:
        """(M,) how often each training cut is drawn, relative to the others; None: all alike."""
        del labels
        return None

    def build(self, dim: int, mix: LayerMix, inventory: Inventory) -> Head:
        """Make the head for frames of width `dim`."""
        raise NotImplementedError


class Head(Objective):
    """Frames of the encoder -> loss in training, predictions after it.

    metric, higher_is_better: of `score`. mix: which layers it reads.
    """

    metric: ClassVar[str]
    higher_is_better: ClassVar[bool]

    def __init__(self, mix: LayerMix) -> None:
        super().__init__()
        self.mix = mix

    def forward(self, output: StudentOutput, batch: Batch) -> StepOutput:
        """See `Objective`; the batch is a `LabelledBatch`."""
        frames, lens = self.mix(output)
        return self.loss(frames, lens, cast(LabelledBatch, batch))

    @abc.abstractmethod
    def loss(self, frames: Tensor, lens: Tensor, batch: LabelledBatch) -> StepOutput:
        """Sum of losses, number of targets and metrics; frames (N, T, D), lens (N,)."""

    @abc.abstractmethod
    def predict(self, frames: Tensor, lens: Tensor) -> list[Any]:
        """One value per item, on the CPU (see `Prediction`)."""

    @abc.abstractmethod
    def score(self, predictions: Sequence[Prediction], labels: dict[str, str]) -> dict[str, Any]:
        """JSON value of the score on test cuts, with key ``value`` and what explains it.

        Args:
            predictions: one per cut. labels: cut id -> label.
        Raises:
            DataError: the labels allow no score.
        """

    def lines(self, predictions: Sequence[Prediction], labels: dict[str, str]) -> list[str]:
        """What is worth reading about single cuts, worst first; empty where nothing is."""
        del predictions, labels
        return []


def field_of(cut: Any, name: str) -> str | None:
    """A label under `name`: custom field of a supervision, a field of it (``text``, ``speaker``, ...), or custom field of the cut."""
    for supervision in cut.supervisions:
        value = (supervision.custom or {}).get(name, getattr(supervision, name, None))
        if value is not None:
            return str(value)
    value = (cut.custom or {}).get(name)
    return None if value is None else str(value)


def classes_of(labels: Iterable[str], what: str) -> list[str]:
    """Sorted distinct labels.

    Raises:
        DataError: fewer than two.
    """
    found = sorted(set(labels))
    if len(found) < 2:
        raise DataError(f"the training cuts must have at least two {what}, but have {len(found)}: {', '.join(found) or 'none'}", cause="labels")
    return found


def inverse_frequency(sets: Sequence[Sequence[str]]) -> NDArray[np.float64]:
    """Weight of each item: the sum over its labels of one over the label's count (AST, arXiv:2104.01778, section 3.1)."""
    counts = Counter(label for labels in sets for label in labels)
    return np.asarray([sum(1.0 / counts[label] for label in labels) for labels in sets])


def masked_mean(frames: Tensor, lens: Tensor) -> Tensor:
    """Mean over the valid frames of (N, T, D) -> (N, D)."""
    valid = torch.arange(frames.shape[1], device=frames.device) < lens[:, None]
    weights = valid.to(frames.dtype) / lens[:, None].to(frames.dtype)
    return torch.einsum("nt,ntd->nd", weights, frames)


def sum_and_count(total: Tensor, count: Tensor | int) -> Tensor:
    """(2,) metric of StepOutput."""
    return torch.stack([total.detach().float(), torch.as_tensor(count, device=total.device).float()])
