"""The largest batch is tried before the first update and leaves no trace."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from spear.errors import SpearError
from spear.training import World, rehearsal
from spear.training.optim.adamw import AdamWConfig
from spear.training.optim.base import OptimizerConfig
from spear.training.optim.scaled_adam import ScaledAdamConfig
from spear.training.rehearsal import room_for_state
from tests.data.cuts import make_shards
from tests.training.test_kills import STEPS, make_trainer, outcome, sources
from tests.training.toy import ToySource, make_batch, read_outcome, toy_trainer


class Largest(ToySource):
    """Training batches of the toy, whose largest one is batch 3 three times over."""

    asked = 0

    def largest(self) -> object:
        """Count and give it."""
        self.asked += 1
        return make_batch(3)


def test_rehearsal_leaves_no_trace(tmp_path: Path) -> None:
    toy_trainer(tmp_path / "plain").run()
    source = Largest()
    trainer = toy_trainer(tmp_path / "rehearsed", source)
    torch.manual_seed(9)
    expected = torch.rand(1)
    torch.manual_seed(9)
    trainer.rehearse()
    assert source.asked == 1
    assert torch.equal(torch.rand(1), expected)
    assert all(p.grad is None for p in trainer.module.parameters())
    trainer.run()
    assert read_outcome(tmp_path / "rehearsed") == read_outcome(tmp_path / "plain")


def test_rehearsal_of_a_student_leaves_no_trace(tmp_path: Path) -> None:
    shards = make_shards(tmp_path / "corpora", noise=2).data / "shards"
    make_trainer(shards, tmp_path / "plain", World(), workers=0, die_at=-1).run()
    trainer = make_trainer(shards, tmp_path / "rehearsed", World(), workers=0, die_at=-1)
    deadly = trainer.train
    trainer.train = sources(shards, 0)[0]
    trainer.rehearse()
    trainer.train = deadly
    trainer.run()
    assert trainer.state.step == STEPS
    assert outcome(tmp_path / "rehearsed") == outcome(tmp_path / "plain")


def test_rehearsal_names_the_batch_that_does_not_fit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = toy_trainer(tmp_path, Largest())

    def full(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB")

    monkeypatch.setattr(trainer.module, "forward", full)
    with pytest.raises(SpearError, match=r"^the largest batch, 3 cuts and 2 s, does not fit into the memory \(lower `sampling.max_batch_s`, or"):
        trainer.rehearse()


@pytest.mark.parametrize("optimizer", [AdamWConfig(), ScaledAdamConfig()])
def test_rehearsal_takes_the_memory_of_the_optimizers_state(optimizer: OptimizerConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer, found = toy_trainer(tmp_path, Largest(), optimizer=optimizer), []
    monkeypatch.setattr(rehearsal, "room_for_state", lambda given: found.extend(room_for_state(given)))
    trainer.module.register_forward_pre_hook(lambda *_: found.append(None))
    trainer.rehearse()
    *room, forward = found
    assert forward is None
    params = [p for p in trainer.module.parameters() if p.requires_grad]
    assert sorted(tuple(x.shape) for x in room) == sorted(2 * [tuple(p.shape) for p in params])
    assert not trainer.optimizer.state
    trainer.module(make_batch(0), torch.Generator()).loss.backward()
    trainer.module(make_batch(1), torch.Generator()).loss.backward()
    trainer.optimizer.step()
    moments = [x for state in trainer.optimizer.state.values() for x in state.values() if isinstance(x, torch.Tensor)]
    assert sum(x.numel() for x in room) <= sum(x.numel() for x in moments)
    assert room_for_state(trainer.optimizer) == []


def test_rehearsal_runs_nothing_where_the_source_names_no_largest_batch(tmp_path: Path) -> None:
    trainer, calls = toy_trainer(tmp_path), []
    trainer.module.register_forward_hook(lambda *_: calls.append(1))
    trainer.rehearse()
    assert calls == []


def test_largest_batch_is_full_of_the_longest_cut(tmp_path: Path) -> None:
    shards = make_shards(tmp_path / "corpora", noise=2).data / "shards"
    train, _ = sources(shards, 0)
    longest = max(int(reader.samples.max()) for reader in train.readers)
    batch = train.largest()
    assert len(set(batch.ids)) == 1
    assert batch.seconds == pytest.approx(len(batch.ids) * longest / 16000)
    assert batch.seconds <= train.sampling.max_batch_s < batch.seconds + longest / 16000
