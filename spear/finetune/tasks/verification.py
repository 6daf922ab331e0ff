"""Speaker verification: pooled layers, a vector per cut, AAM-softmax over the training speakers (ArcFace, arXiv:1801.07698)."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from spear.bounds import above, at_least
from spear.errors import ConfigError, DataError
from spear.evaluation.metrics import equal_error_rate, min_detection_cost
from spear.files import seed_from
from spear.finetune.batch import LabelledBatch
from spear.finetune.layers import AttentiveStatistics, LayerMix
from spear.finetune.tasks.base import FinetuneTaskConfig, Head, Inventory, Prediction, classes_of, field_of, inverse_frequency, sum_and_count
from spear.types import StepOutput


@dataclass(frozen=True, kw_only=True, slots=True)
class SpeakerConfig(FinetuneTaskConfig):
    """Who speaks; test speakers need not be in training."""

    label_field: str = "speaker"
    """Field of a supervision, or custom field, with the speaker's name."""
    dim: int = 192
    """Width of a cut's vector."""
    hidden: int = 128
    """Width of the attention over frames."""
    margin: float = 0.2
    """Angle in radians by which the right speaker must be nearer."""
    scale: float = 30.0
    """Factor on the cosines before the softmax."""
    balance: bool = False
    """Draw cuts of speakers with few cuts more often."""
    num_trials: int = 20_000
    """Most trials of each kind, same and other speaker, on test; all pairs where there are fewer."""

    def __post_init__(self) -> None:
        for name in ("dim", "hidden", "num_trials"):
            at_least(name, getattr(self, name), 1)
        above("scale", self.scale, 0)
        if not 0 <= self.margin < math.pi / 2:
            raise ConfigError(f"`margin` must be at least 0 and less than pi / 2, but is {self.margin}")

    def label(self, cut: Any) -> str | None:
        """See FinetuneTaskConfig."""
        return field_of(cut, self.label_field)

    def needs(self) -> str:
        """See FinetuneTaskConfig."""
        return f"it needs the speaker in `{self.label_field}`"

    def inventory(self, labels: Iterable[str]) -> Inventory:
        """See FinetuneTaskConfig."""
        return {"classes": classes_of(labels, "speakers")}

    def encode(self, label: str, inventory: Inventory) -> NDArray[Any] | None:
        """See FinetuneTaskConfig; -1 for a speaker that training does not have."""
        classes = inventory["classes"]
        return np.asarray(classes.index(label) if label in classes else -1)

    def draw_weights(self, labels: Sequence[str]) -> NDArray[np.float64] | None:
        """See FinetuneTaskConfig."""
        return inverse_frequency([[label] for label in labels]) if self.balance else None

    def build(self, dim: int, mix: LayerMix, inventory: Inventory) -> SpeakerHead:
        """See FinetuneTaskConfig."""
        return SpeakerHead(self, dim, mix, len(inventory["classes"]))


class SpeakerHead(Head):
    """Attentive statistics over frames -> a vector; its cosines with one direction per speaker are trained."""

    metric = "EER"
    higher_is_better = False

    def __init__(self, config: SpeakerConfig, dim: int, mix: LayerMix, num_speakers: int) -> None:
        super().__init__(mix)
        self.config = config
        self.pool = AttentiveStatistics(dim, config.hidden)
        self.norm = nn.LayerNorm(2 * dim)
        self.embed = nn.Linear(2 * dim, config.dim)
        self.speakers = nn.Parameter(torch.randn(num_speakers, config.dim) * config.dim**-0.5)

    def vectors(self, frames: Tensor, lens: Tensor) -> Tensor:
        """(N, T, D) -> (N, E) float32 of length one."""
        found: Tensor = self.embed(self.norm(self.pool(frames.float(), lens)))
        return F.normalize(found.float(), dim=1)

    def loss(self, frames: Tensor, lens: Tensor, batch: LabelledBatch) -> StepOutput:
        """See Head; cuts of unknown speakers have no loss."""
        known = batch.labels >= 0
        vectors, wanted = self.vectors(frames, lens), batch.labels.clamp(min=0)
        with torch.autocast(frames.device.type, enabled=False):  # a cosine in 8 bits is too coarse for the margin
            cosines = vectors @ F.normalize(self.speakers.float(), dim=1).T  # (N, speakers)
            logits = aam_logits(cosines, wanted, self.config.margin if self.training else 0.0, self.config.scale)
            losses = F.cross_entropy(logits, wanted, reduction="none")
        count = known.sum()
        right = ((cosines.argmax(dim=1) == wanted) & known).sum()
        return StepOutput((losses * known).sum(), count, {"accuracy": sum_and_count(right, count)})

    def predict(self, frames: Tensor, lens: Tensor) -> list[Any]:
        """(E,) vectors of length one; the score of a trial is their product."""
        return list(self.vectors(frames, lens).cpu().numpy())

    def score(self, predictions: Sequence[Prediction], labels: dict[str, str]) -> dict[str, Any]:
        """Equal error rate over pairs of test cuts.

        Raises:
            DataError: there is no pair of one speaker, or none of two.
        """
        ordered = sorted(predictions, key=lambda found: found.id)
        same, other = (self._drawn([labels[found.id] for found in ordered], alike=alike) for alike in (True, False))
        if not len(same) or not len(other):
            raise DataError(f"test cuts must give pairs of one speaker and of two, but give {len(same)} and {len(other)}", cause="labels")
        first, second = np.concatenate([same, other]).T
        targets = np.arange(len(first)) < len(same)
        vectors = np.stack([found.value for found in ordered])
        scores = np.einsum("md,md->m", vectors[first], vectors[second])
        costs = {str(p): min_detection_cost(scores, targets, p_target=p) for p in (0.01, 0.05)}
        return {"value": equal_error_rate(scores, targets), "min_dcf": costs, "trials": len(first), "speakers": len(set(labels.values()))}

    def _drawn(self, speakers: Sequence[str], *, alike: bool) -> NDArray[np.int64]:
        """(M, 2) cuts of all pairs of one speaker, or of two, in order, or of `num_trials` of them; in memory for these alone."""
        numbers = np.unique(speakers, return_inverse=True)[1]
        later = [np.flatnonzero((numbers[a + 1 :] == number) == alike).size for a, number in enumerate(numbers)]
        ends = np.cumsum(later)
        count = int(ends[-1])
        rng = np.random.Generator(np.random.Philox(seed_from("trials", "same" if alike else "other")))
        rows = np.arange(count) if count <= self.config.num_trials else np.sort(rng.choice(count, self.config.num_trials, replace=False))
        firsts = np.searchsorted(ends, rows, side="right")
        pairs = [(a, a + 1 + np.flatnonzero((numbers[a + 1 :] == numbers[a]) == alike)[row - (ends[a] - later[a])]) for a, row in zip(firsts, rows)]
        return np.asarray(pairs, dtype=np.int64).reshape(-1, 2)


def aam_logits(cosines: Tensor, wanted: Tensor, margin: float, scale: float) -> Tensor:
    """``scale cos(angle + margin)`` for the wanted class and ``scale cos(angle)`` for the others (ArcFace, arXiv:1801.07698, equation 3).

    Where angle + margin would pass pi, the wanted cosine falls on in a straight line, so that the loss never turns.

    Args:
        cosines: (N, K). wanted: (N,).
    """
    cosine = cosines.gather(1, wanted[:, None])
    sine = (1.0 - cosine.square()).clamp(min=1e-9).sqrt()
    moved = cosine * math.cos(margin) - sine * math.sin(margin)
    moved = torch.where(cosine > -math.cos(margin), moved, cosine - margin * math.sin(margin))
    return scale * cosines.scatter(1, wanted[:, None], moved.to(cosines.dtype))
