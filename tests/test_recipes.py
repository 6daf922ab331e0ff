"""Every recipe loads, names no path and no corpus, and builds its student and its objective."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from spear.config import load_yaml, to_json
from spear.errors import ConfigError
from spear.models.student import Student
from spear.objectives import PretrainModule
from spear.recipe import Recipe, load_recipe
from spear.types import FrameSpec, TokenSpec

ROOT = Path(__file__).resolve().parent.parent
RECIPES = sorted(path for path in (ROOT / "recipes").rglob("*.yaml") if path.parent.name != "finetune")
SIZES = {
    "spear_tiny": 5_190_104,
    "spear_small": 20_248_943,
    "spear_base": 93_289_489,
    "spear_large": 326_951_472,
    "spear_xlarge": 596_973_362,
    "spear_speech_large": 326_951_472,
    "spear_audio_base": 93_289_491,
    "spear_audio_large": 326_951_474,
    "conformer": 93_085_553,
    "transformer": 92_971_377,
    "spidr_base": 93_136_640,
    "dinosr_base": 93_136_640,
    "data2vec_base": 93_136_640,
    "hubert_base": 93_164_288,
    "wavlm_base": 93_164_288,
    "mini": 1_608_132,
    "mini_conformer": 1_598_473,
    "mini_transformer": 1_654_537,
}


def specs(recipe: Recipe) -> dict[str, TokenSpec]:
    return {name: TokenSpec(num_codebooks=4, codebook_size=16, frame_rate_hz=50.0, first_frame_s=0.0125) for name in recipe.teachers}


def frames(recipe: Recipe) -> dict[str, FrameSpec]:
    parts = {name: len(getattr(recipe.teachers[name], "layers", [])) or 1 for name in recipe.objective.frame_teachers()}
    return {name: FrameSpec(768 * count, count, 50.0, 0.0125) for name, count in parts.items()}


@pytest.mark.parametrize("path", RECIPES, ids=lambda p: p.stem)
def test_recipe_loads_and_builds(path: Path) -> None:
    recipe = load_recipe(path)
    with torch.device("meta"):
        encoder = recipe.student.build()
        module = PretrainModule(Student(encoder, recipe.masking), recipe.objective.build_on(encoder, specs(recipe), frames(recipe)))
    assert sum(p.numel() for p in module.parameters()) > 10_000
    if path.stem in SIZES:
        assert sum(p.numel() for p in encoder.parameters()) == SIZES[path.stem]


@pytest.mark.parametrize("path", RECIPES, ids=lambda p: p.stem)
def test_recipe_round_trips_through_its_resolved_config(path: Path) -> None:
    import draccus

    recipe = load_recipe(path)
    assert draccus.decode(Recipe, to_json(recipe)) == recipe


@pytest.mark.parametrize("path", sorted((ROOT / "recipes" / "ablations").glob("*.yaml")), ids=lambda p: p.stem)
def test_ablation_is_an_include_and_few_lines(path: Path) -> None:
    lines = [line for line in path.read_text().splitlines() if line.strip() and not line.startswith("#")]
    assert lines[0].startswith("include: ")
    assert len(lines) <= 8
    assert load_recipe(path) != load_recipe((path.parent / lines[0].removeprefix("include: ")).resolve())


def test_every_recipe_is_in_the_readme_or_the_page_of_recipes() -> None:
    text = (ROOT / "README.md").read_text() + (ROOT / "docs" / "recipes.md").read_text()
    missing = [path.stem for path in (ROOT / "recipes").glob("*.yaml") if f"recipes/{path.name}" not in text]
    assert not missing


def test_recipes_say_only_what_differs() -> None:
    for path in RECIPES:
        assert len(path.read_text().splitlines()) <= 60, path
        assert load_yaml(path)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (
            "features.domains.speach=[speech]",
            "`features.domains.speach` has no teacher of that name; `teachers` has audio, speech; did you mean `speech`?",
        ),
        (
            "features.domains.speech=[spech]",
            "`features.domains.speech` must name domains of the objective (audio, noise, speech), but has 'spech'; did you mean `speech`?",
        ),
        (
            "mixing.domains.aduio={p: 0.1}",
            "`mixing.domains` must name domains of the objective (audio, noise, speech), but has 'aduio'; did you mean `audio`?",
        ),
    ],
)
def test_recipe_raises_config_error_when_a_name_is_misspelt(override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        load_recipe(ROOT / "recipes" / "mini.yaml", [override])


def test_recipe_takes_domains_of_noise_and_the_defaults_of_mixing() -> None:
    mini = ROOT / "recipes" / "mini.yaml"
    load_recipe(mini, ["mixing.domains.hiss={p: 0.1}", "mixing.noise_domains=[hiss]", "features.domains.audio=[audio, hiss]"])
    mixed = load_recipe(mini, ["objective.weights.audio=null", "features.domains=null", "mixing.domains={speech: {}, audio: {}}"])
    assert mixed.objective.domains() == ["speech"]
