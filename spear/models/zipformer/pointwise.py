"""Two linear maps with SwooshL between them, block by block, so that the wide hidden layer never leaves the cache (CPU)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from spear.models.zipformer.swoosh import swoosh_l

ROWS = 1024
"""Rows computed together."""


class _Pointwise(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight1: Tensor, bias1: Tensor, weight2: Tensor, bias2: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight1, bias1, weight2)
        return _forward(x, weight1, bias1, weight2, bias2)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:  # type: ignore[override]
        x, weight1, bias1, weight2 = ctx.saved_tensors
        grad = grad.contiguous()
        grad_x = torch.empty_like(x)
        sums = [torch.zeros_like(p, dtype=torch.float32) for p in (weight1, bias1, weight2)]
        with torch.autocast("cpu", enabled=False):
            for rows, out, grads in zip(x.split(ROWS), grad_x.split(ROWS), grad.split(ROWS)):
                hidden = F.linear(rows, weight1, bias1)
                sums[2] += grads.T @ swoosh_l(hidden)
                grad_hidden = swoosh_l.gradient(hidden, grads @ weight2)
                torch.mm(grad_hidden, weight1, out=out)
                sums[0] += grad_hidden.T @ rows
                sums[1] += grad_hidden.sum(dim=0, dtype=torch.float32)
        return grad_x, *(s.to(x.dtype) for s in sums), grad.sum(dim=0, dtype=torch.float32).to(x.dtype)


def _forward(x: Tensor, weight1: Tensor, bias1: Tensor, weight2: Tensor, bias2: Tensor) -> Tensor:
    out = x.new_empty(x.shape[0], weight2.shape[0])
    for rows, target in zip(x.split(ROWS), out.split(ROWS)):
        torch.addmm(bias2, swoosh_l(F.linear(rows, weight1, bias1)), weight2.T, out=target)
    return out


def pointwise_swoosh(x: Tensor, weight1: Tensor, bias1: Tensor, weight2: Tensor, bias2: Tensor) -> Tensor:
    """``linear2(SwooshL(linear1(x)))``; the backward pass computes the hidden layer again.

    Args:
        x: (M, C) on the CPU. weight1: (H, C). bias1: (H,). weight2: (C', H). bias2: (C',).
    Returns:
        (M, C') in the dtype of autocast, or of x.
    """
    if torch.is_autocast_enabled("cpu"):
        dtype = torch.get_autocast_dtype("cpu")
        x, weight1, bias1, weight2, bias2 = (t.to(dtype) for t in (x, weight1, bias1, weight2, bias2))
    with torch.autocast("cpu", enabled=False):
        if torch.is_grad_enabled() and any(t.requires_grad for t in (x, weight1, bias1, weight2, bias2)):
            result: Tensor = _Pointwise.apply(x, weight1, bias1, weight2, bias2)
            return result
        with torch.no_grad():
            return _forward(x, weight1, bias1, weight2, bias2)
