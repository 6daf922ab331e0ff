"""Codes for others, such as trainers of language models: text or npz, one stream per codebook, repetitions merged where asked for."""

from __future__ import annotations

import io
import itertools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Literal, TextIO

import numpy as np
from numpy.typing import NDArray

from spear.data.token_store import TokenStore
from spear.files import make_folder, write_atomic, write_bytes

Format = Literal["text", "npz"]


def run_lengths(codes: NDArray[np.integer]) -> tuple[NDArray[np.integer], NDArray[np.int64]]:
    """Merge runs of one value.

    Args:
        codes: (T,) of one codebook.
    Returns:
        values (R,), no two neighbours equal; durations (R,) in frames, with sum T.
    """
    starts = np.flatnonzero(np.concatenate([[True], codes[1:] != codes[:-1]])) if len(codes) else np.zeros(0, np.int64)
    return codes[starts], np.diff(np.append(starts, len(codes))).astype(np.int64)


def write_streams(store: TokenStore, out: Path, kind: Format, *, dedup: bool) -> None:
    """Write every codebook of a store as a stream of its own.

    text: ``codebook-00.txt``, a line ``<cut id> TAB <codes>`` per cut; with `dedup` also ``codebook-00.durations.txt`` in frames.
    npz: ``block-00000.npz`` with ``ids``, ``frame_rate_hz``, ``first_frame_s`` and, without `dedup`, ``codes`` (F, C) and ``offsets`` (M + 1,);
    with it ``codes_00`` (R,), ``durations_00`` (R,) and ``offsets_00`` (M + 1,) for every codebook.

    Args:
        dedup: merge repeated codes; each codebook has runs of its own.
    Raises:
        ArtifactError: a block is damaged. SpearError: the folder cannot be written.
    """
    make_folder(out)
    if kind == "npz":
        for index, block in enumerate(store.blocks()):
            write_bytes(out / f"block-{index:05d}.npz", _npz(store, *block, dedup=dedup))
        return
    for book in range(store.spec.num_codebooks):
        path = out / f"codebook-{book:02d}.txt"
        if not dedup:
            _write_lines(path, _streams(store, book), lambda codes: codes)
        else:
            _write_lines(path, _streams(store, book), lambda codes: run_lengths(codes)[0])
            _write_lines(path.with_suffix(".durations.txt"), _streams(store, book), lambda codes: run_lengths(codes)[1])


Stream = Iterator[tuple[str, NDArray[np.integer]]]


def _streams(store: TokenStore, book: int) -> Stream:
    """(cut id, codes (T,)) of one codebook."""
    for ids, codes, offsets in store.blocks():
        for cut_id, start, stop in zip(ids, offsets[:-1], offsets[1:]):
            yield cut_id, codes[start:stop, book]


def _write_lines(path: Path, streams: Stream, change: Callable[[NDArray[np.integer]], NDArray[np.integer]]) -> None:
    def fill(file: TextIO) -> None:
        for cut_id, codes in streams:
            file.write(f"{cut_id}\t{' '.join(map(str, change(codes).tolist()))}\n")

    def write(temporary: Path) -> None:
        with temporary.open("w", encoding="utf-8", newline="\n") as file:
            fill(file)

    write_atomic(path, write)


def _npz(store: TokenStore, ids: list[str], codes: NDArray[np.integer], offsets: NDArray[np.int64], *, dedup: bool) -> bytes:
    arrays: dict[str, NDArray[np.generic]] = {
        "ids": np.array(ids, dtype=np.str_),
        "frame_rate_hz": np.array(store.spec.frame_rate_hz),
        "first_frame_s": np.array(store.spec.first_frame_s),
    }
    if not dedup:
        arrays.update(codes=codes, offsets=offsets)
    for book in range(store.spec.num_codebooks if dedup else 0):
        runs = [run_lengths(codes[start:stop, book]) for start, stop in itertools.pairwise(offsets)]
        arrays[f"codes_{book:02d}"] = np.concatenate([codes[:0, book], *(values for values, _ in runs)])
        arrays[f"durations_{book:02d}"] = np.concatenate([np.zeros(0, np.int64), *(durations for _, durations in runs)])
        arrays[f"offsets_{book:02d}"] = np.cumsum([0, *(len(values) for values, _ in runs)], dtype=np.int64)
    buffer = io.BytesIO()
    np.savez(buffer, allow_pickle=False, **arrays)  # type: ignore[arg-type]  # typed as if every name were allow_pickle
    return buffer.getvalue()
