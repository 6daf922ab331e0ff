"""Stage 4, ``shards``: checked cuts and their tokens -> Lhotse Shar that training reads at random."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lhotse import CutSet
from lhotse.cut import MonoCut

from spear.config import to_json
from spear.data.corpora import CorpusConfig
from spear.data.fbank import SAMPLE_RATE
from spear.data.shards import ShardsConfig, write_index, write_shard
from spear.data.token_store import TokenStore
from spear.errors import DataError
from spear.files import read_tensors, sha256_file, write_tensors
from spear.progress import Meter
from spear.stages.agreement import check_quantizer, check_teachers, teacher_settings, without_location
from spear.stages.artifact import Artifact, Record, fingerprint_of, read_artifact
from spear.stages.manifests import find_manifest, manifest_path

if TYPE_CHECKING:
    from torch import Tensor

    from spear.recipe import Run

logger = logging.getLogger(__name__)
SPLITS = ("train", "valid")
PARTS = "parts"
NAMED_IDS = 3


def run(run: Run) -> None:
    """Write ``DATA/shards/<corpus>`` for every corpus.

    Raises:
        ArtifactError: the manifests or a token store are missing, unfinished or changed.
        DataError: a cut has no tokens, or its tokens do not fit its audio.
    """
    fingerprint_of(run.data / "manifests")
    for corpus in run.corpora:
        _make_corpus(run, corpus)


def _make_corpus(run: Run, corpus: CorpusConfig) -> None:
    folder, teachers = run.data / "shards" / corpus.name, run.stored(corpus.domain)
    splits = [split for split in SPLITS if split == "train" or manifest_path(run.data, corpus.name, split).exists()]
    inputs = {f"manifest/{split}": sha256_file(find_manifest(run.data, corpus.name, split)) for split in splits}
    for teacher in teachers:
        for split in splits:
            folder_of_tokens = _token_folder(run.data, teacher, corpus.name, split)
            inputs[f"tokens/{teacher}/{split}"] = fingerprint_of(folder_of_tokens)
            failures = folder_of_tokens / "failures.jsonl"
            if failures.exists() and failures.stat().st_size:  # the store may be completed later, by `spear tokens --retry-failed`
                inputs[f"failures/{teacher}/{split}"] = sha256_file(failures)
            made = read_artifact(folder_of_tokens)
            known = made.get("inputs", {})
            check_teachers(run, made, [teacher], {teacher: known["teacher"]} if "teacher" in known else {})
            check_quantizer(run, teacher, known.get("quantizer"))
    config = {"shards": to_json(run.recipe.shards), "domain": corpus.domain, "teachers": teacher_settings(run, teachers)}
    artifact = Artifact(folder, kind="shards", config=config, inputs=inputs, counted=without_location)
    if not artifact.is_done():
        with artifact.making() as record:
            for split in splits:
                stores = {teacher: TokenStore.open(_token_folder(run.data, teacher, corpus.name, split)) for teacher in teachers}
                _make_split(run.data, corpus, split, stores, run.recipe.shards, record)
    for split in splits:
        shutil.rmtree(folder / f"{split}_{PARTS}", ignore_errors=True)


def _token_folder(data: Path, teacher: str, corpus: str, split: str) -> Path:
    return data / "tokens" / teacher / corpus / split


def _make_split(data: Path, corpus: CorpusConfig, split: str, stores: dict[str, TokenStore], config: ShardsConfig, record: Record) -> None:
    """Write the shards that are not there yet, then the index."""
    manifest = manifest_path(data, corpus.name, split)
    folder = data / "shards" / corpus.name / split
    failed = _failed_ids(stores)
    for leftover in folder.glob(".*.tmp"):  # of a killed run; Lhotse would take it for a field
        leftover.unlink()
    total = _check_ids(manifest, stores, failed)
    ready = (cut for cut in CutSet.from_jsonl_lazy(manifest) if cut.id not in failed)
    parts: list[dict[str, Tensor]] = []
    with Meter(f"shards: {corpus.name} {split}", total, unit="cuts") as meter:
        for number, cuts in enumerate(_chunks(ready, config.cuts_per_shard)):
            done = folder.parent / f"{split}_{PARTS}" / f"{number:06d}.safetensors"
            if not done.exists():
                write_tensors(done, write_shard(folder, number, cuts, stores, config))
            parts.append(read_tensors(done))
            meter.advance(len(cuts), audio_s=sum(cut.duration for cut in cuts))
    specs = {teacher: store.spec for teacher, store in stores.items()}
    write_index(folder, parts, corpus=corpus.name, domain=corpus.domain, specs=specs)
    seconds = sum(int(part["samples"].sum()) for part in parts) / SAMPLE_RATE
    record.audio_s += seconds
    counts: dict[str, Any] = {"cuts": total, "shards": len(parts), "hours": round(seconds / 3600, 6), "failed_in_tokens": len(failed)}
    record.counts[split] = counts


def _failed_ids(stores: dict[str, TokenStore]) -> set[str]:
    """Cuts that the tokens stage reported as unusable within its allowed share; they are left out of the shards."""
    paths = [store.folder / "failures.jsonl" for store in stores.values()]
    return {json.loads(line)["id"] for path in paths if path.exists() for line in path.read_text().splitlines()}


def _check_ids(manifest: Path, stores: dict[str, TokenStore], failed: set[str]) -> int:
    """Number of cuts of a manifest but for the failed ones, all of which every store must hold.

    Raises:
        DataError: names the first cuts that a store lacks, and how many there are.
    """
    total = 0
    missing: dict[str, list[str]] = {teacher: [] for teacher in stores}
    for cut in CutSet.from_jsonl_lazy(manifest):
        if cut.id in failed:
            continue
        total += 1
        for teacher, store in stores.items():
            if cut.id not in store:
                missing[teacher].append(cut.id)
    for teacher, ids in missing.items():
        if ids:
            more = f" and {len(ids) - NAMED_IDS} more" if len(ids) > NAMED_IDS else ""
            raise DataError(
                f"the tokens of {teacher} in {stores[teacher].folder} lack {len(ids)} of {total} cuts: {', '.join(ids[:NAMED_IDS])}{more}",
                cause="missing_tokens",
            )
    return total


def _chunks(cuts: Iterable[MonoCut], size: int) -> Iterator[list[MonoCut]]:
    chunk: list[MonoCut] = []
    for cut in cuts:
        chunk.append(cut)
        if len(chunk) == size:
            yield chunk
            chunk = []
    if chunk:
        yield chunk
