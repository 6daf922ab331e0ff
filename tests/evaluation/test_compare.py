"""Tokenizers side by side."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch

from spear.evaluation.compare import compare, measure, write_comparison
from spear.evaluation.perturb import CHANGES
from spear.quantizers.card import card
from spear.quantizers.kmeans import KMeansConfig
from spear.quantizers.residual import ResidualConfig
from tests.quantizers.frames import clustered


def test_measure_judges_all_in_the_same_domain() -> None:
    train, heldout = clustered(1000, 8), clustered(200, 8, seed=1)
    config = ResidualConfig(num_codebooks=2, codebook_size=16)
    quantizer, found = measure(config, train, heldout, seed=0)
    assert found["relative_loss"] == pytest.approx(card(quantizer, heldout)["relative_loss"], abs=1e-4)
    raw, found = measure(KMeansConfig(codebook_size=16), train, heldout, seed=0)
    assert found["relative_loss"] != pytest.approx(card(raw, heldout)["relative_loss"], abs=1e-3)
    assert (found["bits_per_frame"], found["num_codebooks"], found["codebook_size"]) == (4.0, 1, 16)
    assert found["fit_s"] >= 0
    assert found["encode_us"] >= 0


def test_write_comparison_writes_one_table_and_one_plot(tmp_path: Path) -> None:
    train, heldout = clustered(600, 6), clustered(100, 6, seed=1)
    cuts = [clustered(40, 6, seed=seed) for seed in (2, 3)]
    changed = {name: [x + 0.1 for x in cuts] for name in CHANGES}
    configs = [KMeansConfig(codebook_size=8), ResidualConfig(num_codebooks=2, codebook_size=8)]
    rows = compare(configs, train, heldout, cuts, changed, teacher="mel", frame_rate_hz=50.0, seed=0)
    assert [row["name"] for row in rows] == ["kmeans 1 x 8", "residual 2 x 8"]
    assert [row["bits_per_second"] for row in rows] == [150, 300]
    text = write_comparison(tmp_path, rows, {"mel": {"noise": 0.25}})
    table = [line for line in text.splitlines() if line.startswith("|")]
    assert len(table) == 2 + len(rows)
    assert len({line.count("|") for line in table}) == 1
    assert f"| {rows[1]['relative_loss']:.3f} |" in table[3]
    assert "noise 0.250 of their variance" in text
    assert (tmp_path / "compare.md").read_text().startswith(text)
    assert json.loads((tmp_path / "compare.json").read_text())["rows"] == rows
    svg = (tmp_path / "compare.svg").read_text()
    assert len(re.findall("residual 2 x 8", svg)) >= 2
    assert torch.get_num_threads() == json.loads((tmp_path / "compare.json").read_text())["threads"]
