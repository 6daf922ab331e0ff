"""A small module and batch sources for the trainer's tests; run as a program it trains in a folder until it is killed."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from spear.errors import StopRequested
from spear.files import seed_from
from spear.training import Trainer, TrainingConfig, World
from spear.training.optim.eden import EdenConfig
from spear.training.optim.scaled_adam import ScaledAdamConfig
from spear.training.tracking import Tracker
from spear.types import Batch, StepOutput

WIDTH, CLASSES = 6, 4


class Habit(nn.Module):
    """Training state that is no tensor: a share that moves with every training step, by a random amount."""

    def __init__(self) -> None:
        super().__init__()
        self.share = 0.5

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.share = 0.9 * self.share + 0.1 * torch.rand(()).item()
            return x * (1 + 0.1 * self.share)
        return x

    def training_state(self) -> float:
        return self.share

    def load_training_state(self, value: float) -> None:
        self.share = value


class ToyModule(nn.Module):
    """Classifies masked frames; cuts of odd batches go to one head, those of even batches to the other, and the total is a sum."""

    def __init__(self, *, habit: bool = True) -> None:
        super().__init__()
        self.body = nn.Linear(WIDTH, 8)
        self.norm = nn.LayerNorm(8)
        self.habit = Habit() if habit else nn.Identity()
        self.dropout = nn.Dropout(0.2)
        self.heads = nn.ModuleDict({"odd": nn.Linear(8, CLASSES), "even": nn.Linear(8, CLASSES)})
        self.gain = nn.Parameter(torch.tensor(1.0))
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))
        self.counts: list[float] = []
        self.discarded = 0

    def forward(self, batch: Batch, generator: torch.Generator | None) -> StepOutput:
        x = batch.features
        if self.training:
            keep = torch.rand(x.shape[:2], generator=generator) > 0.3
            x = x * keep.to(x).unsqueeze(-1)
        x = self.dropout(self.habit(self.norm(self.body(x)))) * self.gain
        logits = self.heads[batch.domains[0]](x).float()
        targets = batch.tokens["toy"][..., 0]
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum", ignore_index=-100)
        count = (targets != -100).sum()
        return StepOutput(loss, count, {f"loss/{batch.domains[0]}": torch.stack([loss.detach(), count])})

    def set_batch_count(self, count: float) -> None:
        self.counts.append(count)

    def after_step(self, step: int) -> None:
        self.steps.fill_(step)

    def discard_step(self) -> None:
        self.discarded += 1


def make_batch(g: int) -> Batch:
    """Batch g: two or three items of some frames, of its own random numbers."""
    generator = torch.Generator().manual_seed(seed_from("toy", g))
    num, frames = 2 + g % 2, 5 + g % 3
    features = torch.randn(num, frames, WIDTH, generator=generator)
    tokens = (features[..., :CLASSES].argmax(-1, keepdim=True)).long()
    tokens[-1, -1] = -100
    return Batch(
        ids=[f"cut-{g}-{i}" for i in range(num)],
        domains=["odd" if g % 2 else "even"] * num,
        features=features,
        feature_lens=torch.full((num,), frames),
        seconds=num * frames / 10,
        tokens={"toy": tokens},
        token_lens={"toy": torch.full((num,), frames)},
    )


class ToySource:
    """Training batches; `on_batch` is called with g before each."""

    batches_per_epoch = 7

    def __init__(self, on_batch: Callable[[int], object] = lambda g: None, make: Callable[[int], Batch] = make_batch) -> None:
        self.on_batch, self.make = on_batch, make

    def iterate(self, start: int, stride: int) -> Iterator[Batch]:
        g = start
        while True:
            self.on_batch(g)
            yield self.make(g)
            g += stride


class ToyValid:
    """Four validation batches."""

    def __len__(self) -> int:
        return 4

    def iterate(self, rank: int, world: int) -> Iterator[Batch]:
        for g in range(rank, len(self), world):
            yield make_batch(10_000 + g)


def toy_config(**changes: Any) -> TrainingConfig:
    """Twenty updates; nothing falls on the same updates as anything else."""
    values: dict[str, Any] = {
        "max_steps": 20,
        "precision": "fp32",
        "device": "cpu",
        "accumulation": 2,
        "log_every": 3,
        "validate_every": 5,
        "save_every": 4,
        "keep_checkpoints": 2,
        "average_period": 2,
        "reference_s": 2.0,
        "optimizer": ScaledAdamConfig(clipping_update_period=4),
        "schedule": EdenConfig(lr_steps=10, lr_hours=0.01, warmup_steps=5),
    }
    return TrainingConfig(**{**values, **changes})


def toy_trainer(folder: Path, source: ToySource | None = None, *, world: World | None = None, habit: bool = True, **changes: Any) -> Trainer:
    """A trainer of a fresh toy module."""
    torch.manual_seed(0)
    module = ToyModule(habit=habit)
    tracker = Tracker(folder, sinks=())
    return Trainer(toy_config(**changes), module, source or ToySource(), ToyValid(), folder, 7, "toy-run", world=world, tracker=tracker)


def signal_at(batch: int, number: int) -> ToySource:
    """A source that sends this process a signal when it is asked for a batch."""
    return ToySource(lambda g: os.kill(os.getpid(), number) if g == batch else None)


def read_outcome(folder: Path) -> dict[str, bytes]:
    """Bytes of what must not depend on interruptions."""
    last = folder / "checkpoints" / "step-00000020"
    names = ("model.safetensors", "average.safetensors", "optimizer.safetensors", "state.json")
    return {"metrics": (folder / "metrics.jsonl").read_bytes(), **{name: (last / name).read_bytes() for name in names}}


def main() -> int:
    """Train slowly in the folder of the first argument; 3 after a signal."""
    torch.set_num_threads(1)
    try:
        toy_trainer(Path(sys.argv[1]), ToySource(lambda g: time.sleep(0.03))).run()
    except StopRequested:
        return 3
    return 0


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    sys.exit(main())
