"""The training loop: batches through a module, one update after the other, stoppable and resumable at any of them."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from spear.errors import SpearError, StopRequested
from spear.files import seed_from
from spear.progress import Meter
from spear.training import checkpoint
from spear.training.averaging import RunningAverage
from spear.training.bad_batch import report_bad_batch
from spear.training.checkpoint import TrainingState
from spear.training.config import TrainingConfig
from spear.training.distributed import World, cpu_threads, pick_device
from spear.training.metrics import Metrics, Stopwatch, peak_memory_gib
from spear.training.protocols import BatchSource, TrainBatch, TrainModule, ValidSource
from spear.training.signals import StopSignals
from spear.training.tracking import METRICS, Tracker, last_record

__all__ = ["BatchSource", "TrainBatch", "TrainModule", "Trainer", "TrainingConfig", "TrainingResult", "ValidSource"]
logger = logging.getLogger(__name__)


class TrainingResult(NamedTuple):
    """A finished run. steps: updates; hours: audio seen; checkpoint: the last one; valid: its validation record, empty without."""

    steps: int
    hours: float
    checkpoint: Path
    valid: dict[str, Any]


class Trainer:
    """Trains a module to ``config.max_steps`` updates; a folder with checkpoints of the same run is continued.

    Update s of process r among W with accumulation A uses batches ``g = s W A + a W + r``; masks and dropout of batch g depend
    on (seed, g) only. So a run that is killed and continued makes the same updates as one that is not, and one process with
    accumulation A the same as A processes, up to rounding.

    Args:
        config: how to train. module: an nn.Module that is a `TrainModule`. train, valid: batches; no validation without `valid`.
        folder: of the run; gets checkpoints, metrics and TensorBoard files. seed: of masks and dropout.
        fingerprint: of everything the run depends on; guards its checkpoints.
        world: this process among those of the run. tracker: where records go. description: settings to keep in checkpoints.
        title: of the progress line. milestones: updates whose nearest checkpoints are kept beside the last ones.
    """

    def __init__(
        self,
        config: TrainingConfig,
        module: nn.Module,
        train: BatchSource,
        valid: ValidSource | None,
        folder: Path,
        seed: int,
        fingerprint: str,
        *,
        world: World | None = None,
        tracker: Tracker | None = None,
        description: dict[str, Any] | None = None,
        title: str = "pretrain",
        milestones: Sequence[float] = (),
    ) -> None:
        self.config, self.train, self.valid, self.folder, self.seed, self.title = config, train, valid, folder, seed, title
        self.world = world or World()
        self.device = pick_device(config.device, self.world)
        self.module = module.to(self.device)
        self.hooks = cast(TrainModule, module)
        self.model = self.hooks if self.world.size == 1 else self._distributed()
        self.optimizer = config.optimizer.build(module)
        self.base_lrs = [float(group["lr"]) for group in self.optimizer.param_groups]
        self.schedule = config.schedule.build(config.max_steps)
        self.average = RunningAverage(module, config.average_period) if self.world.is_main else None
        self.tracker = tracker or Tracker(folder)
        self.state = TrainingState(fingerprint=fingerprint, average_period=config.average_period, config=description or {})
        self.window, self.watch = Metrics(), Stopwatch(self.device)
        self.stopping, self.logged_s, self.milestones = False, 0.0, milestones

    def run(self) -> TrainingResult:
        """Train to the end.

        Raises:
            StopRequested: a signal came; everything is saved.
            CheckpointError: the folder's checkpoints are of another run or damaged.
            SpearError: loss or gradient is not finite, or the disk is full.
        """
        with ExitStack() as stack:
            stack.enter_context(cpu_threads(self.config.num_threads))
            stop = stack.enter_context(StopSignals())
            self._resume()
            first = self.state.step
            if first < self.config.max_steps:
                if self.world.is_main:
                    self.tracker.start(first)
                    stack.callback(self.tracker.close)
                meter = stack.enter_context(Meter(self.title, self.config.max_steps - first, unit="updates")) if self.world.is_main else None
                batches = self.train.iterate(first * self.world.size * self.config.accumulation + self.world.rank, self.world.size)
                stack.callback(getattr(batches, "close", lambda: None))
                self._loop(batches, stop, meter)
        self.world.barrier()
        valid = last_record(self.folder / METRICS, "valid")
        return TrainingResult(self.state.step, self.state.seconds / 3600, checkpoint.checkpoint_path(self.folder, self.state.step), valid)

    def _loop(self, batches: Iterator[TrainBatch], stop: StopSignals, meter: Meter | None) -> None:
        self.module.train()
        self.watch.lap()
        while self.state.step < self.config.max_steps:
            seconds_before = self.state.seconds
            self._update(batches, stop)
            if meter is not None:
                meter.advance(audio_s=self.state.seconds - seconds_before)
            if self._due(self.config.log_every):
                self._log()
            if self.valid is not None and self._due(self.config.validate_every):
                with self.watch.phase("validate", host=True):
                    self._validate(self.valid)
            if self._due(self.config.save_every) or self.stopping:
                with self.watch.phase("save", host=True):
                    self._save()
            if self.stopping and self.state.step < self.config.max_steps:
                self.world.barrier()
                raise StopRequested(f"stopped after update {self.state.step} of {self.config.max_steps}; run again to continue")

    def _update(self, batches: Iterator[TrainBatch], stop: StopSignals) -> None:
        """One optimiser update from `accumulation` batches of every process."""
        step, parts = self.state.step, self.config.accumulation
        self.hooks.set_batch_count(self.state.seconds / self.config.reference_s)
        seen: list[TrainBatch] = []
        losses, counts = [], []
        for part in range(parts):
            with self.watch.phase("data", host=True):
                seen.append(next(batches))
            index = (step * parts + part) * self.world.size + self.world.rank
            torch.manual_seed(seed_from(self.seed, "train", index))
            with self._sync(part == parts - 1):
                with self.watch.phase("forward"), self._autocast():
                    output = self.model(seen[-1].to(self.device), self._generator("mask", index))
                with self.watch.phase("backward"):
                    output.loss.backward()  # type: ignore[no-untyped-call]
            losses.append(output.loss.detach().double())
            counts.append(output.count.detach().double())
            self.window.add({**output.metrics, "loss": torch.stack([losses[-1], counts[-1]])})
        with self.watch.phase("optimizer"):
            mine = [sum(batch.seconds for batch in seen), float(stop.received is not None)]
            bad = (~torch.isfinite(torch.stack(losses))).sum()
            total = torch.cat([torch.stack([torch.stack(counts).sum(), bad]), torch.tensor(mine, dtype=torch.float64, device=self.device)])
            norm = self._scale_gradients(self.world.sum_(total)[0])
            # the one place where the host waits for the device
            _, num_bad, seconds, stopping, grad_norm = torch.cat([total, norm.double().reshape(1)]).tolist()
            if num_bad or not math.isfinite(grad_norm):
                report_bad_batch(self.folder, step + 1, seen, [math.isfinite(x) for x in torch.stack(losses).tolist()], self.world)
            self.state.seconds += seconds
            self.state.step += 1
            self._set_lr()
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
        if self.world.is_main:
            self.window.add({"grad_norm": torch.tensor([grad_norm, 1.0], device=self.device)})
        self.hooks.after_step(self.state.step)
        if self.average is not None:
            self.average.update(self.state.step)
        self.stopping = bool(stopping)

    def _scale_gradients(self, count: Tensor) -> Tensor:
        """Turn gradients of the sum of losses, averaged over processes by DDP, into those of the mean over `count` targets; their norm."""
        grads = [p.grad for p in self.module.parameters() if p.grad is not None]
        if not grads:
            return count.new_zeros(())
        torch._foreach_mul_(grads, (self.world.size / count.clamp(min=1.0)).float())
        return nn.utils.get_total_norm(grads)

    def _set_lr(self) -> None:
        factor = self.schedule.lr_factor(self.state.step, self.state.seconds / 3600)
        for group, base in zip(self.optimizer.param_groups, self.base_lrs):
            group["lr"] = base * factor
        self.state.lr = self.base_lrs[0] * factor

    def _log(self) -> None:
        averages = self.window.averages(self.world)
        self.window.reset()
        wall, phases = self.watch.lap()
        if self.world.is_main:
            drawn = self.state.step * self.world.size * self.config.accumulation
            progress = {"epoch": drawn / self.train.batches_per_epoch, "hours": self.state.seconds / 3600, "lr": self.state.lr}
            self.tracker.metrics("train", self.state.step, {**progress, **averages})
            speed = {"audio_s_per_s": (self.state.seconds - self.logged_s) / wall, "wall_s": wall, "peak_memory_gib": peak_memory_gib(self.device)}
            self.tracker.timing(self.state.step, {**speed, **{f"{name}_s": value for name, value in phases.items()}})
        self.logged_s = self.state.seconds

    @torch.no_grad()
    def _validate(self, valid: ValidSource) -> None:
        metrics = Metrics()
        self.module.eval()
        torch.manual_seed(seed_from(self.seed, "valid"))
        for i, batch in enumerate(valid.iterate(self.world.rank, self.world.size)):
            with self._autocast():
                output = self.hooks(batch.to(self.device), self._generator("valid", i))
            metrics.add({**output.metrics, "loss": torch.stack([output.loss.double(), output.count.double()])})
        self.module.train()
        averages = metrics.averages(self.world)
        if not math.isfinite(averages.get("loss", 0.0)):
            raise SpearError(f"the validation loss at update {self.state.step} is {averages['loss']}")
        if self.world.is_main:
            self.tracker.metrics("valid", self.state.step, averages)

    def _save(self) -> None:
        self.state.ranks = self.world.gather({"metrics": self.window.state(), "modules": checkpoint.module_states(self.module)})
        if self.world.is_main:
            path = checkpoint.save_checkpoint(self.folder, self.state, self.module, self.average, self.optimizer)
            self._prune()
            logger.info("saved %s", path)

    def _prune(self) -> None:
        checkpoint.prune_checkpoints(self.folder, self.config.keep_checkpoints, self.config.save_every, self.milestones)

    def _resume(self) -> None:
        found = self.world.gather(checkpoint.find_checkpoints(self.folder) if self.world.is_main else [])[0]
        if not found:
            return
        self.state = checkpoint.load_checkpoint(found[-1][1], self.state.fingerprint, self.module, self.average, self.optimizer)
        ranks, rank = self.state.ranks, self.world.rank
        checkpoint.load_module_states(self.module, ranks[rank % len(ranks)]["modules"])
        # with fewer processes than before, each takes over the sums of several
        for remembered in ranks[rank :: self.world.size]:
            self.window.add_state(remembered["metrics"], self.device)
        self.logged_s = self.state.seconds
        if self.world.is_main:
            self._prune()
        logger.info("continuing from %s", found[-1][1])

    def _due(self, every: int) -> bool:
        return self.state.step % every == 0 or self.state.step == self.config.max_steps

    def _generator(self, *parts: object) -> torch.Generator:
        return torch.Generator().manual_seed(seed_from(self.seed, *parts))

    def _autocast(self) -> AbstractContextManager[Any]:
        return torch.autocast(self.device.type, dtype=torch.bfloat16) if self.config.precision == "bf16" else nullcontext()

    def _distributed(self) -> TrainModule:
        ids = [self.device.index] if self.device.type == "cuda" else None
        unused = self.config.find_unused_parameters
        return cast(TrainModule, DistributedDataParallel(self.module, device_ids=ids, broadcast_buffers=False, find_unused_parameters=unused))

    def _sync(self, last: bool) -> AbstractContextManager[Any]:
        return nullcontext() if last or not isinstance(self.model, DistributedDataParallel) else self.model.no_sync()
