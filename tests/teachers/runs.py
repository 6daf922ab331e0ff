"""A run of two small corpora of synthetic audio, without a trained teacher."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import soundfile

from spear.data.mixing import MixingConfig
from spear.quantizers.kmeans import KMeansConfig
from spear.recipe import Run
from spear.stages.manifests import manifest_path
from spear.teachers.extraction import FeaturesConfig, TokensConfig
from spear.teachers.logmel import LogMelConfig

USES = {"speech": ["mel"], "audio": ["mel", "wide"], "noise": []}


def write_corpus(data: Path, name: str, split: str, num_cuts: int, *, seed: int, reverse: bool = False) -> None:
    """Cuts of 0.3 to 0.9 s of seeded noise, and their manifest."""
    from lhotse import CutSet, Recording

    folder = data / "audio" / name
    folder.mkdir(parents=True, exist_ok=True)
    cuts = []
    for index in range(num_cuts):
        rng = np.random.default_rng((seed, index))
        samples = int(rng.integers(4800, 14400))
        path = folder / f"{split}-{index:03d}.wav"
        tone = np.sin(2 * np.pi * rng.uniform(100, 3000) * np.arange(samples) / 16000)
        soundfile.write(path, (0.2 * tone + 0.05 * rng.standard_normal(samples)).astype(np.float32), 16000, subtype="FLOAT")
        cut = Recording.from_file(path, recording_id=f"{name}-{split}-{index:03d}").to_cut()
        cuts.append(cut.with_id(f"{name}-{split}-{index:03d}"))
    path = manifest_path(data, name, split)
    path.parent.mkdir(parents=True, exist_ok=True)
    CutSet.from_cuts(reversed(cuts) if reverse else cuts).to_file(path)


Settings = dict[str, Any] | None


def make_run(root: Path, name: str = "data", *, reverse: bool = False, features: Settings = None, tokens: Settings = None) -> Any:
    """A run in `root` with the corpora `talk` (speech) and `city` (audio), and the teachers `mel` and `wide`."""
    data = root / name
    if not data.exists():
        for corpus, seed in (("talk", 1), ("city", 2)):
            write_corpus(data, corpus, "train", 12, seed=seed, reverse=reverse)
            write_corpus(data, corpus, "valid", 3, seed=seed + 10)
    recipe = SimpleNamespace(
        seed=7,
        teachers={"mel": LogMelConfig(num_mel_bins=16), "wide": LogMelConfig(num_mel_bins=16, stack=2)},
        quantizers={"mel": KMeansConfig(codebook_size=16), "wide": KMeansConfig(codebook_size=16)},
        objective=SimpleNamespace(labels=lambda domain: USES[domain], frames=lambda domain: []),
        mixing=MixingConfig(),
        features=FeaturesConfig(**{"num_frames": 600, **(features or {})}),
        tokens=TokensConfig(**{"cuts_per_block": 5, "batch_seconds": 3.0, **(tokens or {})}),
    )
    corpora = [SimpleNamespace(name="talk", domain="speech"), SimpleNamespace(name="city", domain="audio")]
    return Run(cast(Any, recipe), cast(Any, corpora), data, root / "exp")


def contents(folder: Path) -> dict[str, bytes]:
    """Every file of a folder but the one with measured times."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file() and path.name != "artifact.json"}
