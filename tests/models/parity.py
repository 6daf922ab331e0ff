"""Reading the reference outputs that the parity tests compare with."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from spear.models.zipformer import StackConfig, ZipformerConfig

Tensors = dict[str, Tensor]


def read(folder: Path, name: str) -> tuple[Tensors, dict[str, str]]:
    """Tensors and metadata of a fixture file."""
    with safe_open(folder / f"{name}.safetensors", framework="pt") as file:
        return {key: file.get_tensor(key) for key in file.keys()}, file.metadata()  # noqa: SIM118 - not a mapping


def under(tensors: Tensors, prefix: str) -> Tensors:
    """Entries whose name starts with `prefix`, without it."""
    return {key[len(prefix) :]: value for key, value in tensors.items() if key.startswith(prefix)}


def loaded(module: nn.Module, state: Tensors) -> nn.Module:
    """`module` in eval mode with exactly the given parameters."""
    module.load_state_dict(state, strict=True)
    return module.eval()


def config_of(metadata: dict[str, str]) -> ZipformerConfig:
    """The ZipformerConfig a fixture describes."""
    raw: dict[str, Any] = json.loads(metadata["config"])
    return ZipformerConfig(**{key: tuple(value) if isinstance(value, list) else value for key, value in raw.items()})


def layer_config(**changes: Any) -> StackConfig:
    """One layer of the sizes of the layer fixtures."""
    settings: dict[str, Any] = {
        "downsampling": 1,
        "num_layers": 1,
        "dim": 64,
        "unmasked_dim": 64,
        "feedforward_dim": 128,
        "num_heads": 4,
        "query_head_dim": 16,
        "pos_head_dim": 4,
        "value_head_dim": 12,
        "kernel": 15,
        "pos_dim": 48,
        "causal": False,
        "dropout": 0.0,
    }
    return StackConfig(**{**settings, **changes})


def difference(found: Tensor, expected: Tensor) -> float:
    """Largest absolute difference; the shapes must agree."""
    assert found.shape == expected.shape, (found.shape, expected.shape)
    return float((found.detach() - expected).abs().max())


def assert_near(found: Tensor, expected: Tensor, tolerance: float) -> None:
    """Fail unless shapes agree and every element is within `tolerance`."""
    assert difference(found, expected) <= tolerance


def batch_first(x: Tensor) -> Tensor:
    """(T, N, C) of the fixtures to (N, T, C)."""
    return x.transpose(0, 1).contiguous()


TINY: dict[str, Any] = {
    "num_mel_bins": 20,
    "conv_channels": (2, 3, 4),
    "downsampling_factor": (1, 2),
    "num_encoder_layers": (1, 2),
    "encoder_dim": (16, 24),
    "encoder_unmasked_dim": (8, 12),
    "feedforward_dim": 16,
    "num_heads": 2,
    "query_head_dim": 4,
    "pos_head_dim": 2,
    "value_head_dim": 4,
    "cnn_module_kernel": (5, 3),
    "pos_dim": 8,
}
"""Keyword arguments of a ZipformerConfig that runs in milliseconds."""


def tiny_config(**changes: Any) -> ZipformerConfig:
    """A config that runs in milliseconds."""
    return ZipformerConfig(**{**TINY, **changes})


def random_batch(lens: list[int], num_mel_bins: int = 20, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Seeded features (N, T, F) padded with zeros, and their lens."""
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(len(lens), max(lens), num_mel_bins, generator=generator)
    for row, length in zip(features, lens):
        row[length:] = 0.0
    return features, torch.tensor(lens)
