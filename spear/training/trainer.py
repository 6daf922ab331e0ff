"""The training loop: batches through a module, one update after the other, stoppable and resumable at any of them."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from spear.errors import CheckpointError, SpearError, StopRequested
from spear.files import seed_from
from spear.progress import Meter
from spear.training import checkpoint
from spear.training.averaging import RunningAverage
from spear.training.bad_batch import failed_update, report_bad_batch
from spear.training.checkpoint import TrainingState
from spear.training.config import TrainingConfig
from spear.training.distributed import World, cpu_threads, pick_device
from spear.training.metrics import Metrics, Stopwatch, peak_memory_gib
from spear.training.parallel import recompute, spread
from spear.training.precision import LossScale, autocast
from spear.training.protocols import BatchSource, TrainBatch, TrainModule, ValidSource
from spear.training.rehearsal import rehearse
from spear.training.reports import Reports
from spear.training.sharding import local, total_norm
from spear.training.signals import StopSignals
from spear.training.tracking import METRICS, Tracker, last_record
from spear.training.watch import Change, count_flops, speeds
from spear.transfer import send

__all__ = ["BatchSource", "TrainBatch", "TrainModule", "Trainer", "TrainingConfig", "TrainingResult", "ValidSource"]
logger = logging.getLogger(__name__)


class TrainingResult(NamedTuple):
    """A finished run. steps: updates; hours: audio seen; checkpoint: the last one; valid: its validation record, empty without; flops: an
    estimate of the operations it took.
    """

    steps: int
    hours: float
    checkpoint: Path
    valid: dict[str, Any]
    flops: float = 0.0


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
        if config.recompute:
            recompute(module)
        self.parallel = spread(config.parallel, self.module, self.world, self.device, find_unused=config.find_unused_parameters)
        self.scale, self.reports = LossScale(config.precision), Reports(module)
        self.optimizer = config.optimizer.build(module)
        self.base_lrs = [float(group["lr"]) for group in self.optimizer.param_groups]
        self.schedule = config.schedule.build(config.max_steps)
        self.average = RunningAverage(module, config.average_period) if self.world.is_main or self.parallel.sharded else None
        self.tracker = tracker or Tracker(folder, config.trackers)
        self.state = TrainingState(fingerprint=fingerprint, average_period=config.average_period, config=description or {})
        self.window, self.watch = Metrics(), Stopwatch(self.device)
        self.stopping, self.logged_s, self.logged_step, self.milestones = False, 0.0, 0, milestones

    def run(self) -> TrainingResult:
        """Train to the end.

        Raises:
            StopRequested: a signal came; everything is saved.
            CheckpointError: the folder's checkpoints are of another run or damaged.
            SpearError: loss or gradient was not finite too often, an update failed, or the disk is full.
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
                if self.device.type == "cuda":
                    self.rehearse()
                batches = self.train.iterate(first * self.world.size * self.config.accumulation + self.world.rank, self.world.size)
                stack.callback(getattr(batches, "close", lambda: None))
                self._loop(batches, stop, meter)
        self.world.barrier()
        valid = last_record(self.folder / METRICS, "valid")
        last = checkpoint.checkpoint_path(self.folder, self.state.step)
        return TrainingResult(self.state.step, self.state.seconds / 3600, last, valid, self.state.flops_per_s * self.state.seconds)

    def rehearse(self) -> None:
        """Forward and backward with the largest batch, where the source names one; every process must call it.

        Raises:
            SpearError: it does not fit into the memory.
        """
        if not hasattr(self.train, "largest"):
            return
        batch = self.train.largest()
        self.module.train()
        self.hooks.set_batch_count(self.state.seconds / self.config.reference_s)

        def update() -> None:
            with self.parallel.sync(True):
                with autocast(self.config.precision, self.device):
                    loss = self.parallel.model(batch.to(self.device), self._generator("rehearsal")).loss
                loss.backward()

        rehearse(self.module, self.optimizer, batch, update)
        self.reports.take(self.device)
        self.hooks.discard_step()

    def _loop(self, batches: Iterator[TrainBatch], stop: StopSignals, meter: Meter | None) -> None:
        self.module.train()
        self.watch.lap()
        while self.state.step < self.config.max_steps:
            seconds_before = self.state.seconds
            seen: list[TrainBatch] = []
            try:
                self._update(batches, seen, stop)
            except SpearError:
                raise
            except Exception as error:
                raise failed_update(self.folder, self.state.step + 1, seen, error, self.world) from error
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

    def _update(self, batches: Iterator[TrainBatch], seen: list[TrainBatch], stop: StopSignals) -> None:
        """One optimiser update from `accumulation` batches of every process, which are put into `seen`."""
        step, parts = self.state.step, self.config.accumulation
        self.hooks.set_batch_count(self.state.seconds / self.config.reference_s)
        losses, counts, metrics = [], [], []
        for part in range(parts):
            with self.watch.phase("data", host=True):
                seen.append(next(batches))
            batch = seen[-1].to(self.device)
            if step == part == 0:
                self.state.flops_per_s = self._flops(batch, seen[-1].seconds)
            index = (step * parts + part) * self.world.size + self.world.rank
            torch.manual_seed(seed_from(self.seed, "train", index))
            with self.parallel.sync(part == parts - 1):
                with self.watch.phase("forward"), autocast(self.config.precision, self.device):
                    output = self.parallel.model(batch, self._generator("mask", index))
                with self.watch.phase("backward"):
                    (output.loss * self.scale.value).backward()
            losses.append(output.loss.detach().double())
            counts.append(output.count.detach().double())
            metrics.append({**output.metrics, "loss": torch.stack([losses[-1], counts[-1]])})
        with self.watch.phase("optimizer"):
            mine = [sum(batch.seconds for batch in seen), float(stop.received is not None)]
            bad = (~torch.isfinite(torch.stack(losses))).sum()
            told = [send(torch.tensor(mine, dtype=torch.float64), self.device), self.reports.take(self.device)]
            total = torch.cat([torch.stack([torch.stack(counts).sum(), bad]), *told])
            norm = self._scale_gradients(self.world.sum_(total)[0])
            # the one place where the host waits for the device
            grad_norm, _, num_bad, seconds, stopping, *reports = torch.cat([norm.double().reshape(1), total]).tolist()
            self.state.seconds += seconds
            self.state.step += 1
            self.stopping = bool(stopping)
            if num_bad or not math.isfinite(grad_norm):
                self._leave_out(seen, losses, overflow=not num_bad and self.scale.moves)
            else:
                self._step(metrics, grad_norm)
                self.reports.settle(reports)
        if self.average is not None:
            self.average.update(self.state.step)

    def _step(self, metrics: list[dict[str, Tensor]], grad_norm: float) -> None:
        """Move the weights by the gradients that are there, and take note of the batches' metrics."""
        for found in metrics:
            self.window.add(found)
        self._set_lr()
        change = Change(self.module) if self._due(self.config.log_every) else None
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.scale.update(self.state.step, overflow=False)
        norms = {"grad_norm": send(torch.tensor([grad_norm, 1.0]), self.device), **(change.norms() if change is not None else {})}
        if self.world.is_main:
            self.window.add(norms)
        self.hooks.after_step(self.state.step)

    def _leave_out(self, seen: list[TrainBatch], losses: list[Tensor], *, overflow: bool) -> None:
        """Go on without the update whose loss or gradient is not finite; `overflow`: because of the loss scale, which is no fault of the batch.

        Raises:
            SpearError: it is one too many.
        """
        self.optimizer.zero_grad(set_to_none=True)
        self.hooks.discard_step()
        if overflow:
            self.scale.update(self.state.step, overflow=True)
            return
        self.state.skipped += 1
        text = report_bad_batch(self.folder, self.state.step, seen, [math.isfinite(x) for x in torch.stack(losses).tolist()], self.world)
        if self.state.skipped > self.config.max_skipped:
            raise SpearError(f"{text}; more than `training.max_skipped` {self.config.max_skipped} updates were left out")
        if self.world.is_main:
            logger.warning("%s; the update is left out, %d of at most %d", text, self.state.skipped, self.config.max_skipped)

    def _flops(self, batch: Any, seconds: float) -> float:
        def run() -> None:
            with autocast(self.config.precision, self.device):
                self.parallel.module(batch, None)

        return count_flops(self.module, run, seconds)

    def _scale_gradients(self, count: Tensor) -> Tensor:
        """Turn gradients of the scaled sum of losses, averaged over processes, into those of the mean over `count` targets; their norm."""
        self.parallel.finish()
        grads = [p.grad for p in self.module.parameters() if p.grad is not None]
        if not grads:
            return count.new_zeros(())
        torch._foreach_mul_([local(grad) for grad in grads], (self.world.size / count.clamp(min=1.0) / self.scale.value).float())
        return total_norm(grads)

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
            if self.state.skipped:
                progress["skipped"] = self.state.skipped
            if self.scale.moves:
                progress["loss_scale"] = self.scale.value
            self.tracker.metrics("train", self.state.step, {**progress, **averages})
            done, left = self.state.step - self.logged_step, self.config.max_steps - self.state.step
            figures = speeds(wall, phases, self.state.seconds - self.logged_s, done, left, self.state.flops_per_s)
            figures["peak_memory_gib"] = peak_memory_gib(self.device)
            self.tracker.timing(self.state.step, {**figures, **{f"{name}_s": value for name, value in phases.items()}})
        self.logged_step = self.state.step
        self.logged_s = self.state.seconds

    @torch.no_grad()
    def _validate(self, valid: ValidSource) -> None:
        metrics = Metrics()
        self.module.eval()
        torch.manual_seed(seed_from(self.seed, "valid"))
        for i, (batch, counts) in enumerate(self._valid_batches(valid)):
            with autocast(self.config.precision, self.device):
                output = self.hooks(batch.to(self.device), self._generator("valid", i))
            if counts:
                metrics.add({**output.metrics, "loss": torch.stack([output.loss.double(), output.count.double()])})
        self.module.train()
        averages = metrics.averages(self.world)
        if not math.isfinite(averages.get("loss", 0.0)):
            raise SpearError(f"the validation loss at update {self.state.step} is {averages['loss']}")
        if self.world.is_main:
            self.tracker.metrics("valid", self.state.step, averages)

    def _valid_batches(self, valid: ValidSource) -> Iterator[tuple[TrainBatch, bool]]:
        """This process's batches, and whether they count: spread weights need all processes, so that one without a last batch runs any batch."""
        for batch in valid.iterate(self.world.rank, self.world.size):
            yield batch, True
        if self.parallel.sharded and self.world.rank >= len(valid) % self.world.size > 0:
            yield next(iter(valid.iterate(0, 1))), False

    def _save(self) -> None:
        self.state.ranks = self.world.gather({"metrics": self.window.state(), "modules": checkpoint.module_states(self.module)})
        self.state.loss_scale = self.scale.state() if self.scale.moves else []
        self.state.due = self.state.step % self.config.save_every == 0
        if self.world.is_main or self.parallel.sharded:
            path = checkpoint.save_checkpoint(self.folder, self.state, self.module, self.average, self.optimizer, writes=self.world.is_main)
        if self.world.is_main:
            self._prune()
            logger.info("saved %s", path)

    def _prune(self) -> None:
        checkpoint.prune_checkpoints(self.folder, self.config.keep_checkpoints, self.milestones)

    def _resume(self) -> None:
        found = self.world.gather(checkpoint.find_checkpoints(self.folder) if self.world.is_main else [])[0]
        if not found:
            return
        self.state = checkpoint.load_checkpoint(found[-1][1], self.state.fingerprint, self.module, self.average, self.optimizer)
        if self.state.step > self.config.max_steps:
            raise CheckpointError(f"{found[-1][1]} is beyond `training.max_steps` {self.config.max_steps}: take more, or train in another folder")
        self.scale.load(self.state.loss_scale)
        ranks, rank = self.state.ranks, self.world.rank
        checkpoint.load_module_states(self.module, ranks[rank % len(ranks)]["modules"])
        # with fewer processes than before, each takes over the sums of several
        for remembered in ranks[rank :: self.world.size]:
            self.window.add_state(remembered["metrics"], self.device)
        self.logged_s, self.logged_step = self.state.seconds, self.state.step
        if self.world.is_main:
            self._prune()
        logger.info("continuing from %s", found[-1][1])

    def _due(self, every: int) -> bool:
        return self.state.step % every == 0 or self.state.step == self.config.max_steps

    def _generator(self, *parts: object) -> torch.Generator:
        return torch.Generator().manual_seed(seed_from(self.seed, *parts))
