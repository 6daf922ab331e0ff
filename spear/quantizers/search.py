"""Index search of direct-sum codebooks, done on tables of inner products instead of vectors.

A frame x is coded by one entry per codebook whose sum approximates it. Every quantity the search compares is a sum of inner
products between centres (made once) and between the frame and the centres (one matrix product per block), so nothing of the
frame's width appears inside the loop. The merge search is the one of multi_quantization (k2-fsa, Apache-2.0) and returns the same
indexes. On a CPU the loops are compiled where that is possible (`spear.quantizers.kernels`); torch gives the same codes, slower.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from spear.quantizers import kernels
from spear.quantizers.merge_search import Tables, given_costs, list_length, merge_round

BLOCK_FRAMES = 2048
"""Frames whose costs are held at once: BLOCK_FRAMES * C * K floats."""
LIST_FRAMES = 96
"""Frames that torch searches together on a CPU; small enough that their lists stay in the cache."""
DEVICE_SHARE, DEVICE_BLOCKS = 1 / 16, 16
"""On a GPU: share of its memory that a search may take, and at most so many times BLOCK_FRAMES, as every block costs its launches."""


def block_frames(device: torch.device, num: int, size: int) -> int:
    """Frames that are coded together with C = `num` codebooks of K = `size` entries: BLOCK_FRAMES, on a GPU as many of them as its memory allows."""
    if device.type != "cuda":
        return BLOCK_FRAMES
    return frames_within(DEVICE_SHARE * torch.cuda.get_device_properties(device).total_memory, num, size)


def frames_within(limit_bytes: float, num: int, size: int) -> int:
    """Whole blocks of frames whose costs and lists take `limit_bytes`, 1 to DEVICE_BLOCKS."""
    lists = num // 2
    width = min(list_length(2, size), size * size)
    # costs; products of all pairs of lists of two codes, with what they are made of
    per_frame = 4 * num * size + 32 * max(1, lists * (lists - 1) // 2) * width * width
    return BLOCK_FRAMES * max(1, min(DEVICE_BLOCKS, int(limit_bytes / per_frame) // BLOCK_FRAMES))


def make_tables(centres: Tensor, *, overwrite: bool = False) -> Tables:
    """Tables of effective centres (C, K, D), all float32. overwrite: whether the centres may be shifted in place, which saves a copy.

    The shift to mean zero changes no distance and keeps the inner products free of cancellation.
    """
    num, size, _ = centres.shape
    means = centres.mean(dim=1)
    flat = (centres.sub_(means[:, None]) if overwrite else centres - means[:, None]).flatten(0, 1).contiguous()
    norms = torch.cat([(rows * rows).sum(dim=1) for rows in flat.split(size)])  # one codebook at a time takes less memory
    cross = flat.new_zeros(num, num * size, size)
    blocks = cross.view(num, num, size, size)
    for column in range(1, num):
        before = column * size
        torch.mm(flat[:before], (2.0 * flat[before : before + size]).T, out=cross[column, :before])
        blocks[:column, column] = blocks[column, :column].transpose(1, 2)
    return Tables(flat, means.sum(dim=0), cross, norms, size)


def frame_costs(tables: Tables, frames: Tensor) -> Tensor:
    """Cost of every entry for every frame, all else left out: ||c||^2 - 2 c.x, (B, C*K) for frames (B, D)."""
    return torch.addmm(tables.norms, frames - tables.shift, tables.centres.T, alpha=-2.0)


def refine(tables: Tables, costs: Tensor, codes: Tensor, iters: int, *, keep_best: bool = False) -> Tensor:
    """Improve codes by `iters` rounds of the pairwise merge search, which may also raise the error of a frame.

    Args:
        tables: of the quantizer. costs: (B, C*K) from `frame_costs`. codes: (B, C) int64 entries to start from.
        iters: rounds; a frame that a round leaves unchanged is at a fixed point and takes no part in later ones.
        keep_best: return the codes with the lowest error of all rounds and the start, not the last ones.
    Returns:
        (B, C) int64.
    """
    loops = _compiled(costs)
    if loops is not None:
        return _in_threads(costs, codes, lambda cost, code: loops.refine(cost, tables.cross, code, iters, keep_best))
    best, codes = codes, codes.clone()
    lowest = errors(tables, costs, codes) if keep_best else None
    step = LIST_FRAMES if codes.device.type == "cpu" else block_frames(codes.device, codes.shape[1], tables.size)
    active = torch.arange(len(codes), device=codes.device)
    inference = torch.is_inference_mode_enabled()

    def search(rows: Tensor) -> Tensor:
        """Refine some frames; those that changed."""
        with torch.inference_mode(inference):  # a thread does not inherit it
            old = codes[rows]
            new = merge_round(tables, costs[rows], old)
            codes[rows] = new
            return rows[(new != old).any(dim=1)]

    with _workers(codes.device) as run:
        for _ in range(iters):
            changed = list(run(search, active.split(step)))
            active = torch.cat(changed) if changed else active
            if not len(active):
                break
            if lowest is not None:
                found = errors(tables, costs, codes)
                best = torch.where((found < lowest)[:, None], codes, best)
                lowest = torch.minimum(found, lowest)
    return codes if lowest is None else best


def sweep(tables: Tables, costs: Tensor, codes: Tensor | None, sweeps: int) -> Tensor:
    """Coordinate descent: each codebook in turn takes its best entry given the others, `sweeps` times over.

    Args:
        costs: (B, C*K) from `frame_costs`. codes: (B, C) int64 to start from; None: the first sweep decides each codebook on
            what the ones before it leave.
    Returns:
        (B, C) int64.
    """
    num = tables.cross.shape[0]
    fresh = codes is None
    codes = torch.zeros(len(costs), num, dtype=torch.int64, device=costs.device) if codes is None else codes.clone()
    loops = _compiled(costs)
    if loops is not None:
        return _in_threads(costs, codes, lambda cost, code: loops.sweep(cost, tables.cross, code, sweeps, fresh))
    for number in range(sweeps):
        for book in range(num):
            others = book if fresh and number == 0 else num
            codes[:, book] = given_costs(tables, costs, codes, book, others).argmin(dim=1)
    return codes


def errors(tables: Tables, costs: Tensor, codes: Tensor) -> Tensor:
    """Squared errors (B,) of codes (B, C), less the squared norms of the shifted frames."""
    num, size = codes.shape[1], tables.size
    total = torch.zeros(len(costs), device=costs.device)
    for book in range(num):
        total = total + costs[:, book * size : (book + 1) * size].gather(1, codes[:, book : book + 1])[:, 0]
    for first in range(num):
        for second in range(first + 1, num):
            total = total + tables.cross[second, first * size + codes[:, first], codes[:, second]]
    return total


def _compiled(costs: Tensor) -> kernels.SearchLoops | None:
    return kernels.search_loops() if costs.device.type == "cpu" and costs.dtype == torch.float32 else None


def _in_threads(costs: Tensor, codes: Tensor, work: Callable[[Tensor, Tensor], None]) -> Tensor:
    """Run `work`, which overwrites int32 codes, on equal shares of the frames, one per thread."""
    costs, found = costs.contiguous(), codes.to(torch.int32, memory_format=torch.contiguous_format, copy=True)
    if not len(found):
        return codes
    share = -(-len(found) // torch.get_num_threads())
    with _workers(costs.device) as run:
        list(run(lambda pair: work(*pair), zip(costs.split(share), found.split(share))))
    return found.long()


@contextmanager
def _workers(device: torch.device) -> Iterator[Callable[[Callable[[Any], Any], Iterable[Any]], Iterable[Any]]]:
    """A `map` that uses torch's number of threads on a CPU."""
    threads = torch.get_num_threads()
    if device.type != "cpu" or threads == 1:
        yield map
        return
    with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        yield pool.map
