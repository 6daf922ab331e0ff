"""Depthwise convolutions of frames and images; on a CPU by kernels that are several times faster than torch's own."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.grad import conv2d_weight

from spear.models.tracing import is_compiling
from spear.models.zipformer.kernels import depthwise_loop
from spear.models.zipformer.linear import low_type

BLOCK = 32
"""Frames whose products are summed by one matrix product of the weight's gradient."""
Pair = tuple[int, int]


def _convolve(x: Tensor, weight: Tensor, bias: Tensor | None, padding: Pair) -> Tensor:
    """x (N, H, W, C), weight (C, 1, kh, kw) -> (N, H', W', C), as a channels-last image without a copy."""
    return F.conv2d(x.permute(0, 3, 1, 2), weight, bias, padding=padding, groups=weight.shape[0]).permute(0, 2, 3, 1)


def _weight_gradient(x: Tensor, grad: Tensor, kernel: Pair, padding: Pair) -> Tensor:
    """x (N, H, W, C), grad (N, H', W', C) -> (C, 1, kh, kw): sums over pixels of products of x and grad at every shift."""
    x, grad = x.float().contiguous(), grad.float().contiguous()
    loop = depthwise_loop()
    if loop is not None:
        return loop.weight_gradient(x, grad, kernel, padding).permute(2, 0, 1).unsqueeze(1)
    if kernel[0] == x.shape[1] == grad.shape[1] == 1:
        return _line_gradient(x.squeeze(1), grad.squeeze(1), kernel[1], padding[1])[:, None, None]
    size = (x.shape[3], 1, *kernel)
    images = (x.permute(0, 3, 1, 2), grad.permute(0, 3, 1, 2))
    gradient: Tensor = conv2d_weight(images[0], size, images[1], padding=padding, groups=x.shape[3])  # type: ignore[no-untyped-call]
    return gradient


def _line_gradient(x: Tensor, grad: Tensor, kernel: int, padding: int) -> Tensor:
    """(D, kernel) from frames (N, T, D): the sums over frames as diagonals of block matrix products."""
    n, t, dim = grad.shape
    blocks = -(-t // BLOCK)
    window = BLOCK + kernel - 1
    x = F.pad(x, (0, 0, padding, blocks * BLOCK + kernel - 1 - padding - x.shape[1]))
    windows = x.permute(2, 0, 1).contiguous().unfold(2, window, BLOCK).reshape(dim, n * blocks, window)
    pieces = F.pad(grad, (0, 0, 0, blocks * BLOCK - t)).permute(2, 0, 1).reshape(dim, n * blocks, BLOCK)
    products = windows.transpose(1, 2) @ pieces  # (D, window, BLOCK)
    return products.as_strided((dim, kernel, BLOCK), (window * BLOCK, BLOCK, BLOCK + 1)).sum(dim=2)


class _Depthwise(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, padding: Pair) -> Tensor:
        if torch.is_autocast_enabled("cpu"):
            dtype = torch.get_autocast_dtype("cpu")
            x, weight, bias = x.to(dtype), weight.to(dtype), bias.to(dtype)
        ctx.save_for_backward(x, weight)
        ctx.padding = padding
        return _convolve(x.to(weight.dtype), weight, bias, padding)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor, Tensor, None]:  # type: ignore[override]
        x, weight = ctx.saved_tensors
        return *gradients(x, weight, grad, ctx.padding), None


def gradients(x: Tensor, weight: Tensor, grad: Tensor, padding: Pair) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x in its type, and of weight and bias in float32, given that of `depthwise_conv2d`."""
    kernel = (weight.shape[2], weight.shape[3])
    with torch.autocast("cpu", enabled=False):
        back = (kernel[0] - 1 - padding[0], kernel[1] - 1 - padding[1])
        grad_x = _convolve(grad, weight.flip(2, 3), None, back).to(x.dtype)
        return grad_x, _weight_gradient(x, grad, kernel, padding), grad.sum(dim=(0, 1, 2), dtype=torch.float32)


def depthwise_conv2d(x: Tensor, weight: Tensor, bias: Tensor, padding: Pair) -> Tensor:
    """Cross-correlation of every channel of an image with its own filter, on a CPU.

    Args:
        x: (N, H, W, C), kept in its own type and computed in that of the weight or of autocast. weight: (C, 1, kh, kw). bias: (C,).
        padding: zeros on either side, up and down and across.
    Returns:
        (N, H + 2 padding - kh + 1, W + 2 padding - kw + 1, C).
    """
    if torch.is_grad_enabled() and weight.requires_grad and x.dtype != torch.float64:
        result: Tensor = _Depthwise.apply(x, weight, bias, padding)
        return result
    return _convolve(x.to(weight.dtype), weight, bias, padding)


def depthwise_conv1d(x: Tensor, weight: Tensor, bias: Tensor, padding: int = 0) -> Tensor:
    """Cross-correlation of every channel with its own filter.

    Args:
        x: (N, T, D). weight: (D, 1, K). bias: (D,). padding: zeros on either side in time.
    Returns:
        (N, T + 2 padding - K + 1, D).
    """
    if is_compiling() and x.device.type == "cpu":
        dtype = low_type(x)
        opaque: Tensor = torch.ops.spear.depthwise(x.to(dtype), weight.to(dtype), bias.to(dtype), padding)
        return opaque
    if x.device.type != "cpu":
        return F.conv1d(x.transpose(1, 2), weight, bias, padding=padding, groups=weight.shape[0]).transpose(1, 2)
    return depthwise_conv2d(x.unsqueeze(1), weight.unsqueeze(2), bias, (0, padding)).squeeze(1)
