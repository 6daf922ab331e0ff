"""Low-rank adapters (LoRA, Hu et al., arXiv:2106.09685): the encoder stays as it is but for a product of two thin matrices per linear layer.

The package peft puts a layer of its own around a linear layer. Here functions that keep less for the backward pass read the weights of five of
a Zipformer layer's eighteen maps themselves, so that such an adapter would learn nothing and nobody would be told. So the weight itself is what is
adapted, by `torch.nn.utils.parametrize`: whoever reads it reads the sum.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from spear.bounds import above, at_least
from spear.errors import ConfigError


@dataclass(frozen=True, kw_only=True, slots=True)
class LoRAConfig:
    """Train thin matrices beside the encoder's linear layers, and nothing else of it."""

    rank: int = 8
    """Width of the thin matrices."""
    alpha: float = 16.0
    """Their product is added `alpha / rank` times."""
    modules: str = ""
    """Regular expression that is found in the names of the layers to adapt, such as ``self_attn``; empty: every linear layer."""

    def __post_init__(self) -> None:
        at_least("rank", self.rank, 1)
        above("alpha", self.alpha, 0)
        try:
            re.compile(self.modules)
        except re.error as error:
            raise ConfigError(f"`modules` must be a regular expression, but {self.modules!r} is none: {error}") from error


class LowRank(nn.Module):
    """``W + alpha / rank B A``: A (rank, in) is drawn, B (out, rank) starts at zero (arXiv:2106.09685, section 4.1)."""

    def __init__(self, weight: Tensor, config: LoRAConfig) -> None:
        super().__init__()
        self.scale = config.alpha / config.rank
        self.a = nn.Parameter(weight.new_empty(config.rank, weight.shape[1]))
        self.b = nn.Parameter(weight.new_zeros(weight.shape[0], config.rank))
        nn.init.kaiming_uniform_(self.a, a=math.sqrt(5))

    def forward(self, weight: Tensor) -> Tensor:
        """(out, in) -> (out, in)."""
        with torch.autocast(weight.device.type, enabled=False):
            return torch.addmm(weight, self.b, self.a, alpha=self.scale)


def add_adapters(encoder: nn.Module, config: LoRAConfig) -> int:
    """Freeze the encoder and give its linear layers adapters that learn; what it says stays the same.

    Returns:
        number of layers with an adapter.
    Raises:
        ConfigError: `modules` fits none.
    """
    chosen = [layer for name, layer in encoder.named_modules() if isinstance(layer, nn.Linear) and re.search(config.modules, name)]
    if not chosen:
        raise ConfigError(f"`encoder.lora.modules` must fit the name of a linear layer of the encoder, but {config.modules!r} fits none")
    encoder.requires_grad_(False)
    for layer in chosen:
        parametrize.register_parametrization(layer, "weight", LowRank(layer.weight, config))
    return len(chosen)


def merge_adapters(encoder: nn.Module) -> None:
    """Add the products to the weights and take the adapters away, in place; an encoder without adapters stays as it is."""
    for layer in list(encoder.modules()):
        if isinstance(layer, nn.Linear) and parametrize.is_parametrized(layer, "weight"):
            parametrize.remove_parametrizations(layer, "weight", leave_parametrized=True)
