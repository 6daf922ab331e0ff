"""A Conformer student (arXiv 2005.08100), for the ablation of the encoder."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn
from torch.nn import functional as F

from spear.errors import ConfigError
from spear.models.rotary import RotaryAttention
from spear.models.uniform import UniformConfig, UniformEncoder, UniformLayer
from spear.models.zipformer.convolution import DepthwiseConv1d
from spear.models.zipformer.init import scaled


@dataclass(frozen=True, kw_only=True, slots=True)
class ConformerConfig(UniformConfig):
    """Conformer with rotary positions; the defaults have 93.1 M parameters, about as many as SPEAR Base.

    Where the paper's convolution module has a batch norm, this one has a layer norm, so that no frame depends on the other items.
    """

    num_layers: int = 15
    """Layers."""
    dim: int = 512
    """Width of the frames."""
    num_heads: int = 8
    """Attention heads; `dim` is a multiple of twice their number."""
    feedforward_dim: int = 2048
    """Hidden width of the two feed-forward modules."""
    kernel: int = 31
    """Length of the depthwise filters over time, odd."""

    def __post_init__(self) -> None:
        UniformConfig.__post_init__(self)
        if self.kernel < 1 or self.kernel % 2 == 0:
            raise ConfigError(f"`kernel` must be odd and positive, but is {self.kernel}")

    def build(self) -> UniformEncoder:
        """Make the encoder with fresh weights drawn from torch's global generator."""
        return UniformEncoder(self, [ConformerLayer(self) for _ in range(self.num_layers)], nn.Identity())


class ConformerLayer(UniformLayer):
    """Half a feed-forward module, attention, convolution, half a feed-forward module, each after a layer norm; a layer norm at the end."""

    def __init__(self, config: ConformerConfig) -> None:
        super().__init__()
        dim, share = config.dim, (4 * config.num_layers) ** -0.5
        self.dropout = config.dropout
        self.feed_forward1 = _FeedForward(config, share)
        self.attention_norm = nn.LayerNorm(dim)
        self.attention = RotaryAttention(dim, config.num_heads, config.dropout)
        scaled(self.attention.out_proj, share)
        self.conv = _Convolution(dim, config.kernel, share)
        self.feed_forward2 = _FeedForward(config, share)
        self.norm = nn.LayerNorm(dim)

    def forward(self, x: Tensor, positions: tuple[Tensor, Tensor], visible: Tensor | None, padding: Tensor | None) -> tuple[Tensor, Tensor]:
        """See UniformLayer."""
        x = x + 0.5 * self._drop(self.feed_forward1(x))
        x = x + self._drop(self.attention(self.attention_norm(x), positions, visible))
        x = x + self._drop(self.conv(x, padding))
        branch = self.feed_forward2(x)
        return self.norm(x + 0.5 * self._drop(branch)), branch

    def _drop(self, x: Tensor) -> Tensor:
        return F.dropout(x, self.dropout, self.training)


class _FeedForward(nn.Module):
    """Layer norm, linear, SiLU, dropout, linear."""

    def __init__(self, config: ConformerConfig, share: float) -> None:
        super().__init__()
        self.dropout = config.dropout
        self.norm = nn.LayerNorm(config.dim)
        self.in_proj = nn.Linear(config.dim, config.feedforward_dim)
        self.out_proj = scaled(nn.Linear(config.feedforward_dim, config.dim), share)

    def forward(self, x: Tensor) -> Tensor:
        """x: (N, T, D) -> (N, T, D)."""
        hidden = F.dropout(F.silu(self.in_proj(self.norm(x))), self.dropout, self.training)
        out: Tensor = self.out_proj(hidden)
        return out


class _Convolution(nn.Module):
    """Layer norm, gated linear unit, depthwise convolution over time, layer norm, SiLU, linear."""

    def __init__(self, dim: int, kernel: int, share: float) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim)
        self.in_proj = nn.Linear(dim, 2 * dim)
        self.depthwise_conv = DepthwiseConv1d(dim, kernel, kernel // 2)
        self.depthwise_norm = nn.LayerNorm(dim)
        self.out_proj = scaled(nn.Linear(dim, dim), share)

    def forward(self, x: Tensor, padding: Tensor | None) -> Tensor:
        """x: (N, T, D), padding: (N, T) bool -> (N, T, D)."""
        gated = F.glu(self.in_proj(self.norm(x)))
        if padding is not None:
            gated = gated.masked_fill(padding[:, :, None], 0.0)
        out: Tensor = self.out_proj(F.silu(self.depthwise_norm(self.depthwise_conv(gated))))
        return out
