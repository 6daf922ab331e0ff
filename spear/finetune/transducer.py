"""The transducer's loss (Graves, arXiv:1211.3711), over its whole lattice or over a band of it (Kuang et al., arXiv:2206.13236).

A node (s, t) of the lattice: s symbols have been said when frame t is read. From there either symbol s + 1 is said, to (s + 1, t), or the
blank ends the frame, to (s, t + 1); the blank of the last frame behind the last symbol ends the text. Letters: see `spear.types`; S symbols of
the longest text, R rows of a band, V symbols of the vocabulary.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from spear.finetune.text import BLANK

NEVER = -math.inf


class Lattice(NamedTuple):
    """Log probabilities (N, S + 1, T) of saying the next symbol, and of ending the frame; `NEVER` outside a band."""

    symbols: Tensor
    blanks: Tensor


class Paths(NamedTuple):
    """total: (N,) log probability of the text, summed over all paths. symbols, blanks: (N, S + 1, T) share of the paths through each edge, the
    derivatives of `total`; no gradient flows through them.
    """

    total: Tensor
    symbols: Tensor
    blanks: Tensor


class Lens(NamedTuple):
    """(N,) valid frames, at least 1, and (N,) symbols."""

    frames: Tensor
    symbols: Tensor


def sum_paths(lattice: Lattice, lens: Lens) -> Paths:
    """Sum over all paths of each item, in float64; what lies behind its lens has no part in it.

    Where a band leaves no path to the end, the total is `NEVER` and the shares are zero.
    """
    return Paths(*_Sum.apply(*lattice, *lens))


class _Sum(torch.autograd.Function):
    """Forward and backward probabilities (arXiv:1211.3711, equations 16 to 20), one diagonal of the lattice at a time."""

    @staticmethod
    def forward(ctx: Any, symbols: Tensor, blanks: Tensor, frames: Tensor, said: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x, y = _skewed(symbols), _skewed(blanks)  # (T + S, N, S + 1)
        items = torch.arange(x.shape[1], device=x.device)
        rows, diagonals = torch.arange(x.shape[2], device=x.device), torch.arange(x.shape[0], device=x.device)
        end = (diagonals[:, None, None] == (frames + said - 1)[:, None]) & (rows == said[:, None])
        alpha = _forward(x, y)
        beta = _backward(x, y, end)
        total = (alpha + y)[frames + said - 1, items, said]
        after = torch.where(end, 0.0, beta[1:, :, :-1])
        whole = total.masked_fill(total == NEVER, 0.0)[:, None]
        shares = [_straight((alpha + edge + rest - whole).exp(), symbols.shape[2]) for edge, rest in ((x, beta[1:, :, 1:]), (y, after))]
        found = total.to(symbols.dtype), shares[0].to(symbols.dtype), shares[1].to(symbols.dtype)
        ctx.save_for_backward(*found[1:])
        ctx.mark_non_differentiable(*found[1:])
        return found

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        symbols, blanks = ctx.saved_tensors
        return grad[:, None, None] * symbols, grad[:, None, None] * blanks, None, None


def _forward(x: Tensor, y: Tensor) -> Tensor:
    """Log probability of reaching each node; all (T + S, N, S + 1)."""
    alpha = torch.full_like(x, NEVER)
    alpha[0, :, 0] = 0.0
    for d in range(len(x) - 1):
        torch.add(alpha[d], y[d], out=alpha[d + 1])
        alpha[d + 1, :, 1:] = torch.logaddexp(alpha[d + 1, :, 1:], alpha[d, :, :-1] + x[d, :, :-1])
    return alpha


def _backward(x: Tensor, y: Tensor, end: Tensor) -> Tensor:
    """Log probability of the end from each node: (T + S + 1, N, S + 2), the last diagonal and row never reaching it."""
    beta = x.new_full((x.shape[0] + 1, x.shape[1], x.shape[2] + 1), NEVER)
    for d in range(len(x) - 1, -1, -1):
        both = torch.logaddexp(y[d] + beta[d + 1, :, :-1], x[d] + beta[d + 1, :, 1:])
        beta[d, :, :-1] = torch.where(end[d], y[d], both)
    return beta


def _skewed(values: Tensor) -> Tensor:
    """(N, S + 1, T) -> (T + S, N, S + 1) float64: diagonal d holds node (s, d - s) of every row; NEVER where there is none."""
    items, rows, frames = values.shape
    flat = F.pad(values.double(), (0, rows), value=NEVER).flatten(1)  # cutting it into shorter rows shifts row s by s
    return flat[:, : rows * (frames + rows - 1)].reshape(items, rows, -1).permute(2, 0, 1).contiguous()


def _straight(values: Tensor, frames: int) -> Tensor:
    """Undo `_skewed`."""
    _, items, rows = values.shape
    flat = F.pad(values.permute(1, 2, 0).flatten(1), (0, rows))
    return flat.view(items, rows, frames + rows)[..., :frames]


def joint_lattice(logits: Tensor, labels: Tensor, ranges: Tensor) -> Lattice:
    """The lattice of a joint network, from the rows that it was asked about.

    Args:
        logits: (N, T, R, V) unnormalised. labels: (N, S) symbols, anything at padding. ranges: (N, T, R) rows, see `whole_range` and `band`.
    """
    frames, longest = logits.shape[1], labels.shape[1]
    norm = logits.logsumexp(dim=3)
    following = F.pad(labels.clamp(min=0), (0, 1), value=BLANK)[:, None].expand(-1, frames, -1).gather(2, ranges)
    said = logits.gather(3, following[..., None]).squeeze(3) - norm
    outside = logits.new_full((len(logits), frames, longest + 1), NEVER)
    x, y = (outside.scatter(2, ranges, edge).transpose(1, 2) for edge in (said, logits[..., BLANK] - norm))
    return Lattice(x, y)


def simple_lattice(am: Tensor, lm: Tensor, labels: Tensor, lens: Lens, *, lm_scale: float, am_scale: float) -> Lattice:
    """The lattice of a joint network that only adds, which costs a matrix product and no (N, T, S, V) (arXiv:2206.13236, section 3.1).

    Of its log probabilities, a share `lm_scale` is replaced by those of `lm` alone, and a share `am_scale` by those of `am` with the mean
    distribution of `lm` over the batch (section 3.2).

    Args:
        am: (N, T, V) float32 from the frames. lm: (N, S + 1, V) from the symbols before. labels: (N, S), anything at padding.
    """
    am_max, lm_max = am.amax(dim=2, keepdim=True), lm.amax(dim=2, keepdim=True)
    am_probs, lm_probs = (am - am_max).exp(), (lm - lm_max).exp()
    tiny = torch.finfo(am.dtype).tiny
    with torch.autocast(am.device.type, enabled=False):
        norm = ((lm_probs @ am_probs.transpose(1, 2)) + tiny).log() + lm_max + am_max.transpose(1, 2)  # (N, S + 1, T)
    following = F.pad(labels.clamp(min=0), (0, 1), value=BLANK)  # (N, S + 1)
    am_edges = am.gather(2, following[:, None].expand(-1, am.shape[1], -1)).transpose(1, 2), am[..., BLANK][:, None]
    lm_edges = lm.gather(2, following[..., None]), lm[..., BLANK][..., None]
    both = [a + b - norm for a, b in zip(am_edges, lm_edges)]
    alone = [b - lm.logsumexp(dim=2, keepdim=True) for b in lm_edges]
    edges = [(1 - lm_scale - am_scale) * edge + lm_scale * other for edge, other in zip(both, alone)]
    if am_scale:
        valid = torch.arange(lm.shape[1], device=lm.device) <= lens.symbols[:, None]
        mean = lm.softmax(dim=2)[valid].mean(dim=0) + tiny  # (V,)
        am_norm = ((am_probs * mean).sum(dim=2).log() + am_max.squeeze(2))[:, None]  # (N, 1, T)
        prior = mean.log()
        edges = [edge + am_scale * (a + b - am_norm) for edge, a, b in zip(edges, am_edges, (prior[following][..., None], prior[BLANK]))]
    return Lattice(*(edge.expand(-1, lm.shape[1], am.shape[1]) for edge in edges))


def whole_range(labels: Tensor, frames: int) -> Tensor:
    """(N, T, S + 1): every row at every frame."""
    return torch.arange(labels.shape[1] + 1, device=labels.device).expand(len(labels), frames, -1)


def band(paths: Paths, lens: Lens, rows: int) -> Tensor:
    """The R = min(`rows`, S + 1) neighbouring rows of each frame through which most paths go (arXiv:2206.13236, section 3.3).

    A band that begins with row p holds the blanks of rows p to p + R - 1, less what comes into it by symbol p of this frame, which only
    rows below can say. Beginnings start at row 0, never fall, rise by at most R - 1 a frame, and the last band holds the last row, wherever
    that many frames can reach it.

    Args:
        paths: of a lattice without a band. rows: at least 2.
    Returns:
        (N, T, R) int64 rows.
    """
    count, longest, frames = min(rows, paths.blanks.shape[1]), paths.blanks.shape[1], paths.blanks.shape[2]
    summed = F.pad(paths.blanks.cumsum(dim=1), (0, 0, 1, 0))
    held = summed[:, count:] - summed[:, : longest - count + 1]
    held[:, 1:] -= paths.symbols[:, : longest - count]
    time = torch.arange(frames, device=held.device)
    last = (lens.symbols - count + 1).clamp(min=0)[:, None]
    begin = torch.where(time < lens.frames[:, None] - 1, held.argmax(dim=1), last)
    begin = _rising(begin)
    slack = (count - 1) * time
    begin = slack - _rising(slack - begin).clamp(min=0)
    return begin[..., None] + torch.arange(count, device=held.device)


def _rising(values: Tensor) -> Tensor:
    """The greatest sequences (N, T) that never fall and never exceed `values`."""
    return values.flip(1).cummin(dim=1).values.flip(1)
