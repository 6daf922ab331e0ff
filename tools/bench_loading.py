"""How fast shards with tokens are read, and how long a training waits for its batches.

    python tools/bench_loading.py --recipe recipes/mini.yaml --corpora egs/mini/conf/corpora.yaml --data egs/mini/data
    python tools/bench_loading.py ... --student recipes/spear_tiny.yaml --workers 1 --steps 40

The first form reads every cut of all shards, audio and tokens, in a random order on one core, and then makes batches of them (mixing, filter banks,
padding). With `--student` the student of another recipe is trained on the same shards, and the share of its time without a batch is told from the
run's own records, the first ones left out.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import tempfile
import time
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from statistics import median

import numpy as np
import torch

from spear.data.fbank import SAMPLE_RATE
from spear.data.shards import ShardReader
from spear.data.source import TrainSource
from spear.recipe import Run, load_recipe, load_run
from spear.stages.pretrain import make_trainer
from spear.training import World

LOG_EVERY = 5


def timed(work: Callable[[int], float], repeats: int) -> float:
    """Median over repeats of seconds of audio per second of `work`."""
    speeds = []
    for number in range(repeats):
        start = time.perf_counter()
        audio_s = work(number)
        speeds.append(audio_s / (time.perf_counter() - start))
    return median(speeds)


def read(readers: Iterable[ShardReader], seed: int) -> float:
    """Read every cut of `readers` in a random order; seconds of audio."""
    places = [(reader, number) for reader in readers for number in range(len(reader))]
    samples = 0
    for i in np.random.default_rng(seed).permutation(len(places)):
        reader, number = places[i]
        samples += len(reader[number].audio)
    return samples / SAMPLE_RATE


def make(train: TrainSource, count: int, repeat: int) -> float:
    """Make `count` batches; seconds of audio."""
    return sum(train.batch(repeat * count + g).seconds for g in range(count))


def waiting(run: Run) -> str:
    """Train, and tell the share of the time that no batch was there."""
    trainer, _, _ = make_trainer(run, "bench", World())
    trainer.run()
    records = [json.loads(line) for line in (run.exp / "timing.jsonl").read_text().splitlines()]
    records = records[2:]  # workers start, code is compiled
    wall = sum(record["wall_s"] - record.get("save_s", 0.0) - record.get("validate_s", 0.0) for record in records)
    shares = {name: 100 * sum(record.get(f"{name}_s", 0.0) for record in records) / wall for name in ("data", "forward", "backward", "optimizer")}
    size = sum(p.numel() for p in trainer.module.parameters())
    told = ", ".join(f"{name} {share:.2f} %" for name, share in shares.items())
    return f"{size / 1e6:.2f}M parameters with heads, {len(records) * LOG_EVERY} updates in {wall:.1f} s: {told} of the time"


def main() -> None:
    """Measure and say."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("recipe", "corpora", "data"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    parser.add_argument("--student", type=Path, help="recipe whose student is trained")
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--batches", type=int, default=10)
    parser.add_argument("--set", action="append", default=[], metavar="a.b=c", dest="overrides")
    options = parser.parse_args()
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        training = [f"training.{key}={options.steps}" for key in ("max_steps", "validate_every", "save_every")]
        settings = [*training, f"training.log_every={LOG_EVERY}", "training.num_threads=1", f"sampling.num_workers={options.workers}"]
        run = load_run(options.recipe, options.corpora, options.data, Path(name), [*settings, *options.overrides])
        if options.student is not None:
            print(waiting(replace(run, recipe=replace(run.recipe, student=load_recipe(options.student).student))))
            return
        readers = [ShardReader(options.data / "shards" / corpus.name / "train") for corpus in run.corpora]
        _, train, _ = make_trainer(run, "bench", World())
        hours, codes = sum(reader.hours for reader in readers), sum(len(reader.specs) for reader in readers)
        speed = timed(lambda repeat: read(readers, repeat), options.repeats)
        print(f"reading {hours:.2f} h in {len(readers)} corpora with {codes} sets of tokens: {speed:.0f} x real time per core")
        speed = timed(lambda repeat: make(train, options.batches, repeat), options.repeats)
        print(f"making batches of them: {speed:.0f} x real time per core ({os.cpu_count()} cores in the machine, one used)")


if __name__ == "__main__":
    main()
