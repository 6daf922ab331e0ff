"""``spear inspect``: what a token store holds, and its codes as text or npz."""

from __future__ import annotations

import argparse
import logging
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from spear.data.token_export import write_streams
from spear.data.token_store import STORE, TokenStore
from spear.errors import ArtifactError, ConfigError
from spear.progress import clock
from spear.quantizers.card import entry_counts
from spear.stages.tokens import entropy_bits

logger = logging.getLogger(__name__)

BARS = " ▁▂▃▄▅▆▇█"
GROUPS = 32
"""Bars of a histogram: neighbouring entries are counted together."""
SHOWN_CODES = 12


def inspect_tokens(options: argparse.Namespace, say: Callable[[str], None]) -> None:
    """Describe every token store at or below a folder; with ``out`` also write its codes there.

    Args:
        options: folder, rows, out, format, dedup (see ``spear inspect --help``). say: takes one line.
    Raises:
        ConfigError: ``dedup`` without ``out``. ArtifactError: no finished store, or a damaged one.
    """
    if options.out is None and options.dedup:
        raise ConfigError("`--dedup` needs `--out`")
    folders = stores_below(options.folder)
    for folder in folders:
        store = TokenStore.open(folder)
        for line in describe(store, options.rows):
            say(line)
        if options.out is not None:
            target = options.out / folder.relative_to(options.folder)
            write_streams(store, target, options.format, dedup=options.dedup)
            logger.info("inspect: %s of %s are in %s", options.format, folder, target)


def stores_below(folder: Path) -> list[Path]:
    """Finished token stores at or below a folder, sorted.

    Raises:
        ArtifactError: there is none.
    """
    found = sorted(path.parent for path in folder.rglob(STORE))
    if not found:
        raise ArtifactError(f"{folder} holds no finished token store: run `spear tokens` first")
    return found


def describe(store: TokenStore, rows: int) -> list[str]:
    """Lines: header, a histogram per codebook, the first codes of `rows` cuts."""
    spec = store.spec
    counts = torch.zeros(spec.num_codebooks, spec.codebook_size, dtype=torch.int64)
    for _, codes, _ in store.blocks():
        counts += entry_counts(torch.from_numpy(codes), spec.codebook_size)
    frames = int(counts[0].sum())
    size = sum(path.stat().st_size for path in store.folder.glob("block-*"))
    hours = frames / spec.frame_rate_hz / 3600
    lines = [
        f"{store.folder}",
        f"  {len(store)} cuts, {frames} frames at {spec.frame_rate_hz:g} Hz (first centred at {spec.first_frame_s:g} s), {clock(hours * 3600)}",
        f"  {spec.num_codebooks} codebooks of {spec.codebook_size} entries, {size / 1e6:.3g} MB, {size / max(hours, 1e-9) / 1e6:.3g} MB an hour",
        f"  teacher {spec.teacher_fingerprint[:12]}, quantizer {spec.quantizer_fingerprint[:12]}",
        f"  {'codebook':>8} {'used':>6} {'bits':>6}  {'most frequent':<24} entries 0 to {spec.codebook_size - 1}",
    ]
    for book, (row, bits) in enumerate(zip(counts, entropy_bits(counts))):
        top = ", ".join(f"{int(entry)}: {100 * int(row[entry]) / max(frames, 1):.1f} %" for entry in row.argsort(descending=True, stable=True)[:2])
        lines.append(f"  {book:>8} {int((row > 0).sum()):>6} {bits:>6.2f}  {top:<24} {bars(row)}")
    for cut_id in store.ids[:rows]:
        codes = store[cut_id]
        lines.append(f"  {cut_id}: {len(codes)} frames")
        lines += [f"    {book:>6}: {' '.join(map(str, codes[:SHOWN_CODES, book].tolist()))} ..." for book in range(spec.num_codebooks)]
    return lines


def bars(counts: Tensor) -> str:
    """A histogram (K,) as one bar per group of neighbouring entries, the highest full; a blank is a group that never occurs."""
    groups = torch.stack([part.sum() for part in counts.tensor_split(min(GROUPS, len(counts)))])
    highest = max(int(groups.max()), 1)
    return "".join(BARS[-(-int(count) * (len(BARS) - 1) // highest)] for count in groups)
