"""The Swoosh activations, computed in float32 and keeping one tensor for the backward pass."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from spear.models.tracing import is_compiling, is_tracing
from spear.models.zipformer.kernels import k2_kernels, swoosh_loops

SLOPE = 0.08
LEFT, RIGHT = (4.0, 0.035), (1.0, 0.313261687)
"""Shift and offset of SwooshL and SwooshR."""
BLOCK = 1 << 15
"""Elements computed together on a CPU, small enough for the cache to hold them between the passes."""


class _Swoosh(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, shift: float, offset: float) -> Tensor:
        ctx.save_for_backward(x)
        ctx.shift = shift
        return _blocks(x, None, shift, offset)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        (x,) = ctx.saved_tensors
        return _blocks(x, grad, ctx.shift, 0.0), None, None


def _shifted(x: Tensor, shift: float, out: Tensor) -> None:
    if x.dtype == out.dtype:
        torch.sub(x, shift, out=out)
    else:
        out.copy_(x).sub_(shift)


def _forward(x: Tensor, out: Tensor, z: Tensor, shift: float, offset: float) -> None:
    """out = Swoosh of x; z and out are float32, z is scratch."""
    _shifted(x, shift, z)
    torch.ops.aten.softplus.out(z, out=out)
    out.sub_(z, alpha=SLOPE).sub_(offset + SLOPE * shift)


def _backward(x: Tensor, grad: Tensor, out: Tensor, shift: float) -> None:
    """out = grad times the derivative of Swoosh at x; out is float32."""
    _shifted(x, shift, out)
    out.sigmoid_().sub_(SLOPE).mul_(grad)


def _blocks(x: Tensor, grad: Tensor | None, shift: float, offset: float) -> Tensor:
    """Swoosh of x, or its derivative times `grad`, in x's dtype and memory order.

    On a CPU by compiled loops where there are any, else block by block, so that the passes over a block find it in the cache.
    """
    if x.device.type != "cpu" or x.dtype == torch.float64:
        k2 = k2_kernels() if x.device.type != "cpu" and x.dtype != torch.float64 else None
        return _whole(x, grad, shift, offset) if k2 is None else from_k2(k2, x, grad, shift)
    out = torch.empty_like(x)
    if x.stride() != out.stride() or (grad is not None and grad.stride() != x.stride()):
        return _whole(x, grad, shift, offset)
    loops = swoosh_loops()
    if loops is None or x.dtype not in (torch.float32, torch.bfloat16) or (grad is not None and grad.dtype != x.dtype):
        _in_torch(x, grad, out, shift, offset)
    elif grad is None:
        loops.forward(x, out, shift, offset + SLOPE * shift)
    else:
        loops.backward(x, grad, out, shift)
    return out


def _whole(x: Tensor, grad: Tensor | None, shift: float, offset: float) -> Tensor:
    """`_blocks` in passes over all of x."""
    z = _full(x) - shift
    whole = F.softplus(z).sub_(z, alpha=SLOPE).sub_(offset + SLOPE * shift) if grad is None else z.sigmoid_().sub_(SLOPE).mul_(grad)
    return whole.to(x.dtype)


def from_k2(k2: Any, x: Tensor, grad: Tensor | None, shift: float) -> Tensor:
    """`_blocks` by k2's kernels, which compute in float32; its own gradient, rounded to 8 bits, is not used.

    Args:
        k2: the module.
    """
    letter = "l" if shift == LEFT[0] else "r"
    if grad is None:
        value: Tensor = getattr(k2, f"swoosh_{letter}_forward")(x)
        return value.to(x.dtype)
    derivative: Tensor = getattr(k2, f"swoosh_{letter}_forward_and_deriv")(x)[1]
    return derivative.mul_(grad).to(x.dtype)


def _in_torch(x: Tensor, grad: Tensor | None, out: Tensor, shift: float, offset: float) -> None:
    pieces, targets = _split(x), _split(out)
    grads = None if grad is None else _split(grad)
    scratch_z, scratch_out = torch.empty(2, min(BLOCK, x.numel())).unbind()
    for i, (piece, target) in enumerate(zip(pieces, targets)):
        result = target if target.dtype == torch.float32 else scratch_out[: piece.numel()]
        if grads is None:
            _forward(piece, result, scratch_z[: piece.numel()], shift, offset)
        else:
            _backward(piece, grads[i], result, shift)
        if result is not target:
            target.copy_(result)


def _split(x: Tensor) -> tuple[Tensor, ...]:
    """Blocks of a dense tensor in memory order."""
    return torch.split(x.as_strided((x.numel(),), (1,)), BLOCK)


def _full(x: Tensor) -> Tensor:
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def _swoosh(x: Tensor, shift: float, offset: float) -> Tensor:
    if is_compiling() and x.device.type == "cpu":
        opaque: Tensor = torch.ops.spear.swoosh(x, shift, offset)
        return opaque
    if is_tracing():
        full = _full(x)
        return (F.softplus(full - shift) - SLOPE * full - offset).to(x.dtype)
    if torch.is_grad_enabled() and x.requires_grad:
        result: Tensor = _Swoosh.apply(x, shift, offset)
        return result
    return _blocks(x, None, shift, offset)


class Swoosh(NamedTuple):
    """``softplus(x - shift) - 0.08 x - offset`` (Zipformer, arXiv 2310.11230, section 3.4); any shape, same type."""

    shift: float
    offset: float

    def __call__(self, x: Tensor) -> Tensor:
        """Apply to x, with a gradient."""
        return _swoosh(x, self.shift, self.offset)

    def of(self, x: Tensor) -> Tensor:
        """Apply to x, without a gradient."""
        return _blocks(x, None, self.shift, self.offset)

    def gradient(self, x: Tensor, grad: Tensor) -> Tensor:
        """`grad` times the derivative at x; both of one shape and type."""
        return _blocks(x, grad, self.shift, 0.0)


swoosh_l, swoosh_r = Swoosh(*LEFT), Swoosh(*RIGHT)


class SwooshR(nn.Module):
    """`swoosh_r` as a module."""

    def forward(self, x: Tensor) -> Tensor:
        """Apply to x of any shape."""
        return swoosh_r(x)
