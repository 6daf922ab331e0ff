"""A teacher that is a running mean of the student, and what all objectives with such a teacher share."""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass, field
from typing import ClassVar, Literal, NamedTuple

import torch
from torch import Tensor, nn

from spear.bounds import above, at_least, within
from spear.errors import ConfigError
from spear.models.base import Encoder
from spear.models.student import Student
from spear.objectives.base import Objective, ObjectiveConfig
from spear.registry import Registry
from spear.types import Batch, EncoderOutput, StudentOutput

Tap = Literal["block_output", "ffn_pre_residual"]
EPSILON = 1e-5
"""Share of the channels' mean variance that is added to each: what a pre-norm layer adds to its stream starts small, and its scale is no matter."""
SMALLEST = 1e-30
"""Least variance that a channel is divided by."""


@dataclass(frozen=True, kw_only=True, slots=True)
class DecayConfig(Registry):
    """Family of schedules of the share of its old weights that the teacher keeps at an update."""

    TABLE: ClassVar[dict[str, str]] = {
        "exponential": "spear.objectives.ema:ExponentialDecay",
        "linear": "spear.objectives.ema:LinearDecay",
    }

    def at(self, step: int) -> float:
        """The share at update `step`, 1 for the first one; 1.0 keeps the teacher as it is."""
        raise NotImplementedError


@dataclass(frozen=True, kw_only=True, slots=True)
class ExponentialDecay(DecayConfig):
    """1 - (1 - start) exp(-step / timescale), and 1 where less than 1e-7 is missing (SpidR)."""

    start: float = 0.999
    """Decay at update 0."""
    timescale: float = 20_000.0
    """Updates in which what is missing to 1 shrinks by the factor e."""

    def __post_init__(self) -> None:
        within("start", self.start, 0, 1)
        above("timescale", self.timescale, 0)

    def at(self, step: int) -> float:
        """See DecayConfig."""
        missing = (1 - self.start) * math.exp(-step / self.timescale)
        return 1.0 if missing < 1e-7 else 1 - missing


@dataclass(frozen=True, kw_only=True, slots=True)
class LinearDecay(DecayConfig):
    """From `start` to `end` over `steps` updates, then `end` (data2vec, DinoSR)."""

    start: float = 0.999
    """Decay at update 0."""
    end: float = 0.9999
    """Decay from update `steps` on."""
    steps: int = 30_000
    """Updates from one to the other."""

    def __post_init__(self) -> None:
        within("start", self.start, 0, 1)
        within("end", self.end, 0, 1)
        at_least("steps", self.steps, 1)

    def at(self, step: int) -> float:
        """See DecayConfig."""
        return self.start + (self.end - self.start) * min(step / self.steps, 1.0)


@dataclass(frozen=True, kw_only=True, slots=True)
class SelfTaughtConfig(ObjectiveConfig):
    """What all objectives with a mean of the student as teacher share; they read no tokens and take cuts of any domain."""

    top_layers: int = 8
    """Layers of the teacher, the last ones, that give targets."""
    tap: Tap = "ffn_pre_residual"
    """Where the layers are read: ``ffn_pre_residual``, what the feed-forward module gives before it is added to the stream (Transformer
    and Conformer), or ``block_output`` (all students)."""
    decay: DecayConfig = field(default_factory=ExponentialDecay)
    """Share of its old weights that the teacher keeps at an update. Its front end and positions are always the student's."""
    teacher_frozen_from: int | None = None
    """Update from which the teacher's layers stay as they are; null: never."""
    front_end_frozen_from: int | None = None
    """Update after which the student's front end learns no more; null: never. With several processes `training.find_unused_parameters` must
    not be false."""

    def __post_init__(self) -> None:
        at_least("top_layers", self.top_layers, 1)
        for name in ("teacher_frozen_from", "front_end_frozen_from"):
            if getattr(self, name) is not None:
                at_least(name, getattr(self, name), 0)

    def labels(self, domain: str) -> list[str]:
        """No teacher's tokens are read."""
        del domain
        return []

    def teachers(self) -> list[str]:
        """None."""
        return []

    def layers(self, encoder: Encoder) -> list[int]:
        """Indices of the layers that give targets.

        Raises:
            ConfigError: the encoder has fewer.
        """
        if self.top_layers > encoder.num_layers:
            raise ConfigError(f"`top_layers` must be at most the student's {encoder.num_layers} layers, but is {self.top_layers}")
        return list(range(encoder.num_layers - self.top_layers, encoder.num_layers))


class EmaTeacher(nn.Module):
    """A copy of an encoder whose layers follow it slowly; its front end and what gives positions follow at once.

    Its weights are float32 state that is saved with the objective; they never get gradients. It always runs in eval mode.
    """

    def __init__(self, encoder: Encoder, config: SelfTaughtConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = copy.deepcopy(encoder).requires_grad_(False)
        self.encoder.trusts_input = True
        super().train(False)

    def train(self, mode: bool = True) -> EmaTeacher:
        """Stay in eval mode."""
        del mode
        super().train(False)
        return self

    @torch.no_grad()
    def forward(self, features: Tensor, lens: Tensor) -> EncoderOutput:
        """What the teacher makes of unmasked features; see `Encoder.forward`."""
        output: EncoderOutput = self.encoder(features, lens)
        return output

    @torch.no_grad()
    def follow(self, step: int, encoder: Encoder) -> None:
        """Move after update `step` of `encoder`: ``teacher = decay * teacher + (1 - decay) * student``; front end, positions, buffers copied."""
        frozen = self.config.teacher_frozen_from is not None and step >= self.config.teacher_frozen_from
        missing = 0.0 if frozen else 1 - self.config.decay.at(step)
        theirs = dict(encoder.named_parameters())
        slow: tuple[list[Tensor], list[Tensor]] = ([], [])
        fast: tuple[list[Tensor], list[Tensor]] = ([], [])
        for name, own in self.encoder.named_parameters():
            mine, other = fast if encoder.in_front_end(name) or encoder.in_positions(name) else slow
            mine.append(own)
            other.append(theirs[name].detach())
        if missing > 0.0:
            torch._foreach_lerp_(*slow, missing)
        if fast[0]:
            torch._foreach_copy_(*fast)
        buffers = dict(encoder.named_buffers())
        for name, buffer in self.encoder.named_buffers():
            buffer.copy_(buffers[name])


class Frames(NamedTuple):
    """The frames of a batch that an objective looks at, M of N x T.

    rows: (M,) int64 into the N * T frames, None for all. weight: (M,) float32, 1 where the frame counts. valid: (N, T) bool, no padding.
    """

    rows: Tensor | None
    weight: Tensor
    valid: Tensor

    def of(self, x: Tensor) -> Tensor:
        """(M, ...) of (N, T, ...)."""
        flat = x.flatten(0, 1)
        return flat if self.rows is None else flat.index_select(0, self.rows)


def choose_frames(output: StudentOutput, *, masked_only: bool) -> Frames:
    """The frames that are masked at least by half, or all valid ones.

    On a CPU only those are gone through. Elsewhere all are, with weight 0 for the rest, since to count them would wait for the device.
    """
    t = output.features.shape[1]
    valid = torch.arange(t, device=output.lens.device) < output.lens[:, None]
    counts = (valid & (output.masked_share >= 0.5) if masked_only else valid).flatten()
    if counts.device.type == "cpu":
        rows = counts.nonzero()[:, 0]
        return Frames(rows, torch.ones(len(rows)), valid)
    return Frames(None, counts.float(), valid)


def normalised(x: Tensor, frames: Frames) -> Tensor:
    """Chosen frames (M, D) float32 of x (N, T, D), each channel with mean 0 and variance 1 over the valid frames of its item."""
    x = x.float()
    if frames.rows is not None:
        return _normalised_rows(x, frames, frames.rows)
    valid = frames.valid[:, :, None]
    count = frames.valid.sum(dim=1).clamp(min=1)[:, None, None]
    x = torch.where(valid, x, 0.0)
    x = torch.where(valid, x - x.sum(dim=1, keepdim=True) / count, 0.0)
    variance = x.square().sum(dim=1, keepdim=True) / count
    floor = EPSILON * variance.mean(dim=2, keepdim=True)
    return frames.of(x * (variance + floor).clamp(min=SMALLEST).rsqrt())


def _normalised_rows(x: Tensor, frames: Frames, rows: Tensor) -> Tensor:
    """The same on a CPU, item by item, with the operator there that finds and takes away the moments of channels fastest."""
    item = torch.div(rows, x.shape[1], rounding_mode="floor")
    own = (rows - item * x.shape[1]).split(torch.bincount(item, minlength=len(x)).tolist())
    found = []
    for channels, length, chosen in zip(x, frames.valid.sum(dim=1).tolist(), own):
        out, _, scale = torch.native_batch_norm(channels[: max(length, 1)], None, None, None, None, True, 0.0, SMALLEST)
        variance = scale.square().reciprocal()
        floor = EPSILON * variance.mean()
        found.append(out.index_select(0, chosen).mul_((variance / (variance + floor)).sqrt()))
    return torch.cat(found)


class SelfTaught(Objective):
    """An objective whose targets come from a mean of the student that hears the unmasked input."""

    def __init__(self, config: SelfTaughtConfig, encoder: Encoder) -> None:
        super().__init__()
        self.settings = config
        self.layers = config.layers(encoder)
        encoder.read_at(config.tap)
        self.teacher = EmaTeacher(encoder, config)

    def targets(self, output: StudentOutput, batch: Batch, frames: Frames) -> list[Tensor]:
        """Normalised frames (M, D_l) float32 of every chosen layer of the teacher, without gradient.

        Raises:
            ConfigError: the student's layers have another rate than its output.
        """
        with torch.no_grad():
            states = self.teacher(batch.features, batch.feature_lens).hidden_states
            if states[-1].shape[1] != output.features.shape[1]:
                raise ConfigError("the layers of the student must have the rate of its output (`student.output_downsampling_factor` 1)")
            return [normalised(states[layer], frames) for layer in self.layers]

    def after_step(self, step: int, student: Student) -> None:
        """Move the teacher; freeze what is to be frozen from the next update on."""
        self.teacher.follow(step, student.encoder)
        self.resume(step, student)

    def resume(self, step: int, student: Student) -> None:
        """See Objective.resume."""
        limit = self.settings.front_end_frozen_from
        if limit is not None and step >= limit:
            for name, parameter in student.encoder.named_parameters():
                if student.encoder.in_front_end(name):
                    parameter.requires_grad_(False)
