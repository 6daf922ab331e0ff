"""The recipes without frozen teachers, and those whose teacher is the last run's student, from audio to an exported encoder."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

import spear
from spear.recipe import load_recipe
from tests.conftest import ROOT
from tests.road import STAGES, Road, command, make_road, save_teacher

SMALL = (
    "student.num_layers=4",
    "student.dim=16",
    "student.num_heads=2",
    "student.feedforward_dim=32",
    "student.conv_channels=[4, 4, 8]",
    "objective.top_layers=3",
)
SMALL_ZIPFORMER = (
    "student.encoder_dim=32",
    "student.encoder_unmasked_dim=16",
    "student.feedforward_dim=48",
    "student.num_heads=2",
    "student.query_head_dim=8",
    "student.value_head_dim=6",
    "student.conv_channels=[4, 4, 8]",
)
SHORT = ("training.max_steps=20", "training.log_every=5", "training.validate_every=10", "training.save_every=10", "sampling.max_batch_s=6")
STEPS = ("training.device=cpu", "training.precision=fp32", "features.num_frames=700", "sampling.num_buckets=2")


@pytest.fixture(scope="module")
def corpora(tmp_path_factory: pytest.TempPathFactory) -> Road:
    return make_road(tmp_path_factory.mktemp("self_taught"))


def walk(road: Road, name: str, exp: str, settings: Sequence[str], stages: Sequence[str]) -> Path:
    """Run stages of ``recipes/NAME.yaml`` with `settings`; returns the run's folder."""
    options = {
        "--recipe": ROOT / "recipes" / f"{name}.yaml",
        "--corpora": road.corpora,
        "--data": road.root / f"data_{exp}",
        "--exp": road.root / exp,
    }
    sets = [text for setting in settings for text in ("--set", setting)]
    for stage in stages:
        outcome = command(stage, *(text for key, path in options.items() for text in (key, str(path))), *sets)
        assert outcome.code == 0, outcome.err
    return road.root / exp


def metrics(exp: Path, split: str) -> list[dict[str, float]]:
    records = [json.loads(line) for line in (exp / "metrics.jsonl").read_text().splitlines()]
    return [record for record in records if record["split"] == split]


@pytest.mark.parametrize("name", ["spidr_mini", "dinosr_mini", "data2vec_mini"])
def test_recipe_without_teachers_walks_the_road(corpora: Road, name: str) -> None:
    codebooks = () if name == "data2vec_mini" else ("objective.codebook_size=8",)
    frozen = () if name == "data2vec_mini" else ("objective.front_end_frozen_from=10",)
    exp = walk(corpora, name, name, (*SMALL, *SHORT, *STEPS, *codebooks, *frozen), STAGES[: STAGES.index("evaluate")])
    data = corpora.root / f"data_{name}"
    assert sorted(path.name for path in data.iterdir()) == ["manifests", "shards"]
    last = metrics(exp, "train")[-1]
    assert 0 < last["loss"] < 10  # it may rise, as the targets move
    assert 0.2 < last["masked_share"] < 0.9
    assert metrics(exp, "valid")[-1]["step"] == 20
    if name != "data2vec_mini":
        assert 1.5 < last["target_perplexity"] <= 8
        assert last["active_codes/layer4"] > 1.5
    encoder = spear.load_encoder(exp / "export")
    assert encoder(torch.zeros(1, 8000)).features.shape[2] == 16


@pytest.mark.parametrize("name", ["bestrq_mini", "encodecmae_mini"])
def test_recipe_with_targets_from_log_mels_walks_the_road(corpora: Road, name: str) -> None:
    sizes = {"bestrq_mini": ("quantizers.logmel.codebook_size=64",), "encodecmae_mini": ("quantizers.codec.codebook_size=16",)}[name]
    exp = walk(corpora, name, name, (*SMALL_ZIPFORMER, *SHORT, *STEPS, *sizes), STAGES[: STAGES.index("export")])
    assert metrics(exp, "train")[-1]["loss"] < metrics(exp, "train")[0]["loss"]


def test_hubert_takes_its_own_export_as_teacher_and_wavlm_mixes(corpora: Road) -> None:
    small = (*SMALL_ZIPFORMER, *SHORT, *STEPS)
    stages = STAGES[: STAGES.index("evaluate")]
    first = walk(corpora, "hubert_mini", "hubert", (*small, "quantizers.mfcc.codebook_size=16"), stages)
    assert metrics(first, "train")[-1]["loss"] < metrics(first, "train")[0]["loss"]
    for name, exp in (("hubert_mini_it2", "hubert2"), ("wavlm_mini", "wavlm")):
        target = corpora.root / f"data_{exp}" / "teachers" / "hubert_mini"
        target.parent.mkdir(parents=True)
        shutil.copytree(first / "export", target)
        second = walk(corpora, name, exp, (*small, "quantizers.own.codebook_size=16"), stages)
        assert metrics(second, "train")[-1]["loss"] < metrics(second, "train")[0]["loss"]
        assert (second / "export" / "model.safetensors").exists()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["spidr_mini", "dinosr_mini"])
def test_mini_recipe_keeps_its_codes_alive(corpora: Road, name: str) -> None:
    stages = STAGES[: STAGES.index("export")]
    settings = ("training.max_steps=200", "objective.front_end_frozen_from=100", *SHORT[1:], *STEPS)
    exp = walk(corpora, name, f"{name}_slow", settings, stages)
    last = metrics(exp, "train")[-1]
    size = load_recipe(ROOT / "recipes" / f"{name}.yaml").objective.codebook_size  # type: ignore[attr-defined]
    assert last["target_perplexity"] > 0.5 * size
    assert last["predicted_perplexity"] > 0.1 * size
    assert last["accuracy"] > 4 / size


@pytest.fixture(scope="module")
def first_iteration(corpora: Road) -> Path:
    """The export of a small `hubert_mini`."""
    settings = (*SMALL_ZIPFORMER, *SHORT, *STEPS, "quantizers.mfcc.codebook_size=16")
    return walk(corpora, "hubert_mini", "first_iteration", settings, STAGES[: STAGES.index("evaluate")]) / "export"


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(path.stem for path in (ROOT / "recipes").glob("*_mini*.yaml")))
def test_mini_recipe_learns_at_its_own_size(corpora: Road, first_iteration: Path, name: str) -> None:
    """As it is but for the length of the run and the frames of the fits; teachers of random weights stand in for the trained ones."""
    teachers = corpora.root / f"data_{name}_own_size" / "teachers"
    for teacher in ("speech", "audio", "speaker"):
        save_teacher(teachers / teacher, layers=4)
    shutil.copytree(first_iteration, teachers / "hubert_mini")
    settings = ("training.max_steps=30", *SHORT[1:], *STEPS)
    if getattr(load_recipe(ROOT / "recipes" / f"{name}.yaml").objective, "split_every", None):
        settings += ("objective.split_every=null",)  # losses before and after a split are of other codes
    exp = walk(corpora, name, f"{name}_own_size", settings, STAGES[: STAGES.index("evaluate")])
    losses = [record["loss"] for record in metrics(exp, "train")]
    assert len(losses) == 6
    assert all(0 < loss < 1.02 * losses[0] for loss in losses[1:])
    assert min(losses) < 0.99 * losses[0]
    assert metrics(exp, "valid")[-1]["step"] == 30
    features = spear.load_encoder(exp / "export")(torch.zeros(1, 8000)).features
    assert features.shape[2] == (192 if name == "usad_mini" else 128)
    assert torch.isfinite(features).all()
