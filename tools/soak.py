"""A long training of a tiny student on real shards: does its memory grow, do file handles stay open, are checkpoints pruned?

    python tools/soak.py --recipe recipes/mini.yaml --corpora egs/mini/conf/corpora.yaml --data egs/mini/data --steps 100000

The student has about 50 000 parameters. Every part of a run works as in a long one: reading, mixing, logging, validation, checkpoints, averaging.
With `--minutes` the run is stopped by a signal, as a cluster would, after that time. Resident memory, what the C library has handed out (a leak
shows there; the rest of a growth is holes between blocks) and open files are noted every 200 updates; a slope is the least-squares line over
the second half of the run, after caches have filled. docs/performance.md says what LD_PRELOAD of another allocator changes.
"""

from __future__ import annotations

import argparse
import ctypes
import logging
import os
import signal
import tempfile
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import numpy as np

from spear.errors import StopRequested
from spear.recipe import load_run
from spear.stages.pretrain import make_trainer
from spear.training import World
from spear.training.checkpoint import find_checkpoints
from spear.training.protocols import BatchSource, TrainBatch

EVERY = 200
OVERRIDES = [
    "student={type: transformer, num_layers: 1, dim: 48, num_heads: 2, feedforward_dim: 96, conv_channels: [4, 4, 8]}",
    "mixing.domains={speech: {p: 0.5}, audio: {p: 0.5, other: soft}}",
    "sampling.max_batch_s=7",
    "training.precision=fp32",
    "training.num_threads=1",
    "training.log_every=50",
    "training.validate_every=20000",
    "training.save_every=1000",
    "training.keep_checkpoints=3",
    "training.schedule={type: constant}",
]


class MallocInfo(ctypes.Structure):
    """What `mallinfo2` of glibc 2.33 and later returns."""

    _fields_ = [
        (name, ctypes.c_size_t) for name in ("arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks", "fordblks", "keep")
    ]


def allocated_mb() -> float:
    """MiB in blocks that the C library has handed out and not got back; nan where it does not tell."""
    try:
        mallinfo = ctypes.CDLL(None).mallinfo2
    except AttributeError:
        return float("nan")
    mallinfo.restype = MallocInfo
    info = mallinfo()
    return float(info.uordblks + info.hblkhd) / 2**20


class Watched:
    """Batches of `source`; notes memory and open files of this process, and sends it SIGTERM after `seconds`."""

    def __init__(self, source: BatchSource, seconds: float) -> None:
        self.source, self.end, self.batches_per_epoch = source, time.monotonic() + seconds, source.batches_per_epoch
        self.steps: list[int] = []
        self.rss_mb: list[float] = []
        self.allocated_mb: list[float] = []
        self.files: list[int] = []

    def iterate(self, start: int, stride: int) -> Iterator[TrainBatch]:
        """See `BatchSource`."""
        for number, batch in enumerate(self.source.iterate(start, stride)):
            if number % EVERY == 0:
                pages = int(Path("/proc/self/statm").read_text().split()[1])
                self.steps.append(number)
                self.rss_mb.append(pages * os.sysconf("SC_PAGE_SIZE") / 2**20)
                self.allocated_mb.append(allocated_mb())
                self.files.append(len(os.listdir("/proc/self/fd")))
            if time.monotonic() > self.end:
                self.end = float("inf")
                os.kill(os.getpid(), signal.SIGTERM)
            yield batch


def main() -> None:
    """Train, watch and say."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("recipe", "corpora", "data"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=100_000)
    parser.add_argument("--minutes", type=float, default=float("inf"))
    parser.add_argument("--set", action="append", default=[], metavar="a.b=c", dest="overrides")
    options = parser.parse_args()
    logging.disable(logging.INFO)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        overrides = [*OVERRIDES, f"training.max_steps={options.steps}", *options.overrides]
        run = load_run(options.recipe, options.corpora, options.data, folder, overrides)
        trainer, train, _ = make_trainer(run, "soak", World())
        watched = Watched(train, 60 * options.minutes)
        trainer.train = watched
        start = time.monotonic()
        with suppress(StopRequested):
            trainer.run()
        took = time.monotonic() - start
        files = watched.files
        kept = [step for step, _ in find_checkpoints(folder)]
        size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) / 2**20
        student = sum(p.numel() for name, p in trainer.module.named_parameters() if name.startswith("student."))
    print(f"student of {student} parameters, {trainer.state.step} updates, {trainer.state.seconds / 3600:.1f} h of audio, {took:.0f} s")
    for what, values in (("resident memory", watched.rss_mb), ("allocated memory", watched.allocated_mb)):
        if not any(values):  # another allocator, of which glibc knows nothing
            continue
        half = len(values) // 2
        slope = 10_000 * float(np.polyfit(watched.steps[half:], values[half:], 1)[0])
        tenths = ", ".join(f"{value:.1f}" for value in values[:: max(1, len(values) // 10)])
        print(f"{what}, every tenth of the run: {tenths} MiB; slope over the second half: {slope:+.3f} MiB per 10 000 updates")
    print(f"open files: {files[0]} at the start, {min(files[1:])} to {max(files[1:])} later")
    print(f"checkpoints at the end: {', '.join(map(str, kept))}; the folder holds {size:.1f} MiB")


if __name__ == "__main__":
    main()
