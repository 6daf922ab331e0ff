"""Number formats, the loss scale, updates that are left out, and errors that nobody foresaw."""

from __future__ import annotations

import json
import logging
import math
import signal
from pathlib import Path

import pytest
import torch

from spear.errors import SpearError, StopRequested
from spear.files import read_tensors
from spear.training.precision import GROW_AFTER, LossScale
from spear.types import Batch
from tests.training.toy import ToySource, make_batch, read_outcome, signal_at, toy_trainer


def spoilt(*numbers: int) -> ToySource:
    """A source whose batches of these numbers hold a NaN."""

    def make(g: int) -> Batch:
        batch = make_batch(g)
        if g in numbers:
            batch.features[0, 0] = math.nan
        return batch

    return ToySource(make=make)


def test_trainer_leaves_out_updates_that_are_not_finite_and_says_so(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    trainer = toy_trainer(tmp_path, spoilt(11, 20, 21), log_every=1, max_skipped=2)
    weights = {}

    def remember(step: int) -> None:
        weights[step] = trainer.module.body.weight.detach().clone()

    trainer.hooks.after_step = remember  # type: ignore[method-assign]
    with caplog.at_level(logging.WARNING):
        assert trainer.run().steps == 20
    assert sorted(weights) == [step for step in range(1, 21) if step not in (6, 11)]
    assert trainer.module.discarded == 2
    assert all(torch.isfinite(value).all() for value in weights.values())
    warnings = [record.getMessage() for record in caplog.records]
    assert "the loss of update 6 is not finite; cuts cut-11-0, cut-11-1, cut-11-2; " in warnings[0]
    assert warnings[1].endswith("the update is left out, 2 of at most 2")
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    train = {line["step"]: line for line in lines if line["split"] == "train"}
    assert "loss" not in train[6]
    assert [train[step].get("skipped") for step in (5, 6, 10, 11, 20)] == [None, 1, 1, 2, 2]
    assert math.isfinite(train[7]["loss"])
    names = sorted(path.name for path in (tmp_path / "bad_batch").iterdir())
    assert names == [f"step-{step:08d}-rank-0-part-{part}.safetensors" for step in (6, 11) for part in (0, 1)]
    assert read_tensors(tmp_path / "bad_batch" / names[1])["features"][0, 0].isnan().all()


def test_trainer_fails_at_one_update_too_many(tmp_path: Path) -> None:
    with pytest.raises(SpearError, match="update 11 is not finite; .*; more than `training.max_skipped` 1 updates were left out"):
        toy_trainer(tmp_path, spoilt(11, 20), max_skipped=1).run()


def test_trainer_ends_in_the_same_bytes_when_stopped_after_an_update_left_out(tmp_path: Path) -> None:
    toy_trainer(tmp_path / "whole", spoilt(11)).run()
    stopping, bad = signal_at(11, signal.SIGTERM), spoilt(11)
    stopping.make = bad.make
    with pytest.raises(StopRequested, match="after update 6 of 20"):
        toy_trainer(tmp_path / "parts", stopping).run()
    toy_trainer(tmp_path / "parts", bad).run()
    assert read_outcome(tmp_path / "whole") == read_outcome(tmp_path / "parts")


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried\nto allocate 3 GiB"), "out of memory (lower `sampling.max_batch_s`, or set"),
        (RuntimeError("CUDA error: device-side\nassert"), "RuntimeError: CUDA error: device-side assert"),
        (AssertionError("a slip"), "AssertionError: a slip"),
    ],
)
def test_trainer_ends_an_unforeseen_failure_in_one_line(tmp_path: Path, error: Exception, words: str) -> None:
    trainer = toy_trainer(tmp_path)

    def fail(*_: object) -> None:
        if trainer.state.step == 2:
            raise error

    trainer.module.body.register_forward_hook(fail)
    with pytest.raises(SpearError) as caught:
        trainer.run()
    text = str(caught.value)
    assert "\n" not in text
    shape = "x".join(map(str, make_batch(4).features.shape))
    assert text.startswith(f"update 3 failed on process 0 with a batch of features {shape}, tokens.toy ")
    assert "cuts cut-4-0, cut-4-1: " in text
    assert words in text
    folder = tmp_path / "bad_batch"
    assert "in fail" in (folder / "step-00000003-rank-0.txt").read_text()
    assert torch.equal(read_tensors(folder / "step-00000003-rank-0-part-0.safetensors")["features"], make_batch(4).features)


def test_trainer_ends_a_failure_to_read_in_one_line(tmp_path: Path) -> None:
    def make(g: int) -> Batch:
        if g == 4:
            raise RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed.")
        return make_batch(g)

    with pytest.raises(SpearError, match="update 3: no batch could be read: RuntimeError: DataLoader worker .* is killed by signal: Killed"):
        toy_trainer(tmp_path, ToySource(make=make)).run()


def test_trainer_runs_in_fp16_and_resumes_its_scale(tmp_path: Path) -> None:
    seen = []
    trainer = toy_trainer(tmp_path / "whole", precision="fp16")
    trainer.module.body.register_forward_hook(lambda module, args, output: seen.append((output.dtype, module.training)))
    trainer.run()
    assert {dtype for dtype, _ in seen} == {torch.float16}
    with pytest.raises(StopRequested):
        toy_trainer(tmp_path / "parts", signal_at(17, signal.SIGTERM), precision="fp16").run()
    toy_trainer(tmp_path / "parts", precision="fp16").run()
    assert read_outcome(tmp_path / "whole") == read_outcome(tmp_path / "parts")
    assert json.loads((tmp_path / "whole/checkpoints/step-00000020/state.json").read_text())["loss_scale"] == [1.0, 20.0]


def test_trainer_takes_an_overflow_of_fp16_for_the_scale_s_fault(tmp_path: Path) -> None:
    trainer = toy_trainer(tmp_path, precision="fp16", max_skipped=0, log_every=1)
    trainer.module.body.weight.register_hook(lambda grad: grad * math.inf if trainer.state.step in (4, 5) else grad)
    trainer.run()
    assert trainer.scale.state() == [0.25, 14.0]
    assert not (tmp_path / "bad_batch").exists()
    train = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines() if '"train"' in line]
    assert [record["loss_scale"] for record in train[3:7]] == [1.0, 0.5, 0.25, 0.25]


def test_trainer_scale_changes_no_update(tmp_path: Path) -> None:
    """Powers of two are exact in float32."""
    one, two = (toy_trainer(tmp_path / name, max_steps=4) for name in ("one", "two"))
    two.scale.value = 64.0
    one.run()
    two.run()
    for (name, a), (_, b) in zip(one.module.named_parameters(), two.module.named_parameters()):
        assert torch.equal(a, b), name


def test_loss_scale_grows_slower_the_larger_it_is() -> None:
    scale, changes = LossScale("fp16"), {}
    for step in range(1, 6000):
        scale.update(step, overflow=False)
        changes.setdefault(scale.value, step)
    assert changes == {1.0: 1, 2.0: 100, 4.0: 200, 8.0: 300, 16.0: 700, 32.0: 1100, 64.0: 3100, 128.0: 5100}
    assert [after for _, after in GROW_AFTER] == [100, 400, 2000]


def test_loss_scale_raises_spear_error_when_no_scale_will_do() -> None:
    scale = LossScale("fp16")
    for step in range(1, 17):
        scale.update(step, overflow=True)
    with pytest.raises(SpearError, match=r"fallen to 7.62939e-06 at update 17: the training has diverged"):
        scale.update(17, overflow=True)


def test_loss_scale_stays_one_in_other_precisions() -> None:
    scale = LossScale("bf16")
    for step in range(500):
        scale.update(step, overflow=step % 2 == 0)
    assert scale.value == 1.0
