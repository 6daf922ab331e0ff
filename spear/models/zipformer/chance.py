"""Cheap random draws of the training-time regularisers, all from torch's global CPU generator."""

from __future__ import annotations

import torch
from torch import Tensor

from spear.transfer import send


def draw() -> float:
    """One number in [0, 1)."""
    return float(torch.rand(()).item())


def happens(prob: float) -> bool:
    """True with probability `prob`; certain outcomes draw nothing."""
    return prob > 0.0 and (prob >= 1.0 or draw() < prob)


def onto(mask: Tensor, like: Tensor) -> Tensor:
    """A mask on the CPU in the type and on the device of `like`, without waiting for what a GPU still has to do."""
    return send(mask, like.device).to(like.dtype)


def keep_mask(shape: tuple[int, ...], drop_prob: float, like: Tensor) -> Tensor:
    """Zeros with probability `drop_prob`, else ones; in the dtype and on the device of `like`."""
    return onto(torch.rand(shape) >= drop_prob, like)


def drop_items(x: Tensor, prob: float) -> Tensor:
    """Zero whole batch items (first dimension of `x`), each with probability `prob`, without rescaling the others."""
    if prob <= 0.0:
        return x
    kept = torch.rand((x.shape[0],) + (1,) * (x.ndim - 1)) >= prob
    return x if bool(kept.all()) else x * onto(kept, x)


def dropout_mask(x: Tensor, prob: float) -> Tensor | None:
    """Zeros, and ones scaled up, (N, 1, C) for x (N, T, C); None where nothing is dropped."""
    return keep_mask((x.shape[0], 1, x.shape[2]), prob, x) / (1.0 - prob) if prob > 0.0 else None


def shared_dropout(x: Tensor, prob: float) -> Tensor:
    """Dropout on (N, T, C) whose mask is the same for all frames of an item."""
    keep = dropout_mask(x, prob)
    return x if keep is None else x * keep
