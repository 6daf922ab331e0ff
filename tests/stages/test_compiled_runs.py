"""A run may change between compiled and plain layers whenever it is resumed: neither weights nor checkpoints know of it."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch

from spear.models.zipformer.compiled import compile_layers
from spear.recipe import Run
from spear.stages import features, manifests, pretrain, quantizers, shards, tokens
from spear.training import TrainingConfig
from spear.training.optim.warmup import ConstantConfig
from tests.export.tiny import tiny_config
from tests.stages.test_online import corpora, recipe_of, records


def trained(made: Run, exp: str, compiled: list[bool]) -> list[float]:
    """Losses of two updates for every entry of `compiled`; the run ends after each, and is then resumed."""
    for part, choice in enumerate(compiled, start=1):
        training = TrainingConfig(
            max_steps=2 * part,
            log_every=1,
            validate_every=2,
            save_every=2,
            device="cpu",
            num_threads=1,
            precision="fp32",
            schedule=ConstantConfig(),
            compile=choice,
        )
        pretrain.run(replace(made, recipe=replace(made.recipe, training=training), exp=made.data.parent / exp))
    return [record["loss"] for record in records(made.data.parent / exp) if "loss" in record]


@pytest.mark.slow
def test_compiled_and_plain_runs_resume_each_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pretrain, "compile_layers", partial(compile_layers, backend="aot_eager"))
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    made = Run(recipe_of(student=tiny_config()), corpora(tmp_path), tmp_path / "data", tmp_path / "exp")
    for stage in (manifests, features, quantizers, tokens, shards):
        stage.run(made)
    plain = trained(made, "plain", [False, False, False])
    assert len(plain) == 9
    assert plain[0] > 1.3 * plain[8]
    for choice in ([False, True, False], [True, False, True]):  # compiled layers draw their dropout in another order
        assert trained(made, f"turns_{choice[0]}", choice) == pytest.approx(plain, rel=0.1)
    assert not torch._dynamo.utils.counters["graph_break"]
