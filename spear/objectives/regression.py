"""Regression on the mean of the teacher's layers, the teacher being a running mean of the student (data2vec, arXiv:2202.03555)."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from spear.bounds import at_least
from spear.errors import ConfigError
from spear.models.base import Encoder
from spear.objectives.ema import DecayConfig, LinearDecay, SelfTaught, SelfTaughtConfig, choose_frames
from spear.types import Batch, StepOutput, StudentOutput, TokenSpec


@dataclass(frozen=True, kw_only=True, slots=True)
class RegressionConfig(SelfTaughtConfig):
    """The student's output is brought near the mean of the teacher's last layers on masked frames; defaults of data2vec Base for speech."""

    decay: DecayConfig = field(default_factory=LinearDecay)
    """Share of its old weights that the teacher keeps at an update. Its front end and positions are always the student's."""
    beta: float = 0.0
    """Smooth L1: differences below it count as squares over 2 beta, larger ones as they are less beta / 2; 0: squares."""

    def __post_init__(self) -> None:
        SelfTaughtConfig.__post_init__(self)
        at_least("beta", self.beta, 0)

    def build(self, encoder: Encoder, specs: dict[str, TokenSpec]) -> Regression:
        """Make teacher and head for `encoder`, which is read at `tap` from now on.

        Raises:
            ConfigError: the chosen layers have several widths, so that they have no mean.
        """
        del specs
        return Regression(self, encoder)


class Regression(SelfTaught):
    """Sum over frames of ``D^-1/2 sum_d loss(prediction_d - target_d)``, on masked frames in training and on all valid ones in evaluation."""

    def __init__(self, config: RegressionConfig, encoder: Encoder) -> None:
        super().__init__(config, encoder)
        widths = sorted({encoder.layer_dims[layer] for layer in self.layers})
        if len(widths) > 1:
            raise ConfigError(f"the last `top_layers` {config.top_layers} layers must have one width, but have {', '.join(map(str, widths))}")
        self.beta = config.beta
        self.head = nn.Linear(encoder.dim, widths[0])

    def forward(self, output: StudentOutput, batch: Batch) -> StepOutput:
        """See Objective.forward; metrics: ``target_std`` and ``predicted_std``, mean over channels of the deviation over the batch's frames
        (both near 0: collapse), and ``masked_share``.
        """
        frames = choose_frames(output, masked_only=self.training)
        target = torch.stack(self.targets(output, batch, frames)).mean(dim=0)  # (M, D)
        predicted = self.head(frames.of(output.features)).float()
        if self.beta > 0:
            losses = F.smooth_l1_loss(predicted, target, beta=self.beta, reduction="none")
        else:
            losses = (predicted - target).square()
        count = frames.weight.sum()
        total = (losses.sum(dim=1) * frames.weight).sum() * target.shape[1] ** -0.5
        masked = (output.masked_share >= 0.5) & frames.valid
        metrics = {
            "target_std": torch.stack([_deviation(target, frames.weight) * count, count]),
            "predicted_std": torch.stack([_deviation(predicted.detach(), frames.weight) * count, count]),
            "masked_share": torch.stack([masked.sum(), frames.valid.sum()]).float(),
        }
        return StepOutput(total, count, metrics)


def _deviation(x: Tensor, weight: Tensor) -> Tensor:
    """Mean over channels of the standard deviation of x (M, D) over its weighted frames (M,)."""
    count = weight.sum().clamp(min=1)
    mean = (x * weight[:, None]).sum(dim=0) / count
    variance = ((x - mean).square() * weight[:, None]).sum(dim=0) / count
    return variance.sqrt().mean()
