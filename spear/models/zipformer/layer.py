"""One Zipformer layer."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from spear.models.tracing import is_compiling
from spear.models.zipformer.attention import AttentionWeights, NonlinAttention, SelfAttention
from spear.models.zipformer.balancer import Balancer
from spear.models.zipformer.chance import drop_items, keep_mask
from spear.models.zipformer.config import StackConfig
from spear.models.zipformer.convolution import ConvolutionModule
from spear.models.zipformer.downsample import Bypass
from spear.models.zipformer.feedforward import FeedForward
from spear.models.zipformer.norm import BiasNorm
from spear.models.zipformer.scheduled_float import Schedule, ScheduledModule, schedule
from spear.models.zipformer.whiten import Whiten

ATTENTION_SKIP = CONV_SKIP = schedule((0, 0.2), (4000, 0.05), (16000, 0.0))
FEEDFORWARD_SKIP = schedule((0, 0.1), (4000, 0.01), (50000, 0.0))


class ZipformerLayer(ScheduledModule):
    """Attention weights once, then two blocks of modules that share them (Zipformer, arXiv 2310.11230, section 3.2)."""

    training_unit = True  # recomputed and spread over processes as one

    def __init__(self, config: StackConfig) -> None:
        super().__init__()
        dim, hidden = config.dim, config.feedforward_dim
        self.bypass = Bypass(dim)
        self.bypass_mid = Bypass(dim)
        # unused, but part of every released state dict
        self.bypass_scale = nn.Parameter(torch.full((dim,), 0.5), requires_grad=False)
        self.self_attn_weights = AttentionWeights(
            dim, pos_dim=config.pos_dim, num_heads=config.num_heads, query_head_dim=config.query_head_dim, pos_head_dim=config.pos_head_dim
        )
        self.self_attn1 = SelfAttention(dim, num_heads=config.num_heads, value_head_dim=config.value_head_dim)
        self.self_attn2 = SelfAttention(dim, num_heads=config.num_heads, value_head_dim=config.value_head_dim)
        self.feed_forward1 = FeedForward(dim, hidden * 3 // 4, config.dropout)
        self.feed_forward2 = FeedForward(dim, hidden, config.dropout)
        self.feed_forward3 = FeedForward(dim, hidden * 5 // 4, config.dropout)
        self.nonlin_attention = NonlinAttention(dim, 3 * dim // 4)
        self.conv_module1 = ConvolutionModule(dim, config.kernel, causal=config.causal)
        self.conv_module2 = ConvolutionModule(dim, config.kernel, causal=config.causal)
        self.norm = BiasNorm(dim)
        self.attention_skip_rate: Schedule | float = ATTENTION_SKIP
        self.conv_skip_rate: Schedule | float = CONV_SKIP
        self.ff2_skip_rate: Schedule | float = FEEDFORWARD_SKIP
        self.ff3_skip_rate: Schedule | float = FEEDFORWARD_SKIP
        self.balancer_na = _weak_balancer(schedule((0, 0.004), (4000, 0.02)), 100.0)
        self.balancer_ff2 = _weak_balancer(schedule((0, 0.0), (4000, 0.1)), 2.0)
        self.balancer_ff3 = _weak_balancer(schedule((0, 0.0), (4000, 0.2)), 4.0)
        self.balancer1 = Balancer(min_positive=0.45, max_positive=0.55, min_abs=0.2, max_abs=4.0)
        self.balancer2 = Balancer(min_positive=0.45, max_positive=0.55, min_abs=0.1, max_abs=4.0)
        self.whiten = Whiten(schedule((0, 4.0), (20000, 12.0), default=4.0))

    def forward(self, x: Tensor, positions: Tensor, mask: Tensor | None = None, padding_mask: Tensor | None = None, chunk_size: int = -1) -> Tensor:
        """One layer at the frame rate of its stack.

        Args:
            x: (N, T, D). positions: (2 T - 1, P). mask: bool, broadcastable to (N, 1, T, T), True where a key is hidden.
            padding_mask: (N, T). chunk_size: frames of a chunk of the causal convolutions, -1 for all.
        Returns:
            (N, T, D).
        """
        orig = x
        weights = self.self_attn_weights(x, positions, mask)
        attention_keep = self._attention_keep(x)
        x = x + self.feed_forward1(x)
        x = x + _kept(self.balancer_na(self.nonlin_attention(x, weights[:, 0])), attention_keep)
        x = x + _kept(self.self_attn1(x, weights), attention_keep)
        x = x + self._skip(self.conv_module1(x, padding_mask, chunk_size), "conv_skip_rate")
        x = x + self._skip(self.balancer_ff2(self.feed_forward2(x)), "ff2_skip_rate")
        x = self.bypass_mid(orig, x)
        x = x + _kept(self.self_attn2(x, weights), attention_keep)
        x = x + self._skip(self.conv_module2(x, padding_mask, chunk_size), "conv_skip_rate")
        x = x + self._skip(self.balancer_ff3(self.feed_forward3(x)), "ff3_skip_rate")
        x = self.bypass(orig, self.norm(self.balancer1(x)))
        out: Tensor = self.whiten(self.balancer2(x))
        return out

    def _attention_keep(self, x: Tensor) -> Tensor | None:
        if is_compiling():
            return self.later("attention_skip_rate", x) if self.training else None
        rate = self.value(self.attention_skip_rate) if self.training else 0.0
        return keep_mask((x.shape[0], 1, 1), rate, x) if rate > 0.0 else None

    def _skip(self, branch: Tensor, rate: str) -> Tensor:
        if is_compiling():
            return branch * self.later(rate, branch) if self.training else branch
        return drop_items(branch, self.value(getattr(self, rate))) if self.training else branch


def _weak_balancer(min_abs: Schedule, max_abs: float) -> Balancer:
    return Balancer(min_positive=0.3, max_positive=0.7, min_abs=min_abs, max_abs=max_abs, prob=0.05)


def _kept(branch: Tensor, keep: Tensor | None) -> Tensor:
    return branch if keep is None else branch * keep
