"""The Zipformer encoder: front end, stacks at several frame rates, and their outputs as one."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from spear.models.base import FBANK_FIRST_FRAME_S, Encoder
from spear.models.zipformer.chance import draw, onto
from spear.models.zipformer.chunks import Chunking, attention_mask, padding_mask
from spear.models.zipformer.config import StackConfig, ZipformerConfig
from spear.models.zipformer.downsample import Downsample
from spear.models.zipformer.scheduled_float import set_batch_count
from spear.models.zipformer.stack import DownsampledStack, Stack
from spear.models.zipformer.subsampling import MIN_FRAMES, Conv2dSubsampling
from spear.types import EncoderOutput

FEATURE_MASK_PROB = 0.125


class ZipformerOutput(NamedTuple):
    """features: (N, T, D) at the output rate; lens: (N,); stacks, layers: outputs of all stacks and all layers at 50 Hz."""

    features: Tensor
    lens: Tensor
    stacks: list[Tensor]
    layers: list[Tensor]


def fit_channels(x: Tensor, dim: int) -> Tensor:
    """Keep the first `dim` channels of x (N, T, D), or append zeros."""
    width = x.shape[-1]
    return x[..., :dim] if width >= dim else nn.functional.pad(x, (0, dim - width))


def join_channels(outputs: list[Tensor]) -> Tensor:
    """The last output, completed to the widest one by the upper channels of the most recent wider outputs."""
    pieces = [outputs[-1]]
    width = outputs[-1].shape[-1]
    for output in reversed(outputs[:-1]):
        if output.shape[-1] > width:
            pieces.append(output[..., width:])
            width = output.shape[-1]
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim=-1)


def feature_masks(stacks: list[StackConfig], x: Tensor) -> list[Tensor]:
    """Draw which items lose their upper channels, the same for all stacks.

    The upper half of the channels beyond `unmasked_dim` is lost more often than the lower half. Zeros and ones (N, 1, D), one per stack.
    """
    lower = torch.rand(x.shape[0], 1, 1) > FEATURE_MASK_PROB
    upper = lower & (torch.rand(x.shape[0], 1, 1) > FEATURE_MASK_PROB)
    masks = []
    for stack in stacks:
        half = (stack.dim - stack.unmasked_dim) // 2
        widths = (stack.unmasked_dim, half, stack.dim - stack.unmasked_dim - half)
        parts = (torch.ones_like(lower), lower, upper)
        mask = torch.cat([part.expand(-1, -1, width) for part, width in zip(parts, widths)], dim=-1)
        masks.append(onto(mask, x))
    return masks


class Zipformer(nn.Module):
    """The stacks and the joint output."""

    def __init__(self, config: ZipformerConfig) -> None:
        super().__init__()
        self.config = config
        self.stacks = config.stacks()
        self.encoders = nn.ModuleList(DownsampledStack(s) if s.downsampling > 1 else Stack(s) for s in self.stacks)
        if config.output_downsampling_factor == 2:
            self.downsample_output = Downsample(2)

    def forward(self, x: Tensor, lens: Tensor, chunking: Chunking | None = None) -> ZipformerOutput:
        """x: (N, T, D) at 50 Hz, lens: (N,) valid frames; chunking: overrides the choice of a causal encoder."""
        chunking = chunking or self.choose_chunking()
        padding = padding_mask(lens, x.shape[1])
        mask = attention_mask(padding, chunking, x.shape[1], x.device)
        masks: list[Tensor] | None = feature_masks(self.stacks, x) if self.training and self.config.feature_mask else None
        outputs: list[Tensor] = []
        layers: list[Tensor] = []
        for i, (stack, encoder) in enumerate(zip(self.stacks, self.encoders)):
            x = fit_channels(x, stack.dim)
            feature_mask = None if masks is None else masks[i]
            x, hidden = encoder(x, mask=mask, padding_mask=padding, chunk_size=chunking.size, feature_mask=feature_mask)
            outputs.append(x)
            layers.extend(hidden)
        features, lens = self.finish(outputs, lens)
        return ZipformerOutput(features, lens, outputs, layers)

    def finish(self, outputs: list[Tensor], lens: Tensor) -> tuple[Tensor, Tensor]:
        """Join the outputs of all stacks and bring them to the output rate."""
        x = join_channels(outputs)
        if self.config.output_downsampling_factor == 2:
            return self.downsample_output(x), (lens + 1) // 2
        return x, lens

    def choose_chunking(self) -> Chunking:
        """Chunk size and left context of this batch: drawn in training, the first ones otherwise."""
        if not self.config.causal:
            return Chunking(-1, -1)
        size = self._choose(self.config.chunk_sizes)
        if size == -1:
            return Chunking(-1, -1)
        left = self._choose(self.config.left_contexts)
        return Chunking(size, -1 if left == -1 else max(1, left // size))

    def _choose(self, options: tuple[int, ...]) -> int:
        return options[int(draw() * len(options))] if self.training and len(options) > 1 else options[0]


class ZipformerEncoder(Encoder):
    """Log-mels at 100 Hz to features at 50 or 25 Hz, with the state dict of the released SPEAR models."""

    min_fbank_frames = MIN_FRAMES
    sample_rate = 16000
    front_end = ("encoder_embed",)
    uses_all = True

    def __init__(self, config: ZipformerConfig) -> None:
        super().__init__()
        stacks = config.stacks()
        self.config = config
        self.num_mel_bins = config.num_mel_bins
        self.frame_rate_hz = 50.0 / config.output_downsampling_factor
        # an output frame is centred on its fbank frame 4, or between its frames 4 and 6
        self.first_frame_s = FBANK_FIRST_FRAME_S + 0.03 + 0.01 * config.output_downsampling_factor
        self.dim = max(stack.dim for stack in stacks)
        self.layer_dims = [stack.dim for stack in stacks for _ in range(stack.num_layers)]
        self.num_layers = len(self.layer_dims)
        self.mask_emb = nn.Parameter(torch.empty(config.num_mel_bins).normal_())
        self.encoder_embed = Conv2dSubsampling(config.num_mel_bins, stacks[0].dim, tuple(config.conv_channels), config.dropout)
        self.encoder = Zipformer(config)

    def forward(self, features: Tensor, lens: Tensor) -> EncoderOutput:
        """Encode a padded batch.

        Args:
            features: (N, T, F) log-mels at 100 Hz, padded with LOG_EPSILON. lens: (N,) int64 valid frames.
        Returns:
            features at the output rate; hidden_states: (N, T, D_l) of every layer at 50 Hz. Padded frames hold values without meaning.
        Raises:
            DataError: wrong number of bins (cause ``shape``), or an item of less than 9 frames (cause ``too_short``).
        """
        self.check_input(features, lens)
        x, lens = self.encoder_embed(features, lens)
        out = self.encoder(x, lens)
        return EncoderOutput(out.features, out.lens, tuple(out.layers))

    def set_batch_count(self, count: float) -> None:
        """Move all schedules to `count` plus the offset of the config."""
        set_batch_count(self, count + self.config.schedule_offset)
