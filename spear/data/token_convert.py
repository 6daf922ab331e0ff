"""Codes between Lhotse Shar, a tar member per cut, and token stores, flat codes with offsets: see docs/formats.md."""

from __future__ import annotations

import gzip
import io
import itertools
import json
import tarfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from lhotse import CutSet

from spear.bounds import at_least
from spear.data.shards import Codes, ShardsConfig, index_path, shard_path, token_field, write_token_shard
from spear.data.token_store import TokenStore, TokenWriter
from spear.errors import ArtifactError, ConfigError, DataError
from spear.files import read_json
from spear.types import TokenSpec

CUTS = "cuts.*.jsonl.gz"


class Row(NamedTuple):
    """One cut of a shard: codes (T, C), seconds of audio."""

    cut_id: str
    seconds: float
    codes: Codes


@dataclass(frozen=True)
class SharTokens:
    """The codes in one field of a Shar folder.

    folder: with cuts.000000.jsonl.gz, ... and <field>.000000.tar, ... spec: what the codes are. num_shards: of the folder.
    """

    folder: Path
    field: str
    spec: TokenSpec
    num_shards: int

    @property
    def files(self) -> list[Path]:
        """All files that are read."""
        return [path for number in range(self.num_shards) for path in (cuts_path(self.folder, number), shard_path(self.folder, self.field, number))]

    def __iter__(self) -> Iterator[Row]:
        """Cut after cut, one shard in memory.

        Raises:
            ArtifactError: a file is missing or damaged. DataError: a cut has no codes, or cuts and codes are in another order.
        """
        for number in range(self.num_shards):
            path = shard_path(self.folder, self.field, number)
            found = read_tar(path)
            for cut_id, seconds in read_cuts(cuts_path(self.folder, number)):
                name, codes, _ = next(found, ("none", None, 0.0))
                if name != cut_id or codes is None:
                    raise DataError(f"{path} must hold the codes of {cut_id} next, but holds {name}", cause="missing_tokens")
                yield Row(cut_id, seconds, codes)
            rest = sum(1 for _ in found)
            if rest:
                raise DataError(f"{path} holds {rest} more members than there are cuts", cause="tokens")


def cuts_path(folder: Path, number: int) -> Path:
    """The manifest of one shard."""
    return folder / f"cuts.{number:06d}.jsonl.gz"


def read_cuts(path: Path) -> Iterator[tuple[str, float]]:
    """(id, seconds) of the cuts of one shard; raises ArtifactError where the file is damaged."""
    try:
        with gzip.open(path, "rt", encoding="utf-8") as lines:
            for line in lines:
                cut = json.loads(line)
                yield str(cut["id"]), float(cut["duration"])
    except (OSError, EOFError, zlib.error, ValueError, KeyError) as error:
        raise ArtifactError(f"{path} is not a readable manifest of cuts: {error}") from error


def read_tar(path: Path) -> Iterator[tuple[str, Codes | None, float]]:
    """(cut id, codes (T, C) or None where there are none, seconds between frames) of a tar of Lhotse arrays.

    Raises:
        ArtifactError: the file is missing, damaged, or its arrays are no ``.npy``.
    """
    try:
        with tarfile.open(path) as tar:
            members = iter(tar)
            for data, about in itertools.zip_longest(members, members):
                name, _, suffix = data.name.rpartition(".")
                if about is None or about.name.rpartition(".")[0] != name or suffix not in ("npy", "nodata"):
                    raise ArtifactError(f"{path} must hold pairs of .npy and .json, but holds {data.name}")
                payload, manifest = (tar.extractfile(member) for member in (data, about))
                if payload is None or manifest is None:
                    raise ArtifactError(f"{path} must hold files only, but {data.name} is none")
                if suffix == "nodata":
                    yield name, None, 0.0
                    continue
                yield name, np.load(io.BytesIO(payload.read()), allow_pickle=False), float(json.load(manifest)["frame_shift"])
    except (OSError, EOFError, tarfile.TarError, ValueError, KeyError) as error:
        raise ArtifactError(f"{path} is not a readable tar of codes: {' '.join(str(error).split())[:160]}") from error


def open_shar(folder: Path, field: str | None, codebook_size: int | None, first_frame_s: float | None) -> SharTokens:
    """Find a field of codes in a Shar folder.

    Shards of this package say what their codes are; for others, rate and number of codebooks are those of the first array.

    Args:
        field: None: the only one that this package wrote. codebook_size, first_frame_s: for folders of others.
    Raises:
        ConfigError: several or no fields, or a value that is missing. ArtifactError: the folder is no Shar.
    """
    num_shards = len(list(folder.glob(CUTS)))
    if not num_shards:
        raise ArtifactError(f"{folder} is neither a token store nor a folder of Shar with {CUTS}")
    index = index_path(folder).with_suffix(".json")
    known = {token_field(teacher): TokenSpec(**spec) for teacher, spec in read_json(index)["tokens"].items()} if index.exists() else {}
    if field is None:
        if len(known) != 1:
            raise ConfigError(f"`--field` must say which codes to take: {folder} has {', '.join(sorted(known)) or 'no index that says'}")
        field = next(iter(known))
    if not shard_path(folder, field, 0).exists():
        raise ConfigError(f"`--field` must be a field of {folder}, but {shard_path(folder, field, 0).name} does not exist")
    if field not in known:
        if codebook_size is None or first_frame_s is None:
            raise ConfigError(f"`--codebook-size` and `--first-frame` are needed: {folder} has no index that says what {field} is")
        at_least("--codebook-size", codebook_size, 1)
        shape, shift = next(((codes.shape, shift) for _, codes, shift in read_tar(shard_path(folder, field, 0)) if codes is not None), ((), 0.0))
        if len(shape) != 2 or shift <= 0:
            raise DataError(f"{field} in {folder} must be arrays of shape (T, C) in time, but are not", cause="tokens")
        known = {field: TokenSpec(int(shape[1]), codebook_size, _rate(shift), first_frame_s)}
    return SharTokens(folder, field, known[field], num_shards)


def _rate(shift: float) -> float:
    """Frames per second of frames `shift` seconds apart: the fraction of small numbers that the shift was made from, where it is one."""
    rate = 1 / shift
    near = float(Fraction(rate).limit_denominator(1000))
    return near if abs(near - rate) <= 1e-9 * rate else rate


def fill_store(source: SharTokens, writer: TokenWriter, cuts_per_block: int) -> dict[str, Any]:
    """Write a store of all cuts of a Shar folder, but for its blocks that are there already; its bytes are those that ``spear tokens`` wrote.

    Returns:
        ``cuts``, ``frames`` and ``audio_s``.
    Raises:
        DataError: codes of another shape or range than the spec's, or an id twice.
    """
    frames, seconds, blocks = 0, 0.0, 0
    seen: set[str] = set()
    rows = iter(source)
    while block := list(itertools.islice(rows, cuts_per_block)):
        ids = [row.cut_id for row in block]
        for cut_id in ids:
            if cut_id in seen:
                raise DataError(f"{source.folder} holds the cut {cut_id} twice", cause="duplicate_id")
            seen.add(cut_id)
        audio_s = round(sum(row.seconds for row in block), 6)
        if not writer.is_finished(blocks):
            try:
                writer.write(blocks, ids, [_whole(row) for row in block], audio_s=audio_s, failures=[])
            except ValueError as error:
                raise DataError(f"{source.field} in {source.folder}: {error}", cause="tokens") from error
        frames, seconds, blocks = frames + sum(len(row.codes) for row in block), seconds + audio_s, blocks + 1
    writer.close(blocks)
    return {"cuts": len(seen), "frames": frames, "audio_s": seconds}


def _whole(row: Row) -> torch.Tensor:
    if not np.issubdtype(row.codes.dtype, np.integer):
        raise ValueError(f"codes of {row.cut_id} must be whole numbers, but are {row.codes.dtype}")
    return torch.from_numpy(row.codes.astype(np.int64))


def fill_shar(store: TokenStore, manifest: Path, folder: Path, field: str, cuts_per_shard: int) -> dict[str, Any]:
    """Write the cuts of a manifest and their codes as Shar, for ``CutSet.from_shar``, but for shards that are there already.

    Audio stays where the cuts say that it is.

    Returns:
        ``cuts``, ``shards`` and ``audio_s``.
    Raises:
        DataError: a cut has no codes, or they do not fit its length.
    """
    cuts, number, count, seconds = iter(CutSet.from_file(manifest)), 0, 0, 0.0
    for leftover in folder.glob(".*.tmp"):  # of a killed run; Lhotse would take it for a field
        leftover.unlink()
    while chunk := list(itertools.islice(cuts, cuts_per_shard)):
        if not cuts_path(folder, number).exists():  # it is written last
            write_token_shard(folder, number, chunk, field, store, ShardsConfig())
        number, count, seconds = number + 1, count + len(chunk), seconds + sum(cut.duration for cut in chunk)
    return {"cuts": count, "shards": number, "audio_s": seconds}
