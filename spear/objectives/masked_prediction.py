"""Masked prediction of the tokens of all teachers (SPEAR, arXiv 2510.25955)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from spear.errors import ConfigError
from spear.models.base import FBANK_RATE_HZ, HIDDEN_RATE_HZ, Encoder
from spear.models.heads import HeadConfig, LinearHeadConfig
from spear.models.student import Student
from spear.objectives.alignment import Align, FrameMap, align_tokens, frame_map
from spear.objectives.balance import BalanceConfig, FixedConfig
from spear.objectives.base import Objective, ObjectiveConfig
from spear.transfer import send
from spear.types import IGNORE, Batch, StepOutput, StudentOutput, TokenSpec

DURATIONS_S = (2, 5, 10, 20)
"""Edges of the classes of durations by which a teacher's match is told apart."""
DURATION_NAMES = [*(f"{low}-{high}s" for low, high in zip((0, *DURATIONS_S), DURATIONS_S)), f"{DURATIONS_S[-1]}s-"]


@dataclass(frozen=True, kw_only=True, slots=True)
class MaskedPredictionConfig(ObjectiveConfig):
    """Joint, disjoint and asymmetric losses are three tables of `weights`."""

    weights: dict[str, dict[str, float]] = field(default_factory=lambda: {"speech": {"speech": 1.0}, "audio": {"speech": 1.0, "audio": 0.1}})
    """Cut domain -> teacher -> weight of its loss; a teacher left out (or 0) is not used there. Default: asymmetric, lambda 0.1."""
    alpha: float = 0.5
    """Weight of masked frames; unmasked ones get 1 - alpha. 0.5 weighs all frames alike (the paper's best), 1 is HuBERT's rule."""
    align: Align = "index"
    """``index`` pairs frames by number (the paper), ``time`` by the times of their centres. ``interpolate``: the tokens of the frames before and
    after the student frame's centre both count, each by how near it is; frames of which one is not there have no target."""
    delay_frames: int = 0
    """Student frame t + delay predicts token frame t; look-ahead for streaming students."""
    layers: dict[str, int] = field(default_factory=dict)
    """Teacher -> student layer (1 is the first) that predicts its tokens instead of the output, as in intermediate layer supervision
    (arXiv 2112.08778); layers above it are free of that teacher. At least one teacher must be left out."""
    balance: BalanceConfig = field(default_factory=FixedConfig)
    """How the teachers' losses are weighed against each other beside `weights`."""

    head: HeadConfig = field(default_factory=LinearHeadConfig)
    """How the student's features become logits."""

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
        for teacher, layer in self.layers.items():
            if layer < 1:
                raise ConfigError(f"`layers.{teacher}` must be 1 or more, but is {layer}")
            if teacher not in self.teachers():
                raise ConfigError(f"`layers` names teacher {teacher!r}, which has no weight above 0 in `weights`")
        if len(self.layers) == len(self.teachers()):
            raise ConfigError("`layers` must leave out at least one teacher, or the student's output would learn nothing")

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
        for teacher, layer in self.layers.items():
            if layer > encoder.num_layers:
                raise ConfigError(f"`objective.layers.{teacher}` must be at most {encoder.num_layers}, the student's layers, but is {layer}")
        if self.layers and encoder.frame_rate_hz != HIDDEN_RATE_HZ:
            raise ConfigError(f"`objective.layers` needs a student at {HIDDEN_RATE_HZ:g} Hz, but it has {encoder.frame_rate_hz:g} Hz")
        return MaskedPrediction(self, encoder, {name: specs[name] for name in self.teachers()})


class _Terms(NamedTuple):
    """Results of one teacher on the valid frames of a batch."""

    loss: Tensor  # (M,) cross-entropy, mean over codebooks
    valid: Tensor  # (N, T) where there is a target
    rows: Tensor  # (M,) index of these frames among the N * T
    item: Tensor  # (M,) index of the cut
    by_cut: Tensor  # (N, 2 + C) per cut: frames, sum of `loss`, and per codebook how many are right; detached


class MaskedPrediction(Objective):
    """Cross-entropy per codebook on masked and unmasked frames, weighted by domain and teacher.

    For teacher k with codebooks 1..C and frame weight a = 2 (alpha m + (1 - alpha)(1 - m)), m = 1 on masked frames,
    the loss is the sum over cuts n and frames t of weights[domain_n][k] a_t mean_c CE(logits_c, token_c), and the count is
    the number of student frames with at least one target. In evaluation, where nothing is masked, a = 1.
    Where a batch has second tokens (soft token mixing), or tokens of two frames count (``align: interpolate``), CE is its mean over the tokens
    with their probabilities.
    """

    uses_all = True  # also heads of teachers that a batch does not use, see `_terms`

    def __init__(self, config: MaskedPredictionConfig, encoder: Encoder, specs: dict[str, TokenSpec]) -> None:
        super().__init__()
        self.config = config
        self.maps: dict[str, FrameMap] = {
            name: frame_map(spec, encoder.frame_rate_hz, encoder.first_frame_s, config.align) for name, spec in specs.items()
        }
        dims = {name: encoder.layer_dims[config.layers[name] - 1] if name in config.layers else encoder.dim for name in specs}
        self.heads = nn.ModuleDict(
            {name: config.head.build(dims[name], spec.num_codebooks * self.maps[name].group, spec.codebook_size) for name, spec in specs.items()}
        )
        self.balance = config.balance.build(list(self.heads))

    def forward(self, output: StudentOutput, batch: Batch) -> StepOutput:
        """See Objective.forward; metrics are ``loss`` and ``accuracy`` per teacher and domain, ``match`` also per class of durations, in
        evaluation ``codebook`` per teacher and codebook (both shares of right tokens), and ``masked_share``.
        """
        delay = self.config.delay_frames
        features, masked = output.features[:, delay:], (output.masked_share[:, delay:] >= 0.5).float()
        lens = (output.lens - delay).clamp(min=0)
        frame_weight = 2 * (self.config.alpha * masked + (1 - self.config.alpha) * (1 - masked))  # (N, T)
        if not self.training:
            frame_weight = torch.ones_like(frame_weight)  # nothing is masked
        weights = [[self.config.weights.get(domain, {}).get(name, 0.0) for name in self.heads] for domain in batch.domains]
        weight = send(torch.tensor(weights, dtype=torch.float32), features.device)  # (N, teachers)
        read = {name: output.hidden_states[layer - 1][:, delay:] for name, layer in self.config.layers.items()}
        terms = [self._terms(name, read.get(name, features), batch, lens, weight[:, k] > 0) for k, name in enumerate(self.heads)]
        if self.training:
            sums = torch.stack([term.by_cut[:, :2] for term in terms], dim=2)  # (N, 2, teachers)
            factors = self.balance(sums[:, 1], sums[:, 0])
            weight = weight if factors is None else weight * factors
        total = features.new_zeros((), dtype=torch.float32)
        covered = torch.zeros(features.shape[:2], dtype=torch.bool, device=features.device)
        for k, term in enumerate(terms):
            total = total + (term.loss * weight[term.item, k] * frame_weight.flatten()[term.rows]).sum()
            covered |= term.valid
        frames = torch.arange(features.shape[1], device=features.device) < lens[:, None]
        metrics = self._metrics(terms, batch)
        metrics["masked_share"] = torch.stack([(masked * frames).sum(), frames.sum().float()]).detach()
        return StepOutput(total, covered.sum(), metrics)

    def after_step(self, step: int, student: Student) -> None:
        """Let the balance take note of the update."""
        self.balance.after_step()

    def discard_step(self) -> None:
        """Let the balance forget the update."""
        self.balance.discard_step()

    def _terms(self, name: str, features: Tensor, batch: Batch, lens: Tensor, used: Tensor) -> _Terms:
        """Only valid frames reach the head; with none, the head still joins the graph so that DDP sees its gradient.

        A GPU is waited for once, to count them.
        """
        frames, num_frames = self.maps[name], features.shape[1]

        def aligned(tokens: Tensor, *, upper: bool = False) -> Tensor:
            return align_tokens(tokens, batch.token_lens[name], frames, lens, num_frames, upper=upper)

        sides = [aligned(batch.tokens[name], upper=upper) for upper in ((False, True) if frames.interpolated else (False,))]  # (N, T, C) each
        valid = torch.stack([(side != IGNORE).all(dim=-1) for side in sides]).all(dim=0) & used[:, None]  # (N, T)
        rows = valid.flatten().nonzero()[:, 0]
        item = torch.div(rows, max(num_frames, 1), rounding_mode="floor")

        def chosen(x: Tensor) -> Tensor:
            return x.flatten(0, 1).index_select(0, rows)

        logits = self.heads[name](chosen(features)[None])[0]  # (M, C, K)
        seconds, share = None, None
        if name in batch.second and batch.second_share is not None:
            seconds, share = [chosen(aligned(batch.second[name], upper=upper)) for upper in (False, True)[: len(sides)]], batch.second_share[item]
        wanted = [chosen(side) for side in sides]
        if frames.interpolated:
            loss, correct = _between(logits, wanted, frames.share(num_frames, logits.device)[rows - item * num_frames], seconds, share)
        elif seconds is not None and share is not None:
            loss, correct = _two_points(logits, wanted[0], seconds[0], share)
        else:
            loss, correct = _one_point(logits, wanted[0])
        with torch.no_grad():
            dense = correct.new_zeros(valid.numel(), 2 + correct.shape[1])
            dense[rows] = torch.cat([torch.ones_like(loss)[:, None], loss[:, None], correct], dim=1)
        return _Terms(loss, valid, rows, item, dense.unflatten(0, valid.shape).sum(dim=1))

    @torch.no_grad()
    def _metrics(self, terms: list[_Terms], batch: Batch) -> dict[str, Tensor]:
        """Sums and counts; the same names on every rank, whatever its batch holds."""
        found: dict[str, Tensor] = {}
        domains = sorted(self.config.weights)
        edges = send(torch.tensor(DURATIONS_S) * int(FBANK_RATE_HZ), batch.feature_lens.device)
        group = torch.bucketize(batch.feature_lens, edges, right=True)
        own = [[float(domain == wanted) for wanted in domains] for domain in batch.domains]
        in_group = group[:, None] == torch.arange(len(DURATIONS_S) + 1, device=group.device)  # (N, groups); `one_hot` would read `group`
        belongs = send(torch.tensor(own), group.device)[:, :, None] * in_group[:, None]  # (N, domains, groups)
        for name, term in zip(self.heads, terms):
            count, loss, correct = term.by_cut[:, 0], term.by_cut[:, 1], term.by_cut[:, 2:]
            # no matrix product, which autocast would round
            sums = (belongs[..., None] * torch.stack([count, loss, correct.mean(dim=1)], dim=1)[:, None, None]).sum(dim=0)
            for d, domain in enumerate(domains):
                if name not in self.config.labels(domain):
                    continue
                of_domain = sums[d].sum(dim=0)
                found[f"loss/{name}/{domain}"] = of_domain[:2].flip(0)
                found[f"accuracy/{name}/{domain}"] = of_domain[::2].flip(0)
                for g, label in enumerate(DURATION_NAMES):
                    found[f"match/{name}/{domain}/{label}"] = sums[d, g, ::2].flip(0)
            if not self.training:
                for c in range(correct.shape[1]):
                    found[f"codebook/{name}/{c}"] = torch.stack([correct[:, c].sum(), count.sum()])
        return found


def _one_point(logits: Tensor, wanted: Tensor) -> tuple[Tensor, Tensor]:
    """Cross-entropy (M,), mean over codebooks, and what is right (M, C) of logits (M, C, K) against tokens (M, C)."""
    loss = F.cross_entropy(logits.flatten(0, 1), wanted.flatten(), reduction="none").reshape(wanted.shape).mean(dim=1)
    return loss, (logits.detach().argmax(dim=-1) == wanted).float()


def _two_points(logits: Tensor, wanted: Tensor, second: Tensor, share: Tensor) -> tuple[Tensor, Tensor]:
    """As `_one_point`, its mean where each token is drawn: `second` (M, C) with probability `share` (M,) where it is not IGNORE, else `wanted`."""
    share = torch.where(second != IGNORE, share[:, None], 0.0)  # (M, C)
    second = second.clamp(min=0)
    minus = -logits.log_softmax(dim=-1)
    losses = [minus.gather(-1, tokens[..., None])[..., 0] for tokens in (wanted, second)]
    loss = torch.lerp(losses[0], losses[1], share).mean(dim=1)
    guess = logits.detach().argmax(dim=-1)
    return loss, torch.lerp((guess == wanted).float(), (guess == second).float(), share)


def _between(logits: Tensor, wanted: list[Tensor], later: Tensor, seconds: list[Tensor] | None, share: Tensor | None) -> tuple[Tensor, Tensor]:
    """As `_one_point`, its mean where each token is drawn: the frame after a point with probability `later` (M,), else the one before it,
    and of that frame the second token, where there is one, with probability `share` (M,).

    Args:
        wanted, seconds: tokens (M, C) of the frames before and after.
    """
    minus = -logits.log_softmax(dim=-1)
    guess = logits.detach().argmax(dim=-1)
    loss, correct = torch.zeros_like(minus[..., 0]), torch.zeros_like(minus[..., 0])
    for side, (tokens, chance) in enumerate(zip(wanted, (1 - later, later))):
        points = [(tokens, chance[:, None].expand(tokens.shape))]
        if seconds is not None and share is not None:
            second = torch.where(seconds[side] != IGNORE, share[:, None], 0.0)
            points = [(tokens, points[0][1] * (1 - second)), (seconds[side].clamp(min=0), points[0][1] * second)]
        for token, probability in points:
            loss = loss + probability * minus.gather(-1, token[..., None])[..., 0]
            correct = correct + probability * (guess == token)
    return loss.mean(dim=1), correct.detach().float()
