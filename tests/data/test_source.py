"""Batches from shards: the stream, its ranks and workers, mixing with tokens, and validation."""

from __future__ import annotations

import itertools
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from spear.data.batches import BatchBuilder, pad_tokens
from spear.data.fbank import fbank
from spear.data.mixing import DomainMixing, MixingConfig
from spear.data.sampler import SamplingConfig
from spear.data.shards import Item, ShardReader
from spear.data.source import ShardNoise, TrainSource, ValidSource, make_sources
from spear.errors import ArtifactError, DataError
from spear.files import read_json, write_json
from spear.types import IGNORE, LOG_EPSILON, Batch
from tests.data.cuts import AUDIO, SPECS, make_shards

CLEAN = MixingConfig(domains={})


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_shards(tmp_path_factory.mktemp("corpora"), noise=2).data / "shards"


def sources(shards: Path, mixing: MixingConfig = CLEAN, **settings: Any) -> tuple[TrainSource, ValidSource]:
    sampling = SamplingConfig(**{"max_batch_s": 6.0, "num_buckets": 2, **settings})
    weights = {"voices": 1.0, "sounds": 2.0, "hiss": 1.0}
    train, valid = make_sources(shards, weights, sampling=sampling, mixing=mixing, seed=5, teachers=["speech", "audio"], only_noise=["hiss"])
    assert valid is not None
    return train, valid


def assert_equal(a: Batch, b: Batch) -> None:
    assert (a.ids, a.domains, a.seconds) == (b.ids, b.domains, b.seconds)
    assert torch.equal(a.features, b.features)
    assert torch.equal(a.feature_lens, b.feature_lens)
    for teacher in a.tokens:
        assert torch.equal(a.tokens[teacher], b.tokens[teacher])
        assert torch.equal(a.token_lens[teacher], b.token_lens[teacher])


def test_batch_has_features_tokens_and_ignored_rows(shards: Path) -> None:
    train, _ = sources(shards)
    readers = {reader.corpus: reader for reader in train.readers}
    assert set(readers) == {"voices", "sounds"}  # hiss only gives noise
    seen = set()
    for g in range(train.batches_per_epoch):
        batch = train.batch(g)
        for i, (cut_id, domain) in enumerate(zip(batch.ids, batch.domains)):
            reader = readers["voices" if domain == "speech" else "sounds"]
            item = reader[[reader.id(n) for n in range(len(reader))].index(cut_id)]
            n = int(batch.feature_lens[i])
            assert torch.equal(batch.features[i, :n], fbank(torch.from_numpy(item.audio)))
            assert (batch.features[i, n:] == LOG_EPSILON).all()
            m = int(batch.token_lens["speech"][i])
            assert np.array_equal(batch.tokens["speech"][i, :m].numpy(), item.tokens["speech"])
            assert (batch.tokens["speech"][i, m:] == IGNORE).all()
            if domain == "speech":
                assert batch.token_lens["audio"][i] == 0
                assert (batch.tokens["audio"][i] == IGNORE).all()
            seen.add(domain)
        assert batch.tokens["audio"].dtype == torch.int64
        assert batch.tokens["audio"].shape[2] == AUDIO.num_codebooks
        assert batch.seconds == pytest.approx(float(batch.feature_lens.sum()) / 100, abs=0.01 * len(batch.ids))
    assert seen == {"speech", "audio"}


def test_stream_of_all_ranks_is_one_epoch_and_the_same_for_any_number_of_ranks(shards: Path) -> None:
    train, _ = sources(shards)
    n = train.batches_per_epoch
    alone = [batch.ids for batch in itertools.islice(train.iterate(0, 1), 2 * n)]
    world = 2
    split = [[batch.ids for batch in itertools.islice(sources(shards)[0].iterate(rank, world), n)] for rank in range(world)]
    assert [split[g % world][g // world] for g in range(2 * n)] == alone
    heard = Counter(itertools.chain.from_iterable(alone[:n]))
    assert {count for name, count in heard.items() if name.startswith("s")} == {1}
    assert {count for name, count in heard.items() if name.startswith("a")} == {2}
    assert len(heard) == sum(map(len, train.readers))


def test_stream_starts_anywhere_with_the_same_batches(shards: Path) -> None:
    train, _ = sources(shards, MixingConfig())
    late = next(iter(sources(shards, MixingConfig())[0].iterate(7, 3)))
    walked = next(itertools.islice(train.iterate(0, 1), 7, None))
    assert_equal(late, walked)


def test_stream_is_the_same_for_any_number_of_workers(shards: Path) -> None:
    everything = MixingConfig(domains={"speech": DomainMixing(p=1.0, p_noise=0.5), "audio": DomainMixing(p=1.0, p_noise=1.0)})
    plain, _ = sources(shards, everything)
    worked, _ = sources(shards, everything, num_workers=2, prefetch=2)
    for a, b in itertools.islice(zip(plain.iterate(2, 2), worked.iterate(2, 2)), 5):
        assert_equal(a, b)


@pytest.mark.parametrize("num_workers", [0, 1])
def test_stream_raises_data_error_with_its_own_text_when_a_shard_is_gone(tmp_path: Path, num_workers: int) -> None:
    folder = make_shards(tmp_path, speech=5, sounds=2).data / "shards"
    weights = {"voices": 1.0}
    train, _ = make_sources(folder, weights, sampling=SamplingConfig(num_workers=num_workers), mixing=CLEAN, seed=0, teachers=["speech"])
    (folder / "voices" / "train" / "recording.000000.tar").unlink()
    with pytest.raises(DataError, match=r"^cut s\d in .*recording\.000000\.tar: cannot be read: No such file or directory$"):
        next(iter(train.iterate(0, 1)))


def test_mixing_in_batches_changes_audio_and_tokens_together(shards: Path) -> None:
    always = MixingConfig(domains={"speech": DomainMixing(p=1.0, p_noise=0.0)})
    train, _ = sources(shards, always)
    longer = 0
    for g in range(train.batches_per_epoch):
        plain = BatchBuilder(train.builder.specs)([train.readers[corpus][cut] for corpus, cut in train.plan.batch(g)], 0, g)
        batch = train.batch(g)
        assert batch.ids == plain.ids
        for i, domain in enumerate(batch.domains):
            n, m = int(batch.feature_lens[i]), int(batch.token_lens["speech"][i])
            assert abs(n / 2 - m) <= 2  # 100 Hz features, 50 Hz tokens
            if domain == "audio":
                assert torch.equal(batch.features[i, :n], plain.features[i, :n])
            longer += n > int(plain.feature_lens[i])
    assert longer > 0


def test_mixing_never_makes_a_batch_longer_than_max_batch_s(shards: Path) -> None:
    mixing = MixingConfig(domains={"speech": DomainMixing(p=1.0, p_noise=0.0)})
    train, _ = sources(shards, mixing, max_batch_s=12.0)
    readers = {reader.corpus: reader for reader in train.readers}
    longest = max(int(reader.samples.max()) for reader in readers.values()) / 16000
    padded, grown = [], 0
    for g in range(6 * train.batches_per_epoch):
        batch = train.batch(g)
        padded.append(len(batch.ids) * float(batch.feature_lens.max()) / 100)
        grown += int(batch.feature_lens.max()) > 100 * longest
    assert max(padded) <= 12.0
    assert grown > 0


def test_noise_comes_from_noise_corpora_cropped_or_repeated(shards: Path) -> None:
    reader = ShardReader(shards / "hiss" / "train")
    noise = ShardNoise([reader])
    rng = np.random.default_rng(0)
    assert len(noise(rng, 4000)) == 4000
    long = noise(rng, 40000)
    assert np.array_equal(long[:16000], long[16000:32000])
    train, _ = sources(shards, MixingConfig(domains={"speech": DomainMixing(p=1.0, p_noise=1.0, noise_snr_db=(-20.0, -20.0))}))
    batch = next(b for b in map(train.batch, range(9)) if "speech" in b.domains)
    row = batch.features[batch.domains.index("speech")]
    assert 85 <= int(row[:50].mean(dim=0).argmax()) <= 101  # tones of 3.0 and 3.1 kHz drown the voice


def test_valid_source_has_every_cut_once_over_the_ranks(shards: Path) -> None:
    _, valid = sources(shards, MixingConfig())
    ids = [name for rank in range(3) for batch in valid.iterate(rank, 3) for name in batch.ids]
    reader = ShardReader(shards / "voices" / "valid")
    assert sorted(ids) == sorted(reader.id(i) for i in range(len(reader)))
    assert len(valid) == sum(1 for rank in range(3) for _ in valid.iterate(rank, 3))
    assert_equal(next(iter(valid.iterate(0, 1))), next(iter(sources(shards)[1].iterate(0, 1))))  # never mixed


def test_builder_can_keep_the_waveforms() -> None:
    items = [Item("a", "speech", np.ones(800, np.float32), {}), Item("b", "speech", np.ones(1600, np.float32), {})]
    batch = BatchBuilder(SPECS, num_mel_bins=80, keep_audio=True)(items, 0, 0)
    assert batch.features.shape == (2, 10, 80)
    assert batch.audio is not None
    assert batch.audio_lens is not None
    assert batch.audio.sum(dim=1).tolist() == batch.audio_lens.tolist() == [800, 1600]
    assert batch.tokens["speech"].shape == (2, 1, 4)


def test_builder_raises_data_error_when_codebooks_differ_or_nothing_is_given() -> None:
    items = [Item("a", "speech", np.ones(800, np.float32), {"speech": np.zeros((3, 2), np.uint8)})]
    with pytest.raises(DataError, match=r"tokens of speech for cut a: must have 4 codebooks, but have the shape \(3, 2\)"):
        pad_tokens(items, "speech", 4)
    with pytest.raises(DataError, match="at least one cut"):
        BatchBuilder({})([], 0, 0)


def test_make_sources_raises_when_no_corpus_has_a_teacher_or_specs_differ(tmp_path: Path) -> None:
    folder = make_shards(tmp_path, speech=5, sounds=2).data / "shards"
    with pytest.raises(DataError, match="no corpus has tokens of audio"):
        make_sources(folder, {"voices": 1.0}, sampling=SamplingConfig(), mixing=CLEAN, seed=0, teachers=["speech", "audio"])
    about = read_json(folder / "sounds" / "train_index.json")
    about["tokens"]["speech"]["frame_rate_hz"] = 25.0
    write_json(folder / "sounds" / "train_index.json", about)
    with pytest.raises(
        ArtifactError, match=r"tokens of speech must have one `frame_rate_hz` in all shards, but it is 50\.0 in .* and 25\.0 in .*sounds"
    ):
        make_sources(folder, {"voices": 1.0, "sounds": 1.0}, sampling=SamplingConfig(), mixing=CLEAN, seed=0, teachers=["speech"])
