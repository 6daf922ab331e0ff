"""Streaming inference: one chunk at a time, with the past in caches."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple, cast

import torch
from torch import Tensor

from spear.errors import ConfigError, DataError
from spear.models.zipformer.config import StackConfig
from spear.models.zipformer.downsample import upsample
from spear.models.zipformer.encoder import ZipformerEncoder, fit_channels
from spear.models.zipformer.layer import ZipformerLayer
from spear.models.zipformer.stack import DownsampledStack, Stack
from spear.models.zipformer.subsampling import CONVNEXT_REACH, output_width

EXTRA_FRAMES = 13
"""Frames at 100 Hz a step needs beyond two per output frame: 7 for the convolutions, 6 for the ConvNeXt block's future."""


class LayerState(NamedTuple):
    """Caches of one layer; L is the left context at the layer's rate.

    keys: (N, L, H q). nonlin: (N, L, h). values1, values2: (N, L, H v). conv1, conv2: (N, K // 2, D).
    """

    keys: Tensor
    nonlin: Tensor
    values1: Tensor
    values2: Tensor
    conv1: Tensor
    conv2: Tensor


class StreamState(NamedTuple):
    """embed: (N, channels, 3, W) cache of the front end. processed: (N,) frames at 50 Hz so far. layers: of all stacks, in order."""

    embed: Tensor
    processed: Tensor
    layers: list[LayerState]


class StreamOutput(NamedTuple):
    """embed: (N, chunk, D) front end at 50 Hz. features: (N, T, D) at the output rate. lens: (N,) valid output frames."""

    embed: Tensor
    features: Tensor
    lens: Tensor
    state: StreamState


def _choice(name: str, wanted: int | None, known: tuple[int, ...]) -> int:
    usable = [value for value in known if value > 0]
    if wanted is None and len(known) == 1 and usable:
        return usable[0]
    if wanted is None:
        raise ConfigError(f"`{name}` must be one positive number for streaming, but is {list(known)}: choose one")
    if wanted not in usable:
        raise ConfigError(f"`{name}` must be one of {usable}, which the encoder was trained with, but is {wanted}")
    return wanted


class ZipformerStream:
    """Runs a causal encoder chunk by chunk; the results are those of the chunk-masked offline pass.

    step_frames: input frames (100 Hz) of one step. hop_frames: how far the input moves on between steps.

    Args:
        encoder: in eval mode. chunk_size, left_context_frames: at 50 Hz, one of those in its config; None where that has only one.
    Raises:
        ConfigError: the encoder is not causal, or its config has no such chunk size or left context.
    """

    def __init__(self, encoder: ZipformerEncoder, chunk_size: int | None = None, left_context_frames: int | None = None) -> None:
        config = encoder.config
        if not config.causal:
            raise ConfigError("`causal` must be true for streaming, but is false")
        self.encoder = encoder
        self.chunk = _choice("chunk_size", chunk_size, config.chunk_sizes)
        self.left = self.chunk * max(1, _choice("left_context_frames", left_context_frames, config.left_contexts) // self.chunk)  # as chunk masks
        self.hop_frames = 2 * self.chunk
        self.step_frames = self.hop_frames + EXTRA_FRAMES

    def start(self, batch_size: int = 1) -> StreamState:
        """The state before the first chunk: caches of zeros."""
        config = self.encoder.config
        like = self.encoder.mask_emb
        embed = like.new_zeros(batch_size, config.conv_channels[2], CONVNEXT_REACH, output_width(config.num_mel_bins))
        layers = [self._empty(stack, batch_size, like) for stack in config.stacks() for _ in range(stack.num_layers)]
        return StreamState(embed, torch.zeros(batch_size, dtype=torch.int64, device=like.device), layers)

    @torch.no_grad()
    def step(self, features: Tensor, lens: Tensor, state: StreamState) -> StreamOutput:
        """Encode one chunk.

        Args:
            features: (N, step_frames, F) log-mels, hop_frames after those of the last step; past an item's end LOG_EPSILON.
            lens: (N,) valid frames among them.
        Raises:
            DataError: wrong number of frames (cause ``shape``).
        """
        if features.shape[1] != self.step_frames:
            raise DataError(f"a step takes {self.step_frames} log-mel frames, but got {features.shape[1]}", cause="shape")
        front = self.encoder.encoder_embed
        middle, embed_cache = front.convnext.stream(front.conv(front.image(features)), state.embed)
        embed = front.finish(middle)
        lens = ((lens - 7) // 2 - CONVNEXT_REACH).clamp(min=0)
        positions = torch.arange(self.chunk, device=lens.device)
        unfilled = state.processed[:, None] <= torch.arange(self.left - 1, -1, -1, device=lens.device)
        hidden = torch.cat((unfilled, positions >= lens[:, None]), dim=1)  # (N, left + chunk)
        x, outputs = embed, []
        layers: list[LayerState] = []
        caches = iter(state.layers)
        for config, stack in zip(self.encoder.encoder.stacks, self.encoder.encoder.encoders):
            x = fit_channels(x, config.dim)
            x = self._stack(stack, x, hidden, caches, layers)
            outputs.append(x)
        out, out_lens = self.encoder.encoder.finish(outputs, lens)
        return StreamOutput(embed, out, out_lens, StreamState(embed_cache, state.processed + lens, layers))

    def _stack(self, module: torch.nn.Module, x: Tensor, hidden: Tensor, caches: Iterator[LayerState], new: list[LayerState]) -> Tensor:
        inner: Tensor = x
        factor, stack = 1, module
        if isinstance(module, DownsampledStack):
            factor, stack = module.factor, module.encoder
            inner = module.downsample(x)
        if not isinstance(stack, Stack):
            raise TypeError(f"{type(stack).__name__} is not a stack")
        size, left = inner.shape[1], self.left // factor
        mask = hidden[:, ::factor][:, -(left + size) :]
        positions = stack.positions(size, left + size, x.device)
        for layer in stack.layers:
            inner, state = layer_step(cast("ZipformerLayer", layer), inner, positions, mask, next(caches))
            new.append(state)
        if not isinstance(module, DownsampledStack):
            return inner
        combined: Tensor = module.out_combiner(x, upsample(inner, factor, x.shape[1]))
        return combined

    def _empty(self, stack: StackConfig, n: int, like: Tensor) -> LayerState:
        left = self.left // stack.downsampling
        heads = stack.num_heads
        values, kernel = (n, left, heads * stack.value_head_dim), (n, stack.kernel // 2, stack.dim)
        shapes = ((n, left, heads * stack.query_head_dim), (n, left, 3 * stack.dim // 4), values, values, kernel, kernel)
        return LayerState(*(like.new_zeros(shape) for shape in shapes))


def layer_step(layer: ZipformerLayer, x: Tensor, positions: Tensor, mask: Tensor, state: LayerState) -> tuple[Tensor, LayerState]:
    """One layer on one chunk.

    Args:
        x: (N, T, D). positions: (2 T + L - 1, P). mask: (N, L + T) bool, True where a cached or new frame does not exist.
    Returns:
        (N, T, D), the caches for the next chunk.
    """
    padding = mask[:, mask.shape[1] - x.shape[1] :]
    orig = x
    weights, keys = layer.self_attn_weights.stream(x, positions, mask[:, None, None], state.keys)
    x = x + layer.feed_forward1(x)
    branch, nonlin = layer.nonlin_attention.stream(x, weights[:, 0], state.nonlin)
    x = x + branch
    branch, values1 = layer.self_attn1.stream(x, weights, state.values1)
    x = x + branch
    branch, conv1 = layer.conv_module1.stream(x, padding, state.conv1)
    x = x + branch
    x = x + layer.feed_forward2(x)
    x = layer.bypass_mid(orig, x)
    branch, values2 = layer.self_attn2.stream(x, weights, state.values2)
    x = x + branch
    branch, conv2 = layer.conv_module2.stream(x, padding, state.conv2)
    x = x + branch
    x = x + layer.feed_forward3(x)
    return layer.bypass(orig, layer.norm(x)), LayerState(keys, nonlin, values1, values2, conv1, conv2)
