"""A trained student that gets another teacher: its encoder goes on as it was, every teacher has a head, all of it learns."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from spear.export import save_encoder
from spear.models.masking import MaskConfig
from spear.models.student import Student
from spear.objectives import PretrainModule
from spear.objectives.masked_prediction import MaskedPredictionConfig
from spear.stages.pretrain import initial_encoder
from spear.types import Batch, TokenSpec
from tests.export.tiny import tiny_config, tiny_encoder

SPECS = {
    "speech": TokenSpec(num_codebooks=2, codebook_size=8, frame_rate_hz=50.0, first_frame_s=0.0125),
    "new": TokenSpec(num_codebooks=3, codebook_size=16, frame_rate_hz=25.0, first_frame_s=0.02),
}
WEIGHTS = {"speech": {"speech": 1.0, "new": 1.0}}


def make_batch() -> Batch:
    generator = torch.Generator().manual_seed(0)
    tokens = {
        "speech": torch.randint(8, (2, 40, 2), generator=generator),
        "new": torch.randint(16, (2, 20, 3), generator=generator),
    }
    return Batch(
        ids=["a", "b"],
        domains=["speech", "speech"],
        features=torch.randn(2, 87, 128, generator=generator),
        feature_lens=torch.tensor([87, 87]),
        seconds=1.74,
        tokens=tokens,
        token_lens={"speech": torch.tensor([40, 40]), "new": torch.tensor([20, 20])},
    )


def test_pretrain_adds_the_head_of_a_new_teacher_and_keeps_the_encoder(tmp_path: Path) -> None:
    old = tiny_encoder()
    save_encoder(tmp_path / "old", old.encoder, old.student, {})
    run: Any = SimpleNamespace(recipe=SimpleNamespace(seed=3, student=tiny_config(), init_from="old"), data=tmp_path)
    encoder = initial_encoder(run)
    before = old.encoder.state_dict()
    assert all(torch.equal(value, before[key]) for key, value in encoder.state_dict().items())
    objective = MaskedPredictionConfig(weights=WEIGHTS).build_on(encoder, SPECS, {})
    assert set(objective.heads) == {"speech", "new"}  # type: ignore[arg-type]
    module = PretrainModule(Student(encoder, MaskConfig()), objective).train()
    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-3)
    losses = []
    for step in range(30):
        result = module(make_batch(), torch.Generator().manual_seed(step))
        loss = result.loss / result.count
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert sum(losses[-5:]) < 0.9 * sum(losses[:5])
    assert not torch.equal(encoder.state_dict()["mask_emb"], before["mask_emb"])
