"""What a pre-training run is known by, and that its parts get the settings of the recipe."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from spear.config import to_json
from spear.data.corpora import CorpusConfig
from spear.models.masking import MaskConfig
from spear.recipe import Run, load_recipe
from spear.stages import pretrain
from spear.stages.artifact import Artifact
from spear.training import World
from tests.conftest import ROOT

KEPT = ("seed", "student", "masking", "mixing", "sampling", "objective", "training")
LEFT_OUT = {
    *(("sampling", name) for name in ("num_workers", "prefetch")),
    *(("training", name) for name in ("device", "parallel", "recompute", "compile", "find_unused_parameters", "trackers", "max_skipped")),
    *(("training", name) for name in ("log_every", "validate_every", "save_every", "keep_checkpoints")),
}


def leaves(value: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    if isinstance(value, dict) and value:
        for key, item in value.items():
            yield from leaves(item, (*path, key))
    else:
        yield path


def changed(value: Any, path: tuple[str, ...]) -> Any:
    """A copy of the JSON value with another leaf at `path`."""
    found = copy.deepcopy(value)
    place = found
    for key in path[:-1]:
        place = place[key]
    leaf = place[path[-1]]
    if isinstance(leaf, bool):
        place[path[-1]] = not leaf
    elif isinstance(leaf, (int, float)):
        place[path[-1]] = leaf + 1
    elif isinstance(leaf, str):
        place[path[-1]] = leaf + "x"
    else:
        place[path[-1]] = [*leaf, 1] if isinstance(leaf, list) else 1
    return found


def corpus(name: str, weight: float) -> CorpusConfig:
    return CorpusConfig(name=name, domain="speech", source=SimpleNamespace(), weight=weight)  # type: ignore[arg-type]


def mini(*overrides: str, weights: tuple[float, float] = (3.0, 1.0)) -> Run:
    corpora = [corpus("first", weights[0]), corpus("second", weights[1])]
    return Run(load_recipe(ROOT / "recipes" / "mini.yaml", overrides), corpora, Path("nowhere"), Path("nowhere"))


def test_pretrain_identity_changes_with_every_setting_but_those_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    run = mini()
    settings = {key: value for key, value in to_json(run.recipe).items() if key in KEPT}
    before = pretrain._config(run)
    alike = set()
    for path in leaves(settings):
        other = changed(settings, path)
        monkeypatch.setattr(pretrain, "to_json", lambda recipe, other=other: other)
        if pretrain._config(run) == before:
            alike.add(path)
    assert alike == LEFT_OUT


def test_pretrain_identity_holds_the_length_only_where_the_schedule_depends_on_it() -> None:
    free = {kind: mini("training.schedule={type: " + kind + "}") for kind in ("eden", "cosine")}
    assert "max_steps" not in pretrain._config(free["eden"])["training"]
    assert pretrain._config(free["cosine"])["training"]["max_steps"] == 2400


@pytest.mark.parametrize(
    "change",
    [
        *("masking.time_prob=0.2", "masking.channel_length=21", "student.num_heads=8", "mixing.domains={speech: {p: 0.25}}"),
        *("training.average_period=11", "training.reference_s=13", "training.optimizer.lr=0.09"),
    ],
)
def test_pretrain_fingerprint_changes_with_the_recipe(change: str) -> None:
    first, same, other = (Artifact(Path("x"), kind="pretrain", config=pretrain._config(run), inputs={}) for run in (mini(), mini(), mini(change)))
    assert first.fingerprint == same.fingerprint != other.fingerprint


def test_pretrain_identity_holds_the_weights_of_the_corpora() -> None:
    assert pretrain._config(mini())["corpora"] == {"first": 3.0, "second": 1.0}
    assert pretrain._config(mini()) != pretrain._config(mini(weights=(1.0, 3.0)))


def test_artifact_fingerprint_changes_with_each_part_of_the_identity() -> None:
    same: dict[str, Any] = {"kind": "pretrain", "config": {"a": 1}, "inputs": {"b": "2"}, "version": 1}
    changes: list[dict[str, Any]] = [{}, {"kind": "export"}, {"config": {"a": 2}}, {"inputs": {"b": "3"}}, {"version": 2}]
    assert len({Artifact(Path("x"), **{**same, **change}).fingerprint for change in changes}) == len(changes)


def test_pretrain_gives_its_parts_the_settings_of_the_recipe(monkeypatch: pytest.MonkeyPatch) -> None:
    caught: dict[str, Any] = {}
    encoder = SimpleNamespace(num_mel_bins=128, reads="fbank")

    def make_sources(folder: Path, weights: dict[str, float], **settings: Any) -> tuple[Any, None]:
        caught.update(settings, weights=weights)
        return SimpleNamespace(builder=SimpleNamespace(specs={})), None

    def make_student(given: Any, masking: MaskConfig) -> torch.nn.Module:
        assert given is encoder
        caught["masking"] = masking
        return torch.nn.Identity()

    monkeypatch.setattr(pretrain, "initial_encoder", lambda run: encoder)
    monkeypatch.setattr(pretrain, "make_sources", make_sources)
    monkeypatch.setattr(pretrain, "Student", make_student)
    monkeypatch.setattr(pretrain, "PretrainModule", lambda student, objective: student)
    monkeypatch.setattr(pretrain, "Trainer", lambda *args, **settings: (args, settings))
    monkeypatch.setattr("spear.objectives.masked_prediction.MaskedPredictionConfig.build_on", lambda *args: None)
    run = mini("masking.time_prob=0.31", "sampling.max_batch_s=17", "training.max_steps=77")
    (config, *_), settings = pretrain.make_trainer(run, "f", World())[0]  # type: ignore[misc]
    assert caught["masking"] == MaskConfig(time_prob=0.31, channel_prob=0.1)
    assert caught["weights"] == {"first": 3.0, "second": 1.0}
    assert caught["sampling"].max_batch_s == 17
    assert caught["mixing"] is run.recipe.mixing
    assert sorted(caught["teachers"]) == ["audio", "speech"]
    assert (caught["num_mel_bins"], caught["reads"], caught["keep_audio"]) == (128, "fbank", False)
    assert config.max_steps == 77
    assert settings["description"] == pretrain._config(run)
