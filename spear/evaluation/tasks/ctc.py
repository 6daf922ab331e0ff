"""Recognition by a small CTC network on frozen features: phones of an alignment tier, or the characters of the text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from spear.bounds import above, at_least
from spear.errors import ConfigError, DataError
from spear.evaluation.ctc import CtcNetwork, CtcRun, beam_search, greedy, train_ctc
from spear.evaluation.metrics import ratio_interval
from spear.evaluation.probe import LayerStack, scale_of
from spear.evaluation.robustness import edit_distances
from spear.evaluation.tasks.base import SPLITS, Array, Features, Rows, Score, Settings, Split, Task, TaskConfig, alignment_of
from spear.evaluation.tasks.classification import WEIGHTED_SUM
from spear.evaluation.tasks.utterances import transcript_of

MARK = "\x1f"
"""Between the symbols of a transcript."""
Ids = NDArray[np.int64]


@dataclass(frozen=True, kw_only=True, slots=True)
class CtcConfig(TaskConfig):
    """Recognise phones or characters."""

    tier: str | None = "phone"
    """Alignment tier whose symbols are recognised; null: the characters of the supervision's text."""
    network: Literal["linear", "blstm"] = "linear"
    """What stands on the weighted sum of layers: one linear map, or a bidirectional LSTM before it."""
    hidden: int = 128
    """Width of the LSTM in each direction."""
    learning_rates: list[float] = field(default_factory=lambda: [0.003, 0.01])
    """Tried with the first seed; the best on valid is kept."""
    steps: int = 400
    """Updates."""
    batch_cuts: int = 16
    """Cuts per update."""
    beam: int = 8
    """Prefixes of the beam search that is told beside greedy reading; 0 leaves it out."""
    max_seconds: float = 3600.0
    """Seconds of whole cuts that a split gives, drawn with the evaluation's seed."""

    def __post_init__(self) -> None:
        TaskConfig.__post_init__(self)
        for key in ("hidden", "steps", "batch_cuts"):
            at_least(key, getattr(self, key), 1)
        at_least("beam", self.beam, 0)
        above("max_seconds", self.max_seconds, 0)
        if not self.learning_rates or min(self.learning_rates) <= 0:
            raise ConfigError(f"`learning_rates` must be at least one and all positive, but is {self.learning_rates}")

    def build(self, name: str, settings: Settings) -> Task:
        """See `TaskConfig`."""
        return Ctc(name, self, settings)


class Ctc(Task):
    """Error rate of greedy reading; the weighted sum of layers is learned with the network."""

    config: CtcConfig

    def wants(self, cut: Any) -> bool:
        """See `Task`."""
        return bool(self.transcript(cut))

    def needs(self) -> str:
        """See `Task`."""
        return "it needs the supervision field `text`" if self.config.tier is None else f"it needs the alignment tier `{self.config.tier}`"

    def transcript(self, cut: Any) -> list[str]:
        """Symbols of a cut: those of the tier, or the characters of its text with single blanks between words."""
        if self.config.tier is not None:
            return [symbol for _, _, symbol in alignment_of(cut, self.config.tier)]
        return list(" ".join((transcript_of(cut) or "").split()))

    def limits(self, split: Split) -> tuple[int | None, float | None]:
        """See `Task`."""
        del split
        return self.config.max_cuts, self.config.max_seconds

    def select(self, cuts: Mapping[Split, Sequence[Any]]) -> dict[Split, list[Any]]:
        """See `Task`; whole cuts, up to `max_seconds` of each split."""
        return {split: self.first_seconds(found, self.config.max_seconds) for split, found in Task.select(self, cuts).items()}

    def rows(self, cut: Any, split: Split, times: NDArray[np.float64], layers: Sequence[Array]) -> Rows:
        """See `Task`: every frame; the first one's label is the transcript."""
        return Rows([MARK.join(self.transcript(cut)), *[""] * (len(times) - 1)], list(layers))

    def score(self, features: Mapping[Split, Features], layer_names: Sequence[str]) -> Score:
        """See `Task`; the learning rate is chosen on valid with the first seed."""
        parts = {split: Sequences(features[split], features["train"], self.settings.device) for split in SPLITS}
        symbols = sorted({symbol for text in parts["train"].texts for symbol in text})
        if not symbols:
            raise DataError(f"task `{self.name}` finds no transcript in its train split")
        index = {symbol: i for i, symbol in enumerate(symbols, start=1)}
        sizes = (parts["train"].stack.shape[0], parts["train"].stack.shape[2], len(symbols))
        wanted = [np.array([index[symbol] for symbol in text], np.int64) for text in parts["train"].texts]

        def train(rate: float, seed: int) -> CtcNetwork:
            run = CtcRun(rate, self.config.steps, self.config.batch_cuts, seed, self.config.network, self.config.hidden)
            return train_ctc(parts["train"].read, wanted, sizes, run)

        seeds = self.settings.seeds
        tried = [(rate, train(rate, seeds[0])) for rate in self.config.learning_rates]
        valid = [self._rate(self._read(network, parts["valid"], symbols, 0), parts["valid"].texts)[0] for _, network in tried]
        rate, network = tried[int(np.argmin(valid))]
        heard = self._read(network, parts["test"], symbols, 0)
        texts = parts["test"].texts
        first, errors, lens = self._rate(heard, texts)
        values = [first, *(self._rate(self._read(train(rate, seed), parts["test"], symbols, 0), texts)[0] for seed in seeds[1:])]
        details: dict[str, Any] = {"items": len(texts), "classes": len(symbols), "learning_rate": rate, "network": self.config.network}
        if self.config.beam:
            beamed = self._read(network, parts["test"], symbols, self.config.beam)
            details["beam"] = round(self._rate(beamed, texts)[0], 6)
        if self.config.tier is None:
            details["word_error_rate"] = round(word_error_rate(heard, texts), 6)
            if self.config.beam:
                details["beam_word_error_rate"] = round(word_error_rate(beamed, texts), 6)
        name = WEIGHTED_SUM if sizes[0] > 1 else layer_names[0]
        details["layer_weights"] = {layer: round(x, 6) for layer, x in zip(layer_names, network.layer_logits.softmax(0).tolist())}
        interval = ratio_interval(errors, lens, resamples=self.settings.resamples, seed=self.settings.seed)
        metric = "CER" if self.config.tier is None else "PER" if self.config.tier == "phone" else "error rate"
        by_layer = {name: {"valid": min(valid), "test": first}}
        return Score(metric, False, float(np.mean(values)), float(np.std(values)), interval, name, by_layer, details)

    @staticmethod
    def _read(network: CtcNetwork, part: Sequences, symbols: Sequence[str], beam: int) -> list[list[str]]:
        """What the network hears in every cut."""
        found = []
        for i in range(len(part.texts)):
            x, lens = part.read([i])
            with torch.inference_mode():
                scores = network(x)[0, : int(lens[0])].float().cpu().numpy()
            ids = beam_search(scores, beam) if beam else greedy(scores)
            found.append([symbols[j - 1] for j in ids])
        return found

    @staticmethod
    def _rate(heard: Sequence[list[str]], texts: Sequence[list[str]]) -> tuple[float, NDArray[np.float64], NDArray[np.float64]]:
        """Error rate over all cuts, and errors and lengths of each."""
        errors = distances(heard, texts).astype(np.float64)
        lens = np.array([len(text) for text in texts], np.float64)
        return float(errors.sum() / lens.sum()), errors, lens


class Sequences:
    """Features of whole cuts, read in padded batches.

    Args:
        features: of one split, see `Ctc.rows`. train: whose means and deviations scale the layers.
    """

    def __init__(self, features: Features, train: Features, device: str) -> None:
        scales = [scale_of(torch.from_numpy(np.array(x)).to(device)) for x in train.layers]
        self.stack = LayerStack(features.layers, scales, torch.device(device))
        first = np.flatnonzero([i == 0 or features.groups[i] != features.groups[i - 1] for i in range(len(features.groups))])
        self._ends = [(int(a), int(b)) for a, b in zip(first, np.append(first[1:], len(features.groups)))]
        self.texts = [features.labels[a].split(MARK) for a, _ in self._ends]

    def read(self, numbers: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Padded features (L, N, T, D) and frames (N,) of some cuts."""
        found = [self.stack.rows(slice(*self._ends[i])) for i in numbers]
        lens = torch.tensor([x.shape[1] for x in found])
        padded = found[0].new_zeros(len(self.stack), len(found), int(lens.max()), found[0].shape[2])
        for i, x in enumerate(found):
            padded[:, i, : x.shape[1]] = x
        return padded, lens


def distances(heard: Sequence[Sequence[str]], texts: Sequence[Sequence[str]]) -> Ids:
    """Edit distance of every pair of sequences."""
    index = {symbol: i for i, symbol in enumerate(sorted({symbol for text in (*heard, *texts) for symbol in text}))}
    a, b = ([np.array([index[symbol] for symbol in text], np.int64) for text in side] for side in (heard, texts))
    return edit_distances(a, b)


def word_error_rate(heard: Sequence[Sequence[str]], texts: Sequence[Sequence[str]]) -> float:
    """Errors over words, for sequences of characters."""
    words = [["".join(text).split() for text in side] for side in (heard, texts)]
    return float(distances(words[0], words[1]).sum() / sum(len(text) for text in words[1]))
