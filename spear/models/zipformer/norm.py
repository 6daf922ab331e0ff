"""BiasNorm, the normalisation that lets a channel carry the length of the vector."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from spear.models.tracing import is_compiling
from spear.models.zipformer.chance import happens
from spear.models.zipformer.gradient import LIMIT_PROB, limit_parameter, limited_gradient
from spear.models.zipformer.scheduled_float import ScheduledModule

LOG_SCALE_LIMITS = (-1.5, 1.5)


def _full(x: Tensor) -> Tensor:
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def _scales(x: Tensor, bias: Tensor, log_scale: Tensor) -> Tensor:
    size: Tensor = torch.linalg.vector_norm(x - bias, dim=-1, keepdim=True)
    scales: Tensor = x.shape[-1] ** 0.5 / size * log_scale.exp()
    return scales


class _BiasNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor, log_scale: Tensor) -> Tensor:
        x = _full(x)
        scales = _scales(x, bias, log_scale)
        ctx.save_for_backward(x, bias, log_scale, scales)
        return x * scales

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:  # type: ignore[override]
        x, bias, log_scale, scales = ctx.saved_tensors
        along = (grad * x).sum(dim=-1, keepdim=True) * scales
        # d scales / d(x - bias) = -(x - bias) scales^3 / (C exp(2 log_scale))
        pull = (x - bias).mul_(along * scales.square() * (-2.0 * log_scale).exp() / x.shape[-1])
        grad_x = (grad * scales).sub_(pull)
        return grad_x, pull.sum(dim=tuple(range(pull.ndim - 1))), along.sum()


def bias_norm(x: Tensor, bias: Tensor, log_scale: Tensor) -> Tensor:
    """``x exp(log_scale) / sqrt(mean((x - bias)^2))`` over the last dimension (Zipformer, arXiv 2310.11230, section 3.3).

    Args:
        x: (..., C). bias: (C,). log_scale: ().
    Returns:
        (..., C) in the dtype of x; in float32 under autocast, because a residual stream starts here.
    """
    dtype = torch.float32 if torch.is_autocast_enabled(x.device.type) else x.dtype
    if torch.is_grad_enabled() and (x.requires_grad or bias.requires_grad):
        result: Tensor = _BiasNorm.apply(x, bias, log_scale)
        return result.to(dtype)
    full = _full(x)
    return (full * _scales(full, bias, log_scale)).to(dtype)


class BiasNorm(ScheduledModule):
    """`bias_norm` with a learned bias per channel and one learned log scale."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.log_scale = nn.Parameter(torch.tensor(1.0))
        self.bias = nn.Parameter(torch.empty(dim).normal_(mean=0.0, std=1e-4))

    def forward(self, x: Tensor) -> Tensor:
        """Normalise x (..., C)."""
        if is_compiling():
            return bias_norm(x, self.bias, self.deferred(self.log_scale) if self.training else self.log_scale)
        return bias_norm(x, self.bias, limit_parameter(self.log_scale, *LOG_SCALE_LIMITS, training=self.training))

    def pull(self, x: Tensor, grad: Tensor) -> Tensor:
        """See ScheduledModule; x is the log scale."""
        return limited_gradient(x, grad, *LOG_SCALE_LIMITS) if happens(LIMIT_PROB) else grad
