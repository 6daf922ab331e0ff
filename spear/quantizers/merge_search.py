"""One round of the pairwise merge search in plain torch: the definition that `kernels/search.cpp` repeats number by number.

For every codebook the best single entries are listed, all other codes as they are. Neighbouring lists are then merged: candidates
of both are combined, and the best combinations kept, until one list of whole frames is left. The value of a combination is
V(a) + V(b) + T(a, b) - T(a, B) - T(A, b), where T adds up twice the inner products between the entries of two tuples and A, B are
the present tuples; constants are left out.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional


class Tables(NamedTuple):
    """What the search needs of a set of centres, C codebooks of K entries.

    centres: (C*K, D), every codebook shifted to mean zero; shift: (D,), the sum of the codebook means; cross: (C, C*K, K), twice
    the inner products of all centres with those of each codebook, zero inside a codebook; norms: (C*K,), squared norms; size: K.
    """

    centres: Tensor
    shift: Tensor
    cross: Tensor
    norms: Tensor
    size: int


class _Lists(NamedTuple):
    """N lists of w candidates per frame.

    values: (B, N, w). products: (B, pairs of lists, w, w), T of candidates of both. present: (B, N, N, w), T of the candidates of
    the first list with the present tuple of the second. codes: (B, N, w, L).
    """

    values: Tensor
    products: Tensor
    present: Tensor
    codes: Tensor


def list_length(num_merged: int, codebook_size: int) -> int:
    """Candidates kept per list of tuples of `num_merged` codes: 16 (8 for K <= 16), twice that per factor 4, at most 128."""
    base = 8 if codebook_size <= 16 else 16
    return min(128, base << ((num_merged.bit_length() - 1) // 2))


def given_costs(tables: Tables, costs: Tensor, codes: Tensor, book: int, others: int) -> Tensor:
    """Costs (B, K) of the entries of one codebook, given the codes (B, C) of the first `others` codebooks but itself.

    Rows are added up from the left and then to the cost, as the compiled loop does it.
    """
    own = costs[:, book * tables.size : (book + 1) * tables.size]
    if not others:
        return own + 0.0
    rows = codes[:, :others] + torch.arange(others, device=codes.device) * tables.size
    return own + functional.embedding_bag(rows, tables.cross[book], mode="sum")


def merge_round(tables: Tables, costs: Tensor, codes: Tensor) -> Tensor:
    """New codes (B, C) int64 for costs (B, C*K) of `frame_costs` and present codes (B, C) int64."""
    num, size = codes.shape[1], tables.size
    width = min(list_length(1, size), size) if num > 1 else 1
    given = torch.stack([given_costs(tables, costs, codes, book, num) for book in range(num)], dim=1)
    values, chosen = smallest(given, width)
    if num == 1:
        return chosen[..., 0]
    lists = _first_lists(tables, values, chosen, codes)
    length = 1
    while num > 1:
        num, length, width = num // 2, length * 2, lists.values.shape[2]
        keep = min(list_length(length, size), width * width) if num > 1 else 1
        values, even, odd = _merge(lists, keep)
        merged = torch.cat([_pick(lists.codes[:, 0::2], even), _pick(lists.codes[:, 1::2], odd)], dim=3)
        if num == 1:
            return merged[:, 0, 0]
        if length == 2:
            products, present = _pair_terms(tables, merged, codes)
        else:
            products, present = _merged_terms(lists, even, odd)
        lists = _Lists(values, products, present, merged)
    raise AssertionError("the number of codebooks is a power of two")


def smallest(values: Tensor, keep: int) -> tuple[Tensor, Tensor]:
    """The `keep` smallest of the last dimension in rising order of place, of equal ones the first: (values, int64 places)."""
    size = values.shape[-1]
    if keep >= size:
        return values, torch.arange(size, device=values.device).expand(values.shape)
    if keep == 1:
        place = values.argmin(dim=-1, keepdim=True)
        return values.gather(-1, place), place
    if values.device.type != "cpu" or values.dtype != torch.float32:
        place = values.topk(keep, dim=-1, largest=False, sorted=False).indices.sort(dim=-1).values
        return values.gather(-1, place), place
    # A float32 and its place make one integer that sorts like the number: one partition, vectorised in numpy, is several times
    # faster than topk and breaks ties by place.
    bits = (values + 0.0).view(torch.int32)
    ordered = (bits ^ ((bits >> 31) & 0x7FFFFFFF)).long() << 32
    packed = ordered.bitwise_or_(torch.arange(size)).numpy()
    packed.partition(keep - 1, axis=-1)
    place = torch.from_numpy(np.ascontiguousarray(packed[..., :keep])).bitwise_and_(0xFFFFFFFF).sort(dim=-1).values
    return values.gather(-1, place), place


class _Pairs(NamedTuple):
    """Index tensors for N lists. left, right: (N/2,) the lists that are merged; near: (N/2,) their places among all pairs of lists;
    first, second: (P,) the lists of all pairs.
    """

    left: Tensor
    right: Tensor
    near: Tensor
    first: Tensor
    second: Tensor


def _all_pairs(num: int) -> list[tuple[int, int]]:
    return [(first, second) for first in range(num) for second in range(first + 1, num)]


def _index(values: Iterable[int], device: torch.device) -> Tensor:
    """(M,) int64; made outside inference mode, as it is kept for later calls."""
    with torch.inference_mode(False):
        return torch.tensor(list(values), dtype=torch.int64, device=device)


# The tensors below depend on sizes only and are kept: on a GPU each copy of a Python list would wait for all work before it.


@lru_cache(maxsize=64)
def _pairs(num: int, device: torch.device) -> _Pairs:
    pairs = _all_pairs(num)
    near = [place for place, (first, second) in enumerate(pairs) if first % 2 == 0 and second == first + 1]
    lists = ([pairs[place][0] for place in near], [pairs[place][1] for place in near], near, [p for p, _ in pairs], [q for _, q in pairs])
    return _Pairs(*(_index(values, device) for values in lists))


@lru_cache(maxsize=256)
def _part_places(num: int, i: int, j: int, device: torch.device) -> Tensor:
    """Places (P,), among all pairs of 2 N lists, of part i of the first and part j of the second list of all pairs of the N merged ones."""
    position = {pair: place for place, pair in enumerate(_all_pairs(2 * num))}
    return _index((position[2 * p + i, 2 * q + j] for p, q in _all_pairs(num)), device)


@lru_cache(maxsize=256)
def _starts(num: int, size: int, part: tuple[int, int] | None, device: torch.device) -> Tensor:
    """Where the tables of pairs of the C = `num` codebooks begin in the flat ``cross``, (P,).

    part: None: of neighbours; (i, j): of code i of the first and code j of the second tuple of all pairs of the C/2 tuples of two codes.
    """
    if part is None:
        books = [(first, first + 1) for first in range(0, num, 2)]
    else:
        books = [(2 * p + part[0], 2 * q + part[1]) for p, q in _all_pairs(num // 2)]
    return _index(((column * num + row) * size * size for row, column in books), device)


def _pick(codes: Tensor, index: Tensor) -> Tensor:
    """codes (B, N, k, L) at index (B, N, j) -> (B, N, j, L)."""
    return codes.gather(2, index[..., None].expand(*index.shape, codes.shape[3]))


def _look_up(tables: Tables, part: tuple[int, int] | None, first: Tensor, second: Tensor) -> Tensor:
    """Twice the inner products of entries of pairs of codebooks (see `_starts`): first (B, pairs, i), second (B, pairs, j) -> (B, pairs, i, j)."""
    num, size = tables.cross.shape[0], tables.size
    starts = _starts(num, size, part, first.device)
    where = (first * size + starts[:, None])[..., None] + second[..., None, :]
    return tables.cross.view(-1).index_select(0, where.view(-1)).view(where.shape)


def _first_lists(tables: Tables, values: Tensor, chosen: Tensor, codes: Tensor) -> _Lists:
    """Lists of single entries; products and present terms only between neighbours, all that the first merge needs."""
    num = codes.shape[1]
    pairs = _pairs(num, codes.device)
    even, odd, old = chosen[:, 0::2], chosen[:, 1::2], codes[..., None]
    present = values.new_zeros(len(codes), num, num, values.shape[2])
    present[:, pairs.left, pairs.right] = _look_up(tables, None, even, old[:, 1::2])[..., 0]
    present[:, pairs.right, pairs.left] = _look_up(tables, None, old[:, 0::2], odd)[:, :, 0]
    return _Lists(values, _look_up(tables, None, even, odd), present, chosen[..., None])


def _merge(lists: _Lists, keep: int) -> tuple[Tensor, Tensor, Tensor]:
    """Merge neighbours: values (B, N/2, keep) and which candidates of the even and of the odd list they consist of."""
    num, width = lists.values.shape[1:]
    pairs = _pairs(num, lists.values.device)
    products = lists.products
    if products.shape[1] > len(pairs.near):
        products = products[:, pairs.near]
    even = lists.values[:, 0::2] - lists.present[:, pairs.left, pairs.right]
    odd = lists.values[:, 1::2] - lists.present[:, pairs.right, pairs.left]
    merged = (even[..., :, None] + odd[..., None, :]) + products
    values, chosen = smallest(merged.flatten(2), keep)
    return values, chosen // width, chosen % width


def _pair_terms(tables: Tables, merged: Tensor, codes: Tensor) -> tuple[Tensor, Tensor]:
    """Products and present terms of lists of pairs of codes (B, N, w, 2), from the tables."""
    num = merged.shape[1]
    old = codes.view(len(codes), num, 1, 2)
    pairs = _pairs(num, codes.device)

    def between(first: Tensor, second: Tensor) -> Tensor:
        def part(i: int, j: int) -> Tensor:
            return _look_up(tables, (i, j), first[:, pairs.first, :, i], second[:, pairs.second, :, j])

        return (part(0, 0) + part(1, 0)) + (part(0, 1) + part(1, 1))

    present = tables.norms.new_zeros(len(codes), num, num, merged.shape[2])
    present[:, pairs.first, pairs.second] = between(merged, old)[..., 0]
    present[:, pairs.second, pairs.first] = between(old, merged)[:, :, 0]
    return between(merged, merged), present


def _merged_terms(lists: _Lists, even: Tensor, odd: Tensor) -> tuple[Tensor, Tensor]:
    """Products and present terms of merged candidates from those of their parts: lines first, then columns."""
    num, width = even.shape[1], lists.values.shape[2]
    pairs = _pairs(num, even.device)

    def lines(i: int, j: int) -> Tensor:
        table = lists.products[:, _part_places(num, i, j, even.device)]
        index = (even, odd)[i][:, pairs.first]
        return table.gather(2, index[..., None].expand(*index.shape, width))

    def columns(j: int) -> Tensor:
        table = lines(0, j) + lines(1, j)
        index = (even, odd)[j][:, pairs.second]
        return table.gather(3, index[..., None, :].expand(*table.shape[:3], index.shape[2]))

    present = lists.present

    def seen(i: int, j: int) -> Tensor:
        index = (even, odd)[i][:, :, None].expand(-1, -1, num, -1)
        return present[:, i::2, j::2].gather(3, index)

    return columns(0) + columns(1), (seen(0, 0) + seen(1, 0)) + (seen(0, 1) + seen(1, 1))
