"""What docs/recipes.md says of the recipes besides SPEAR, and what SPEAR published, is what they hold."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

from spear.config import to_json
from spear.recipe import Recipe, load_recipe

RECIPES = Path(__file__).resolve().parent.parent / "recipes"
MIXING = {"p": 0.2, "p_noise": 0.1, "other": "utterance", "noise_snr_db": [-5, 20], "other_snr_db": [-5, 5]}
VALUES: dict[str, dict[str, Any]] = {
    "spidr_base": {
        "student.num_layers": 12,
        "student.dim": 768,
        "student.conv_dim": 512,
        "student.position_layers": 5,
        "student.qkv_bias": False,
        "student.layer_drop": 0,
        "masking.time_prob": 0.8,
        "masking.time_length": 10,
        "masking.min_time_masks": 2,
        "masking.channel_prob": 0,
        "objective.heads": "per_layer",
        "objective.top_layers": 8,
        "objective.tap": "ffn_pre_residual",
        "objective.codebook_size": 256,
        "objective.codebook_decay": 0.9,
        "objective.split_every": None,
        "objective.front_end_frozen_from": 200_000,
        "training.optimizer": {"type": "adamw", "lr": 5e-4, "betas": [0.9, 0.95], "eps": 1e-6, "weight_decay": 0.01, "clip_norm": 10},
        "training.max_steps": 400_000,
        "sampling.max_batch_s": 237.5,
        "manifests.max_duration_s": 20,
    },
    "dinosr_base": {
        "student.layer_drop": 0.05,
        "objective.heads": "last",
        "objective.decay": {"type": "linear", "start": 0.999, "end": 0.9999, "steps": 30_000},
        "objective.teacher_frozen_from": 200_000,
        "objective.front_end_frozen_from": 200_000,
        "training.optimizer.betas": [0.9, 0.98],
        "training.optimizer.clip_norm": None,
        "training.schedule": {"type": "tristage", "warmup": 0.03, "hold": 0.47, "start": 0.01, "final": 0.01},
        "manifests.min_duration_s": 2,
    },
    "data2vec_base": {
        "masking.time_prob": 0.65,
        "objective.top_layers": 8,
        "objective.beta": 0,
        "objective.decay": {"type": "linear", "start": 0.999, "end": 0.9999, "steps": 30_000},
        "objective.front_end_frozen_from": None,
        "training.schedule.hold": 0.9,
        "student.layer_drop": 0.05,
    },
    "hubert_base": {
        "quantizers.mfcc.codebook_size": 100,
        "quantizers.mfcc.restarts": 20,
        "objective.alpha": 1,
        "objective.align": "time",
        "objective.head": {"type": "cosine", "dim": 256, "temperature": 0.1},
        "student.conv_gradient": 0.1,
        "student.layer_drop": 0.05,
        "masking.time_prob": 0.8,
        "training.max_steps": 250_000,
        "training.schedule.warmup": 0.08,
        "sampling.max_batch_s": 87.5,
    },
    "hubert_base_it2": {"quantizers.own.codebook_size": 500, "teachers.own.layer": 5, "training.max_steps": 400_000},
    "wavlm_base": {f"mixing.domains.speech.{key}": value for key, value in MIXING.items()} | {"quantizers.own.codebook_size": 500},
    "bestrq_base": {
        "teachers.logmel.stack": 4,
        "quantizers.logmel.projection_dim": 16,
        "quantizers.logmel.codebook_size": 8192,
        "quantizers.logmel.num_codebooks": 1,
        "masking.time_length": 40,
        "masking.time_prob": 0.4,
    },
    "encodecmae_base": {
        "quantizers.codec.type": "codec",
        "quantizers.codec.num_codebooks": 8,
        "objective.alpha": 0.9,
        "masking.mode": "block",
        "masking.time_prob": 0.5,
        "training.optimizer.lr": 1e-4,
        "training.schedule.type": "constant",
        "sampling.max_batch_s": 128 * 4,
    },
    "delulu_base": {
        "quantizers.speaker.codebook_size": 500,
        "quantizers.speaker.normalize": True,
        "objective.align": "time",
        "objective.alpha": 1,
        "student.dim": 768,
    }
    | {f"mixing.domains.speech.{key}": value for key, value in MIXING.items()},
}


SPEAR: dict[str, dict[str, Any]] = {
    "spear_base": {"masking.time_prob": 0.65, "masking.channel_length": 20, "sampling.max_batch_s": 400, "training.schedule.lr_hours": 25_000},
    "spear_large": {"sampling.max_batch_s": 300, "training.schedule.lr_hours": 75_000, "training.max_steps": 500_000},
    "spear_speech_base": {"masking.time_prob": 0.5, "masking.channel_length": 15, "training.schedule.lr_hours": 30_000},
    "spear_speech_large": {
        "masking.time_prob": 0.5,
        "sampling.max_batch_s": 400,
        "training.max_steps": 500_000,
        "training.schedule.lr_hours": 100_000,
        "objective.weights": {"speech": {"speech": 1.0}},
    },
    "spear_audio_base": {
        "masking.time_prob": 0.65,
        "masking.channel_length": 20,
        "sampling.max_batch_s": 600,
        "training.max_steps": 250_000,
        "training.schedule.lr_hours": 20_000,
        "student.output_downsampling_factor": 2,
        "objective.weights": {"audio": {"audio": 1.0}},
        "quantizers.audio.num_codebooks": 8,
        "mixing.domains.audio.p": 0.5,
        "mixing.domains.audio.p_noise": 1,
        "mixing.domains.audio.noise_snr_db": [10, 20],
    },
    "spear_audio_large": {"student.encoder_dim": 1024, "training.schedule.lr_hours": 20_000, "sampling.max_batch_s": 600},
}
VALUES |= {name: {"manifests.min_duration_s": 0.9, "training.optimizer.lr": 0.045, **keys} for name, keys in SPEAR.items()}


def value(recipe: Recipe, key: str) -> Any:
    """What a recipe holds under a dotted key."""
    found = to_json(recipe)
    for part in key.split("."):
        found = found[part]
    return found


@pytest.mark.parametrize(("name", "key"), [(name, key) for name, keys in VALUES.items() for key in keys])
def test_recipe_holds_what_the_page_says(name: str, key: str) -> None:
    assert value(load_recipe(RECIPES / f"{name}.yaml"), key) == VALUES[name][key]


def test_spidr_warms_up_for_12k_updates_holds_188k_and_decays_to_a_hundredth() -> None:
    training = load_recipe(RECIPES / "spidr_base.yaml").training
    schedule = training.schedule.build(training.max_steps)
    factors = {step: schedule.lr_factor(step, 0.0) for step in (0, 6_000, 12_000, 200_000, 300_000, 400_000)}
    assert factors == pytest.approx({0: 0.01, 6_000: 0.505, 12_000: 1, 200_000: 1, 300_000: 0.1, 400_000: 0.01})


def test_spidr_teacher_stands_still_from_184k_updates_on() -> None:
    decay = load_recipe(RECIPES / "spidr_base.yaml").objective.decay  # type: ignore[attr-defined]
    assert decay.at(184_000) < 1 == decay.at(184_300)
    assert math.isclose(1 - decay.at(20_000), 1e-3 / math.e)


@pytest.mark.parametrize("size", ["base", "mini"])
def test_speaker_teacher_labels_speech_beside_the_speech_teacher_only(size: str) -> None:
    recipe = load_recipe(RECIPES / f"spear_speaker_{size}.yaml")
    assert sorted(recipe.objective.labels("speech")) == ["speaker", "speech"]
    assert sorted(recipe.objective.labels("audio")) == ["audio", "speech"]
    plain = load_recipe(RECIPES / ("spear_base.yaml" if size == "base" else "mini.yaml"))
    assert recipe.student == plain.student
    assert recipe.training == plain.training
