"""Attention weights, computed once per layer, and the two modules that use them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from spear.models.tracing import is_compiling, is_tracing
from spear.models.zipformer.balancer import Balancer
from spear.models.zipformer.chance import happens
from spear.models.zipformer.gate import gated
from spear.models.zipformer.gradient import penalize_large, penalized_gradient
from spear.models.zipformer.init import scaled
from spear.models.zipformer.linear import Linear
from spear.models.zipformer.scheduled_float import Schedule, ScheduledModule, schedule
from spear.models.zipformer.whiten import Whiten

MASKED_SCORE = -1000.0
SCORE_LIMIT, SCORE_PENALTY, PENALTY_PROB = 25.0, 1.0e-4, 0.1
POSITION_SKIP = schedule((0, 0.5), (4000, 0.0))


def softmax(scores: Tensor) -> Tensor:
    """Softmax over the last dimension in the dtype of `scores`, forward and backward computed in float32, keeping only its output."""
    if is_tracing():
        return scores.float().softmax(dim=-1).to(scores.dtype) if is_compiling() else scores.softmax(dim=-1)  # the name exporters know
    result: Tensor = torch.ops.aten._softmax(scores, -1, False)  # unlike torch.softmax, never recast by autocast
    return result


def shift_to_offsets(scores: Tensor, num_keys: int) -> Tensor:
    """Move scores of relative positions to the keys they belong to, as a view.

    Args:
        scores: (N, H, T, T + S - 1), contiguous; column r belongs to the offset r - (S - 1).
    Returns:
        (N, H, T, S): entry (t, s) is the score of key s seen from query t, the queries being the last T of the S keys.
    """
    n, heads, t, rows = scores.shape
    if is_tracing():  # lengths are symbols, about which nothing can be proved that the views below need
        columns = torch.arange(num_keys, device=scores.device) + torch.arange(t - 1, -1, -1, device=scores.device)[:, None]
        return scores.gather(3, columns.expand(n, heads, -1, -1))
    if t == 1:
        return scores
    flat = scores.reshape(n, heads, t * rows)[..., t - 1 : t - 1 + t * (rows - 1)]
    return flat.view(n, heads, t, rows - 1)[..., :num_keys]


class _AddShifted(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, scores: Tensor, pos_scores: Tensor) -> Tensor:
        ctx.rows = pos_scores.shape[-1]
        return scores + shift_to_offsets(pos_scores, scores.shape[-1])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        grad_pos = grad.new_zeros(*grad.shape[:3], ctx.rows)
        shift_to_offsets(grad_pos, grad.shape[-1]).copy_(grad)
        return grad, grad_pos


def add_shifted(scores: Tensor, pos_scores: Tensor) -> Tensor:
    """`scores` (N, H, T, S) plus the position scores (N, H, T, T + S - 1) of `shift_to_offsets`."""
    if is_compiling():
        added: Tensor = torch.ops.spear.add_shifted(scores, pos_scores)
        return added
    if torch.is_grad_enabled() and scores.requires_grad:
        result: Tensor = _AddShifted.apply(scores, pos_scores)
        return result
    return scores + shift_to_offsets(pos_scores, scores.shape[-1])


class AttentionWeights(ScheduledModule):
    """Softmax of content scores plus relative position scores, without a 1 / sqrt(d) factor (it is in the initial weights)."""

    def __init__(self, dim: int, *, pos_dim: int, num_heads: int, query_head_dim: int, pos_head_dim: int) -> None:
        super().__init__()
        self.num_heads, self.query_head_dim, self.pos_head_dim = num_heads, query_head_dim, pos_head_dim
        self.in_proj = scaled(Linear(dim, (2 * query_head_dim + pos_head_dim) * num_heads), query_head_dim**-0.25)
        self.linear_pos = scaled(Linear(pos_dim, num_heads * pos_head_dim, bias=False), 0.05)
        self.balance_keys = Balancer(min_positive=0.4, max_positive=0.6, min_abs=0.0, max_abs=100.0, prob=0.025)
        self.whiten_keys = Whiten(schedule((0, 3.0), (20000, 6.0), default=3.0), num_groups=num_heads, grad_scale=0.025)
        self.pos_emb_skip_rate: Schedule | float = POSITION_SKIP

    def forward(self, x: Tensor, positions: Tensor, mask: Tensor | None) -> Tensor:
        """Weights of every frame for every frame.

        Args:
            x: (N, T, D). positions: (2 T - 1, P). mask: bool, broadcastable to (N, 1, T, T), True where a key is hidden.
        Returns:
            (N, H, T, T), rows sum to one.
        """
        return self._weights(*self._project(x), positions, mask)

    def stream(self, x: Tensor, positions: Tensor, mask: Tensor, cached_keys: Tensor) -> tuple[Tensor, Tensor]:
        """Weights of T new frames for L cached and T new ones.

        Args:
            x: (N, T, D). positions: (2 T + L - 1, P). mask: (N, 1, 1, L + T) bool. cached_keys: (N, L, H q).
        Returns:
            weights (N, H, T, L + T), the keys to cache (N, L, H q).
        """
        queries, keys, pos_queries = self._project(x)
        keys = torch.cat((cached_keys, keys), dim=1)
        return self._weights(queries, keys, pos_queries, positions, mask), keys[:, keys.shape[1] - cached_keys.shape[1] :]

    def _project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        width = self.query_head_dim * self.num_heads
        queries, keys, pos_queries = self.in_proj(x).split((width, width, self.pos_head_dim * self.num_heads), dim=-1)
        return queries, self.whiten_keys(self.balance_keys(keys)), pos_queries

    def _weights(self, queries: Tensor, keys: Tensor, pos_queries: Tensor, positions: Tensor, mask: Tensor | None) -> Tensor:
        heads = (self.num_heads, -1)
        queries = queries.unflatten(-1, heads).transpose(1, 2)  # (N, H, T, q)
        keys = keys.unflatten(-1, heads).permute(0, 2, 3, 1)  # (N, H, q, S)
        scores = queries @ keys  # (N, H, T, S)
        if self.training and is_compiling():
            encodings = self.linear_pos(positions * self.later("pos_emb_skip_rate", positions[None])[0]).unflatten(-1, heads).permute(1, 2, 0)
            scores = self.deferred(add_shifted(scores, pos_queries.unflatten(-1, heads).transpose(1, 2) @ encodings))
            return self._softmax(scores, mask)
        if self.training and happens(self.value(self.pos_emb_skip_rate)):
            # an exact zero that keeps linear_pos in the graph: all ranks must reduce gradients of the same parameters
            scores = scores + 0.0 * self.linear_pos.weight.sum()
        else:
            encodings = self.linear_pos(positions).unflatten(-1, heads).permute(1, 2, 0)  # (H, p, T + S - 1)
            pos_queries = pos_queries.unflatten(-1, heads).transpose(1, 2)  # (N, H, T, p)
            scores = add_shifted(scores, pos_queries @ encodings)
        if self.training and scores.requires_grad and happens(PENALTY_PROB):
            scores = penalize_large(scores, SCORE_LIMIT, SCORE_PENALTY)
        return self._softmax(scores, mask)

    def pull(self, x: Tensor, grad: Tensor) -> Tensor:
        """See ScheduledModule; x are the scores."""
        return penalized_gradient(x, grad, SCORE_LIMIT, SCORE_PENALTY) if happens(PENALTY_PROB) else grad

    def _softmax(self, scores: Tensor, mask: Tensor | None) -> Tensor:
        if mask is not None:
            scores = scores.masked_fill(mask, MASKED_SCORE)
        return softmax(scores)


class SelfAttention(nn.Module):
    """Values of all heads, averaged with given weights."""

    def __init__(self, dim: int, *, num_heads: int, value_head_dim: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.in_proj = Linear(dim, num_heads * value_head_dim)
        self.out_proj = scaled(Linear(num_heads * value_head_dim, dim), 0.05)
        self.whiten = Whiten(schedule((0, 7.5), (20000, 22.5), default=7.5))

    def forward(self, x: Tensor, weights: Tensor) -> Tensor:
        """x: (N, T, D), weights: (N, H, T, T) -> (N, T, D)."""
        return self._attend(self.in_proj(x), weights)

    def stream(self, x: Tensor, weights: Tensor, cached_values: Tensor) -> tuple[Tensor, Tensor]:
        """x: (N, T, D), weights: (N, H, T, L + T), cached_values: (N, L, H v) -> (N, T, D), values to cache."""
        values = torch.cat((cached_values, self.in_proj(x)), dim=1)
        return self._attend(values, weights), values[:, values.shape[1] - cached_values.shape[1] :]

    def _attend(self, values: Tensor, weights: Tensor) -> Tensor:
        values = values.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)  # (N, H, S, v)
        mixed = (weights @ values).transpose(1, 2).flatten(2)  # (N, T, H v)
        out: Tensor = self.whiten(self.out_proj(mixed))
        return out


class NonlinAttention(nn.Module):
    """Frames averaged with the weights of one head, between two gates."""

    def __init__(self, dim: int, hidden_dim: int) -> None:
        super().__init__()
        self.in_proj = Linear(dim, 3 * hidden_dim)
        self.out_proj = scaled(Linear(hidden_dim, dim), 0.05)
        self.balancer = Balancer(
            min_positive=schedule((0, 0.25), (20000, 0.05)), max_positive=schedule((0, 0.75), (20000, 0.95)), min_abs=0.5, max_abs=5.0
        )
        self.whiten1 = Whiten(schedule((0, 5.0), (20000, 10.0), default=5.0))
        self.whiten2 = Whiten(schedule((0, 5.0), (20000, 15.0), default=5.0))

    def forward(self, x: Tensor, weights: Tensor) -> Tensor:
        """x: (N, T, D), weights: (N, T, T) of one head -> (N, T, D)."""
        frames, gate = self._gated(x)
        return self._mix(frames, gate, weights)

    def stream(self, x: Tensor, weights: Tensor, cached: Tensor) -> tuple[Tensor, Tensor]:
        """x: (N, T, D), weights: (N, T, L + T), cached: (N, L, h) gated frames -> (N, T, D), frames to cache."""
        frames, gate = self._gated(x)
        frames = torch.cat((cached, frames), dim=1)
        return self._mix(frames, gate, weights), frames[:, frames.shape[1] - cached.shape[1] :]

    def _gated(self, x: Tensor) -> tuple[Tensor, Tensor]:
        s, value, gate = self.in_proj(x).chunk(3, dim=-1)
        return gated(self.whiten1(value), self.balancer(s), "tanh"), gate

    def _mix(self, frames: Tensor, gate: Tensor, weights: Tensor) -> Tensor:
        out: Tensor = self.whiten2(self.out_proj((weights @ frames) * gate))
        return out
