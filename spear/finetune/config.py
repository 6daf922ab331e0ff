"""The root of a fine-tuning recipe: which task, from which encoder, trained how. It names no corpus."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from spear.bounds import above, at_least, within
from spear.data.corpora import ManifestsConfig
from spear.data.sampler import SamplingConfig
from spear.errors import ConfigError
from spear.finetune.lora import LoRAConfig
from spear.finetune.tasks import FinetuneTaskConfig
from spear.models.base import StudentConfig
from spear.models.masking import MaskConfig
from spear.training.config import TrainingConfig


@dataclass(frozen=True, kw_only=True, slots=True)
class StartConfig:
    """Where the encoder comes from and how fast it may move."""

    init_from: str | None = None
    """Export folder (below the run's data folder, or a path), released SPEAR folder, icefall ``.pt`` checkpoint or Hugging Face id."""
    random: bool = False
    """Take only the network of `init_from` and draw its weights anew: the control that says what pre-training is worth."""
    student: StudentConfig | None = None
    """The network, where there is no `init_from`."""
    lr_scale: float = 0.1
    """Factor on the learning rate of the encoder; 0 keeps it frozen for the whole run."""
    frozen_steps: int = 0
    """First updates in which only the head learns."""
    layer_decay: float = 1.0
    """Each layer learns at this factor of the rate of the layer above it; 1 for one rate."""
    lora: LoRAConfig | None = None
    """Low-rank adapters: the encoder itself stays as it is, and the export is an ordinary one; null: the whole encoder learns."""
    layers: Literal["last", "weighted"] = "last"
    """What the head reads: the encoder's output, or a learned weighted sum of all layers."""
    schedule_offset: float | None = 20_000.0
    """Added to the batch count of the regularisers' schedules, so that a trained encoder keeps those of late training; null: the student's own."""

    def __post_init__(self) -> None:
        if self.init_from is not None and self.student is not None:
            raise ConfigError("`encoder` must have `init_from` or `student`, but has both: the network comes with the weights")
        at_least("lr_scale", self.lr_scale, 0)
        at_least("frozen_steps", self.frozen_steps, 0)
        within("layer_decay", self.layer_decay, 0, 1)
        above("layer_decay", self.layer_decay, 0)
        if self.lora is not None and self.lr_scale == 0:
            raise ConfigError("`lr_scale` must be above 0 where there is `lora`: it is the adapters' rate")
        if self.random and self.student is not None:
            raise ConfigError("`random` takes the network of `init_from`; with `student` the weights are random already")


@dataclass(frozen=True, kw_only=True, slots=True)
class MixupConfig:
    """Mixing pairs of training cuts with their labels (mixup, arXiv:1710.09412), for tasks whose labels can be mixed."""

    prob: float = 0.0
    """Share of the cuts that are mixed with another one of their batch."""
    alpha: float = 10.0
    """Both parameters of the Beta distribution of the share that a cut keeps; large ones keep it near one half."""

    def __post_init__(self) -> None:
        within("prob", self.prob, 0, 1)
        above("alpha", self.alpha, 0)


@dataclass(frozen=True, kw_only=True, slots=True)
class FinetuneRecipe:
    """What is fine-tuned. It names no corpus and no path of data."""

    task: FinetuneTaskConfig
    """What is learned from which label."""
    encoder: StartConfig
    """Where the encoder starts."""
    seed: int = 0
    """Seed of everything random."""
    manifests: ManifestsConfig = field(default_factory=lambda: ManifestsConfig(long="skip"))
    """How audio becomes checked cuts, as in pre-training."""
    masking: MaskConfig = field(default_factory=lambda: MaskConfig(time_prob=0.1, channel_prob=0.1))
    """Parts of the log-mels hidden in training."""
    mixup: MixupConfig = field(default_factory=MixupConfig)
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    training: TrainingConfig = field(default_factory=lambda: TrainingConfig(max_steps=10_000, validate_every=500, save_every=1000))
    average_share: float = 0.25
    """About this last share of the updates is averaged into the final weights; 0: the last weights as they are."""
    max_train_cuts: int | None = None
    """Train on this many cuts, drawn by a hash of seed and id, so that more cuts hold fewer; null: on all. For curves over the amount of labels."""
    name: str | None = None
    """Title of the model card; none: the name of the run's folder."""

    def __post_init__(self) -> None:
        within("average_share", self.average_share, 0, 1)
        if self.max_train_cuts is not None:
            at_least("max_train_cuts", self.max_train_cuts, 1)
        if self.mixup.prob > 0 and not self.task.can_mix:
            raise ConfigError(f"`mixup.prob` must be 0 for a task whose labels cannot be mixed, but is {self.mixup.prob:g}")
        if self.encoder.lr_scale == 0 and self.encoder.frozen_steps:
            raise ConfigError("`frozen_steps` must be 0 where `lr_scale` is 0: the encoder is frozen for the whole run")
