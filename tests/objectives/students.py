"""Small students and batches for the tests of objectives that teach themselves."""

from __future__ import annotations

from typing import Any

import torch

from spear.models.base import StudentConfig
from spear.models.conv_transformer import ConvTransformerConfig
from spear.models.masking import MaskConfig
from spear.models.student import Student
from spear.models.transformer import TransformerConfig
from spear.models.zipformer.config import ZipformerConfig
from spear.objectives import PretrainModule
from spear.objectives.base import ObjectiveConfig
from spear.types import LOG_EPSILON, Batch

MASKS = MaskConfig(time_prob=0.5, time_length=6, channel_prob=0.0)


def transformer(**changes: Any) -> TransformerConfig:
    """Four layers of width 16 on 16 mel bins."""
    sizes = {"num_mel_bins": 16, "conv_channels": (4, 4, 8), "num_layers": 4, "dim": 16, "num_heads": 2, "feedforward_dim": 24, "dropout": 0.0}
    return TransformerConfig(**{**sizes, **changes})


def conv_transformer(**changes: Any) -> ConvTransformerConfig:
    """Four layers of width 16 on samples."""
    sizes: dict[str, Any] = {
        "conv_dim": 8,
        "num_layers": 4,
        "dim": 16,
        "num_heads": 2,
        "feedforward_dim": 24,
        "position_layers": 2,
        "position_kernel": 5,
        "position_groups": 4,
    }
    return ConvTransformerConfig(**{**sizes, **changes})


def zipformer(**changes: Any) -> ZipformerConfig:
    """Three stacks of two widths."""
    sizes: dict[str, Any] = {
        "num_mel_bins": 16,
        "conv_channels": (4, 4, 8),
        "downsampling_factor": (1, 2, 1),
        "num_encoder_layers": 1,
        "encoder_dim": (16, 24, 16),
        "encoder_unmasked_dim": 16,
        "feedforward_dim": 24,
        "num_heads": 2,
        "query_head_dim": 8,
        "value_head_dim": 4,
        "cnn_module_kernel": 7,
    }
    return ZipformerConfig(**{**sizes, **changes})


def make_module(objective: ObjectiveConfig, student: StudentConfig | None = None, masks: MaskConfig = MASKS) -> PretrainModule:
    """A module in training mode, the same for the same settings."""
    torch.manual_seed(0)
    encoder = (student or transformer()).build()
    return PretrainModule(Student(encoder, masks), objective.build(encoder, {})).train()


def make_batch(g: int, lens: tuple[int, ...] = (90, 61, 75)) -> Batch:
    """Batch `g` of log-mels with padding."""
    generator = torch.Generator().manual_seed(g)
    features = torch.randn(len(lens), max(lens), 16, generator=generator)
    for row, length in zip(features, lens):
        row[length:] = LOG_EPSILON
    return Batch(
        ids=[f"cut-{g}-{i}" for i in range(len(lens))],
        domains=["speech"] * len(lens),
        features=features,
        feature_lens=torch.tensor(lens),
        seconds=sum(lens) / 100,
    )


def generator(seed: int) -> torch.Generator:
    """Draws masks."""
    return torch.Generator().manual_seed(seed)


def instance_norm(x: torch.Tensor) -> torch.Tensor:
    """Channels of x (T, D) with mean 0 and variance 1, in float64."""
    x = x.detach().double() - x.detach().double().mean(dim=0)
    variance = x.square().mean(dim=0)
    return (x / (variance + 1e-5 * variance.mean()).sqrt()).float()
