"""Real shards, a real student: killed at any steps and continued, and one process against two."""

from __future__ import annotations

import json
import os
import random
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.multiprocessing as mp

from spear.data.mixing import DomainMixing, MixingConfig
from spear.data.sampler import SamplingConfig
from spear.data.source import TrainSource, ValidSource, make_sources
from spear.models.masking import MaskConfig
from spear.models.student import Student
from spear.models.zipformer.config import ZipformerConfig
from spear.objectives import PretrainModule
from spear.objectives.balance import RunningConfig
from spear.objectives.masked_prediction import MaskedPredictionConfig
from spear.training import Trainer, World, process_group
from spear.training.tracking import Tracker
from spear.types import Batch
from tests.data.cuts import make_shards
from tests.training.test_distributed import free_port
from tests.training.toy import toy_config

STEPS, KILLS = 24, 10


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_shards(tmp_path_factory.mktemp("corpora"), noise=2).data / "shards"


class Deadly:
    """Training batches that kill this process at the first one of update `die_at`, none if that is negative."""

    def __init__(self, source: TrainSource, die_at: int, world: World, accumulation: int) -> None:
        self.source, self.batches_per_epoch = source, source.batches_per_epoch
        self.die_at, self.per_update = die_at, world.size * accumulation

    def iterate(self, start: int, stride: int) -> Iterator[Batch]:
        for i, batch in enumerate(self.source.iterate(start, stride)):
            if (start + i * stride) // self.per_update == self.die_at:
                os.kill(os.getpid(), signal.SIGKILL)
            yield batch


def sources(shards: Path, workers: int) -> tuple[TrainSource, ValidSource | None]:
    rule = DomainMixing(p=0.8, p_noise=0.4, other="soft")
    mixing = MixingConfig(domains={"speech": rule, "audio": rule}, noise_domains=["noise"])
    sampling = SamplingConfig(max_batch_s=6.0, num_buckets=2, num_workers=workers, prefetch=2)
    weights = {"voices": 1.0, "sounds": 2.0, "hiss": 1.0}
    return make_sources(shards, weights, sampling=sampling, mixing=mixing, seed=5, teachers=["speech", "audio"], only_noise=["hiss"])


def make_trainer(shards: Path, folder: Path, world: World, *, workers: int, die_at: int, **changes: object) -> Trainer:
    torch.manual_seed(3)
    sizes = {"encoder_dim": 32, "encoder_unmasked_dim": 16, "feedforward_dim": 48, "num_heads": 2, "cnn_module_kernel": [7, 5]}
    narrow = {"query_head_dim": 8, "value_head_dim": 6, "downsampling_factor": [1, 2], "num_encoder_layers": 1, "conv_channels": [4, 8, 8]}
    encoder = ZipformerConfig(**sizes, **narrow).build()  # type: ignore[arg-type]
    train, valid = sources(shards, workers)
    weights = {"speech": {"speech": 1.0}, "audio": {"speech": 1.0, "audio": 0.5}}
    objective = MaskedPredictionConfig(weights=weights, balance=RunningConfig()).build(encoder, train.builder.specs)
    config = toy_config(max_steps=STEPS, accumulation=2 // world.size, **changes)
    deadly = Deadly(train, die_at, world, config.accumulation)
    module = PretrainModule(Student(encoder, MaskConfig()), objective)
    return Trainer(config, module, deadly, valid, folder, 7, "run", world=world, tracker=Tracker(folder, ()))


def process(rank: int, size: int, port: int, shards: Path, folder: Path, workers: int, die_at: int) -> None:
    torch.set_num_threads(1)
    if size > 1:
        os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(size), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    with process_group("cpu") as world:
        make_trainer(shards, folder, world, workers=workers, die_at=die_at).run()


def outcome(folder: Path) -> dict[str, bytes]:
    kept = [folder / "metrics.jsonl", *sorted((folder / "checkpoints" / f"step-{STEPS:08d}").iterdir())]
    return {path.name: path.read_bytes() for path in kept}


@pytest.mark.slow
@pytest.mark.parametrize("size", [1, 2])
@pytest.mark.parametrize("workers", [0, 2])
def test_training_killed_at_ten_random_steps_ends_in_the_same_bytes(shards: Path, tmp_path: Path, workers: int, size: int) -> None:
    def start(name: str, die_at: int) -> None:
        arguments = (size, free_port(), shards, tmp_path / name, workers, die_at)
        mp.start_processes(process, args=arguments, nprocs=size, start_method="fork")

    start("whole", -1)
    assert len([line for line in (tmp_path / "whole/metrics.jsonl").read_text().splitlines() if '"train"' in line]) == STEPS // 3
    steps = sorted(random.Random(f"{workers} {size}").sample(range(STEPS), KILLS))
    for step in steps:
        with pytest.raises(mp.ProcessExitedException, match="SIGKILL"):
            start("killed", step)
    start("killed", -1)
    assert outcome(tmp_path / "killed") == outcome(tmp_path / "whole")


def single(shards: Path, folder: Path, **changes: object) -> list[dict[str, float]]:
    make_trainer(shards, folder, World(), workers=0, die_at=-1, log_every=1, validate_every=STEPS, **changes).run()
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def logged(rank: int, port: int, shards: Path, folder: Path) -> None:
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    with process_group("cpu") as world:
        make_trainer(shards, folder, world, workers=0, die_at=-1, log_every=1, validate_every=STEPS).run()


def test_two_processes_with_one_batch_each_have_the_losses_of_one_with_two(shards: Path, tmp_path: Path) -> None:
    mp.start_processes(logged, args=(free_port(), shards, tmp_path / "two"), nprocs=2, start_method="fork")
    ours = [json.loads(line) for line in (tmp_path / "two/metrics.jsonl").read_text().splitlines()][:20]
    theirs = single(shards, tmp_path / "one")[:20]
    assert [record["step"] for record in ours] == list(range(1, 21))
    assert [record["loss"] for record in ours] == pytest.approx([record["loss"] for record in theirs], rel=1e-6)
    assert [record["masked_share"] for record in ours] == [record["masked_share"] for record in theirs]
