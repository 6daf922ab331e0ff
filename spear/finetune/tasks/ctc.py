"""Speech recognition: a linear layer on the frames, trained with CTC (Graves et al., ICML 2006)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from spear.finetune.batch import LabelledBatch
from spear.finetune.decoding import greedy, prefix_beam
from spear.finetune.layers import LayerMix
from spear.finetune.tasks.base import Inventory, sum_and_count
from spear.finetune.tasks.speech import SpeechConfig, SpeechHead
from spear.finetune.text import BLANK, Tokenizer, load_tokenizer
from spear.types import StepOutput


@dataclass(frozen=True, kw_only=True, slots=True)
class CTCConfig(SpeechConfig):
    """One symbol or blank per frame; `beam` counts the prefixes of a prefix beam search."""

    def build(self, dim: int, mix: LayerMix, inventory: Inventory) -> CTCHead:
        """See FinetuneTaskConfig."""
        return CTCHead(self, dim, mix, load_tokenizer(inventory["tokenizer"]))


class CTCHead(SpeechHead):
    """Frames -> log probabilities of symbols; the loss is counted per symbol of the references."""

    def __init__(self, config: CTCConfig, dim: int, mix: LayerMix, tokenizer: Tokenizer) -> None:
        super().__init__(config, mix, tokenizer)
        self.dropout = nn.Dropout(config.dropout)
        self.output = nn.Linear(dim, tokenizer.size)

    def log_probs(self, frames: Tensor) -> Tensor:
        """(N, T, D) -> (N, T, V) float32."""
        logits: Tensor = self.output(self.dropout(frames))
        return logits.float().log_softmax(dim=-1)

    def loss(self, frames: Tensor, lens: Tensor, batch: LabelledBatch) -> StepOutput:
        """See Head. A text that needs more frames than there are has no loss, and is counted in ``too_long``."""
        log_probs = self.log_probs(frames)
        places = torch.arange(1, batch.labels.shape[1], device=lens.device)
        repeated = (batch.labels[:, 1:] == batch.labels[:, :-1]) & (places < batch.label_lens[:, None])  # a blank must stand between the two
        fits = batch.label_lens + repeated.sum(dim=1) <= lens
        labels = batch.labels.clamp(min=0)
        losses = F.ctc_loss(log_probs.transpose(0, 1), labels, lens, batch.label_lens, BLANK, "none", zero_infinity=True)
        count = (batch.label_lens * fits).sum()
        total = losses.sum()
        metrics = {"too_long": sum_and_count((~fits).sum(), len(fits))}
        if not self.training:
            metrics["wer"] = self.word_errors(frames, lens, batch)
        return StepOutput(total, count, metrics)

    def symbols(self, frames: Tensor, lens: Tensor, beam: int) -> list[list[int]]:
        """See SpeechHead."""
        rows = [row[:length] for row, length in zip(self.log_probs(frames).cpu().numpy(), lens.tolist())]
        return [prefix_beam(row, beam) if beam else greedy(row) for row in rows]
