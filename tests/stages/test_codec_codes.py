"""Stages `features` to `tokens` with a codec's own codes."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lhotse import CutSet

from spear.cli import main
from spear.data.audio import load_audio
from spear.data.token_store import TokenStore
from spear.files import read_json
from tests.data.cuts import cut_of, tone, write_cuts
from tests.data.cuts import save as save_audio
from tests.teachers.codecs import save

RECIPE = """
student: {type: zipformer}
objective: {type: masked_prediction, weights: {speech: {codec: 1.0}}}
teachers: {codec: {type: huggingface, model: encodec}}
quantizers: {codec: {type: codec, num_codebooks: 5}}
features: {num_frames: 200, heldout_share: 0.3}
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("codec")
    (root / "recipe.yaml").write_text(RECIPE)
    save("encodec", root / "data" / "encodec")
    for split, count in (("train", 5), ("valid", 2)):
        cuts = [cut_of(save_audio(root / f"{split}{i}.wav", tone(1.0 + i / 10, hz=200.0 + 90 * i)), f"{split}{i}") for i in range(count)]
        write_cuts(root / f"{split}.jsonl.gz", cuts)
    source = "{type: cuts, train: train.jsonl.gz, valid: valid.jsonl.gz}"
    (root / "corpora.yaml").write_text(f"corpora: [{{name: talk, domain: speech, source: {source}}}]\n")
    for stage in ("manifests", "features"):
        assert run(root, stage) == 0
    return root


def run(root: Path, stage: str, *overrides: str) -> int:
    places = ["--recipe", root / "recipe.yaml", "--corpora", root / "corpora.yaml", "--data", root / "data", "--exp", root / "exp"]
    return main([stage, *map(str, places), *(text for override in overrides for text in ("--set", override))])


def test_stages_store_the_codes_that_the_codec_gives(place: Path) -> None:
    import transformers as tf

    for stage in ("quantizers", "tokens"):
        assert run(place, stage) == 0
    assert read_json(place / "data" / "quantizers" / "codec" / "card.json")["type"] == "codec"
    model: Any = tf.EncodecModel.from_pretrained(place / "data" / "encodec").eval()
    store = TokenStore.open(place / "data" / "tokens" / "codec" / "talk" / "train")
    assert (store.spec.num_codebooks, store.spec.codebook_size, store.spec.frame_rate_hz) == (5, 16, 75.0)
    for cut in CutSet.from_file(place / "data" / "manifests" / "talk_cuts_train.jsonl.gz"):
        with torch.no_grad():
            codes = model.encode(torch.from_numpy(load_audio(cut, 24000))[None, None], bandwidth=1.5).audio_codes  # 5 codebooks of 4 bits at 75 Hz
        np.testing.assert_array_equal(store[cut.id], codes[0, 0].T.numpy())


def test_stage_says_in_one_line_that_the_codec_was_changed_or_is_none(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save("encodec", tmp_path, upsampling_ratios=[8, 5, 4, 2], num_residual_layers=2)
    shutil.rmtree(place / "data" / "quantizers", ignore_errors=True)
    assert run(place, "quantizers", f"teachers.codec.model={tmp_path}") == 1
    shutil.rmtree(place / "data" / "quantizers")
    assert run(place, "quantizers", "quantizers.codec.num_codebooks=81") == 1
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("spear: error")]
    assert len(lines) == 2
    assert "was made with another teacher than `teachers.codec`" in lines[0]
    assert "`num_codebooks` must be at most 80, the codebooks of the codec, but is 81" in lines[1]


def test_compare_puts_the_codecs_codes_beside_fitted_ones(place: Path, tmp_path: Path) -> None:
    places = [place / "recipe.yaml", "--corpora", place / "corpora.yaml", "--data", place / "data", "--out", tmp_path / "out"]
    more = ["--add", "{type: codec, num_codebooks: 80}", "--add", "{type: residual, num_codebooks: 5, codebook_size: 16}"]
    assert main(["compare", *map(str, places), "--teacher", "codec", *more]) == 0
    rows = {row["name"]: row for row in read_json(tmp_path / "out" / "compare.json")["rows"]}
    assert set(rows) == {"codec 5 x 16", "codec 80 x 16", "residual 5 x 16"}
    assert rows["codec 80 x 16"]["bits_per_second"] == 80 * 4 * 75
