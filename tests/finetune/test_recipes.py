"""The recipes of fine-tuning load and build their heads."""

from __future__ import annotations

from pathlib import Path

import pytest

from spear.config import load_config, to_json
from spear.errors import ConfigError
from spear.finetune.config import FinetuneRecipe
from spear.finetune.layers import LayerMix

RECIPES = sorted((Path(__file__).resolve().parents[2] / "recipes" / "finetune").glob("*.yaml"))
LABELS = ["one; two", "two", "three"]


@pytest.mark.parametrize("path", RECIPES, ids=lambda p: p.stem)
def test_finetune_recipe_loads_and_builds(path: Path) -> None:
    import draccus

    recipe = load_config(FinetuneRecipe, path)
    if getattr(recipe.task, "units", "") == "pieces":
        pytest.importorskip("sentencepiece", reason="the extra [finetune]")
    assert draccus.decode(FinetuneRecipe, to_json(recipe)) == recipe
    head = recipe.task.build(16, LayerMix(16, [16, 16], recipe.encoder.layers), recipe.task.inventory(LABELS))
    assert sum(p.numel() for p in head.parameters()) > 16


def test_finetune_recipe_raises_config_error_when_labels_cannot_be_mixed() -> None:
    path = next(path for path in RECIPES if path.stem == "ctc")
    with pytest.raises(ConfigError, match=r"mixup.prob` must be 0"):
        load_config(FinetuneRecipe, path, ["mixup.prob=0.5"])
