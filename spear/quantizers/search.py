"""Index search of direct-sum codebooks, done on tables of inner products instead of vectors.

A frame x is coded by one entry per codebook whose sum approximates it. Every quantity the search compares is a sum of inner
products between centres (the Gram matrix, made once) and between the frame and the centres (one matrix product per block),
so nothing of the frame's width appears inside the loop. The search itself, a pairwise merge of short candidate lists, is the
one of multi_quantization (k2-fsa, Apache-2.0) and returns the same indexes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

BLOCK_FRAMES = 2048
"""Frames whose costs are held at once: BLOCK_FRAMES * C * K floats."""
LIST_FRAMES = 96
"""Frames searched together on a CPU; small enough that their lists stay in the cache."""


class Tables(NamedTuple):
    """What the search needs of a set of centres, C codebooks of K entries.

    centres: (C*K, D), every codebook shifted to mean zero; shift: (D,), the sum of the codebook means; cross: (C*K, C*K),
    twice the Gram matrix of `centres`, zero inside each codebook; norms: (C*K,), squared norms; size: K.
    """

    centres: Tensor
    shift: Tensor
    cross: Tensor
    norms: Tensor
    size: int


def make_tables(centres: Tensor) -> Tables:
    """Tables of effective centres (C, K, D), all float32.

    The shift to mean zero changes no distance and keeps the inner products free of cancellation.
    """
    num, size, _ = centres.shape
    means = centres.mean(dim=1)
    flat = (centres - means[:, None]).flatten(0, 1)
    cross = 2.0 * (flat @ flat.T)
    norms = (flat * flat).sum(dim=1)
    blocks = cross.view(num, size, num, size)
    for codebook in range(num):
        blocks[codebook, :, codebook] = 0.0
    return Tables(flat, means.sum(dim=0), cross, norms, size)


def frame_costs(tables: Tables, frames: Tensor) -> Tensor:
    """Cost of every entry for every frame, all else left out: ||c||^2 - 2 c.x, (B, C*K) for frames (B, D)."""
    return torch.addmm(tables.norms, frames - tables.shift, tables.centres.T, alpha=-2.0)


def list_length(num_merged: int, codebook_size: int) -> int:
    """Candidates kept per list of tuples of `num_merged` codes: 16 (8 for K <= 16), twice that per factor 4, at most 128."""
    base = 8 if codebook_size <= 16 else 16
    return min(128, base << ((num_merged.bit_length() - 1) // 2))


def refine(tables: Tables, costs: Tensor, codes: Tensor, iters: int) -> Tensor:
    """Improve codes by `iters` rounds of the pairwise merge search.

    Args:
        tables: of the quantizer. costs: (B, C*K) from `frame_costs`. codes: (B, C) int64 entries to start from.
        iters: rounds; a frame that a round leaves unchanged is at a fixed point and takes no part in later ones.
    Returns:
        (B, C) int64.
    """
    codes = codes.clone()
    offsets = torch.arange(codes.shape[1], device=codes.device) * tables.size
    step = LIST_FRAMES if codes.device.type == "cpu" else BLOCK_FRAMES
    active = torch.arange(len(codes), device=codes.device)
    inference = torch.is_inference_mode_enabled()

    def search(rows: Tensor) -> Tensor:
        """Refine some frames; those that changed."""
        with torch.inference_mode(inference):  # a thread does not inherit it
            old = codes[rows]
            new = _merge_search(tables, costs[rows], old + offsets) - offsets
            codes[rows] = new
            return rows[(new != old).any(dim=1)]

    with _workers(codes.device) as run:
        for _ in range(iters):
            changed = list(run(search, active.split(step)))
            active = torch.cat(changed) if changed else active
            if not len(active):
                break
    return codes


@contextmanager
def _workers(device: torch.device) -> Iterator[Callable[[Callable[[Tensor], Tensor], Iterable[Tensor]], Iterable[Tensor]]]:
    """A `map` that uses torch's number of threads on a CPU, one list of frames each: its operations are too small to be split well."""
    threads = torch.get_num_threads()
    if device.type != "cpu" or threads == 1:
        yield map
        return
    with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        yield pool.map


class _Lists(NamedTuple):
    """N candidate lists per frame: values (B, N, k) relative to the present codes, rows (B, N, k, L) of the centres."""

    values: Tensor
    rows: Tensor


def _merge_search(tables: Tables, costs: Tensor, rows: Tensor) -> Tensor:
    """One round for all frames. costs: (B, C*K), overwritten; rows: (B, C) present rows of the centres; returns new rows."""
    num_frames, num = rows.shape
    size = tables.size
    costs = costs.add_(functional.embedding_bag(rows, tables.cross, mode="sum"))
    present = costs.gather(1, rows)
    keep = min(list_length(1, size), size) if num > 1 else 1
    values, chosen = smallest(costs.view(num_frames, num, size), keep)
    first = torch.arange(num, device=rows.device)[:, None] * size
    lists = _Lists(values - present[..., None], (chosen + first)[..., None])
    products: Tensor | None = None  # (B, pairs of lists, k, k) once lists hold tuples
    old = rows[..., None]  # (B, N, L)
    while num > 1:
        adjacent = _adjacent(products, num) if products is not None else _products(tables, lists.rows, old, _neighbours(num))
        merged = (lists.values[:, 0::2, :, None] + lists.values[:, 1::2, None, :] + adjacent).flatten(2)
        num, length = num // 2, old.shape[2] * 2
        keep = min(list_length(length, size), merged.shape[2]) if num > 1 else 1
        values, chosen = smallest(merged, keep)
        width = lists.values.shape[2]
        even, odd = chosen // width, chosen % width
        picked = [_pick(lists.rows[:, part::2], index) for part, index in ((0, even), (1, odd))]
        old = old.view(num_frames, num, length)
        following = _Lists(values, torch.cat(picked, dim=3))
        if num > 1:
            products = (
                _products(tables, following.rows, old, _all_pairs(num))
                if products is None
                else _merged_products(products, even, odd, _all_pairs(num))
            )
        lists = following
    return lists.rows[:, 0, 0]


def smallest(values: Tensor, keep: int) -> tuple[Tensor, Tensor]:
    """The `keep` smallest of the last dimension, in no particular order: (values, int64 indexes)."""
    size = values.shape[-1]
    if keep >= size:
        index = torch.arange(size, device=values.device).expand(values.shape)
        return values, index
    if keep == 1:
        least = values.min(dim=-1, keepdim=True)
        return least.values, least.indices
    if values.device.type != "cpu" or values.dtype != torch.float32:
        found = values.topk(keep, dim=-1, largest=False, sorted=False)
        return found.values, found.indices
    # A float32 leaves the low 29 bits of a float64 free: with the index in them, one partition of plain numbers
    # (vectorised in numpy) yields values and indexes together, several times faster than topk.
    bits = (1 << size.bit_length()) - 1
    packed = values.double().view(torch.int64).bitwise_or_(torch.arange(size)).view(torch.float64).numpy()
    packed.partition(keep - 1, axis=-1)
    best = torch.from_numpy(np.ascontiguousarray(packed[..., :keep])).view(torch.int64)
    return (best & ~bits).view(torch.float64).float(), best & bits


def _neighbours(num: int) -> list[tuple[int, int]]:
    return [(first, first + 1) for first in range(0, num, 2)]


def _all_pairs(num: int) -> list[tuple[int, int]]:
    return [(first, second) for first in range(num) for second in range(first + 1, num)]


def _adjacent(products: Tensor, num: int) -> Tensor:
    """Of the products of all pairs of `num` lists, those of neighbours."""
    position = {pair: index for index, pair in enumerate(_all_pairs(num))}
    return products[:, [position[pair] for pair in _neighbours(num)]]


def _pick(rows: Tensor, index: Tensor) -> Tensor:
    """rows (B, N, k, L) at index (B, N, j) -> (B, N, j, L)."""
    return rows.gather(2, index[..., None].expand(*index.shape, rows.shape[3]))


def _products(tables: Tables, rows: Tensor, old: Tensor, pairs: list[tuple[int, int]]) -> Tensor:
    """Twice the inner products of the changes that candidates of two lists make, (B, len(pairs), k, k).

    The change of a candidate is the sum of its centres less the sum of the present ones, so the table of candidates and the
    present tuple (put in front) gives all four terms.
    """
    both = torch.cat([old[:, :, None], rows], dim=2)  # (B, N, 1 + k, L)
    left = both[:, [pair[0] for pair in pairs]] * tables.cross.shape[1]
    right = both[:, [pair[1] for pair in pairs]]
    flat = tables.cross.view(-1)
    total: Tensor | None = None
    for first in range(rows.shape[3]):
        for second in range(rows.shape[3]):
            where = left[..., :, None, first] + right[..., None, :, second]
            part = flat.index_select(0, where.view(-1)).view(where.shape)
            total = part if total is None else total.add_(part)
    assert total is not None
    return total[..., 1:, 1:] - total[..., 1:, :1] - total[..., :1, 1:] + total[..., :1, :1]


def _merged_products(products: Tensor, even: Tensor, odd: Tensor, pairs: list[tuple[int, int]]) -> Tensor:
    """Products of merged candidates from those of their parts.

    products: (B, pairs of 2N lists, k, k); even, odd: (B, N, j), which candidates each merged one consists of.
    """
    position = {pair: index for index, pair in enumerate(_all_pairs(2 * even.shape[1]))}
    width = products.shape[-1]
    left, right = [pair[0] for pair in pairs], [pair[1] for pair in pairs]
    total: Tensor | None = None
    for first, left_part in ((0, even), (1, odd)):
        for second, right_part in ((0, even), (1, odd)):
            table = products[:, [position[2 * a + first, 2 * b + second] for a, b in pairs]].flatten(2)
            where = left_part[:, left, :, None] * width + right_part[:, right, None, :]
            part = table.gather(2, where.flatten(2)).view(where.shape)
            total = part if total is None else total.add_(part)
    assert total is not None
    return total
