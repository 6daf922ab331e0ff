"""Online targets: training that labels its batches has the losses of training on stored tokens; frames need no quantizer."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from spear.data.corpora import CorpusConfig, ManifestsConfig
from spear.data.mixing import MixingConfig
from spear.data.sampler import SamplingConfig
from spear.errors import ArtifactError, ConfigError
from spear.files import read_json
from spear.models.masking import MaskConfig
from spear.models.transformer import TransformerConfig
from spear.objectives.base import ObjectiveConfig
from spear.objectives.layer_distillation import LayerDistillationConfig
from spear.objectives.masked_prediction import MaskedPredictionConfig
from spear.quantizers.kmeans import KMeansConfig
from spear.recipe import Recipe, Run
from spear.stages import features, manifests, pretrain, quantizers, shards, tokens
from spear.teachers.extraction import FeaturesConfig, TokensConfig
from spear.teachers.logmel import LogMelConfig
from spear.training import TrainingConfig
from tests.data.cuts import cut_of, cuts_corpus, save, tone, write_cuts

STUDENT = TransformerConfig(conv_channels=(4, 8, 8), num_layers=2, dim=32, num_heads=2, feedforward_dim=32)
WEIGHTS = {"speech": {"mel": 1.0}, "audio": {"mel": 1.0, "wide": 0.5}}


def corpora(root: Path) -> list[CorpusConfig]:
    made = []
    for k, (name, domain) in enumerate((("talk", "speech"), ("city", "audio"))):
        cuts = [cut_of(save(root / name / f"{i}.wav", tone(0.6 + 0.1 * i, hz=200.0 + 300 * (i + k))), f"{name}{i}") for i in range(8)]
        made.append(cuts_corpus(name, domain, write_cuts(root / f"{name}_t.jsonl.gz", cuts[:6]), write_cuts(root / f"{name}_v.jsonl.gz", cuts[6:])))
    return made


def recipe_of(**settings: Any) -> Recipe:
    given: dict[str, Any] = {
        "student": STUDENT,
        "objective": MaskedPredictionConfig(weights=WEIGHTS),
        "teachers": {"mel": LogMelConfig(num_mel_bins=16), "wide": LogMelConfig(num_mel_bins=16, stack=2)},
        "quantizers": {"mel": KMeansConfig(codebook_size=8), "wide": KMeansConfig(codebook_size=8)},
        "manifests": ManifestsConfig(),
        "features": FeaturesConfig(num_frames=600),
        "sampling": SamplingConfig(max_batch_s=3.0, num_buckets=2),
        "mixing": MixingConfig(domains={}),
        "masking": MaskConfig(),
        "training": TrainingConfig(max_steps=3, log_every=1, validate_every=3, save_every=3, device="cpu", num_threads=1),
    }
    return Recipe(**{**given, **settings})


def records(exp: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (exp / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run on stored tokens, trained."""
    root = tmp_path_factory.mktemp("stored")
    run = Run(recipe_of(), corpora(root), root / "data", root / "exp")
    for stage in (manifests, features, quantizers, tokens, shards, pretrain):
        stage.run(run)
    return run


def online(run: Run, exp: str, objective: ObjectiveConfig | None = None, **settings: Any) -> Run:
    recipe = replace(run.recipe, tokens=TokensConfig(source="online"), **settings)
    return replace(run, recipe=recipe if objective is None else replace(recipe, objective=objective), exp=run.exp.parent / exp)


def test_online_targets_give_the_losses_of_stored_tokens_on_the_same_batches(stored: Run) -> None:
    run = online(stored, "online")
    pretrain.run(run)
    before, after = records(stored.exp), records(run.exp)
    assert len(before) == len(after) == 4
    for one, other in zip(before, after):
        assert one.keys() == other.keys()
        for key, value in one.items():
            assert other[key] == (value if isinstance(value, str) else pytest.approx(value, rel=1e-5, abs=1e-7)), key
    inputs = read_json(run.exp / "artifact.json")["inputs"]
    assert {"teachers/mel", "quantizers/mel", "teachers/wide", "quantizers/wide"} <= set(inputs)


def test_online_targets_label_mixed_audio(stored: Run) -> None:
    run = online(stored, "mixed", mixing=MixingConfig())
    pretrain.run(run)
    assert all(record["loss"] > 0 for record in records(run.exp))


def test_online_targets_go_through_loader_workers(stored: Run) -> None:
    run = online(stored, "workers", sampling=SamplingConfig(max_batch_s=3.0, num_buckets=2, num_workers=1))
    pretrain.run(run)
    assert records(run.exp)[-1]["loss"] == pytest.approx(records(stored.exp)[-1]["loss"], rel=1e-5)


def test_online_runs_make_no_tokens_and_shards_without_them(tmp_path: Path) -> None:
    run = Run(recipe_of(tokens=TokensConfig(source="online")), corpora(tmp_path), tmp_path / "data", tmp_path / "exp")
    for stage in (manifests, features, quantizers, tokens, shards, pretrain):
        stage.run(run)
    assert not (run.data / "tokens").exists()
    assert not list((run.data / "shards").rglob("*_tokens.*"))
    assert records(run.exp)[-1]["accuracy/wide/audio"] >= 0


def test_online_run_raises_artifact_error_without_its_quantizer(stored: Run) -> None:
    run = online(stored, "none")
    with pytest.raises(ArtifactError, match="quantizers/mel"):
        pretrain.run(replace(run, data=run.data.parent / "elsewhere"))


def test_layer_distillation_trains_without_quantizers_and_tokens(tmp_path: Path) -> None:
    objective = LayerDistillationConfig(layers=[2], weights=WEIGHTS, hidden_dim=8)
    run = Run(recipe_of(quantizers={}, objective=objective), corpora(tmp_path), tmp_path / "data", tmp_path / "exp")
    for stage in (manifests, features, quantizers, tokens, shards, pretrain):
        stage.run(run)
    assert not any((run.data / name).exists() for name in ("features", "quantizers", "tokens"))
    (record,) = [record for record in records(run.exp) if record["split"] == "valid"]
    assert {"loss", "loss/mel/speech", "l1/wide/audio", "cosine/mel/audio"} <= set(record)
    assert "loss/wide/speech" not in record
    assert list(read_json(run.exp / "artifact.json")["inputs"]) == ["shards/city", "shards/talk", "teachers/mel", "teachers/wide"]


def test_a_noise_domain_with_frame_teachers_is_trained_on(tmp_path: Path) -> None:
    """As with teachers of tokens; a domain that the objective does not know, or gives no weight, is noise only."""
    mixing, domains = MixingConfig(domains={}, noise_domains=["noise", "audio", "rain"]), ("speech", "audio", "rain", "noise")
    frames = LayerDistillationConfig(layers=[2], weights={**WEIGHTS, "rain": {"mel": 0.0}})
    for objective in (frames, MaskedPredictionConfig(weights=WEIGHTS)):
        run = Run(recipe_of(objective=objective, mixing=mixing), [], tmp_path, tmp_path)
        assert [domain for domain in domains if run.is_noise(domain)] == ["rain", "noise"]


def test_recipe_raises_config_error_when_a_teacher_of_tokens_has_no_quantizer() -> None:
    with pytest.raises(ConfigError, match=r"`quantizers\.mel` is missing"):
        recipe_of(quantizers={})
    with pytest.raises(ConfigError, match="`objective` reads teacher 'mel', but `teachers` has wide"):
        recipe_of(quantizers={}, teachers={"wide": LogMelConfig()}, objective=LayerDistillationConfig(weights=WEIGHTS))
