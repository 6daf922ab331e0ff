"""What a student starts with: random weights of the recipe's seed, or those of a trained encoder."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from spear.errors import CheckpointError
from spear.export import save_encoder, save_icefall
from spear.stages.pretrain import initial_encoder
from tests.export.tiny import tiny_config, tiny_encoder


def make_run(data: Path, init_from: str | None, **changes: Any) -> Any:
    return SimpleNamespace(recipe=SimpleNamespace(seed=3, student=tiny_config(**changes), init_from=init_from), data=data)


def test_pretrain_starts_with_random_weights_of_the_seed(tmp_path: Path) -> None:
    first, second = (initial_encoder(make_run(tmp_path, None)) for _ in range(2))
    assert torch.equal(first.mask_emb, second.mask_emb)
    assert not torch.equal(first.mask_emb, tiny_encoder().encoder.mask_emb)


@pytest.mark.parametrize("where", ["below the data", "a path", "a checkpoint"])
def test_pretrain_starts_with_the_weights_that_are_named(tmp_path: Path, where: str) -> None:
    encoder = tiny_encoder()
    save_encoder(tmp_path / "data" / "old", encoder.encoder, encoder.student, {})
    save_icefall(tmp_path / "pretrained.pt", encoder.encoder, encoder.student)
    name = {"below the data": "old", "a path": str(tmp_path / "data" / "old"), "a checkpoint": str(tmp_path / "pretrained.pt")}[where]
    found = initial_encoder(make_run(tmp_path / "data", name, schedule_offset=100.0)).state_dict()
    assert found.keys() == encoder.encoder.state_dict().keys()
    assert all(torch.equal(value, found[key]) for key, value in encoder.encoder.state_dict().items())


def test_pretrain_raises_checkpoint_error_when_the_start_is_another_network_or_nowhere(tmp_path: Path) -> None:
    encoder = tiny_encoder()
    save_encoder(tmp_path / "old", encoder.encoder, encoder.student, {})
    with pytest.raises(CheckpointError, match="`student.feedforward_dim` is 64,64 and there 64,48"):
        initial_encoder(make_run(tmp_path, "old", feedforward_dim=64))
    with pytest.raises(CheckpointError, match="none does not exist"):
        initial_encoder(make_run(tmp_path, "none"))
