"""Runs that are given something bad: shared by the tests of bad input."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from lhotse import CutSet
from lhotse.cut import MonoCut

from tests.data.cuts import cut_of, save, tone, write_cuts
from tests.road import Outcome, Road, command

GOOD = 9
MEL = """
teachers: {mel: {type: logmel, num_mel_bins: 16, stack: 2}}
quantizers: {mel: {type: kmeans, codebook_size: 8}}
features: {num_frames: 300}
objective: {type: masked_prediction, weights: {speech: {mel: 1.0}}}
student: {type: zipformer, downsampling_factor: [1, 2], num_encoder_layers: 1, encoder_dim: 32, encoder_unmasked_dim: 16, feedforward_dim: 48,
  num_heads: 2, cnn_module_kernel: 7, conv_channels: [4, 8, 8]}
"""


def make_good_audio(folder: Path) -> list[Path]:
    """Files that every stage likes."""
    return [save(folder / f"good{i}.flac", tone(0.7 + 0.05 * i, hz=200 + 40 * i)) for i in range(GOOD)]


def make_mel_road(root: Path) -> Road:
    """A run with one log-mel teacher and no corpora file yet."""
    made = Road(root, root / "data", root / "exp")
    made.recipe.write_text(MEL)
    return made


def with_cuts(road: Road, cuts: list[MonoCut], valid: list[MonoCut] | None = None, domain: str = "speech") -> Road:
    """Give the run one corpus, `talk`, of these cuts."""
    source = f"type: cuts, train: {write_cuts(road.root / 'train.jsonl.gz', cuts)}"
    if valid:
        source += f", valid: {write_cuts(road.root / 'valid.jsonl.gz', valid)}"
    road.corpora.write_text(f"corpora: [{{name: talk, domain: {domain}, source: {{{source}}}}}]\n")
    return road


def with_bad(road: Road, good_audio: list[Path], bad: Path | MonoCut) -> Road:
    """One bad cut among nine good ones; the bad one is the middle one."""
    cuts = [cut_of(path) for path in good_audio]
    return with_cuts(road, [*cuts[:5], cut_of(bad, "bad") if isinstance(bad, Path) else bad, *cuts[5:]])


def with_folder(road: Road, folder: Path) -> Road:
    """Give the run one corpus of a folder, all of it for training."""
    source = f"type: folder, path: {folder}, valid_share: 0.0, test_share: 0.0"
    road.corpora.write_text(f"corpora: [{{name: talk, domain: speech, source: {{{source}}}}}]\n")
    return road


def stage(road: Road, name: str, *overrides: str) -> Outcome:
    return command(*road.arguments(name, *(text for override in overrides for text in ("--set", override))))


def manifest(road: Road) -> list[MonoCut]:
    return list(CutSet.from_jsonl_lazy(road.data / "manifests" / "talk_cuts_train.jsonl.gz"))


def counts(road: Road) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((road.data / "manifests" / "artifact.json").read_text())["counts"]["talk"]["train"]
    return found
