"""Codebooks that follow the frames they quantize while training runs (DinoSR, arXiv:2305.10005, section 3.2), as one batched tensor."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

USAGE_DECAY = 0.99
"""Share of the old that an update keeps in the statistics of which codes are used: they tell of about the last hundred updates."""
LEAST_SHARE = 0.01
"""A code is active if it has this share of an even share of the frames."""
IDLE_SHARE = 0.1
"""`OnlineCodebooks.split` moves codes that have less than this share of an even share of the frames."""
BESIDE = 0.1
"""A code that is moved lies this share of its own length from the code that it halves."""


class OnlineCodebooks(nn.Module):
    """L codebooks of K entries of width D; entry k of book l is ``sums[l, k] / counts[l, k]``.

    An update gathers hits n and sums of frames over all its batches and processes, and moves the codes that were hit:
    ``count = decay count + (1 - decay) n``, ``sum = decay sum + (1 - decay) sum of frames``. A code that was not hit keeps both.
    All processes hold the same books. Entries start as Gaussian noise, each channel with mean 0 and variance 1 over the entries, and count 1.

    Args:
        num_books: L. size: K. dim: D. decay: share of the old that a code keeps.
    """

    sums: Tensor
    counts: Tensor
    usage: Tensor
    recent: Tensor
    pending: Tensor

    def __init__(self, num_books: int, size: int, dim: int, decay: float) -> None:
        super().__init__()
        self.num_books, self.size, self.dim, self.decay = num_books, size, dim, decay
        noise = torch.randn(num_books, size, dim)
        noise = noise - noise.mean(dim=1, keepdim=True)
        self.register_buffer("sums", noise * (noise.var(dim=1, keepdim=True, correction=0) + 1e-5).rsqrt())
        self.register_buffer("counts", torch.ones(num_books, size))
        self.register_buffer("usage", torch.zeros(2, num_books, size))  # shares of targets and of guesses
        self.register_buffer("recent", torch.zeros(num_books, size))  # hits since `split`
        # what the batches of the running update add up to: sums (L, K, D), hits and guesses (L, K) each, in one row for one reduction
        self.register_buffer("pending", torch.zeros(num_books * size * (dim + 2)), persistent=False)

    def entries(self) -> Tensor:
        """(L, K, D) float32."""
        return self.sums / self.counts[:, :, None]

    @torch.no_grad()
    def assign(self, frames: Tensor) -> Tensor:
        """Codes (L, M) int64 of the nearest entries to frames (L, M, D) float32."""
        with torch.autocast(frames.device.type, enabled=False):
            entries = self.entries()
            lengths = entries.square().sum(dim=2)[:, None]  # (L, 1, K)
            return torch.baddbmm(lengths, frames, entries.transpose(1, 2), alpha=-2.0).argmin(dim=2)

    @torch.no_grad()
    def collect(self, frames: Tensor, codes: Tensor, guesses: Tensor, weight: Tensor) -> None:
        """Take note of a batch; nothing moves before `update`.

        Args:
            frames: (L, M, D) float32. codes, guesses: (L, M) codes of the frames and what the student took them for. weight: (M,) ones and zeros.
        """
        sums, hits, guessed = self._parts()
        sums += _sums_by_code(frames, codes, weight, self.size)
        for target, found in ((hits, codes), (guessed, guesses)):
            target.scatter_add_(1, found, weight.expand(self.num_books, -1))

    @torch.no_grad()
    def update(self) -> None:
        """Move the books by what was collected; every process must call it, and all meet in one reduction."""
        if dist.is_available() and dist.is_initialized():
            dist.all_reduce(self.pending)
        sums, hits, guessed = self._parts()
        hit = hits > 0
        self.counts.copy_(torch.where(hit, torch.lerp(hits, self.counts, self.decay), self.counts))
        self.sums.copy_(torch.where(hit[:, :, None], torch.lerp(sums, self.sums, self.decay), self.sums))
        shares = torch.stack([hits, guessed])
        shares = shares / shares.sum(dim=2, keepdim=True).clamp(min=1)
        self.usage.lerp_(shares, 1 - USAGE_DECAY)
        self.recent.add_(hits)
        self.discard()

    @torch.no_grad()
    def split(self) -> None:
        """Move codes that were hardly hit since the last call beside those that were hit most, which give half of their count.

        The r-th idle code of a book goes to the r-th of the others. What it was tells in which direction, so that all processes agree.
        """
        idle = self.recent < IDLE_SHARE / self.size * self.recent.sum(dim=1, keepdim=True)  # (L, K)
        rank = idle.cumsum(dim=1) - 1
        moves = idle & (rank < (~idle).sum(dim=1, keepdim=True))
        donors = self.recent.argsort(dim=1, descending=True, stable=True).gather(1, rank.clamp(min=0))
        gives = torch.zeros_like(self.counts).scatter_add_(1, donors, moves.float())  # 0 or 1
        counts = torch.where(moves, self.counts.gather(1, donors), self.counts) * torch.where(moves | (gives > 0), 0.5, 1.0)
        entries = self.entries()
        beside = entries.gather(1, donors[:, :, None].expand_as(entries)) + BESIDE * entries
        self.sums.copy_(torch.where(moves[:, :, None], beside, entries) * counts[:, :, None])
        self.counts.copy_(counts)
        self.recent.zero_()

    def discard(self) -> None:
        """Forget what was collected since the last update."""
        self.pending.zero_()

    @torch.no_grad()
    def measure(self, codes: Tensor, guesses: Tensor, weight: Tensor) -> Tensor:
        """(2, L, K) shares of the codes of one batch (arguments as `collect`)."""
        hits = torch.zeros_like(self.usage)
        for target, found in zip(hits, (codes, guesses)):
            target.scatter_add_(1, found, weight.expand(self.num_books, -1))
        return hits / hits.sum(dim=2, keepdim=True).clamp(min=1)

    def _parts(self) -> tuple[Tensor, Tensor, Tensor]:
        """Views of `pending`: sums (L, K, D), hits (L, K), guesses (L, K)."""
        books, size, dim = self.num_books, self.size, self.dim
        sums, hits, guessed = self.pending.split([books * size * dim, books * size, books * size])
        return sums.view(books, size, dim), hits.view(books, size), guessed.view(books, size)


def perplexities(shares: Tensor) -> tuple[Tensor, Tensor]:
    """Perplexity ``exp(-sum p ln p)`` and number of active codes of shares (..., K), which are scaled to a sum of 1 first; both (...)."""
    p = shares / shares.sum(dim=-1, keepdim=True).clamp(min=1e-12)
    entropy = -torch.special.xlogy(p, p).sum(dim=-1)
    return entropy.exp(), (p > LEAST_SHARE / shares.shape[-1]).sum(dim=-1).float()


def _sums_by_code(frames: Tensor, codes: Tensor, weight: Tensor, size: int) -> Tensor:
    """(L, K, D) sums of the weighted frames (L, M, D) of each code (L, M).

    On a CPU by addition in order of the frames; elsewhere as a product with the codes' indicators, as additions there have no fixed order.
    """
    books, _, dim = frames.shape
    if frames.device.type == "cpu":
        rows = (codes + size * torch.arange(books)[:, None]).flatten()
        return frames.new_zeros(books * size, dim).index_add_(0, rows, (frames * weight[:, None]).flatten(0, 1)).view(books, size, dim)
    with torch.autocast(frames.device.type, enabled=False):
        chosen = F.one_hot(codes, size).to(frames.dtype) * weight[:, None]  # (L, M, K)
        return torch.bmm(chosen.transpose(1, 2), frames)
