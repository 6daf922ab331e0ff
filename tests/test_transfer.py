"""Copies to a GPU that nobody waits for, of tensors and of batches."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from spear.data.loader import ordered_loader
from spear.finetune.batch import LabelledBatch
from spear.transfer import send
from spear.types import Batch


def make(**more: Any) -> Batch:
    return Batch(["a"], ["speech"], torch.ones(1, 4, 2), torch.tensor([4]), 0.04, {"t": torch.ones(1, 2, 1)}, {"t": torch.tensor([2])}, **more)


def test_send_goes_through_page_locked_memory_to_a_gpu_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Any] = []
    x, to = torch.ones(2), Tensor.to
    monkeypatch.setattr(Tensor, "pin_memory", lambda self: calls.append("pinned") or self)
    monkeypatch.setattr(Tensor, "to", lambda self, device, **how: calls.append((device.type, how)) or to(self, "meta"))
    send(x, "cuda:0")
    assert calls == ["pinned", ("cuda", {"non_blocking": True})]
    calls.clear()
    send(x, torch.device("cpu"))
    assert calls == [("cpu", {"non_blocking": False})]


def test_send_gives_what_is_there_already() -> None:
    x = torch.ones(2)
    assert send(x, "cpu") is x


def test_batch_keeps_its_lens_on_the_host() -> None:
    batch = make(second={"t": torch.ones(1)}, audio=torch.ones(1, 9))
    assert batch.host_lens is None
    moved = batch.to("meta")
    assert moved.host_lens is batch.feature_lens
    for tensor in (moved.features, moved.feature_lens, moved.tokens["t"], moved.token_lens["t"], moved.second["t"], moved.audio):
        assert tensor is not None
        assert tensor.device.type == "meta"
    assert moved.to("meta").host_lens is batch.feature_lens
    assert (moved.ids, moved.domains, moved.seconds, moved.second_share) == (["a"], ["speech"], 0.04, None)
    assert batch.features.device.type == "cpu"


def test_labelled_batch_moves_and_pins_its_labels(monkeypatch: pytest.MonkeyPatch) -> None:
    batch = LabelledBatch(["a"], [""], torch.ones(1, 4, 2), torch.tensor([4]), 0.04, labels=torch.tensor([3]), label_lens=torch.tensor([1]))
    moved = batch.to("meta")
    assert isinstance(moved, LabelledBatch)
    assert {x.device.type for x in (moved.features, moved.labels, moved.label_lens)} == {"meta"}
    monkeypatch.setattr(Tensor, "pin_memory", lambda self: self + 1)
    pinned = batch.pin_memory()
    assert isinstance(pinned, LabelledBatch)
    assert (pinned.labels.tolist(), pinned.label_lens.tolist(), pinned.feature_lens.tolist()) == ([4], [2], [5])


@pytest.mark.parametrize("used", [False, True])
def test_loader_pins_where_this_process_works_on_a_gpu(used: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, Any] = {}
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.is_initialized", lambda: used)
    monkeypatch.setattr("spear.data.loader.DataLoader", lambda _, **settings: seen.update(settings) or [])
    assert list(ordered_loader(lambda g: make(), [0], 1, 1)) == []
    assert seen["pin_memory"] is used
