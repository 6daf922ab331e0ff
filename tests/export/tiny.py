"""A small Zipformer with weights far from their initial values, and audio for it."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from spear.export import AudioEncoder
from spear.models.zipformer.config import ZipformerConfig

SIZES: dict[str, Any] = {
    "downsampling_factor": (1, 2),
    "num_encoder_layers": (1, 1),
    "encoder_dim": (32, 48),
    "encoder_unmasked_dim": (16, 24),
    "feedforward_dim": (64, 48),
    "num_heads": (2, 4),
    "query_head_dim": 8,
    "value_head_dim": 6,
    "cnn_module_kernel": (7, 5),
}


def tiny_config(**changes: Any) -> ZipformerConfig:
    """Two stacks of different sizes."""
    return ZipformerConfig(**{**SIZES, **changes})


def tiny_encoder(**changes: Any) -> AudioEncoder:
    """The same weights in every call with the same sizes; none is at a special value such as zero."""
    config = tiny_config(**changes)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(7)
        encoder = config.build()
        with torch.no_grad():
            for parameter in encoder.parameters():
                parameter.add_(torch.randn_like(parameter), alpha=0.05)
    return AudioEncoder(encoder, config).eval()


def tone(samples: int, hz: float = 300.0) -> Tensor:
    """(S,) a sine with a slow swell, so that frames differ."""
    time = torch.arange(samples, dtype=torch.float32) / 16000
    return 0.3 * torch.sin(2 * math.pi * hz * time) * torch.sin(2 * math.pi * 1.7 * time + 0.4)
