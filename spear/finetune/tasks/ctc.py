"""Speech recognition: a linear layer on the frames, trained with CTC (Graves et al., ICML 2006)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from spear.bounds import at_least, within
from spear.errors import ConfigError
from spear.finetune.batch import LabelledBatch
from spear.finetune.decoding import align, count_errors, greedy, prefix_beam, show, sum_errors
from spear.finetune.layers import LayerMix
from spear.finetune.tasks.base import FinetuneTaskConfig, Head, Inventory, Prediction, sum_and_count
from spear.finetune.text import BLANK, Tokenizer, fit_characters, fit_pieces, load_tokenizer, normalise
from spear.types import StepOutput


@dataclass(frozen=True, kw_only=True, slots=True)
class CTCConfig(FinetuneTaskConfig):
    """The text of all supervisions of a cut, in their order."""

    units: Literal["characters", "pieces"] = "characters"
    """``characters`` of the training texts, or ``pieces`` of a SentencePiece model that is fitted to them."""
    vocabulary: int = 500
    """``pieces``: number of them."""
    case: Literal["keep", "lower", "upper"] = "lower"
    """Case that texts are brought to."""
    dropout: float = 0.1
    """Of the frames before the linear layer."""
    beam: int = 0
    """Prefixes of the prefix beam search on test; 0: greedy."""

    def __post_init__(self) -> None:
        at_least("vocabulary", self.vocabulary, 4)
        within("dropout", self.dropout, 0, 1)
        at_least("beam", self.beam, 0)
        if self.units not in ("characters", "pieces") or self.case not in ("keep", "lower", "upper"):
            raise ConfigError(f"`units` must be characters or pieces and `case` keep, lower or upper, but are {self.units} and {self.case}")

    def label(self, cut: Any) -> str | None:
        """See FinetuneTaskConfig."""
        texts = [part.text for part in sorted(cut.supervisions, key=lambda part: float(part.start))]
        return None if not texts or None in texts else normalise(" ".join(texts), self.case)

    def needs(self) -> str:
        """See FinetuneTaskConfig."""
        return "it needs supervisions with `text`"

    def inventory(self, labels: Iterable[str]) -> Inventory:
        """See FinetuneTaskConfig."""
        found: Tokenizer = fit_pieces(labels, self.vocabulary) if self.units == "pieces" else fit_characters(labels)
        return {"tokenizer": found.to_json()}

    def encode(self, label: str, inventory: Inventory) -> NDArray[Any] | None:
        """See FinetuneTaskConfig."""
        symbols = load_tokenizer(inventory["tokenizer"]).encode(label)
        return None if symbols is None else np.asarray(symbols, dtype=np.int64)

    def scorable(self, label: str, inventory: Inventory) -> bool:
        """See FinetuneTaskConfig; what the tokenizer cannot express counts as wrong."""
        del inventory
        return bool(label)

    def build(self, dim: int, mix: LayerMix, inventory: Inventory) -> CTCHead:
        """See FinetuneTaskConfig."""
        return CTCHead(self, dim, mix, load_tokenizer(inventory["tokenizer"]))


class CTCHead(Head):
    """Frames -> log probabilities of symbols; the loss is counted per symbol of the references."""

    metric = "WER"
    higher_is_better = False

    def __init__(self, config: CTCConfig, dim: int, mix: LayerMix, tokenizer: Tokenizer) -> None:
        super().__init__(mix)
        self.config, self.tokenizer = config, tokenizer
        self.dropout = nn.Dropout(config.dropout)
        self.output = nn.Linear(dim, tokenizer.size)

    def log_probs(self, frames: Tensor) -> Tensor:
        """(N, T, D) -> (N, T, V) float32."""
        logits: Tensor = self.output(self.dropout(frames))
        return logits.float().log_softmax(dim=-1)

    def loss(self, frames: Tensor, lens: Tensor, batch: LabelledBatch) -> StepOutput:
        """See Head. A text that needs more frames than there are has no loss, and is counted in ``too_long``."""
        log_probs = self.log_probs(frames)
        losses = F.ctc_loss(log_probs.transpose(0, 1), batch.labels.clamp(min=0), lens, batch.label_lens, BLANK, "none")
        fits = losses.isfinite()
        count = (batch.label_lens * fits).sum()
        total = torch.where(fits, losses, 0.0).sum()
        metrics = {"too_long": sum_and_count((~fits).sum(), len(fits))}
        if not self.training:
            metrics["wer"] = self._wer(log_probs, lens, batch)
        return StepOutput(total, count, metrics)

    def _wer(self, log_probs: Tensor, lens: Tensor, batch: LabelledBatch) -> Tensor:
        errors = []
        for row, length, labels in zip(log_probs.cpu().numpy(), lens.tolist(), batch.labels.tolist()):
            reference = self.tokenizer.decode([symbol for symbol in labels if symbol > 0])
            errors.append(count_errors(reference.split(), self.tokenizer.decode(greedy(row[:length])).split()))
        whole = sum_errors(errors)
        return torch.tensor([float(whole.total), float(whole.words)], device=log_probs.device)

    def predict(self, frames: Tensor, lens: Tensor) -> list[Any]:
        """Texts."""
        found = []
        for row, length in zip(self.log_probs(frames).cpu().numpy(), lens.tolist()):
            symbols = prefix_beam(row[:length], self.config.beam) if self.config.beam else greedy(row[:length])
            found.append(self.tokenizer.decode(symbols))
        return found

    def score(self, predictions: Sequence[Prediction], labels: dict[str, str]) -> dict[str, Any]:
        """Word error rate, with its parts, and character error rate."""
        words = sum_errors([count_errors(labels[found.id].split(), found.value.split()) for found in predictions])
        characters = sum_errors([count_errors(labels[found.id], found.value) for found in predictions])
        parts = {name: getattr(words, name) for name in ("words", "substitutions", "insertions", "deletions")}
        exact = sum(labels[found.id] == " ".join(found.value.split()) for found in predictions) / max(len(predictions), 1)
        return {
            "value": words.rate,
            "cer": characters.rate,
            "texts_right": exact,
            "decoding": f"beam {self.config.beam}" if self.config.beam else "greedy",
            **parts,
        }

    def lines(self, predictions: Sequence[Prediction], labels: dict[str, str]) -> list[str]:
        """Alignments of the cuts with errors, those with most first."""
        paths = {found.id: align(labels[found.id].split(), found.value.split()) for found in predictions}
        wrong = {name: sum(a != b for a, b in path) for name, path in paths.items()}
        order = sorted((name for name in paths if wrong[name]), key=lambda name: (-wrong[name], name))
        return [f"{name}: {wrong[name]} errors: {show(paths[name])}" for name in order]
