"""Which cuts make up training batch g: a pure function of lengths, settings, seed and g, with nothing to restore.

Cuts are grouped by duration into buckets with one batch size each. Every corpus owes every bucket a fixed number of draws per epoch,
taken from an endless row of permutations of its cuts there. So each epoch has the same number of batches, a corpus of weight 1 is
heard exactly once an epoch, and any batch of any epoch can be named without walking through those before it.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from spear.bounds import at_least, within
from spear.data.fbank import SAMPLE_RATE
from spear.errors import ConfigError
from spear.files import seed_from

Ints = npt.NDArray[np.int64]
CACHED_BUCKETS = 64
MOST_OFTEN = 100
"""Largest `weight` that may be a factor: what is heard more often in an epoch is drawn with `temperature`, and larger numbers are hours."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SamplingConfig:
    """How cuts become batches."""

    max_batch_s: float = 200.0
    """Most seconds of audio per batch and rank, padding and what token mixing may add counted."""
    num_buckets: int = 20
    """Groups of like duration; fewer where there are few cuts."""
    weights: Literal["factors", "hours"] = "factors"
    """What a corpus's `weight` is: a factor on its own hours, or the hours it is to give an epoch."""
    temperature: float = 1.0
    """Exponent on the hours each corpus gives an epoch, their sum kept: below 1 small corpora are heard more often."""
    epoch_hours: float | None = None
    """Hours of an epoch over all corpora; by default what the weights say."""
    shuffle: bool = True
    """Draw in a new random order every epoch; else in the order of the shards, short buckets first."""
    num_workers: int = 0
    """Processes that make batches ahead of time; the batches are the same for any number."""
    prefetch: int = 4
    """Batches that every worker keeps ready."""

    def __post_init__(self) -> None:
        if not 0 < self.max_batch_s < float("inf"):
            raise ConfigError(f"`max_batch_s` must be more than 0, but is {self.max_batch_s}")
        within("temperature", self.temperature, 0, 1)
        if self.epoch_hours is not None and not 0 < self.epoch_hours < float("inf"):
            raise ConfigError(f"`epoch_hours` must be more than 0, but is {self.epoch_hours}")
        for key, value, least in (("num_buckets", self.num_buckets, 1), ("num_workers", self.num_workers, 0), ("prefetch", self.prefetch, 1)):
            at_least(key, value, least)


@dataclass(frozen=True, slots=True)
class Lengths:
    """What the sampler knows of a corpus."""

    name: str
    samples: Ints
    """(M,) samples of each cut at 16 kHz."""
    weight: float = 1.0
    growth_s: float = 0.0
    """Most seconds by which mixing may lengthen a cut (see `MixingConfig.growth_s`); a cut is at most doubled."""

    @property
    def hours(self) -> float:
        """Hours of audio."""
        return float(self.samples.sum()) / SAMPLE_RATE / 3600


def check_weights(weights: Mapping[str, float], config: SamplingConfig) -> None:
    """Refuse hours that would be taken for factors.

    Args:
        weights: corpus -> weight.
    Raises:
        ConfigError: a factor is above `MOST_OFTEN`.
    """
    for name, weight in weights.items() if config.weights == "factors" else ():
        if weight > MOST_OFTEN:
            rule = f"`weight` is a factor on a corpus's own hours and must be at most {MOST_OFTEN}"
            raise ConfigError(
                f"{rule}, but is {weight:g} (corpus {name}); for hours set `sampling.weights: hours`, or `weights: hours` in the corpora file"
            )


def repeats(corpora: Sequence[Lengths], config: SamplingConfig) -> list[float]:
    """How often each corpus is heard per epoch.

    Raises:
        ConfigError: every corpus has weight 0, or a factor is too large (see `check_weights`).
    """
    check_weights({corpus.name: corpus.weight for corpus in corpora}, config)
    own = [corpus.hours for corpus in corpora]
    wanted = [corpus.weight if config.weights == "hours" else corpus.weight * hours for corpus, hours in zip(corpora, own)]
    total = sum(wanted)
    if total <= 0:
        raise ConfigError(f"`weight` must be more than 0 for at least one corpus, but is 0 for {', '.join(corpus.name for corpus in corpora)}")
    flattened = [hours**config.temperature if hours > 0 else 0.0 for hours in wanted]
    goal = config.epoch_hours or total
    return [goal * share / sum(flattened) / hours for share, hours in zip(flattened, own)]


@dataclass(frozen=True, slots=True)
class _Cell:
    """The cuts of one corpus in one bucket."""

    corpus: int
    cuts: Ints
    draws: int
    """Cuts taken per epoch."""


@dataclass(frozen=True, slots=True)
class _Bucket:
    cells: tuple[_Cell, ...]
    draws: int
    batches: int


class BatchPlan:
    """The row of training batches. longest: corpus and number of the longest cut.

    Args:
        corpora: lengths and weights. config: see SamplingConfig. seed: of the run.
    Raises:
        ConfigError: a cut alone is longer than `max_batch_s`, or there is nothing to draw.
    """

    def __init__(self, corpora: Sequence[Lengths], config: SamplingConfig, seed: int) -> None:
        self.config, self.seed = config, seed
        if not corpora or not sum(len(corpus.samples) for corpus in corpora):
            raise ConfigError("`corpora` must give at least one training cut, but give none")
        factors = repeats(corpora, config)
        used = [(i, corpus) for i, corpus in enumerate(corpora) if factors[i] > 0]
        longest, self.longest = max((int(corpus.samples.max()) / SAMPLE_RATE, (i, int(corpus.samples.argmax()))) for i, corpus in used)
        if longest > config.max_batch_s:
            raise ConfigError(f"`max_batch_s` must be at least the longest cut, {longest:g} s, but is {config.max_batch_s:g}")
        self._buckets = _make_buckets(used, factors, config)
        self._ends = np.cumsum([bucket.batches for bucket in self._buckets])
        self._drawn: OrderedDict[tuple[int, int], Ints] = OrderedDict()
        self._order: tuple[int, Ints] | None = None

    @property
    def batches_per_epoch(self) -> int:
        """The same for every epoch."""
        return int(self._ends[-1])

    def batch(self, g: int) -> list[tuple[int, int]]:
        """(corpus, cut) of every item of batch `g`, g = 0, 1, ... over all epochs."""
        epoch, place = divmod(g, self.batches_per_epoch)
        place = int(self._shuffled(epoch)[place])
        b = int(np.searchsorted(self._ends, place, side="right"))
        bucket = self._buckets[b]
        i = place - (int(self._ends[b - 1]) if b else 0)
        rows = self._draws(epoch, b)[bucket.draws * i // bucket.batches : bucket.draws * (i + 1) // bucket.batches]
        return [(int(corpus), int(cut)) for corpus, cut in rows]

    def _shuffled(self, epoch: int) -> Ints:
        """Order of the epoch's batches."""
        if self._order is None or self._order[0] != epoch:
            self._order = epoch, self._permutation(self.batches_per_epoch, "batches", epoch)
        return self._order[1]

    def _draws(self, epoch: int, b: int) -> Ints:
        """(draws, 2) corpus and cut of an epoch in bucket `b`."""
        key = epoch, b
        if key not in self._drawn:
            bucket = self._buckets[b]
            rows = [np.stack([np.full(cell.draws, cell.corpus), self._cell(cell, b, epoch)], axis=1) for cell in bucket.cells]
            joined = np.concatenate(rows)
            self._drawn[key] = joined[self._permutation(len(joined), "bucket", epoch, b)]
            if len(self._drawn) > max(CACHED_BUCKETS, len(self._buckets)):
                self._drawn.popitem(last=False)
        return self._drawn[key]

    def _cell(self, cell: _Cell, b: int, epoch: int) -> Ints:
        """(draws,) cuts: places epoch * draws onwards in the endless row of the cell's permutations."""
        size, first = len(cell.cuts), epoch * cell.draws
        rounds = range(first // size, (first + cell.draws - 1) // size + 1)
        row = np.concatenate([cell.cuts[self._permutation(size, "cell", cell.corpus, b, number)] for number in rounds])
        start = first - rounds[0] * size
        return row[start : start + cell.draws]

    def _permutation(self, size: int, *what: object) -> Ints:
        if not self.config.shuffle:
            return np.arange(size)
        return np.random.Generator(np.random.Philox(seed_from(self.seed, "sampler", *what))).permutation(size)


def _make_buckets(used: Sequence[tuple[int, Lengths]], factors: Sequence[float], config: SamplingConfig) -> list[_Bucket]:
    """Cut the range of durations where equal shares of the epoch's audio lie, then fill the pieces."""
    samples = np.concatenate([corpus.samples for _, corpus in used])
    weights = np.concatenate([np.full(len(corpus.samples), factors[i]) for i, corpus in used])
    order = np.argsort(samples, kind="stable")
    audio = np.cumsum(samples[order] * weights[order])
    wanted = audio[-1] * np.arange(1, config.num_buckets) / config.num_buckets
    edges = np.unique(samples[order][np.minimum(np.searchsorted(audio, wanted), len(order) - 1)])  # a bucket's largest length
    edges = np.append(edges[edges < samples.max()], samples.max())
    corpora = dict(used)
    found: list[list[_Cell]] = [[] for _ in edges]
    for i, corpus in used:
        for b, cell in _cells(i, np.searchsorted(edges, corpus.samples), len(edges), factors[i]).items():
            found[b].append(cell)
    buckets = []
    for edge, row in zip(edges, found):
        cells = tuple(row)
        draws = sum(cell.draws for cell in cells)
        size = max(1, int(config.max_batch_s * SAMPLE_RATE // max(int(edge), _longest_mixture(cells, corpora))))
        buckets.append(_Bucket(cells, draws, -(-draws // size)))
    return buckets


def _cells(corpus: int, home: Ints, num_buckets: int, factor: float) -> dict[int, _Cell]:
    """Bucket -> the corpus's cuts in it, with round(M * factor) draws in all, shared out by largest remainder.

    Where a bucket's cuts would have less than one draw, they join those of the next longer bucket; the last ones have one draw all the same.

    Args:
        home: (M,) bucket of every cut. factor: how often each is heard per epoch.
    """
    groups: list[tuple[int, Ints]] = []
    waiting = np.zeros(0, np.int64)
    for b in range(num_buckets):
        cuts = np.flatnonzero(home == b)
        if not len(cuts):
            continue
        waiting = np.union1d(waiting, cuts)
        if len(waiting) * factor >= 1 - 1e-9:  # factors come out of a division
            groups.append((b, waiting))
            waiting = np.zeros(0, np.int64)
    if len(waiting):
        groups.append((int(home.max()), waiting))
    shares = np.array([max(1.0, len(cuts) * factor) for _, cuts in groups])
    draws = np.floor(shares).astype(np.int64)
    missing = max(0, round(len(home) * factor) - int(draws.sum()))
    draws[np.argsort(draws - shares, kind="stable")[:missing]] += 1
    return {b: _Cell(corpus, cuts, int(n)) for (b, cuts), n in zip(groups, draws)}


def _longest_mixture(cells: Sequence[_Cell], corpora: Mapping[int, Lengths]) -> int:
    """Samples that a cut of a bucket may have after mixing with another one; 0 where mixing lengthens none."""
    growing = [(int(corpora[cell.corpus].samples[cell.cuts].max()), corpora[cell.corpus].growth_s) for cell in cells]
    growing = [(longest, growth_s) for longest, growth_s in growing if growth_s > 0]
    if not growing:
        return 0
    longest = max(longest for longest, _ in growing)
    # the other cut starts before the first one ends
    return longest + min(longest, math.ceil(max(growth_s for _, growth_s in growing) * SAMPLE_RATE))


def valid_batches(lengths: Sequence[Ints], max_batch_s: float) -> list[list[tuple[int, int]]]:
    """Every cut once, sorted by duration, in batches of at most `max_batch_s` seconds, padding counted.

    Args:
        lengths: (M,) samples per corpus.
    Returns:
        Batches of (corpus, cut).
    """
    rows = sorted((int(n), corpus, cut) for corpus, samples in enumerate(lengths) for cut, n in enumerate(samples))
    batches: list[list[tuple[int, int]]] = []
    for n, corpus, cut in rows:
        if not batches or (len(batches[-1]) + 1) * n > max_batch_s * SAMPLE_RATE:
            batches.append([])
        batches[-1].append((corpus, cut))
    return batches
