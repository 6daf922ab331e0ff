"""The training loop: exact resumption, accumulation, failures, records."""

from __future__ import annotations

import json
import math
import os
import random
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from torch import nn

import spear.training.checkpoint as checkpoint_module
from spear.errors import CheckpointError, ConfigError, SpearError, StopRequested
from spear.files import read_tensors
from spear.training import Trainer, TrainingConfig
from spear.training.checkpoint import find_checkpoints
from spear.training.optim.adamw import AdamWConfig
from spear.training.optim.warmup import ConstantConfig
from spear.types import Batch
from tests.conftest import ROOT
from tests.training.toy import ToyModule, ToySource, ToyValid, make_batch, read_outcome, signal_at, toy_config, toy_trainer


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    folder = tmp_path_factory.mktemp("whole")
    assert toy_trainer(folder).run().steps == 20
    return read_outcome(folder)


def records(folder: Path, split: str) -> list[dict[str, float]]:
    return [record for line in (folder / "metrics.jsonl").read_text().splitlines() if (record := json.loads(line))["split"] == split]


def spawn(folder: Path) -> subprocess.Popen[bytes]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen([sys.executable, "-m", "tests.training.toy", str(folder)], env=environment, cwd=ROOT, stderr=subprocess.DEVNULL)


def wait_for_checkpoint(folder: Path, process: subprocess.Popen[bytes], step: int) -> None:
    deadline = time.monotonic() + 60
    while not any(found >= step for found, _ in find_checkpoints(folder)):
        assert process.poll() is None, "the training process ended early"
        assert time.monotonic() < deadline
        time.sleep(0.005)


def test_trainer_ends_in_the_same_bytes_after_sigkill(tmp_path: Path, uninterrupted: dict[str, bytes]) -> None:
    process = spawn(tmp_path)
    wait_for_checkpoint(tmp_path, process, 4)
    time.sleep(random.Random(time.time_ns()).uniform(0, 0.5))
    process.kill()
    assert process.wait() == -signal.SIGKILL
    toy_trainer(tmp_path).run()
    assert read_outcome(tmp_path) == uninterrupted


def test_trainer_saves_and_exits_on_sigterm_from_outside(tmp_path: Path, uninterrupted: dict[str, bytes]) -> None:
    process = spawn(tmp_path)
    wait_for_checkpoint(tmp_path, process, 4)
    process.terminate()
    assert process.wait(timeout=60) == 3
    assert 4 <= find_checkpoints(tmp_path)[-1][0] < 20
    toy_trainer(tmp_path).run()
    assert read_outcome(tmp_path) == uninterrupted


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=["sigterm", "sigint"])
@pytest.mark.parametrize("stops", [(1,), (9, 10), (13, 27, 35)], ids=str)
def test_trainer_ends_in_the_same_bytes_after_signals(
    tmp_path: Path, uninterrupted: dict[str, bytes], stops: tuple[int, ...], number: signal.Signals
) -> None:
    before = signal.getsignal(number)
    for batch in stops:
        with pytest.raises(StopRequested, match=f"stopped after update {batch // 2 + 1} of 20"):
            toy_trainer(tmp_path, signal_at(batch, number)).run()
        assert signal.getsignal(number) is before
        assert find_checkpoints(tmp_path)[-1][0] == batch // 2 + 1
    toy_trainer(tmp_path).run()
    assert read_outcome(tmp_path) == uninterrupted


def test_trainer_ends_in_the_same_bytes_after_a_crash_while_saving(
    tmp_path: Path, uninterrupted: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    real = checkpoint_module.write_json

    def fail(path: Path, value: dict[str, object]) -> None:
        if value["step"] == 12:
            raise KeyError("power cut")
        real(path, value)

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint_module, "write_json", fail)
        with pytest.raises(KeyError, match="power cut"):
            toy_trainer(tmp_path).run()
    assert [step for step, _ in find_checkpoints(tmp_path)] == [4, 8]
    assert max(record["step"] for record in records(tmp_path, "train")) == 12
    toy_trainer(tmp_path).run()
    assert read_outcome(tmp_path) == uninterrupted
    assert [path.name for path in sorted((tmp_path / "checkpoints").iterdir())] == ["step-00000016", "step-00000020"]


def test_trainer_starts_afresh_where_no_checkpoint_was_written(tmp_path: Path, uninterrupted: dict[str, bytes]) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 3, "split": "train", "loss": 9}\n{"step": 6, "sp')
    toy_trainer(tmp_path).run()
    assert read_outcome(tmp_path) == uninterrupted


def test_trainer_resumes_adamw_exactly(tmp_path: Path) -> None:
    changes = {"optimizer": AdamWConfig(lr=0.01), "schedule": ConstantConfig(warmup_steps=3)}
    toy_trainer(tmp_path / "a", **changes).run()
    with pytest.raises(StopRequested):
        toy_trainer(tmp_path / "b", signal_at(21, signal.SIGTERM), **changes).run()
    toy_trainer(tmp_path / "b", **changes).run()
    assert read_outcome(tmp_path / "a") == read_outcome(tmp_path / "b")


def test_trainer_does_nothing_more_when_finished(tmp_path: Path, uninterrupted: dict[str, bytes]) -> None:
    first = toy_trainer(tmp_path).run()

    def refuse(g: int) -> None:
        raise AssertionError("no batch is needed")

    second = toy_trainer(tmp_path, ToySource(refuse)).run()
    assert second == first
    assert second.valid["step"] == 20
    assert read_outcome(tmp_path) == uninterrupted


def test_trainer_lengthens_a_run_to_the_same_weights(tmp_path: Path, uninterrupted: dict[str, bytes]) -> None:
    toy_trainer(tmp_path, max_steps=11).run()
    assert toy_trainer(tmp_path, max_steps=20).run().steps == 20
    found = read_outcome(tmp_path)
    for name in ("model.safetensors", "average.safetensors", "optimizer.safetensors"):
        assert found[name] == uninterrupted[name], name
    with pytest.raises(CheckpointError, match="step-00000020 is beyond `training.max_steps` 12"):
        toy_trainer(tmp_path, max_steps=12).run()


def test_trainer_may_record_and_save_at_other_times_when_continued(tmp_path: Path, uninterrupted: dict[str, bytes]) -> None:
    with pytest.raises(StopRequested):
        toy_trainer(tmp_path, signal_at(13, signal.SIGTERM), log_every=1, save_every=3, validate_every=2).run()
    toy_trainer(tmp_path, log_every=7, keep_checkpoints=5).run()
    assert read_outcome(tmp_path)["model.safetensors"] == uninterrupted["model.safetensors"]


def test_trainer_raises_checkpoint_error_when_the_fingerprint_differs(tmp_path: Path) -> None:
    toy_trainer(tmp_path).run()
    other = Trainer(toy_config(), ToyModule(), ToySource(), None, tmp_path, 7, "another-run")
    with pytest.raises(CheckpointError, match="toy-run, but this run is another-run"):
        other.run()


def test_trainer_lowers_the_loss_and_records_it(tmp_path: Path) -> None:
    changes = {"optimizer": AdamWConfig(lr=0.05), "schedule": ConstantConfig()}
    result = toy_trainer(tmp_path, max_steps=60, log_every=20, validate_every=20, **changes).run()
    train, valid = records(tmp_path, "train"), records(tmp_path, "valid")
    assert [record["step"] for record in train] == [20, 40, 60] == [record["step"] for record in valid]
    assert valid[-1]["loss"] < 0.7 * valid[0]["loss"]
    assert result.valid == valid[-1]
    batches = [make_batch(g) for g in range(120)]
    assert train[-1]["hours"] == pytest.approx(sum(batch.seconds for batch in batches) / 3600)
    assert train[-1]["epoch"] == pytest.approx(120 / 7)
    assert set(train[-1]) == {"step", "split", "epoch", "hours", "lr", "loss", "loss/odd", "loss/even", "grad_norm", "param_norm", "update_norm"}
    timing = [json.loads(line) for line in (tmp_path / "timing.jsonl").read_text().splitlines()]
    assert {"audio_s_per_s", "wall_s", "data_s", "forward_s", "backward_s", "optimizer_s", "peak_memory_gib"} <= set(timing[0])
    assert all(0 < record["utilisation"] <= 1 for record in timing)
    assert [record["eta_s"] > 0 for record in timing] == [True, True, False]
    # three passes of body (6 x 8) and head (8 x 4), two operations each, over all frames of batch 0
    frames = make_batch(0).features.shape[0] * make_batch(0).features.shape[1]
    flops = 3 * 2 * frames * (6 * 8 + 8 * 4) / make_batch(0).seconds
    assert timing[0]["tflops"] == pytest.approx(flops * timing[0]["audio_s_per_s"] / 1e12, rel=1e-4)


def test_trainer_loss_is_weighted_by_targets(tmp_path: Path) -> None:
    trainer = toy_trainer(tmp_path, max_steps=1, accumulation=3, habit=False)
    trainer.module.dropout.p = 0.0
    outputs = []
    for g in range(3):
        generator = trainer._generator("mask", g)
        outputs.append(trainer.module(make_batch(g), generator))
    trainer.run()
    expected = sum(o.loss.item() for o in outputs) / sum(o.count.item() for o in outputs)
    assert records(tmp_path, "train")[0]["loss"] == pytest.approx(expected, rel=1e-6)


def test_trainer_gradient_is_that_of_the_mean_loss(tmp_path: Path) -> None:
    """With AdamW's first moment as witness: after one update it is (1 - beta1) times the gradient."""
    trainer = toy_trainer(tmp_path, max_steps=1, accumulation=2, habit=False, optimizer=AdamWConfig(clip_norm=None))
    reference = ToyModule(habit=False)
    reference.load_state_dict(trainer.module.state_dict())
    reference.dropout.p = trainer.module.dropout.p = 0.0
    outputs = [reference(make_batch(g), trainer._generator("mask", g)) for g in range(2)]
    (sum(o.loss for o in outputs) / sum(o.count for o in outputs)).backward()
    trainer.run()
    moments = read_tensors(tmp_path / "checkpoints/step-00000001/optimizer.safetensors")
    for name, parameter in reference.named_parameters():
        torch.testing.assert_close(moments[f"{name}/exp_avg"] / 0.1, parameter.grad, atol=1e-6, rtol=1e-5)


def test_trainer_tells_the_module_its_progress(tmp_path: Path) -> None:
    trainer = toy_trainer(tmp_path)
    trainer.run()
    seconds = [make_batch(2 * s).seconds + make_batch(2 * s + 1).seconds for s in range(20)]
    expected = [sum(seconds[:s]) / 2.0 for s in range(20)]  # reference_s = 2
    assert trainer.module.counts == pytest.approx(expected)
    assert int(trainer.module.steps) == 20


def test_trainer_sets_the_learning_rate_from_updates_and_hours_seen(tmp_path: Path) -> None:
    toy_trainer(tmp_path).run()
    config = toy_config()
    for record in records(tmp_path, "train"):
        expected = 0.045 * config.schedule.lr_factor(int(record["step"]), record["hours"])
        assert record["lr"] == pytest.approx(expected, rel=1e-12)


def test_trainer_keeps_the_running_average_of_the_weights(tmp_path: Path) -> None:
    trainer = toy_trainer(tmp_path, average_period=5)
    snapshots = []
    step = trainer.hooks.after_step

    def remember(number: int) -> None:
        step(number)
        if number % 5 == 0:
            snapshots.append(trainer.module.body.weight.detach().double().clone())

    trainer.module.after_step = remember
    trainer.run()
    average = read_tensors(tmp_path / "checkpoints/step-00000020/average.safetensors")["body.weight"]
    assert average.dtype == torch.float64
    torch.testing.assert_close(average, torch.stack(snapshots).mean(0), atol=1e-12, rtol=0)


def test_trainer_keeps_the_checkpoints_of_its_milestones_through_a_stop(tmp_path: Path) -> None:
    for stop in (0, 9, 13, 17):  # batches; two make an update
        folder = tmp_path / str(stop)
        trainer = toy_trainer(folder, signal_at(stop, signal.SIGTERM) if stop else None, keep_checkpoints=1)
        trainer.milestones = [6.1]
        if stop:
            with pytest.raises(StopRequested):
                trainer.run()
            trainer = toy_trainer(folder, keep_checkpoints=1)
            trainer.milestones = [6.1]
        trainer.run()
        assert [step for step, _ in find_checkpoints(folder)] == [8, 20]


@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_trainer_raises_spear_error_when_something_is_not_finite(tmp_path: Path, where: str) -> None:
    def make(g: int) -> Batch:
        batch = make_batch(g)
        if g == 11:
            batch.features[0, 0] = math.nan
        return batch

    trainer = toy_trainer(tmp_path, ToySource(make=make), max_skipped=0)
    if where == "gradient":
        trainer.train = ToySource()
        trainer.module.body.weight.register_hook(lambda grad: grad * math.inf if trainer.state.step == 5 else grad)
    with pytest.raises(
        SpearError,
        match=f"the {where} of update 6 is not finite; cuts .*cut-11-0.*bad_batch; more than `training.max_skipped` 0 updates were left out",
    ) as caught:
        trainer.run()
    assert "\n" not in str(caught.value)
    assert ("cut-10-0" in str(caught.value)) == (where == "gradient")
    saved = sorted((tmp_path / "bad_batch").iterdir())
    assert [path.name for path in saved] == [f"step-00000006-rank-0-part-{part}.safetensors" for part in (0, 1)]
    torch.testing.assert_close(read_tensors(saved[0])["features"], make_batch(10).features)
    assert torch.equal(read_tensors(saved[1])["tokens.toy"], make_batch(11).tokens["toy"])
    assert [step for step, _ in find_checkpoints(tmp_path)] == [4]


def test_trainer_raises_spear_error_when_the_validation_loss_is_not_finite(tmp_path: Path) -> None:
    trainer = toy_trainer(tmp_path)

    class BadValid(ToyValid):
        def iterate(self, rank: int, world: int):  # type: ignore[no-untyped-def]
            batch = make_batch(0)
            batch.features.fill_(math.inf)
            yield batch

    trainer.valid = BadValid()
    with pytest.raises(SpearError, match="validation loss at update 5 is nan"):
        trainer.run()


def test_trainer_survives_updates_without_targets(tmp_path: Path) -> None:
    def make(g: int) -> Batch:
        batch = make_batch(g)
        if g in (4, 5):
            batch.tokens["toy"].fill_(-100)
        return batch

    toy_trainer(tmp_path, ToySource(make=make), log_every=1).run()
    train = records(tmp_path, "train")
    assert "loss" not in train[2]
    assert train[2]["grad_norm"] == 0.0
    assert all("loss" in record for record in train[3:])


def test_trainer_validates_without_changing_the_training(tmp_path: Path) -> None:
    toy_trainer(tmp_path / "often", validate_every=1).run()
    toy_trainer(tmp_path / "seldom", validate_every=20).run()
    a, b = (read_outcome(tmp_path / name)["model.safetensors"] for name in ("often", "seldom"))
    assert a == b
    assert records(tmp_path / "often", "valid")[-1] == records(tmp_path / "seldom", "valid")[-1]


def test_trainer_runs_in_bf16(tmp_path: Path) -> None:
    seen = []
    trainer = toy_trainer(tmp_path, precision="bf16", max_steps=3)
    trainer.module.body.register_forward_hook(lambda module, args, output: seen.append(output.dtype))
    trainer.run()
    assert set(seen) == {torch.bfloat16}
    assert all(p.dtype == torch.float32 for p in trainer.module.parameters())


def test_trainer_works_outside_the_main_thread(tmp_path: Path) -> None:
    results = []
    thread = threading.Thread(target=lambda: results.append(toy_trainer(tmp_path, max_steps=2).run()))
    thread.start()
    thread.join()
    assert results[0].steps == 2


def test_trainer_restores_the_number_of_threads(tmp_path: Path) -> None:
    before = torch.get_num_threads()
    inside = []
    source = ToySource(lambda g: inside.append(torch.get_num_threads()))
    toy_trainer(tmp_path, source, num_threads=before + 1, max_steps=1).run()
    assert set(inside) == {before + 1}
    assert torch.get_num_threads() == before


def test_trainer_groups_parameters_by_lr_scale(tmp_path: Path) -> None:
    torch.manual_seed(0)
    module = ToyModule()
    module.body.lr_scale = 0.0
    before = module.body.weight.detach().clone()
    trainer = Trainer(toy_config(max_steps=5), module, ToySource(), None, tmp_path, 1, "x")
    trainer.run()
    assert len(trainer.optimizer.param_groups) == 2
    assert torch.equal(module.body.weight, before)
    assert isinstance(module.heads, nn.ModuleDict)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"max_steps": 0}, "`max_steps` must be at least 1, but is 0"),
        ({"accumulation": -1}, "`accumulation` must be at least 1"),
        ({"reference_s": 0.0}, "`reference_s` must be above 0"),
        ({"num_threads": 0}, "`num_threads` must be at least 1"),
        ({"precision": "fp8"}, "`precision` must be one of fp32, bf16, fp16, but is 'fp8'"),
        ({"parallel": "tp"}, "`parallel` must be one of ddp, fsdp, but is 'tp'"),
        ({"max_skipped": -1}, "`max_skipped` must be at least 0"),
        ({"trackers": ["mlflow"]}, "`trackers` must be among tensorboard, wandb, but has 'mlflow'"),
        ({"device": "tpu"}, "`device` must be one of auto, cpu, cuda"),
    ],
)
def test_training_config_raises_config_error_when_a_value_is_out_of_bounds(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        TrainingConfig(**changes)
