"""What a run will take: bytes that are known before anything is made."""

from __future__ import annotations

import gzip
from pathlib import Path

from spear.commands.estimate import MANIFEST_BYTES_PER_CUT, TAR_BYTES, _needs
from spear.commands.measure import Measured
from spear.data.corpora import CorpusConfig
from spear.data.scan import Scan
from spear.data.sources import CutsSource, FolderSource
from spear.recipe import Run, load_recipe
from spear.types import TokenSpec
from tests.conftest import ROOT


def test_estimate_goes_by_the_manifests_that_are_given_and_counts_members_of_tars(tmp_path: Path) -> None:
    paths = {split: tmp_path / f"{split}.jsonl.gz" for split in ("train", "valid")}
    for path in paths.values():
        path.write_bytes(gzip.compress(path.name.encode() * 100))
    corpora = [
        CorpusConfig(name="talk", domain="speech", source=CutsSource(**{split: str(path) for split, path in paths.items()})),
        CorpusConfig(name="city", domain="audio", source=FolderSource(path=str(tmp_path))),
    ]
    run = Run(load_recipe(ROOT / "recipes" / "spear_base.yaml"), corpora, tmp_path, tmp_path)
    spec = TokenSpec(num_codebooks=16, codebook_size=256, frame_rate_hz=50.0, first_frame_s=0.0125)
    scans = {"talk": [Scan("train", 1000), Scan("valid", 10)], "city": [Scan("train", 100), Scan("test", 50)]}  # durations are not known: no hours
    needs = {need.stage: need for need in _needs(run, scans, {"speech": spec, "audio": spec}, Measured())}
    assert needs["manifests"].size == sum(path.stat().st_size for path in paths.values()) + 150 * MANIFEST_BYTES_PER_CUT
    assert needs["shards"].size == TAR_BYTES * (1010 + 100 + 100)  # speech tokens of all, audio tokens of the sounds
