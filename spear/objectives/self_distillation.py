"""Self-distillation with online codebooks: SpidR and DinoSR (arXiv:2305.10005) are two settings of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from spear.bounds import at_least, within
from spear.errors import ConfigError
from spear.models.base import Encoder
from spear.models.heads import CodebookHead, LayerHeads
from spear.models.student import Student
from spear.objectives.ema import Frames, SelfTaught, SelfTaughtConfig, choose_frames
from spear.objectives.online_codebooks import OnlineCodebooks, perplexities
from spear.types import Batch, StepOutput, StudentOutput, TokenSpec


@dataclass(frozen=True, kw_only=True, slots=True)
class SelfDistillationConfig(SelfTaughtConfig):
    """The student predicts, on masked frames, which entry of a layer's codebook the teacher's frame is nearest to; defaults of SpidR."""

    heads: Literal["per_layer", "last"] = "per_layer"
    """``per_layer``: each layer of the student predicts the codes of the teacher's layer of its number (SpidR); ``last``: its output predicts
    those of all layers (DinoSR)."""
    codebook_size: int = 256
    """K, entries of each layer's codebook."""
    codebook_decay: float = 0.9
    """Share of the old that an entry keeps at an update in which frames were assigned to it."""
    split_every: int | None = None
    """Updates after which entries that hardly a frame was near to are moved beside the most used ones; null: never (SpidR, DinoSR)."""

    def __post_init__(self) -> None:
        SelfTaughtConfig.__post_init__(self)
        at_least("codebook_size", self.codebook_size, 2)
        within("codebook_decay", self.codebook_decay, 0, 1)
        if self.split_every is not None:
            at_least("split_every", self.split_every, 1)
        if self.heads not in HEADS:
            raise ConfigError(f"`heads` must be one of {', '.join(HEADS)}, but is {self.heads!r}")

    def build(self, encoder: Encoder, specs: dict[str, TokenSpec]) -> SelfDistillation:
        """Make teacher, codebooks and heads for the last `top_layers` layers of `encoder`, which is read at `tap` from now on."""
        del specs
        return SelfDistillation(self, encoder)


def _side_by_side(rows: list[Tensor], dim: int) -> Tensor:
    """(L, M, D) of frames (M, D_l) of L layers; zeros fill narrow ones up, which changes no distance."""
    return torch.stack([F.pad(row, (0, dim - row.shape[1])) for row in rows])


class _PerLayer(nn.Module):
    """Every chosen layer of the student predicts its own codes."""

    def __init__(self, encoder: Encoder, layers: list[int], size: int) -> None:
        super().__init__()
        self.layers = layers
        self.heads = LayerHeads([encoder.layer_dims[layer] for layer in layers], size)

    def forward(self, output: StudentOutput, frames: Frames) -> Tensor:
        """Logits (L, M, K)."""
        logits: Tensor = self.heads([frames.of(output.hidden_states[layer]) for layer in self.layers])
        return logits


class _Last(nn.Module):
    """The student's output predicts the codes of all layers."""

    def __init__(self, encoder: Encoder, layers: list[int], size: int) -> None:
        super().__init__()
        self.heads = CodebookHead(encoder.dim, len(layers), size)

    def forward(self, output: StudentOutput, frames: Frames) -> Tensor:
        """Logits (L, M, K)."""
        logits: Tensor = self.heads(frames.of(output.features)[None])[0]  # (M, L, K)
        return logits.transpose(0, 1)


HEADS: dict[str, type[nn.Module]] = {"per_layer": _PerLayer, "last": _Last}


class SelfDistillation(SelfTaught):
    """Cross-entropy with the online codes of the teacher's layers, the mean over the layers, summed over frames.

    In training the frames are the masked ones, and they move the codebooks after the update. In evaluation, where nothing is masked, all
    valid frames count and nothing moves.
    """

    def __init__(self, config: SelfDistillationConfig, encoder: Encoder) -> None:
        super().__init__(config, encoder)
        self.split_every = config.split_every
        self.dim = max(encoder.layer_dims[layer] for layer in self.layers)
        self.codebooks = OnlineCodebooks(len(self.layers), config.codebook_size, self.dim, config.codebook_decay)
        self.heads = HEADS[config.heads](encoder, self.layers, config.codebook_size)

    def forward(self, output: StudentOutput, batch: Batch) -> StepOutput:
        """See Objective.forward; metrics: ``accuracy``, ``target_perplexity``, ``predicted_perplexity`` and ``active_codes``, means over the
        layers, the last three also by layer, and ``masked_share``. In training the three tell of about the last hundred updates, in
        evaluation of one batch.
        """
        frames = choose_frames(output, masked_only=self.training)
        targets = _side_by_side(self.targets(output, batch, frames), self.dim)  # (L, M, D)
        codes = self.codebooks.assign(targets)
        logits: Tensor = self.heads(output, frames)
        losses = F.cross_entropy(logits.flatten(0, 1), codes.flatten(), reduction="none").view_as(codes)
        total = (losses.mean(dim=0) * frames.weight).sum()
        guesses = logits.detach().argmax(dim=2)
        if self.training:
            self.codebooks.collect(targets, codes, guesses, frames.weight)
            usage = self.codebooks.usage
        else:
            usage = self.codebooks.measure(codes, guesses, frames.weight)
        count = frames.weight.sum()
        metrics = self._usage_metrics(usage)
        metrics["accuracy"] = torch.stack([((codes == guesses).float().mean(dim=0) * frames.weight).sum(), count])
        masked = (output.masked_share >= 0.5) & frames.valid
        metrics["masked_share"] = torch.stack([masked.sum(), frames.valid.sum()]).float()
        return StepOutput(total, count, metrics)

    def after_step(self, step: int, student: Student) -> None:
        """Move teacher and codebooks."""
        super().after_step(step, student)
        self.codebooks.update()
        if self.split_every is not None and step % self.split_every == 0:
            self.codebooks.split()

    def discard_step(self) -> None:
        """Forget the frames of an update that was left out."""
        self.codebooks.discard()

    @torch.no_grad()
    def _usage_metrics(self, usage: Tensor) -> dict[str, Tensor]:
        """From shares (2, L, K); before the first update there are none, and the metrics have count 0."""
        known = (usage[0].sum(dim=1) > 0).float()  # (L,)
        perplexity, active = perplexities(usage)  # (2, L)
        rows = {"target_perplexity": perplexity[0], "predicted_perplexity": perplexity[1], "active_codes": active[0]}
        found: dict[str, Tensor] = {}
        for name, row in rows.items():
            pairs = torch.stack([row * known, known], dim=1)  # (L, 2)
            found[name] = pairs.sum(dim=0)
            found.update({f"{name}/layer{layer + 1}": pair for layer, pair in zip(self.layers, pairs)})
        return found
