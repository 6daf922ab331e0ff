"""Labelled cuts as batches: a pure function of the manifests, the settings and the number of the batch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
from lhotse.cut import Cut
from numpy.typing import NDArray
from torch import Tensor

from spear.data.audio import Audio, load_audio
from spear.data.fbank import SAMPLE_RATE
from spear.data.inputs import INPUTS
from spear.data.loader import ordered_loader
from spear.data.sampler import BatchPlan, Lengths, SamplingConfig, valid_batches
from spear.files import seed_from
from spear.types import Batch

PAD = -1
"""Fills targets of different lengths."""


@dataclass(slots=True)
class LabelledBatch(Batch):
    """A batch with targets: (N, U) int64 symbols padded with PAD and their numbers (N,), (N, K) float32 shares, or (N,) int64 classes."""

    labels: Tensor = field(default_factory=lambda: torch.zeros(0))
    label_lens: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.int64))


@dataclass(frozen=True, slots=True)
class Example:
    """A cut with its target (see `FinetuneTaskConfig.encode`) and the number of its corpus."""

    cut: Cut
    target: NDArray[Any]
    corpus: int = 0

    @property
    def samples(self) -> int:
        """At 16 kHz."""
        return round(float(self.cut.duration) * SAMPLE_RATE)


@dataclass(frozen=True, slots=True)
class Mixup:
    """See `MixupConfig`."""

    prob: float
    alpha: float


class Reads(NamedTuple):
    """What the encoder reads. kind: see `spear.data.inputs.INPUTS`; width: F."""

    kind: str
    width: int


def make_batch(examples: Sequence[Example], reads: Reads, mixup: Mixup | None = None, seed: int = 0, g: int = 0) -> LabelledBatch:
    """Read, mix and pad.

    Args:
        examples: at least one. mixup: mix pairs of this batch. seed, g: decide which.
    Raises:
        DataError: a cut cannot be read.
    """
    waves = [load_audio(example.cut) for example in examples]
    targets = [example.target for example in examples]
    if mixup is not None and mixup.prob > 0 and len(examples) > 1:
        waves, targets = mix_pairs(waves, targets, mixup, np.random.Generator(np.random.Philox(seed_from(seed, "mixup", g))))
    lens = torch.tensor([len(wave) for wave in waves], dtype=torch.int64)
    audio = torch.zeros(len(waves), int(lens.max()))
    for row, wave in zip(audio, waves):
        row[: len(wave)] = torch.from_numpy(wave)
    features, feature_lens = INPUTS[reads.kind].batch(audio, lens, reads.width)
    labels, label_lens = _padded(targets)
    cuts = [example.cut for example in examples]
    domains = [str((cut.custom or {}).get("domain", "")) for cut in cuts]
    return LabelledBatch(
        [cut.id for cut in cuts], domains, features, feature_lens, float(lens.sum()) / SAMPLE_RATE, labels=labels, label_lens=label_lens
    )


def mix_pairs(waves: list[Audio], targets: list[NDArray[Any]], mixup: Mixup, rng: np.random.Generator) -> tuple[list[Audio], list[NDArray[Any]]]:
    """x <- share x + (1 - share) y for waveforms and targets; y is another item of the batch, repeated or cut to the length of x."""
    partners = (np.arange(len(waves)) + rng.integers(1, len(waves))) % len(waves)
    shares = rng.beta(mixup.alpha, mixup.alpha, len(waves))
    shares = np.where(rng.random(len(waves)) < mixup.prob, shares, 1.0).astype(np.float32)
    mixed = [x if s == 1 else s * x + (1 - s) * np.resize(waves[p], len(x)) for x, s, p in zip(waves, shares, partners)]
    return mixed, [t if s == 1 else s * t + (1 - s) * targets[p] for t, s, p in zip(targets, shares, partners)]


def _padded(targets: Sequence[NDArray[Any]]) -> tuple[Tensor, Tensor]:
    lens = torch.tensor([target.size for target in targets], dtype=torch.int64)
    if targets[0].ndim == 0 or targets[0].dtype.kind == "f":
        return torch.from_numpy(np.stack(targets)), lens
    rows = torch.full((len(targets), max(1, int(lens.max()))), PAD, dtype=torch.int64)
    for row, target in zip(rows, targets):
        row[: target.size] = torch.from_numpy(target)
    return rows, lens


class Places:
    """The examples of a corpus as places of equal chance, so that a plan of batches can draw by weights.

    Without weights place i is example i. With weights the examples lie side by side from short to long, each as wide as its weight, and place
    i goes from i to i + 1: one with weight 3 has three places, ten with weight .1 share one, and every visit to it draws one of them anew.
    samples: (places,) the longest example that a place may give, at 16 kHz.

    Args:
        examples: M, at least one. weights: (M,) times that an example is to be drawn per epoch.
    """

    def __init__(self, examples: Sequence[Example], weights: NDArray[np.float64] | None) -> None:
        samples = np.asarray([example.samples for example in examples], dtype=np.int64)
        self.examples, self.samples = list(examples), samples
        self._ends: NDArray[np.float64] | None = None
        if weights is not None:
            order = np.argsort(samples, kind="stable")
            count = max(1, round(float(weights.sum())))
            self.examples = [examples[i] for i in order]
            self._ends = np.cumsum(weights[order]) * (count / weights.sum())
            self.samples = samples[order][np.searchsorted(self._ends, np.arange(1, count + 1)).clip(max=len(examples) - 1)]

    def at(self, place: int, point: float) -> Example:
        """The example of a place at `point`, in [0, 1)."""
        if self._ends is None:
            return self.examples[place]
        return self.examples[min(int(np.searchsorted(self._ends, place + point, side="right")), len(self.examples) - 1)]


class LabelledSource:
    """Endless training batches; a `BatchSource` of the trainer.

    Args:
        examples: at least one. weights: of the corpora. draws: (M,) relative frequency of each example; None: all alike.
        sampling: see SamplingConfig. seed: of the order and of mixup.
    Raises:
        ConfigError: the sampling cannot be met.
    """

    def __init__(
        self,
        examples: Sequence[Example],
        weights: Sequence[float],
        sampling: SamplingConfig,
        seed: int,
        *,
        reads: Reads,
        draws: NDArray[np.float64] | None = None,
        mixup: Mixup | None = None,
    ) -> None:
        self.sampling, self.seed, self.reads, self.mixup = sampling, seed, reads, mixup
        of_corpus = [[i for i, example in enumerate(examples) if example.corpus == corpus] for corpus in range(len(weights))]
        self.places, lengths = [], []
        for corpus, (indexes, weight) in enumerate(zip(of_corpus, weights)):
            if indexes:
                share = None if draws is None else draws[indexes] / draws.sum() * len(draws)
                self.places.append(Places([examples[i] for i in indexes], share))
                lengths.append(Lengths(str(corpus), self.places[-1].samples, weight))
        self.plan = BatchPlan(lengths, sampling, seed)

    @property
    def batches_per_epoch(self) -> int:
        """See BatchSource."""
        return self.plan.batches_per_epoch

    def batch(self, g: int) -> LabelledBatch:
        """Batch `g`, g = 0, 1, ..."""
        rows = self.plan.batch(g)
        points = np.random.Generator(np.random.Philox(seed_from(self.seed, "draws", g))).random(len(rows))
        return make_batch([self.places[corpus].at(place, u) for (corpus, place), u in zip(rows, points)], self.reads, self.mixup, self.seed, g)

    def iterate(self, start: int, stride: int) -> Iterator[Batch]:
        """See BatchSource."""
        return ordered_loader(self.batch, range(start, 2**62, stride), self.sampling.num_workers, self.sampling.prefetch)


class LabelledSet:
    """Every example once, short ones first; a `ValidSource` of the trainer."""

    def __init__(self, examples: Sequence[Example], sampling: SamplingConfig, *, reads: Reads) -> None:
        self.examples, self.sampling, self.reads = list(examples), sampling, reads
        lengths = [np.asarray([example.samples for example in self.examples], dtype=np.int64)]
        self._batches = valid_batches(lengths, sampling.max_batch_s)

    def __len__(self) -> int:
        return len(self._batches)

    def batch(self, g: int) -> LabelledBatch:
        """Batch `g`, 0 to len - 1."""
        return make_batch([self.examples[cut] for _, cut in self._batches[g]], self.reads)

    def iterate(self, rank: int, world: int) -> Iterator[Batch]:
        """See ValidSource."""
        return ordered_loader(self.batch, range(rank, len(self), world), self.sampling.num_workers, self.sampling.prefetch)
