"""Initial weights that make a residual branch start small."""

from __future__ import annotations

from typing import TypeVar

import torch
from torch import nn

M = TypeVar("M", bound=nn.Linear | nn.Conv2d)


def scaled(module: M, scale: float) -> M:
    """Multiply the fresh weight of `module` by `scale` and redraw its bias from U(-0.1 scale, 0.1 scale); returns it."""
    with torch.no_grad():
        module.weight.mul_(scale)
        if module.bias is not None:
            module.bias.uniform_(-0.1 * scale, 0.1 * scale)
    return module
