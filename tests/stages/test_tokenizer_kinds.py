"""Stages `quantizers` and `tokens` with every kind of quantizer, named on the command line."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest

from spear.cli import main
from spear.data.token_store import TokenStore
from spear.quantizers import load_quantizer
from tests.data.cuts import cut_of, save, tone, write_cuts

RECIPE = """
student: {type: zipformer}
objective: {type: masked_prediction, weights: {speech: {mel: 1.0}}}
teachers: {mel: {type: logmel, num_mel_bins: 20}}
quantizers: {mel: {type: mvq, num_codebooks: 2, codebook_size: 16}}
features: {num_frames: 800, heldout_share: 0.2}
"""
KINDS = {
    "residual": (["codebook_size=16"], 4, 16, np.uint8),
    "product": (["codebook_size=300"], 4, 300, np.int16),
    "random_projection": (["codebook_size=40000"], 1, 40000, np.int32),
    "fsq": (["levels=[8, 5, 5, 5]"], 4, 1000, np.int16),
    "dmel": (["bits=8"], 20, 256, np.uint8),
}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A recipe, a corpus, its manifests and features."""
    root = tmp_path_factory.mktemp("kinds")
    (root / "recipe.yaml").write_text(RECIPE)
    for split, count in (("train", 6), ("valid", 2)):
        cuts = [cut_of(save(root / f"{split}{i}.wav", tone(1.5 + i / 10, hz=200.0 + 90 * i)), f"{split}{i}") for i in range(count)]
        write_cuts(root / f"{split}.jsonl.gz", cuts)
    source = "{type: cuts, train: train.jsonl.gz, valid: valid.jsonl.gz}"
    (root / "corpora.yaml").write_text(f"corpora: [{{name: talk, domain: speech, source: {source}}}]\n")
    for stage in ("manifests", "features"):
        assert run(root, root / "data", stage) == 0
    return root


def run(root: Path, data: Path, stage: str, *overrides: str) -> int:
    places = ["--recipe", root / "recipe.yaml", "--corpora", root / "corpora.yaml", "--data", data, "--exp", root / "exp"]
    return main([stage, *map(str, places), *(text for override in overrides for text in ("--set", override))])


@pytest.mark.parametrize("kind", KINDS)
def test_stages_take_every_kind_by_an_override(place: Path, tmp_path: Path, kind: str) -> None:
    settings, num_codebooks, size, dtype = KINDS[kind]
    data = tmp_path / "data"
    shutil.copytree(place / "data", data)
    overrides = [f"quantizers.mel.type={kind}", *(f"quantizers.mel.{setting}" for setting in settings)]
    for stage in ("quantizers", "tokens"):
        assert run(place, data, stage, *overrides) == 0
    assert load_quantizer(data / "quantizers" / "mel").kind == kind
    store = TokenStore.open(data / "tokens" / "mel" / "talk" / "train")
    assert (store.spec.num_codebooks, store.spec.codebook_size) == (num_codebooks, size)
    codes = store["train3"]
    assert codes.dtype == dtype
    assert codes.shape == (180, num_codebooks)
    assert 0 <= codes.min() <= codes.max() < size


def test_stages_say_in_one_line_that_a_quantizer_cannot_take_the_frames(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = tmp_path / "data"
    shutil.copytree(place / "data", data)
    assert run(place, data, "quantizers", "quantizers.mel.type=product", "quantizers.mel.num_codebooks=3") == 1
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("spear: error")]
    assert lines == ["spear: error: `num_codebooks` must divide the width of the frames 20, but is 3"]
