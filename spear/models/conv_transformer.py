"""The encoder of wav2vec 2.0, HuBERT and SpidR: strided convolutions over samples, then a post-norm Transformer."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from spear.bounds import at_least
from spear.errors import ConfigError
from spear.models.base import Encoder, StudentConfig
from spear.models.zipformer.chance import draw
from spear.types import EncoderOutput

SAMPLES_PER_FRAME = 160
"""Samples in one frame of the input."""
SAMPLE_RATE = 16000


@dataclass(frozen=True, kw_only=True, slots=True)
class ConvTransformerConfig(StudentConfig):
    """Base of SpidR and DinoSR (arXiv:2305.10005), 93.1 M parameters; HuBERT and WavLM Base differ in details that docs/recipes.md names."""

    conv_dim: int = 512
    """Channels of the convolutions over samples."""
    conv_kernels: tuple[int, ...] = (10, 3, 3, 3, 3, 2, 2)
    """Lengths of their filters."""
    conv_strides: tuple[int, ...] = (5, 2, 2, 2, 2, 2, 2)
    """Their strides; the product is the hop in samples, a multiple of 160."""
    conv_gradient: float = 1.0
    """Factor on the gradient that reaches the convolutions; HuBERT takes 0.1."""
    num_layers: int = 12
    """Transformer layers."""
    dim: int = 768
    """Width of the frames."""
    num_heads: int = 12
    """Attention heads."""
    feedforward_dim: int = 3072
    """Hidden width of a feed-forward module."""
    position_layers: int = 5
    """Convolutions that give the frames their positions."""
    position_kernel: int = 19
    """Length of their filters, odd."""
    position_groups: int = 16
    """Groups of their channels."""
    qkv_bias: bool = False
    """Whether queries, keys and values have a bias."""
    dropout: float = 0.1
    """Dropout of attention weights and branches, and before the first layer."""
    layer_drop: float = 0.0
    """Probability that a batch skips a layer in training. With `training.parallel: fsdp` the layer is computed all the same, and left out."""

    def __post_init__(self) -> None:
        for name in ("conv_dim", "num_layers", "dim", "num_heads", "feedforward_dim", "position_layers", "position_groups"):
            at_least(name, getattr(self, name), 1)
        if len(self.conv_kernels) != len(self.conv_strides) or not self.conv_kernels or min(*self.conv_kernels, *self.conv_strides) < 1:
            found = f"{list(self.conv_kernels)} and {list(self.conv_strides)}"
            raise ConfigError(f"`conv_kernels` and `conv_strides` must be as many positive numbers, but are {found}")
        if self.hop % SAMPLES_PER_FRAME:
            raise ConfigError(f"`conv_strides` must have a product that is a multiple of {SAMPLES_PER_FRAME}, but it is {self.hop}")
        for name in ("num_heads", "position_groups"):
            if self.dim % getattr(self, name):
                raise ConfigError(f"`dim` must be a multiple of `{name}` {getattr(self, name)}, but is {self.dim}")
        if self.position_kernel < 1 or self.position_kernel % 2 == 0:
            raise ConfigError(f"`position_kernel` must be odd and positive, but is {self.position_kernel}")
        for name in ("dropout", "layer_drop"):
            if not 0.0 <= getattr(self, name) < 1.0:
                raise ConfigError(f"`{name}` must be at least 0 and below 1, but is {getattr(self, name)}")
        if not 0.0 <= self.conv_gradient <= 1.0:
            raise ConfigError(f"`conv_gradient` must be between 0 and 1, but is {self.conv_gradient}")

    @property
    def hop(self) -> int:
        """Samples from one frame of the output to the next."""
        return math.prod(self.conv_strides)

    @property
    def field(self) -> int:
        """Samples that one frame of the output sees of the input, before attention."""
        seen = 1
        for kernel, stride in zip(reversed(self.conv_kernels), reversed(self.conv_strides)):
            seen = (seen - 1) * stride + kernel
        return seen

    def grid(self) -> int:
        """See StudentConfig."""
        return self.hop // SAMPLES_PER_FRAME

    def build(self) -> ConvTransformer:
        """Make the encoder with fresh weights drawn from torch's global generator."""
        return ConvTransformer(self)


class ConvFrontEnd(nn.Module):
    """Strided convolutions without padding, each with a layer norm over channels and GELU; then layer norm and a linear to the width."""

    def __init__(self, config: ConvTransformerConfig) -> None:
        super().__init__()
        self.convs, self.norms = nn.ModuleList(), nn.ModuleList()
        channels = 1
        for kernel, stride in zip(config.conv_kernels, config.conv_strides):
            conv = nn.Conv1d(channels, config.conv_dim, kernel, stride, bias=False)
            nn.init.kaiming_normal_(conv.weight)
            self.convs.append(conv)
            self.norms.append(nn.LayerNorm(config.conv_dim))
            channels = config.conv_dim
        self.norm = nn.LayerNorm(config.conv_dim)
        self.proj = _linear(config.conv_dim, config.dim)
        self.gradient = config.conv_gradient

    def forward(self, audio: Tensor) -> Tensor:
        """audio: (N, S) -> (N, T, D)."""
        x = audio[:, None]
        for conv, norm in zip(self.convs, self.norms):
            x = F.gelu(norm(conv(x).transpose(1, 2)).transpose(1, 2))
        x = x.transpose(1, 2)
        if self.gradient < 1.0:
            x = x.detach() + self.gradient * (x - x.detach())
        out: Tensor = self.proj(self.norm(x))
        return out


class Positions(nn.Module):
    """Grouped convolutions over time, each with a layer norm without weights and GELU, added to the frames (data2vec, arXiv:2202.03555)."""

    def __init__(self, config: ConvTransformerConfig) -> None:
        super().__init__()
        kernel, groups = config.position_kernel, config.position_groups
        self.dim = config.dim
        self.convs = nn.ModuleList(
            nn.Conv1d(config.dim, config.dim, kernel, padding=kernel // 2, groups=groups) for _ in range(config.position_layers)
        )

    def forward(self, x: Tensor, padding: Tensor) -> Tensor:
        """x: (N, T, D), padding: (N, T, 1) bool -> (N, T, D); padded frames are zeros for every convolution."""
        added = x
        for conv in self.convs:
            added = conv(added.masked_fill(padding, 0.0).transpose(1, 2)).transpose(1, 2)
            added = F.gelu(F.layer_norm(added, (self.dim,)))
        return x + added


class PostNormLayer(nn.Module):
    """``x = norm(x + attention(x))``, then ``x = norm(x + feed_forward(x))``."""

    training_unit = True  # recomputed and spread over processes as one

    def __init__(self, config: ConvTransformerConfig) -> None:
        super().__init__()
        self.num_heads, self.dropout = config.num_heads, config.dropout
        self.qkv_proj = _linear(config.dim, 3 * config.dim, bias=config.qkv_bias)
        self.attention_proj = _linear(config.dim, config.dim)
        self.attention_norm = nn.LayerNorm(config.dim)
        self.in_proj = _linear(config.dim, config.feedforward_dim)
        self.out_proj = _linear(config.feedforward_dim, config.dim)
        self.norm = nn.LayerNorm(config.dim)

    def forward(self, x: Tensor, visible: Tensor) -> tuple[Tensor, Tensor]:
        """x: (N, T, D), visible: (N, 1, 1, T) bool, True at keys that exist -> the layer's output, and its feed-forward module's, (N, T, D)."""
        queries, keys, values = self.qkv_proj(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)  # (N, H, T, d) each
        mixed = F.scaled_dot_product_attention(queries, keys, values, attn_mask=visible, dropout_p=self.dropout if self.training else 0.0)
        x = self.attention_norm(x + self._drop(self.attention_proj(mixed.transpose(1, 2).flatten(2))))
        branch = self.out_proj(F.gelu(self.in_proj(x)))
        return self.norm(x + self._drop(branch)), branch

    def _drop(self, x: Tensor) -> Tensor:
        return F.dropout(x, self.dropout, self.training)


class ConvTransformer(Encoder):
    """Frames of 160 samples to features, at 50 Hz with the default strides.

    The samples of an utterance are brought to mean 0 and variance 1 first. Masks cover frames after the convolutions. Padding is never seen.
    """

    reads = "samples"
    num_mel_bins = SAMPLES_PER_FRAME
    sample_rate = SAMPLE_RATE
    taps = ("block_output", "ffn_pre_residual")
    front_end = ("conv_front_end",)
    position_parts = ("positions",)

    def __init__(self, config: ConvTransformerConfig) -> None:
        super().__init__()
        self.config = config
        self.frame_rate_hz = SAMPLE_RATE / config.hop
        self.first_frame_s = config.field / 2 / SAMPLE_RATE
        self.dim, self.num_layers = config.dim, config.num_layers
        self.layer_dims = [config.dim] * config.num_layers
        self.uses_all = config.layer_drop == 0.0
        self.min_fbank_frames = -(-config.field // SAMPLES_PER_FRAME)
        self.mask_emb = nn.Parameter(torch.empty(config.dim).uniform_())
        self.conv_front_end = ConvFrontEnd(config)
        self.positions = Positions(config)
        self.norm = nn.LayerNorm(config.dim)
        self.layers = nn.ModuleList(PostNormLayer(config) for _ in range(config.num_layers))

    def output_frames(self, frames: int) -> int:
        """See Encoder: floor((160 frames - field) / hop) + 1."""
        return max(0, (frames * SAMPLES_PER_FRAME - self.config.field) // self.config.hop + 1)

    def output_lens(self, lens: Tensor) -> Tensor:
        """`output_frames` of (N,) lengths."""
        return torch.div(lens * SAMPLES_PER_FRAME - self.config.field, self.config.hop, rounding_mode="floor") + 1

    def mask_size(self, features: Tensor, lens: Tensor) -> tuple[Tensor, int, int]:
        """See Encoder: the frames of the output and their width."""
        return self.output_lens(lens), self.output_frames(features.shape[1]), self.dim

    def forward_masked(self, features: Tensor, lens: Tensor, time: Tensor, channel: Tensor) -> EncoderOutput:
        """See Encoder."""
        output: EncoderOutput = self(features, lens, time, channel)
        return output

    def masked_share(self, time: Tensor, num_frames: int) -> Tensor:
        """See Encoder: a frame is masked or not."""
        return time[:, :num_frames].float()

    def forward(self, features: Tensor, lens: Tensor, time: Tensor | None = None, channel: Tensor | None = None) -> EncoderOutput:
        """Encode a padded batch.

        Args:
            features: (N, T100, 160) samples. lens: (N,) int64 valid frames of them. time: (N, T) and channel: (N, D) bool, what to hide.
        Returns:
            features (N, T, D), the output of the last layer; hidden_states: (N, T, D) of every layer, at the tap. Padded frames hold values
            without meaning.
        Raises:
            DataError: another width (cause ``shape``), or an item that is shorter than the field of one frame (cause ``too_short``).
        """
        self.check_input(features, lens)
        x = self.conv_front_end(normalise_samples(features, lens))
        out_lens = self.output_lens(lens)
        if time is not None:
            x = torch.where(time[:, :, None], self.mask_emb.to(x.dtype), x)
        if channel is not None:
            x = x.masked_fill(channel[:, None], 0.0)
        exists = torch.arange(x.shape[1], device=x.device) < out_lens[:, None]
        x = F.dropout(self.norm(self.positions(x, ~exists[:, :, None])), self.config.dropout, self.training)
        hidden = []
        for layer in self.layers:
            if self.training and self.config.layer_drop > 0.0 and draw() < self.config.layer_drop:
                x, branch = self._skip(layer, x, exists[:, None, None]), torch.zeros_like(x)
            else:
                x, branch = layer(x, exists[:, None, None])
            hidden.append({"block_output": x, "ffn_pre_residual": branch}[self.tap])
        return EncoderOutput(x, out_lens, tuple(hidden))

    def _skip(self, layer: nn.Module, x: Tensor, visible: Tensor) -> Tensor:
        """x. Where all layers must run, this one does beside it, without a trace in the draws of the others."""
        if not self.runs_all_layers:
            return x
        with torch.random.fork_rng(devices=[x.device] if x.device.type == "cuda" else []):
            unused, _ = layer(x, visible)
        kept: Tensor = _Beside.apply(x, unused)
        return kept


class _Beside(torch.autograd.Function):
    """The first of two tensors of one shape; the second gets a gradient of zeros."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, unused: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        return grad, torch.zeros_like(grad)


def normalise_samples(frames: Tensor, lens: Tensor) -> Tensor:
    """Samples (N, S) float32 of frames (N, T, 160), with mean 0 and variance 1 over each item's valid ones and zeros past them."""
    x = frames.float()
    exists = (torch.arange(x.shape[1], device=x.device) < lens[:, None])[:, :, None]
    count = (lens * x.shape[2])[:, None, None]
    x = torch.where(exists, x, 0.0)
    x = torch.where(exists, x - x.sum(dim=(1, 2), keepdim=True) / count, 0.0)
    variance = x.square().sum(dim=(1, 2), keepdim=True) / count
    return (x * (variance + 1e-5).rsqrt()).flatten(1)


def _linear(inputs: int, outputs: int, *, bias: bool = True) -> nn.Linear:
    """Weights N(0, 0.02), bias 0, as in BERT."""
    linear = nn.Linear(inputs, outputs, bias=bias)
    nn.init.normal_(linear.weight, std=0.02)
    if bias:
        nn.init.zeros_(linear.bias)
    return linear
