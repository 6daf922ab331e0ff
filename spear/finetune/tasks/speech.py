"""What tasks of speech recognition share: texts out of supervisions, symbols, error rates with alignments."""

from __future__ import annotations

import abc
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from spear.bounds import at_least, within
from spear.errors import ConfigError
from spear.evaluation.tasks.utterances import transcript_of
from spear.finetune.batch import LabelledBatch
from spear.finetune.decoding import align, count_errors, show, sum_errors
from spear.finetune.layers import LayerMix
from spear.finetune.tasks.base import FinetuneTaskConfig, Head, Inventory, Prediction
from spear.finetune.text import BLANK, Tokenizer, fit_characters, fit_pieces, load_tokenizer, normalise


@dataclass(frozen=True, kw_only=True, slots=True)
class SpeechConfig(FinetuneTaskConfig):
    """The text of all supervisions of a cut, in their order."""

    units: Literal["characters", "pieces"] = "characters"
    """``characters`` of the training texts, or ``pieces`` of a SentencePiece model that is fitted to them."""
    vocabulary: int = 500
    """``pieces``: number of them."""
    case: Literal["keep", "lower", "upper"] = "lower"
    """Case that texts are brought to."""
    dropout: float = 0.1
    """Of the frames before the head."""
    beam: int = 0
    """Texts that the beam search keeps on test; 0: greedy."""

    def __post_init__(self) -> None:
        at_least("vocabulary", self.vocabulary, 4)
        within("dropout", self.dropout, 0, 1)
        at_least("beam", self.beam, 0)
        if self.units not in ("characters", "pieces") or self.case not in ("keep", "lower", "upper"):
            raise ConfigError(f"`units` must be characters or pieces and `case` keep, lower or upper, but are {self.units} and {self.case}")

    def label(self, cut: Any) -> str | None:
        """See FinetuneTaskConfig."""
        text = transcript_of(cut)
        return None if text is None else normalise(text, self.case)

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


class SpeechHead(Head):
    """Frames -> texts."""

    metric = "WER"
    higher_is_better = False

    def __init__(self, config: SpeechConfig, mix: LayerMix, tokenizer: Tokenizer) -> None:
        super().__init__(mix)
        self.beam, self.tokenizer = config.beam, tokenizer

    @abc.abstractmethod
    def symbols(self, frames: Tensor, lens: Tensor, beam: int) -> list[list[int]]:
        """Symbols of each item by beam search, or greedily where `beam` is 0; frames (N, T, D), lens (N,)."""

    def predict(self, frames: Tensor, lens: Tensor) -> list[Any]:
        """Texts."""
        return [self.tokenizer.decode(found) for found in self.symbols(frames, lens, self.beam)]

    def word_errors(self, frames: Tensor, lens: Tensor, batch: LabelledBatch) -> Tensor:
        """(2,) errors of the greedy texts and words of the references, a metric of StepOutput."""
        errors = []
        for found, labels in zip(self.symbols(frames, lens, 0), batch.labels.tolist()):
            reference = self.tokenizer.decode([symbol for symbol in labels if symbol > BLANK])
            errors.append(count_errors(reference.split(), self.tokenizer.decode(found).split()))
        whole = sum_errors(errors)
        return torch.tensor([float(whole.total), float(whole.words)], device=frames.device)

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
            "decoding": f"beam {self.beam}" if self.beam else "greedy",
            **parts,
        }

    def lines(self, predictions: Sequence[Prediction], labels: dict[str, str]) -> list[str]:
        """Alignments of the cuts with errors, those with most first."""
        paths = {found.id: align(labels[found.id].split(), found.value.split()) for found in predictions}
        wrong = {name: sum(a != b for a, b in path) for name, path in paths.items()}
        order = sorted((name for name in paths if wrong[name]), key=lambda name: (-wrong[name], name))
        return [f"{name}: {wrong[name]} errors: {show(paths[name])}" for name in order]
