"""Log-mel energies under HEAR and X-ARES, as a baseline beside an export; S3PRL has its own (``-u fbank``)."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

from spear.evaluation.embedders import LogMel


class _Frames(nn.Module):
    sample_rate = sampling_rate = 16000
    scene_embedding_size = timestamp_embedding_size = output_dim = 128
    hop_size_in_ms = 20.0

    def __init__(self) -> None:
        super().__init__()
        self.log_mel = LogMel()

    def forward(self, audio: Tensor) -> Tensor:
        return torch.from_numpy(np.stack([layers[0] for layers in self.log_mel.embed_batch(list(audio.numpy()))]))


class LogMelEncoder(_Frames):
    """For X-ARES."""


def load_model(model_file_path: str = "") -> nn.Module:
    """For HEAR; there is nothing to load."""
    return _Frames()


def get_timestamp_embeddings(audio: Tensor, model: nn.Module) -> tuple[Tensor, Tensor]:
    """(N, S) -> (N, T, 128) and the centres in ms (N, T)."""
    frames = model(audio)
    times = 10.0 + 20.0 * torch.arange(frames.shape[1], dtype=torch.float32)
    return frames, times.expand(len(frames), -1).contiguous()


def get_scene_embeddings(audio: Tensor, model: nn.Module) -> Tensor:
    """(N, S) -> (N, 128)."""
    return model(audio).mean(dim=1)
