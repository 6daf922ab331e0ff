"""Layer-to-layer distillation of continuous frames: USAD (arXiv 2506.18843) and, with one student layer, DistilHuBERT (arXiv 2110.01900).

No tokens: the teachers run beside the student (`Batch.targets`), on the audio that it hears.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from spear.bounds import at_least
from spear.errors import ConfigError
from spear.models.base import HIDDEN_RATE_HZ, Encoder
from spear.objectives.alignment import Align, FrameMap, frame_map
from spear.objectives.base import Objective, ObjectiveConfig
from spear.transfer import send
from spear.types import Batch, FrameSpec, StepOutput, StudentOutput, TokenSpec


@dataclass(frozen=True, kw_only=True, slots=True)
class LayerDistillationConfig(ObjectiveConfig):
    """Every chosen student layer predicts the frames of a teacher's layer through a small network of its own."""

    layers: list[int] = field(default_factory=lambda: [3, 6, 9, 12])
    """Student layers, 1 is the first. The n-th predicts the n-th layer of every teacher (`layers` of `type: layers`); a single one predicts
    all layers of every teacher, as in DistilHuBERT."""
    weights: dict[str, dict[str, float]] = field(default_factory=lambda: {domain: {"speech": 1.0, "audio": 1.0} for domain in ("speech", "audio")})
    """Cut domain -> teacher -> weight of its loss; a teacher left out (or 0) does not hear that domain."""
    hidden_dim: int = 0
    """Hidden width of a head's two linears with GELU; 0: a head is one linear."""
    l1: float = 1.0
    """Weight of the mean absolute difference over the D channels."""
    cosine: float = 1.0
    """Weight of -ln sigmoid(cosine)."""
    normalize: Literal["none", "frame"] = "none"
    """``frame``: every target frame is brought to zero mean and unit variance over its channels first."""
    align: Align = "index"
    """``index`` pairs frames by number, ``time`` by the times of their centres; ``interpolate``: on the line between the frames before and after
    the student frame's centre."""

    def __post_init__(self) -> None:
        if not self.layers or min(self.layers) < 1 or len(set(self.layers)) < len(self.layers):
            raise ConfigError(f"`layers` must be one or more different numbers from 1 on, but is {self.layers}")
        for domain, row in self.weights.items():
            for teacher, weight in row.items():
                if not 0 <= weight < float("inf"):
                    raise ConfigError(f"`weights.{domain}.{teacher}` must be 0 or more, but is {weight}")
        if not self.frame_teachers():
            raise ConfigError("`weights` must give at least one teacher a weight above 0")
        for key, value in (("hidden_dim", self.hidden_dim), ("l1", self.l1), ("cosine", self.cosine)):
            at_least(key, value, 0)
        if self.l1 + self.cosine <= 0:
            raise ConfigError("`l1` or `cosine` must be more than 0, but both are 0")
        if self.normalize not in ("none", "frame"):
            raise ConfigError(f"`normalize` must be none or frame, but is {self.normalize!r}")

    def labels(self, domain: str) -> list[str]:
        """No tokens are read; see ObjectiveConfig.labels."""
        self.frames(domain)
        return []

    def domains(self) -> list[str]:
        """Domains of the table of weights, sorted."""
        return sorted(self.weights)

    def teachers(self) -> list[str]:
        """None: no tokens are read."""
        return []

    def frames(self, domain: str) -> list[str]:
        """Teachers with a weight above 0 for `domain`, sorted."""
        if domain not in self.weights:
            raise ConfigError(f"domain {domain!r} is not in the recipe's `objective.weights`, which knows {', '.join(sorted(self.weights))}")
        return sorted(teacher for teacher, weight in self.weights[domain].items() if weight > 0)

    def frame_teachers(self) -> list[str]:
        """All teachers with a weight above 0, sorted."""
        return sorted({teacher for row in self.weights.values() for teacher, weight in row.items() if weight > 0})

    def build(self, encoder: Encoder, specs: dict[str, TokenSpec]) -> Objective:
        """See ObjectiveConfig.build; this objective needs `build_on`."""
        return self.build_on(encoder, specs, {})

    def build_on(self, encoder: Encoder, specs: dict[str, TokenSpec], frames: dict[str, FrameSpec]) -> Objective:
        """One head for every pair of a student layer and a teacher's layer."""
        missing = [name for name in self.frame_teachers() if name not in frames]
        if missing:
            raise ConfigError(f"`objective.weights` names teacher {missing[0]!r}, which does not run beside the student")
        return LayerDistillation(self, encoder, {name: frames[name] for name in self.frame_teachers()})


class _Pair(NamedTuple):
    """A student layer (0 is the first) and the part of a teacher's frames that it predicts."""

    layer: int
    part: int


class LayerDistillation(Objective):
    """L1 and cosine between predicted and true teacher frames (arXiv 2506.18843, section 2.2).

    For teacher k with layers 1..M, predictions p and targets z of width D, the loss is the sum over cuts n and student frames t of
    weights[domain_n][k] / M sum_m [l1 mean_d |p_d - z_d| - cosine ln sigmoid(cos(p, z))], and the count is the number of student frames
    with at least one target. Masked and unmasked frames count alike.
    """

    def __init__(self, config: LayerDistillationConfig, encoder: Encoder, specs: dict[str, FrameSpec]) -> None:
        super().__init__()
        if encoder.frame_rate_hz != HIDDEN_RATE_HZ:
            raise ConfigError(f"layer_distillation needs a student at {HIDDEN_RATE_HZ:g} Hz, but it has {encoder.frame_rate_hz:g} Hz")
        if max(config.layers) > encoder.num_layers:
            raise ConfigError(f"`objective.layers` must be at most {encoder.num_layers}, the student's layers, but has {max(config.layers)}")
        self.config, self.specs = config, specs
        self.maps = {name: frame_map(spec, encoder.frame_rate_hz, encoder.first_frame_s, config.align) for name, spec in specs.items()}
        self.pairs = {name: pairs(name, config.layers, spec.num_parts) for name, spec in specs.items()}
        self.heads = nn.ModuleDict()
        for name, spec in specs.items():
            width = spec.dim // spec.num_parts * self.maps[name].group
            self.heads[name] = nn.ModuleList(_head(encoder.layer_dims[pair.layer], config.hidden_dim, width) for pair in self.pairs[name])

    def forward(self, output: StudentOutput, batch: Batch) -> StepOutput:
        """See Objective.forward; metrics are ``loss``, ``l1`` and ``cosine`` per teacher and domain, and ``masked_share``."""
        num_frames = output.features.shape[1]
        frames = torch.arange(num_frames, device=output.features.device) < output.lens[:, None]
        total = output.features.new_zeros((), dtype=torch.float32)
        covered = torch.zeros_like(frames)
        metrics: dict[str, Tensor] = {}
        for name, spec in self.specs.items():
            weight = send(torch.tensor([self.config.weights.get(domain, {}).get(name, 0.0) for domain in batch.domains]), total.device)
            targets, places = batch.targets[name], self.maps[name]
            sizes = _Sizes(batch.target_lens[name], targets.shape[1], output.lens, num_frames)
            index, valid = _places(places, sizes)
            after, there = _places(places, sizes, upper=places.interpolated)
            valid = valid & there & (weight > 0)[:, None]  # (N, T)
            item, frame = valid.nonzero(as_tuple=True)
            found = targets[item[:, None], index[frame]].float()  # (M, group, D)
            if places.interpolated:
                share = places.share(num_frames, found.device)[frame]
                found = torch.lerp(found, targets[item[:, None], after[frame]].float(), share[:, None, None])
            parts = found.unflatten(2, (spec.num_parts, -1)).transpose(1, 2)  # (M, parts, group, D / parts)
            l1, cosine = self._compare(name, output, item, frame, parts)
            loss = self.config.l1 * l1 - self.config.cosine * F.logsigmoid(cosine)  # (M, pairs)
            total = total + (loss.mean(dim=1) * weight[item]).sum()
            covered |= valid
            metrics.update(self._metrics(name, {"loss": loss, "l1": l1, "cosine": cosine}, item, batch.domains))
        metrics["masked_share"] = torch.stack([(output.masked_share * frames).sum(), frames.sum().float()]).detach()
        return StepOutput(total, covered.sum(), metrics)

    def _compare(self, name: str, output: StudentOutput, item: Tensor, frame: Tensor, parts: Tensor) -> tuple[Tensor, Tensor]:
        """Mean absolute difference and cosine of every pair, (M, pairs) each; a mean over the teacher frames under a student frame."""
        l1: list[Tensor] = []
        cosine: list[Tensor] = []
        heads = cast(nn.ModuleList, self.heads[name])
        for head, pair in zip(heads, self.pairs[name]):
            target = parts[:, pair.part]
            if self.config.normalize == "frame":
                target = F.layer_norm(target, target.shape[-1:])
            predicted = head(output.hidden_states[pair.layer][item, frame]).float().reshape(target.shape)
            l1.append((predicted - target).abs().mean(dim=(1, 2)))
            cosine.append(F.cosine_similarity(predicted, target, dim=2).mean(dim=1))
        return torch.stack(l1, dim=1), torch.stack(cosine, dim=1)

    def _metrics(self, name: str, values: dict[str, Tensor], item: Tensor, domains: list[str]) -> dict[str, Tensor]:
        found: dict[str, Tensor] = {}  # the same names on every rank, whatever its batch holds
        for domain in sorted(self.config.weights):
            if name not in self.config.frames(domain):
                continue
            belongs = send(torch.tensor([d == domain for d in domains]), item.device)[item].float()
            for key, value in values.items():
                found[f"{key}/{name}/{domain}"] = torch.stack([(value.detach().mean(dim=1) * belongs).sum(), belongs.sum()])
        return found


def pairs(name: str, layers: list[int], num_parts: int) -> list[_Pair]:
    """Which student layer predicts which layer of teacher `name`.

    Raises:
        ConfigError: several student layers, but another number of teacher layers.
    """
    if len(layers) == 1:
        return [_Pair(layers[0] - 1, part) for part in range(num_parts)]
    if len(layers) != num_parts:
        raise ConfigError(
            f"`objective.layers` has {len(layers)} student layers, so that teacher {name!r} must have as many (`type: layers`), but has {num_parts}"
        )
    return [_Pair(layer - 1, part) for part, layer in enumerate(layers)]


def _head(dim: int, hidden: int, width: int) -> nn.Module:
    return nn.Linear(dim, width) if hidden == 0 else nn.Sequential(nn.Linear(dim, hidden), nn.GELU(), nn.Linear(hidden, width))


class _Sizes(NamedTuple):
    """Frames of a teacher: of every cut (N,) and of the batch; then those of the student."""

    lens: Tensor
    frames: int
    student_lens: Tensor
    student_frames: int


def _places(frames: FrameMap, sizes: _Sizes, *, upper: bool = False) -> tuple[Tensor, Tensor]:
    """Teacher frames (T, group) of every student frame, kept within bounds, and where all of them are there, (N, T); `upper` as in `FrameMap`."""
    device = sizes.lens.device
    index = frames.indices(sizes.student_frames, upper=upper, device=device)
    valid = ((index >= 0) & (index < sizes.lens[:, None, None])).all(dim=2)
    valid = valid & (torch.arange(sizes.student_frames, device=device) < sizes.student_lens[:, None])
    return index.clamp(0, sizes.frames - 1), valid
