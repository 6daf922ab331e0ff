"""``spear convert``: codes from Lhotse Shar to a token store, or from a token store to Shar."""

from __future__ import annotations

import argparse
import logging
from dataclasses import asdict
from pathlib import Path
from typing import Any

from spear.bounds import at_least
from spear.data.token_convert import SharTokens, fill_shar, fill_store, open_shar
from spear.data.token_store import STORE, TokenStore, TokenWriter
from spear.errors import ConfigError
from spear.files import read_json, sha256_file, sha256_json
from spear.stages.artifact import DONE, Artifact

logger = logging.getLogger(__name__)

SHAR = "shar"


def convert_tokens(options: argparse.Namespace) -> None:
    """Convert `options.src` into `options.out`; run again, it goes on where it was stopped.

    Args:
        options: src, out, field, manifest, cuts, codebook_size, first_frame (see ``spear convert --help``).
    Raises:
        SpearError: the source cannot be read, an option is missing or of the other direction, or `out` was made from something else.
    """
    at_least("--cuts", options.cuts, 1)
    if options.out.resolve() == options.src.resolve():
        raise ConfigError(f"`OUT` must be another folder than `SRC`, but both are {options.src}")
    if (options.src / STORE).exists():
        _to_shar(TokenStore.open(options.src), options)
    else:
        if options.manifest is not None:
            raise ConfigError(f"`--manifest` is for token stores, but {options.src} is none")
        _to_store(open_shar(options.src, options.field, options.codebook_size, options.first_frame), options)


def _to_store(source: SharTokens, options: argparse.Namespace) -> None:
    config: dict[str, Any] = {"to": "store", "field": source.field, "spec": asdict(source.spec), "cuts_per_block": options.cuts}
    made = options.src.parent / DONE
    teachers = read_json(made)["config"].get("teachers", {}) if made.exists() else {}
    teacher = source.field.removesuffix("_tokens")
    if teacher in teachers:  # as `spear tokens` notes them: `spear shards` compares them with the recipe's
        config["teachers"] = {teacher: teachers[teacher]}
    artifact = Artifact(options.out, kind="convert", config=config, inputs={"files": _hash(source.files)})
    if artifact.is_done():
        return
    with artifact.making() as record:
        counts = fill_store(source, TokenWriter(options.out, source.spec), options.cuts)
        record.audio_s = counts.pop("audio_s")
        record.counts = counts
    logger.info("convert: %d cuts, %d frames of %s -> %s", counts["cuts"], counts["frames"], source.field, options.out)


def _to_shar(store: TokenStore, options: argparse.Namespace) -> None:
    if options.manifest is None or options.field is None:
        raise ConfigError("a token store becomes Shar with `--manifest`, the cuts it was made of, and `--field`, the name of the codes there")
    if options.codebook_size is not None or options.first_frame is not None:
        raise ConfigError(f"`--codebook-size` and `--first-frame` are for Shar, but {store.folder} is a token store that says them")
    if not options.manifest.is_file():
        raise ConfigError(f"`--manifest` must be a file of cuts, but {options.manifest} does not exist")
    config = {"to": "shar", "field": options.field, "cuts_per_shard": options.cuts}
    inputs = {"manifest": sha256_file(options.manifest), "store": _hash([*sorted(store.folder.glob("block-*")), store.folder / STORE])}
    artifact = Artifact(options.out, kind="convert", config=config, inputs=inputs)
    if artifact.is_done():
        return
    with artifact.making() as record:
        counts = fill_shar(store, options.manifest, options.out / SHAR, options.field, options.cuts)
        record.audio_s = counts.pop("audio_s")
        record.counts = counts
    logger.info("convert: %d cuts in %d shards -> %s", counts["cuts"], counts["shards"], options.out / SHAR)


def _hash(paths: list[Path]) -> str:
    return sha256_json({path.name: sha256_file(path) for path in paths})
