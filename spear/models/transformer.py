"""A pre-norm Transformer student, for the ablation of the encoder."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn
from torch.nn import functional as F

from spear.models.rotary import RotaryAttention
from spear.models.uniform import UniformConfig, UniformEncoder, UniformLayer
from spear.models.zipformer.init import scaled


@dataclass(frozen=True, kw_only=True, slots=True)
class TransformerConfig(UniformConfig):
    """Pre-norm Transformer with rotary positions; the defaults have 93.0 M parameters, about as many as SPEAR Base."""

    def build(self) -> UniformEncoder:
        """Make the encoder with fresh weights drawn from torch's global generator."""
        return UniformEncoder(self, [TransformerLayer(self) for _ in range(self.num_layers)], nn.LayerNorm(self.dim))


class TransformerLayer(UniformLayer):
    """``x + attention(norm(x))``, then ``x + feed_forward(norm(x))`` (pre-norm: arXiv 2002.04745).

    The last linear of each branch starts small, by 1 / sqrt(number of branches), so that the sum of all branches does not grow with depth.
    """

    def __init__(self, config: UniformConfig) -> None:
        super().__init__()
        dim, share = config.dim, (2 * config.num_layers) ** -0.5
        self.dropout = config.dropout
        self.attention_norm = nn.LayerNorm(dim)
        self.attention = RotaryAttention(dim, config.num_heads, config.dropout)
        scaled(self.attention.out_proj, share)
        self.feed_forward_norm = nn.LayerNorm(dim)
        self.in_proj = nn.Linear(dim, config.feedforward_dim)
        self.out_proj = scaled(nn.Linear(config.feedforward_dim, dim), share)

    def forward(self, x: Tensor, positions: tuple[Tensor, Tensor], visible: Tensor | None, padding: Tensor | None) -> tuple[Tensor, Tensor]:
        """See UniformLayer."""
        x = x + self._drop(self.attention(self.attention_norm(x), positions, visible))
        hidden = self._drop(F.gelu(self.in_proj(self.feed_forward_norm(x))))
        branch = self.out_proj(hidden)
        return x + self._drop(branch), branch

    def _drop(self, x: Tensor) -> Tensor:
        return F.dropout(x, self.dropout, self.training)
