"""What a student starts with: random weights of the recipe's seed, or those of a trained encoder."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from spear.errors import ArtifactError, CheckpointError
from spear.export import save_encoder, save_icefall
from spear.recipe import Run, load_recipe
from spear.stages.artifact import DONE, UNFINISHED, Artifact
from spear.stages.pretrain import PROCESSES, _config, _is_done, _processes, initial_encoder
from spear.training import World
from tests.conftest import ROOT
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


def mini(exp: Path, *overrides: str) -> Run:
    return Run(load_recipe(ROOT / "recipes" / "mini.yaml", overrides), [], exp, exp)


def is_done(run: Run, processes: int = 1) -> bool:
    world = World(size=processes)
    return _is_done(run, Artifact(run.exp, kind="pretrain", config=_config(run, _processes(run, world)), inputs={}), world)


def finish(run: Run, steps: int, processes: int = 1) -> None:
    with Artifact(run.exp, kind="pretrain", config=_config(run, processes), inputs={}).making() as record:
        record.counts = {"steps": steps}
        record.extra = {PROCESSES: processes} if processes > 1 else {}


@pytest.mark.parametrize("schedule", ["eden", "eden2", "constant"])
def test_pretrain_lengthens_a_finished_run_whose_schedule_fits_any_length(tmp_path: Path, schedule: str) -> None:
    kind = "training.schedule={type: " + schedule + "}"
    finish(mini(tmp_path, kind, "training.max_steps=10"), 10)
    assert is_done(mini(tmp_path, kind, "training.max_steps=10"))
    with pytest.raises(ArtifactError, match="holds 10 updates, but `training.max_steps` is 9: take 10 or more"):
        is_done(mini(tmp_path, kind, "training.max_steps=9"))
    assert not is_done(mini(tmp_path, kind, "training.max_steps=20"))
    assert (tmp_path / UNFINISHED).exists()
    assert not (tmp_path / DONE).exists()
    finish(mini(tmp_path, kind, "training.max_steps=20"), 20)
    assert is_done(mini(tmp_path, kind, "training.max_steps=20"))


@pytest.mark.parametrize("schedule", ["cosine", "linear", "tristage"])
@pytest.mark.parametrize("state", [DONE, UNFINISHED])
def test_pretrain_says_that_a_schedule_depends_on_the_length(tmp_path: Path, schedule: str, state: str) -> None:
    kind = "training.schedule={type: " + schedule + "}"
    finish(mini(tmp_path, kind, "training.max_steps=10"), 10)
    (tmp_path / DONE).rename(tmp_path / state)
    with pytest.raises(
        ArtifactError, match=f"begun with `training.max_steps` 10, which is now 20: the schedule `{schedule}` falls over the whole run"
    ):
        is_done(mini(tmp_path, kind, "training.max_steps=20"))


def test_pretrain_names_another_key_that_differs_as_well(tmp_path: Path) -> None:
    finish(mini(tmp_path, "training.max_steps=10"), 10)
    with pytest.raises(ArtifactError, match=r"`config.seed` was 0, is 1; `config.training.max_steps` was 10, is 20"):
        is_done(mini(tmp_path, "training.max_steps=20", "seed=1"))


@pytest.mark.parametrize(
    "change",
    [
        *("training.log_every=7", "training.validate_every=7", "training.save_every=7", "training.keep_checkpoints=7", "training.device=cpu"),
        *("training.trackers=[wandb]", "training.max_skipped=7", "training.recompute=true", "training.parallel=fsdp", "sampling.num_workers=7"),
    ],
)
def test_pretrain_keys_that_change_no_weight_are_no_part_of_its_identity(tmp_path: Path, change: str) -> None:
    finish(mini(tmp_path), 2400)
    assert is_done(mini(tmp_path, change))


@pytest.mark.parametrize("change", ["training.precision=bf16", "sampling.max_batch_s=13", "objective.alpha=0.6"])
def test_pretrain_keys_that_change_weights_are_part_of_its_identity(tmp_path: Path, change: str) -> None:
    finish(mini(tmp_path, "training.precision=fp32"), 2400)
    with pytest.raises(ArtifactError, match=f"`config.{change.partition('=')[0]}` was"):
        is_done(mini(tmp_path, "training.precision=fp32", change))


def begin(run: Run, processes: int) -> None:
    finish(run, run.recipe.training.max_steps, processes)
    (run.exp / DONE).rename(run.exp / UNFINISHED)


def test_pretrain_goes_on_with_other_processes_where_the_batches_per_update_stay(tmp_path: Path) -> None:
    begin(mini(tmp_path, "training.accumulation=2"), 4)
    for processes, accumulation in ((4, 2), (8, 1), (2, 4), (1, 8)):
        run = mini(tmp_path, f"training.accumulation={accumulation}")
        assert not is_done(run, processes)
        with Artifact(run.exp, kind="pretrain", config=_config(run, processes), inputs={}).making() as record:
            record.counts = {"steps": 2400}
        (tmp_path / DONE).rename(tmp_path / UNFINISHED)


@pytest.mark.parametrize(
    ("processes", "accumulation", "advice"),
    [(4, 1, "set `training.accumulation` to 2"), (2, 2, "set `training.accumulation` to 4"), (3, 2, "take a number of processes that divides it")],
)
def test_pretrain_says_that_the_batches_per_update_must_stay(tmp_path: Path, processes: int, accumulation: int, advice: str) -> None:
    begin(mini(tmp_path), 8)
    made = f"{processes} processes with `training.accumulation` {accumulation} make {processes * accumulation}: the product must stay; {advice}"
    with pytest.raises(ArtifactError, match=f"was begun with 8 batches per update, but {made}"):
        is_done(mini(tmp_path, f"training.accumulation={accumulation}"), processes)


def test_pretrain_finished_run_is_done_for_any_number_of_processes_unless_it_is_lengthened(tmp_path: Path) -> None:
    kind = "training.schedule={type: eden}"
    finish(mini(tmp_path, kind, "training.max_steps=10"), 10, processes=8)
    assert is_done(mini(tmp_path, kind, "training.max_steps=10"))
    with pytest.raises(ArtifactError, match="8 batches per update, but 1 process with `training.accumulation` 1 make 1"):
        is_done(mini(tmp_path, kind, "training.max_steps=20"))
    with pytest.raises(ArtifactError, match="8 batches per update, but 1 process with `training.accumulation` 2 make 2"):
        is_done(mini(tmp_path, kind, "training.max_steps=10", "training.accumulation=2"))
    assert not is_done(mini(tmp_path, kind, "training.max_steps=20", "training.accumulation=8"))
