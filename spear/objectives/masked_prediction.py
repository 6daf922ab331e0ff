"""Masked prediction of the tokens of all teachers (SPEAR, arXiv 2510.25955)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from spear.errors import ConfigError
from spear.models.base import Encoder
from spear.models.heads import CodebookHead
from spear.objectives.alignment import Align, FrameMap, align_tokens, frame_map
from spear.objectives.base import Objective, ObjectiveConfig
from spear.types import IGNORE, Batch, StepOutput, StudentOutput, TokenSpec


@dataclass(frozen=True, kw_only=True, slots=True)
class MaskedPredictionConfig(ObjectiveConfig):
    """Joint, disjoint and asymmetric losses are three tables of `weights`."""

    weights: dict[str, dict[str, float]] = field(default_factory=lambda: {"speech": {"speech": 1.0}, "audio": {"speech": 1.0, "audio": 0.1}})
    """Cut domain -> teacher -> weight of its loss; a teacher left out (or 0) is not used there. Default: asymmetric, lambda 0.1."""
    alpha: float = 0.5
    """Weight of masked frames; unmasked ones get 1 - alpha. 0.5 weighs all frames alike (the paper's best), 1 is HuBERT's rule."""
    align: Align = "index"
    """``index`` pairs frames by number (the paper), ``time`` by the times of their centres."""
    delay_frames: int = 0
    """Student frame t + delay predicts token frame t; look-ahead for streaming students."""

    def __post_init__(self) -> None:
        if not 0 <= self.alpha <= 1:
            raise ConfigError(f"`alpha` must be between 0 and 1, but is {self.alpha}")
        if self.delay_frames < 0:
            raise ConfigError(f"`delay_frames` must not be negative, but is {self.delay_frames}")
        for domain, row in self.weights.items():
            for teacher, weight in row.items():
                if weight < 0:
                    raise ConfigError(f"`weights.{domain}.{teacher}` must not be negative, but is {weight}")
            if not any(row.values()):
                raise ConfigError(f"`weights.{domain}` must give at least one teacher a weight above 0")
        if not self.weights:
            raise ConfigError("`weights` must name at least one domain")

    def labels(self, domain: str) -> list[str]:
        """Teachers with a weight above 0 for `domain`, sorted."""
        if domain not in self.weights:
            raise ConfigError(f"domain {domain!r} is not in the recipe's `objective.weights`, which knows {', '.join(sorted(self.weights))}")
        return sorted(teacher for teacher, weight in self.weights[domain].items() if weight > 0)

    def domains(self) -> list[str]:
        """Domains of the table of weights, sorted."""
        return sorted(self.weights)

    def teachers(self) -> list[str]:
        """All teachers named with a weight above 0, sorted."""
        return sorted({teacher for domain in self.weights for teacher in self.labels(domain)})

    def build(self, encoder: Encoder, specs: dict[str, TokenSpec]) -> MaskedPrediction:
        """One head per teacher with N codebooks for each of its frames under a student frame."""
        missing = [name for name in self.teachers() if name not in specs]
        if missing:
            raise ConfigError(f"`objective.weights` names teacher {missing[0]!r}, for which there are no tokens")
        return MaskedPrediction(self, encoder, {name: specs[name] for name in self.teachers()})


class _Terms(NamedTuple):
    """Per-frame results of one teacher on the valid frames of a batch."""

    loss: Tensor  # (M,) cross-entropy, mean over codebooks
    correct: Tensor  # (M,) share of codebooks right
    item: Tensor  # (M,) index of the cut


class MaskedPrediction(Objective):
    """Cross-entropy per codebook on masked and unmasked frames, weighted by domain and teacher.

    For teacher k with codebooks 1..C and frame weight a = 2 (alpha m + (1 - alpha)(1 - m)), m = 1 on masked frames,
    the loss is the sum over cuts n and frames t of weights[domain_n][k] a_t mean_c CE(logits_c, token_c), and the count is
    the number of student frames with at least one target. In evaluation, where nothing is masked, a = 1.
    """

    def __init__(self, config: MaskedPredictionConfig, encoder: Encoder, specs: dict[str, TokenSpec]) -> None:
        super().__init__()
        self.config = config
        self.maps: dict[str, FrameMap] = {
            name: frame_map(spec, encoder.frame_rate_hz, encoder.first_frame_s, config.align) for name, spec in specs.items()
        }
        self.heads = nn.ModuleDict(
            {name: CodebookHead(encoder.dim, spec.num_codebooks * self.maps[name].group, spec.codebook_size) for name, spec in specs.items()}
        )

    def forward(self, output: StudentOutput, batch: Batch) -> StepOutput:
        """See Objective.forward; metrics are ``loss`` and ``accuracy`` per teacher and domain, and ``masked_share``."""
        delay = self.config.delay_frames
        features, masked = output.features[:, delay:], (output.masked_share[:, delay:] >= 0.5).float()
        lens = (output.lens - delay).clamp(min=0)
        frame_weight = 2 * (self.config.alpha * masked + (1 - self.config.alpha) * (1 - masked))  # (N, T)
        if not self.training:
            frame_weight = torch.ones_like(frame_weight)  # nothing is masked
        total = features.new_zeros((), dtype=torch.float32)
        covered = torch.zeros(features.shape[:2], dtype=torch.bool, device=features.device)
        metrics: dict[str, Tensor] = {}
        for name in self.heads:
            targets = align_tokens(batch.tokens[name], batch.token_lens[name], self.maps[name], lens, features.shape[1])
            weight = features.new_tensor([self.config.weights.get(domain, {}).get(name, 0.0) for domain in batch.domains], dtype=torch.float32)
            valid = (targets != IGNORE).all(dim=-1) & (weight > 0)[:, None]  # (N, T)
            terms = self._terms(name, features, targets, valid)
            total = total + (terms.loss * weight[terms.item] * frame_weight[valid]).sum()
            covered |= valid
            metrics.update(self._metrics(name, terms, batch.domains))
        frames = torch.arange(features.shape[1], device=features.device) < lens[:, None]
        metrics["masked_share"] = torch.stack([masked[frames].sum(), frames.sum().float()]).detach()
        return StepOutput(total, covered.sum(), metrics)

    def _terms(self, name: str, features: Tensor, targets: Tensor, valid: Tensor) -> _Terms:
        """Only valid frames reach the head; with none, the head still joins the graph so that DDP sees its gradient."""
        logits = self.heads[name](features[valid][None])[0]  # (M, C, K)
        wanted = targets[valid]  # (M, C)
        loss = F.cross_entropy(logits.flatten(0, 1), wanted.flatten(), reduction="none").reshape(wanted.shape).mean(dim=1)
        with torch.no_grad():
            correct = (logits.argmax(dim=-1) == wanted).float().mean(dim=1)
        return _Terms(loss, correct, valid.nonzero()[:, 0])

    def _metrics(self, name: str, terms: _Terms, domains: list[str]) -> dict[str, Tensor]:
        found: dict[str, Tensor] = {}  # the same names on every rank, whatever its batch holds
        loss = terms.loss.detach()
        for domain in sorted(self.config.weights):
            if name not in self.config.labels(domain):
                continue
            belongs = torch.tensor([d == domain for d in domains], device=loss.device)[terms.item].float()
            count = belongs.sum()
            found[f"loss/{name}/{domain}"] = torch.stack([(loss * belongs).sum(), count])
            found[f"accuracy/{name}/{domain}"] = torch.stack([(terms.correct * belongs).sum(), count])
        return found
