"""Masks over frames: padding, and the chunks of a causal encoder."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from spear.models.tracing import is_tracing


class Chunking(NamedTuple):
    """size: frames of a chunk at 50 Hz, -1 for one chunk; left_chunks: chunks before it that a chunk sees, -1 for all."""

    size: int
    left_chunks: int


def padding_mask(lens: Tensor, num_frames: int) -> Tensor | None:
    """(N, T) bool, True at padding; None where it is known without waiting for a GPU that there is none."""
    if not is_tracing() and lens.device.type == "cpu" and bool((lens >= num_frames).all()):
        return None
    return torch.arange(num_frames, device=lens.device) >= lens[:, None]


def chunk_mask(num_frames: int, chunking: Chunking, device: torch.device) -> Tensor:
    """(T, T) bool, rows are queries: True at keys of later chunks and of chunks further back than `left_chunks`."""
    chunk = torch.arange(num_frames, device=device) // chunking.size
    hidden = chunk[None, :] > chunk[:, None]
    if chunking.left_chunks >= 0:
        hidden = hidden | (chunk[None, :] < chunk[:, None] - chunking.left_chunks)
    return hidden


def attention_mask(padding: Tensor | None, chunking: Chunking, num_frames: int, device: torch.device) -> Tensor | None:
    """Hidden keys for the attention scores: bool, broadcastable to (N, 1, T, T), or None."""
    mask = None if padding is None else padding[:, None, None, :]
    if chunking.size == -1:
        return mask
    chunks = chunk_mask(num_frames, chunking, device)[None, None]
    return chunks if mask is None else mask | chunks
