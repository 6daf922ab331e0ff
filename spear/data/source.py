"""The batches of a run, read from shards: an endless training stream that starts anywhere at once, and a finite validation set."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np

from spear.data.audio import Audio
from spear.data.batches import BatchBuilder
from spear.data.fbank import SAMPLE_RATE
from spear.data.loader import ordered_loader
from spear.data.mixing import Mixer, MixingConfig, NoiseDraw
from spear.data.sampler import BatchPlan, Lengths, SamplingConfig, valid_batches
from spear.data.shards import ShardReader
from spear.errors import ArtifactError, DataError
from spear.types import Batch, TokenSpec


class ShardNoise:
    """Draws noise from the cuts of shards; a callable for `Mixer`.

    A cut is drawn uniformly; a longer one gives a random stretch, a shorter one is repeated from a random place.
    """

    def __init__(self, readers: Sequence[ShardReader]) -> None:
        self._readers = list(readers)
        self._ends = np.cumsum([len(reader) for reader in self._readers])

    def __call__(self, rng: np.random.Generator, samples: int) -> Audio:
        """(samples,) float32 noise."""
        place = int(rng.integers(int(self._ends[-1])))
        corpus = int(np.searchsorted(self._ends, place, side="right"))
        reader = self._readers[corpus]
        noise = reader.audio(place - (int(self._ends[corpus - 1]) if corpus else 0))
        if len(noise) >= samples:
            start = int(rng.integers(len(noise) - samples + 1))
            return noise[start : start + samples]
        start = int(rng.integers(len(noise)))
        return np.resize(np.roll(noise, -start), samples)


class TrainSource:
    """Endless training batches; batch g depends only on the shards, the settings, the seed and g.

    Args:
        readers: corpora to train on. weights: corpus -> weight (see SamplingConfig). builder: makes the batches; where it mixes, no mixture
            makes a batch longer than `max_batch_s`.
    Raises:
        ConfigError: the sampling cannot be met.
    """

    def __init__(
        self, readers: Sequence[ShardReader], weights: Mapping[str, float], builder: BatchBuilder, sampling: SamplingConfig, seed: int
    ) -> None:
        self.readers, self.builder, self.sampling, self.seed = list(readers), builder, sampling, seed
        mixing = builder.mixer.config if builder.mixer is not None else None
        lengths = [
            Lengths(reader.corpus, reader.samples, weights.get(reader.corpus, 1.0), mixing.growth_s(reader.domain) if mixing is not None else 0.0)
            for reader in self.readers
        ]
        self.plan = BatchPlan(lengths, sampling, seed)

    @property
    def batches_per_epoch(self) -> int:
        """The same for every epoch: epoch = g // batches_per_epoch."""
        return self.plan.batches_per_epoch

    def batch(self, g: int) -> Batch:
        """Batch `g`, g = 0, 1, ...

        Raises:
            DataError: a shard cannot be read.
        """
        items = [self.readers[corpus][cut] for corpus, cut in self.plan.batch(g)]
        return self.builder(items, self.seed, g)

    def largest(self) -> Batch:
        """The longest cut as often as a batch may hold it: no batch takes more memory. It is no part of the stream."""
        corpus, cut = self.plan.longest
        item = self.readers[corpus][cut]
        return self.builder([item] * max(1, int(self.sampling.max_batch_s * SAMPLE_RATE // len(item.audio))), self.seed, 0)

    def iterate(self, start: int, stride: int) -> Iterator[Batch]:
        """Yield batch(start), batch(start + stride), ... without end."""
        return ordered_loader(self.batch, range(start, 2**62, stride), self.sampling.num_workers, self.sampling.prefetch)


class ValidSource:
    """Every validation cut once, sorted by duration and unmixed.

    Args:
        readers: corpora to validate on. builder: makes the batches, without a mixer. sampling: its `max_batch_s` holds here too.
    """

    def __init__(self, readers: Sequence[ShardReader], builder: BatchBuilder, sampling: SamplingConfig) -> None:
        self.readers, self.builder, self.sampling = list(readers), builder, sampling
        self._batches = valid_batches([reader.samples for reader in self.readers], sampling.max_batch_s)

    def __len__(self) -> int:
        return len(self._batches)

    def batch(self, g: int) -> Batch:
        """Batch `g`, 0 to len - 1."""
        return self.builder([self.readers[corpus][cut] for corpus, cut in self._batches[g]], 0, g)

    def iterate(self, rank: int, world: int) -> Iterator[Batch]:
        """Yield batches rank, rank + world, ... of the set."""
        return ordered_loader(self.batch, range(rank, len(self), world), self.sampling.num_workers, self.sampling.prefetch)


def make_sources(
    shards: Path,
    weights: Mapping[str, float],
    *,
    sampling: SamplingConfig,
    mixing: MixingConfig,
    seed: int,
    teachers: Sequence[str] = (),
    only_noise: Sequence[str] = (),
    num_mel_bins: int = 128,
    keep_audio: bool = False,
    reads: str = "fbank",
) -> tuple[TrainSource, ValidSource | None]:
    """Open the shards of a run.

    Args:
        shards: ``DATA/shards``. weights: corpus -> weight; the corpora to open.
        teachers: whose tokens the objective reads; others that the shards hold are left out.
        only_noise: corpora that only give noise. num_mel_bins, reads: of the student's encoder. keep_audio: also give waveforms.
    Returns:
        Training batches, and validation batches (None where no corpus has a split valid).
    Raises:
        ArtifactError: shards are missing, or hold tokens of one teacher with different specs.
        DataError: no corpus has the tokens of a teacher.
    """
    train = {name: ShardReader(shards / name / "train", teachers) for name in weights}
    heard = [reader for name, reader in train.items() if name not in only_noise]
    folders = [shards / name / "valid" for name in weights if name not in only_noise]
    valid = [ShardReader(folder, teachers) for folder in folders if folder.is_dir()]
    specs = token_specs([*heard, *valid], teachers)
    noisy = [reader for reader in train.values() if reader.domain in mixing.noise_domains and len(reader)]
    noise: NoiseDraw | None = ShardNoise(noisy) if noisy else None
    builder = BatchBuilder(specs, num_mel_bins=num_mel_bins, mixer=Mixer(mixing, specs, noise), keep_audio=keep_audio, reads=reads)
    plain = BatchBuilder(specs, num_mel_bins=num_mel_bins, keep_audio=keep_audio, reads=reads)
    return TrainSource(heard, weights, builder, sampling, seed), ValidSource(valid, plain, sampling) if valid else None


def token_specs(readers: Sequence[ShardReader], teachers: Sequence[str]) -> dict[str, TokenSpec]:
    """Teacher -> spec of its tokens in the shards, which must agree.

    Raises:
        ArtifactError: two corpora hold different tokens of one teacher; names the field that differs.
        DataError: no corpus holds tokens of a teacher.
    """
    found: dict[str, tuple[TokenSpec, ShardReader]] = {}
    for reader in readers:
        for teacher, spec in reader.specs.items():
            known, first = found.setdefault(teacher, (spec, reader))
            for name in TokenSpec.__dataclass_fields__:
                if getattr(known, name) != getattr(spec, name):
                    raise ArtifactError(
                        f"tokens of {teacher} must have one `{name}` in all shards, but it is {getattr(known, name)} in {first.folder} "
                        f"and {getattr(spec, name)} in {reader.folder}"
                    )
    for teacher in teachers:
        if teacher not in found:
            raise DataError(f"no corpus has tokens of {teacher}: none of the domains trained on uses that teacher", cause="missing_tokens")
    return {teacher: found[teacher][0] for teacher in teachers}
