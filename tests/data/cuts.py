"""Small corpora on the disk for the tests of data and stages."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import soundfile
import torch
from lhotse import CutSet, Recording, SupervisionSegment
from lhotse.cut import MonoCut
from lhotse.supervision import AlignmentItem

from spear.data.corpora import CorporaConfig, CorpusConfig, ManifestsConfig
from spear.data.mixing import MixingConfig
from spear.data.shards import ShardsConfig
from spear.data.sources import CutsSource, FolderSource
from spear.data.token_store import TokenWriter
from spear.errors import ConfigError
from spear.files import write_json
from spear.recipe import Run
from spear.stages import manifests, shards
from spear.types import TokenSpec

SPEECH = TokenSpec(num_codebooks=4, codebook_size=16, frame_rate_hz=50.0, first_frame_s=0.01, teacher_fingerprint="t", quantizer_fingerprint="q")
AUDIO = TokenSpec(num_codebooks=2, codebook_size=512, frame_rate_hz=25.0, first_frame_s=0.02)
SPECS = {"speech": SPEECH, "audio": AUDIO}
LABELS = {"speech": ["speech"], "audio": ["speech", "audio"]}


def tone(seconds: float, rate: int = 16000, hz: float = 440.0, gain: float = 0.3) -> np.ndarray[Any, Any]:
    """A sine with a little noise, float32."""
    n = round(seconds * rate)
    noise = np.random.default_rng(n).standard_normal(n)
    return (gain * np.sin(2 * np.pi * hz * np.arange(n) / rate) + 0.01 * noise).astype(np.float32)


def save(path: Path, audio: np.ndarray[Any, Any], rate: int = 16000, subtype: str | None = None) -> Path:
    """Write an audio file and its folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, audio, rate, subtype=subtype)
    return path


def cut_of(path: Path, cut_id: str | None = None, *, speaker: str | None = None, phones: list[tuple[str, float, float]] | None = None) -> MonoCut:
    """A whole file as a cut, with one supervision where it has a speaker."""
    cut = Recording.from_file(path, recording_id=cut_id or path.stem).to_cut()
    cut.id = cut_id or path.stem
    if speaker:
        alignment = {"phone": [AlignmentItem(*phone) for phone in phones or []]}
        cut.supervisions = [SupervisionSegment(cut.id, cut.id, 0.0, cut.duration, speaker=speaker, text="a b", alignment=alignment)]
    return cut


def write_cuts(path: Path, cuts: list[MonoCut]) -> str:
    """Write a manifest; returns its path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    CutSet.from_cuts(cuts).to_file(path)
    return str(path)


class Objective:
    """Knows which teachers label the two domains."""

    def labels(self, domain: str) -> list[str]:
        """Names of teachers."""
        if domain not in LABELS:
            raise ConfigError(f"`weights` does not know the domain {domain}")
        return LABELS[domain]

    def frames(self, domain: str) -> list[str]:
        """None: all targets are tokens."""
        del domain
        return []


def make_run(data: Path, corpora: list[CorpusConfig], **settings: Any) -> Run:
    """A run with the parts of a recipe that data stages read."""
    given = {"manifests": ManifestsConfig(), "mixing": MixingConfig(), "shards": ShardsConfig(cuts_per_shard=4), "objective": Objective()}
    given = {**given, "tokens": SimpleNamespace(pairs="needed", source="stored"), "teachers": {}, "quantizers": {}, **settings}
    recipe: Any = SimpleNamespace(**given)
    return Run(recipe, CorporaConfig(corpora=corpora).corpora, data, data / "exp")


def folder_corpus(path: Path, name: str = "sounds", domain: str = "audio", *, valid_share: float = 0.0, **settings: Any) -> CorpusConfig:
    """A corpus of all audio files of a folder."""
    return CorpusConfig(name=name, domain=domain, source=FolderSource(path=str(path), valid_share=valid_share, test_share=0.0), **settings)


def cuts_corpus(name: str, domain: str, train: str, valid: str | None = None, **settings: Any) -> CorpusConfig:
    """A corpus of existing manifests."""
    return CorpusConfig(name=name, domain=domain, source=CutsSource(train=train, valid=valid), **settings)


def write_tokens(run: Run, *, skip: tuple[str, ...] = (), extra_frames: int = 0) -> None:
    """Seeded codes for every cut of a run's manifests, without the cuts in `skip`."""
    for corpus in run.corpora:
        for teacher in LABELS.get(corpus.domain, []):
            spec = SPECS[teacher]
            for split in corpus.source.splits():
                path = manifests.manifest_path(run.data, corpus.name, split)
                if not path.exists():
                    continue
                cuts = [cut for cut in CutSet.from_jsonl_lazy(path) if cut.id not in skip]
                writer = TokenWriter(run.data / "tokens" / teacher / corpus.name / split, spec)
                generator = torch.Generator().manual_seed(7)
                lens = [int(cut.duration * spec.frame_rate_hz) + extra_frames for cut in cuts]
                codes = [torch.randint(spec.codebook_size, (n, spec.num_codebooks), generator=generator) for n in lens]
                writer.write(0, [cut.id for cut in cuts], codes)
                writer.close(1)
                write_json(writer.folder / "artifact.json", {"fingerprint": f"{teacher}-{extra_frames}", "kind": "tokens", "config": {}})


def make_shards(folder: Path, *, speech: int = 10, sounds: int = 6, noise: int = 0) -> Run:
    """A finished DATA with a speech and a sound corpus (and one of noise); durations differ from cut to cut."""
    for i in range(speech):
        save(folder / "speech" / f"s{i}.wav", tone(0.6 + 0.13 * i, hz=200 + 30 * i))
    for i in range(sounds):
        save(folder / "sounds" / f"a{i}.wav", tone(0.9 + 0.2 * i, hz=800 + 50 * i))
    for i in range(noise):
        save(folder / "noise" / f"n{i}.wav", tone(1.0, hz=3000 + 100 * i))
    corpora = [folder_corpus(folder / "speech", "voices", "speech", valid_share=0.5), folder_corpus(folder / "sounds", "sounds", "audio")]
    if noise:
        corpora.append(folder_corpus(folder / "noise", "hiss", "noise"))
    run = make_run(folder / "data", corpora)
    manifests.run(run)
    write_tokens(run)
    shards.run(run)
    return run
