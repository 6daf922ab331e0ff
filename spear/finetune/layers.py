"""Which layers a head reads, how frames become one vector, and at what rate each layer learns."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from spear.models.base import Encoder
from spear.types import EncoderOutput, StudentOutput


class LayerMix(nn.Module):
    """The encoder's output, or ``sum_l softmax(w)_l x_l`` over the standardised frames of all layers (SUPERB, arXiv:2105.01051, section 3.3).

    Args:
        dim: of the encoder's output. layer_dims: of its layers. layers: ``last`` or ``weighted``.
    """

    def __init__(self, dim: int, layer_dims: Sequence[int], layers: Literal["last", "weighted"]) -> None:
        super().__init__()
        self.dim = dim if layers == "last" else max(layer_dims)
        self.weights = nn.Parameter(torch.zeros(len(layer_dims))) if layers == "weighted" else None

    def forward(self, output: StudentOutput | EncoderOutput) -> tuple[Tensor, Tensor]:
        """Frames (N, T, D) at the encoder's rate and lens (N,); a layer narrower than the widest is filled up with zeros."""
        if self.weights is None:
            return output.features, output.lens
        frames = output.features.shape[1]
        states = []
        for state in output.hidden_states:
            group = -(-state.shape[1] // frames)
            if group > 1:
                missing = group * frames - state.shape[1]
                state = torch.cat([state, state[:, -1:].expand(-1, missing, -1)], dim=1).unflatten(1, (frames, group)).mean(dim=2)
            states.append(F.pad(F.layer_norm(state, state.shape[-1:]), (0, self.dim - state.shape[2])))
        return torch.einsum("l,lntd->ntd", self.weights.softmax(0).to(states[0].dtype), torch.stack(states)), output.lens


class AttentiveStatistics(nn.Module):
    """Mean and standard deviation over time with weights per frame and channel (ECAPA-TDNN, arXiv:2005.07143, section 3.1).

    Args:
        dim: D of the frames. hidden: width of the attention.
    """

    def __init__(self, dim: int, hidden: int = 128) -> None:
        super().__init__()
        self.inner = nn.Linear(3 * dim, hidden)
        self.outer = nn.Linear(hidden, dim)

    def forward(self, frames: Tensor, lens: Tensor) -> Tensor:
        """frames (N, T, D), lens (N,) -> (N, 2 D)."""
        hidden = torch.arange(frames.shape[1], device=frames.device) >= lens[:, None]  # (N, T)
        even = (~hidden)[:, :, None].to(frames.dtype) / lens[:, None, None].to(frames.dtype)
        mean, deviation = weighted_statistics(frames, even)
        context = torch.cat([frames, mean[:, None].expand_as(frames), deviation[:, None].expand_as(frames)], dim=2)
        scores = self.outer(torch.tanh(self.inner(context))).masked_fill(hidden[:, :, None], float("-inf"))
        return torch.cat(weighted_statistics(frames, scores.softmax(dim=1)), dim=1)


def weighted_statistics(frames: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation (N, D) of frames (N, T, D) with weights (N, T, D or 1) that sum to one over time."""
    mean = (weights * frames).sum(dim=1)
    variance = (weights * (frames - mean[:, None]).square()).sum(dim=1)
    return mean, variance.clamp(min=1e-7).sqrt()


def layers_of(encoder: Encoder) -> list[nn.Module]:
    """The encoder's layers, first one first."""
    lists = [module for name, module in encoder.named_modules() if name.rpartition(".")[2] == "layers" and isinstance(module, nn.ModuleList)]
    return [layer for found in lists for layer in found]


def set_rates(encoder: Encoder, lr_scale: float, layer_decay: float) -> None:
    """Give the encoder's parts their share of the learning rate (`lr_scale` of `spear.training.optim.base.parameter_groups`).

    Layer l of L has ``lr_scale layer_decay^(L - 1 - l)``, the front end ``lr_scale layer_decay^L``, everything else `lr_scale`. With a
    scale of 0 the encoder takes no gradient.
    """
    if lr_scale == 0:
        encoder.requires_grad_(False)
        return
    encoder.lr_scale = lr_scale  # type: ignore[assignment]
    if layer_decay == 1:
        return
    layers = layers_of(encoder)
    for i, layer in enumerate(layers):
        layer.lr_scale = layer_decay ** (len(layers) - 1 - i)  # type: ignore[assignment]
    for name in encoder.front_end:
        encoder.get_submodule(name).lr_scale = layer_decay ** len(layers)  # type: ignore[assignment]
