"""A stack of equal layers, at the full frame rate or at a reduced one."""

from __future__ import annotations

import copy

from torch import Tensor, nn

from spear.models.zipformer.config import StackConfig
from spear.models.zipformer.downsample import Bypass, Downsample, upsample
from spear.models.zipformer.layer import ZipformerLayer
from spear.models.zipformer.position import RelativePositions
from spear.models.zipformer.scheduled_float import schedule


class Stack(nn.Module):
    """Layers that start as copies of one another, with one table of positions."""

    def __init__(self, config: StackConfig) -> None:
        super().__init__()
        self.pos_dim = config.pos_dim
        self.positions = RelativePositions(config.pos_dim)
        template = ZipformerLayer(config)
        layers = [template, *(copy.deepcopy(template) for _ in range(config.num_layers - 1))]
        step = (config.warmup_end - config.warmup_begin) / config.num_layers
        for k, layer in enumerate(layers):
            begin = config.warmup_begin + k * step
            layer.bypass.skip_rate = schedule((begin, 0.5), (begin + step, 0.035 * config.downsampling**0.5))
        self.layers = nn.ModuleList(layers)

    def forward(
        self,
        x: Tensor,
        *,
        mask: Tensor | None = None,
        padding_mask: Tensor | None = None,
        chunk_size: int = -1,
        feature_mask: Tensor | None = None,
    ) -> tuple[Tensor, list[Tensor]]:
        """Run all layers.

        Args:
            x: (N, T, D) at the rate of the layers. mask: bool, broadcastable to (N, 1, T, T), True where a key is hidden.
            padding_mask: (N, T). chunk_size: in frames of this rate. feature_mask: (N, 1, D) zeros and ones.
        Returns:
            output (N, T, D), the outputs of the layers before the feature mask.
        """
        positions = self.positions(x.shape[1], x.shape[1], x.device)
        hidden: list[Tensor] = []
        if feature_mask is not None:
            x = x * feature_mask
        for layer in self.layers:
            x = layer(x, positions, mask, padding_mask, chunk_size)
            hidden.append(x)
            if feature_mask is not None:
                x = x * feature_mask
        return x, hidden


class DownsampledStack(nn.Module):
    """A stack between a downsampling and an upsampling, mixed with its input."""

    def __init__(self, config: StackConfig) -> None:
        super().__init__()
        self.factor = config.downsampling
        self.downsample = Downsample(config.downsampling)
        self.encoder = Stack(config)
        self.out_combiner = Bypass(config.dim)

    def forward(
        self,
        x: Tensor,
        *,
        mask: Tensor | None = None,
        padding_mask: Tensor | None = None,
        chunk_size: int = -1,
        feature_mask: Tensor | None = None,
    ) -> tuple[Tensor, list[Tensor]]:
        """As `Stack.forward`, with all arguments and results at the full rate.

        The layers' outputs are repeated to the full rate and taken before the mix with the input.
        """
        ds, t = self.factor, x.shape[1]
        if mask is not None:
            mask = mask[..., ::ds, ::ds]
        inner, hidden = self.encoder(
            self.downsample(x),
            mask=mask,
            padding_mask=None if padding_mask is None else padding_mask[:, ::ds],
            chunk_size=chunk_size // ds,
            feature_mask=feature_mask,
        )
        new = upsample(inner, ds, t)
        raised = [new if state is inner else upsample(state, ds, t) for state in hidden]
        return self.out_combiner(x, new), raised
