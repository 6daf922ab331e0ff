"""Speech recognition with a transducer: a stateless predictor (Ghodsi et al., ICASSP 2020), a joint network, the pruned loss of arXiv:2206.13236."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from spear.bounds import at_least, within
from spear.errors import ConfigError
from spear.finetune.batch import LabelledBatch
from spear.finetune.layers import LayerMix
from spear.finetune.tasks.base import Inventory, sum_and_count
from spear.finetune.tasks.speech import SpeechConfig, SpeechHead
from spear.finetune.text import BLANK, Tokenizer, load_tokenizer
from spear.finetune.transducer import NEVER, Lens, band, joint_lattice, simple_lattice, sum_paths, whole_range
from spear.finetune.transducer_search import beam_search, greedy_search
from spear.models.student import Student
from spear.types import StepOutput

GROUP = 4
"""Channels of a group of the predictor's convolution."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RNNTConfig(SpeechConfig):
    """Any number of symbols per frame; `beam` counts the texts of a search that says at most one symbol per frame."""

    context: int = 2
    """Symbols that the predictor sees."""
    predictor_dim: int = 512
    """Width of the predictor, a multiple of 4."""
    joint_dim: int = 512
    """Width of the joint network."""
    prune: int = 5
    """Rows of the lattice that the loss keeps at every frame; 0: all of them, for short texts and small vocabularies."""
    simple_scale: float = 0.5
    """Weight of the loss of the additive joint network that says which rows are kept."""
    lm_scale: float = 0.25
    """Its share that sees the symbols before alone."""
    am_scale: float = 0.0
    """Its share that sees the frames alone."""
    warmup_steps: int = 2000
    """Updates in which the weight of the simple loss falls from 1 and that of the pruned one rises from 0.1 to 1."""
    max_symbols: int = 3
    """Most symbols that greedy search says at one frame."""

    def __post_init__(self) -> None:
        SpeechConfig.__post_init__(self)
        for name in ("context", "joint_dim", "max_symbols"):
            at_least(name, getattr(self, name), 1)
        at_least("warmup_steps", self.warmup_steps, 0)
        at_least("simple_scale", self.simple_scale, 0)
        for name in ("lm_scale", "am_scale"):
            within(name, getattr(self, name), 0, 1)
        if self.lm_scale + self.am_scale > 1:
            raise ConfigError(f"`lm_scale` and `am_scale` must be at most 1 together, but are {self.lm_scale:g} and {self.am_scale:g}")
        if self.predictor_dim < GROUP or self.predictor_dim % GROUP:
            raise ConfigError(f"`predictor_dim` must be a multiple of {GROUP}, but is {self.predictor_dim}")
        if self.prune < 0 or self.prune == 1:
            raise ConfigError(f"`prune` must be 0 or at least 2, but is {self.prune}: a band of one row has no way up")

    def build(self, dim: int, mix: LayerMix, inventory: Inventory) -> RNNTHead:
        """See FinetuneTaskConfig."""
        return RNNTHead(self, dim, mix, load_tokenizer(inventory["tokenizer"]))


class Predictor(nn.Module):
    """The last few symbols as one vector."""

    def __init__(self, size: int, dim: int, context: int) -> None:
        super().__init__()
        self.context = context
        self.embed = nn.Embedding(size, dim)
        self.conv = nn.Conv1d(dim, dim, context, groups=dim // GROUP, bias=False)

    def forward(self, symbols: Tensor) -> Tensor:
        """(N, U) symbols -> (N, U - context + 1, P), one vector for every `context` neighbours."""
        hidden: Tensor = self.conv(self.embed(symbols).transpose(1, 2))
        return F.relu(hidden).transpose(1, 2)


class RNNTHead(SpeechHead):
    """Frames and the symbols before -> log probabilities of the next; the loss is counted per symbol of the references."""

    def __init__(self, config: RNNTConfig, dim: int, mix: LayerMix, tokenizer: Tokenizer) -> None:
        super().__init__(config, mix, tokenizer)
        self.config, self.updates = config, 0
        self.dropout = nn.Dropout(config.dropout)
        self.predictor = Predictor(tokenizer.size, config.predictor_dim, config.context)
        self.frame_proj = nn.Linear(dim, config.joint_dim)
        self.text_proj = nn.Linear(config.predictor_dim, config.joint_dim)
        self.output = nn.Linear(config.joint_dim, tokenizer.size)
        pruned = bool(config.prune)
        self.simple_am = nn.Linear(dim, tokenizer.size) if pruned else None
        self.simple_lm = nn.Linear(config.predictor_dim, tokenizer.size) if pruned else None

    def after_step(self, step: int, student: Student) -> None:
        """See Objective."""
        self.updates = step

    def resume(self, step: int, student: Student) -> None:
        """See Objective."""
        self.updates = step

    def joint(self, frames: Tensor, text: Tensor) -> Tensor:
        """Logits (..., V) float32 of frames and texts (..., J)."""
        logits: Tensor = self.output(torch.tanh(frames + text))
        return logits.float()

    def loss(self, frames: Tensor, lens: Tensor, batch: LabelledBatch) -> StepOutput:
        """See Head; ``simple`` and ``pruned`` are the parts of the loss without their weights.

        A text that no band of this width can reach within its frames has no loss, and is counted in ``too_long``.
        """
        sizes, labels = Lens(lens, batch.label_lens), batch.labels.clamp(min=BLANK)
        heard = self.dropout(frames)
        text = self.predictor(F.pad(labels, (self.config.context, 0), value=BLANK))  # (N, S + 1, P)
        ranges, simple = whole_range(labels, frames.shape[1]), None
        if self.simple_am is not None and self.simple_lm is not None:
            scales = {"lm_scale": self.config.lm_scale, "am_scale": self.config.am_scale}
            paths = sum_paths(simple_lattice(self.simple_am(heard).float(), self.simple_lm(text).float(), labels, sizes, **scales), sizes)
            ranges, simple = band(paths, sizes, self.config.prune), -paths.total
        logits = self.joint(self.frame_proj(heard)[:, :, None], _rows(self.text_proj(text), ranges))
        pruned = -sum_paths(joint_lattice(logits, labels, ranges), sizes).total
        fits = pruned != -NEVER
        count = (sizes.symbols * fits).sum()
        parts = {name: torch.where(fits, part, 0.0).sum() for name, part in (("simple", simple), ("pruned", pruned)) if part is not None}
        metrics = {"too_long": sum_and_count((~fits).sum(), len(fits)), **{name: sum_and_count(part, count) for name, part in parts.items()}}
        if not self.training:
            metrics["wer"] = self.word_errors(frames, lens, batch)
        weights = self.scales()
        total = torch.stack([weights[name] * part for name, part in parts.items()]).sum()
        return StepOutput(total, count, metrics)

    def scales(self) -> dict[str, float]:
        """Weights of the two losses after `updates` updates (as in icefall's recipes); 1 where nothing is pruned."""
        if not self.config.prune:
            return {"pruned": 1.0}
        done = min(1.0, self.updates / self.config.warmup_steps) if self.config.warmup_steps else 1.0
        return {"simple": 1.0 - done * (1.0 - self.config.simple_scale), "pruned": 0.1 + 0.9 * done}

    def symbols(self, frames: Tensor, lens: Tensor, beam: int) -> list[list[int]]:
        """See SpeechHead."""
        heard = self.frame_proj(self.dropout(frames))
        if not beam:
            return greedy_search(self._step, heard, lens, self.config.context, self.config.max_symbols)
        return [beam_search(self._step, row[:length], self.config.context, beam) for row, length in zip(heard, lens.tolist())]

    def _step(self, frames: Tensor, context: Tensor) -> Tensor:
        logits = self.joint(frames, self.text_proj(self.predictor(context)[:, 0]))
        return logits.log_softmax(dim=1)


def _rows(text: Tensor, ranges: Tensor) -> Tensor:
    """Of `text` (N, S + 1, J) the rows (N, T, R) at every frame: (N, T, R, J)."""
    index = ranges.flatten(1)[..., None].expand(-1, -1, text.shape[2])
    return text.gather(1, index).view(*ranges.shape, -1)
