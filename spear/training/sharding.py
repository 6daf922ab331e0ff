"""Tensors that are spread over processes: their local parts, their whole, and norms over both kinds."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor


def is_sharded(tensor: Tensor) -> bool:
    """Whether this process holds only its part of `tensor`."""
    return isinstance(tensor, DTensor)


def local(tensor: Tensor) -> Tensor:
    """This process's part, sharing its memory; all of it where it is not spread."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def whole(tensor: Tensor) -> Tensor:
    """All of it, gathered from all processes, each of which must call this."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def spread_like(tensor: Tensor, like: Tensor) -> Tensor:
    """`tensor`, which every process holds whole, on the device of `like` and spread as it is."""
    if not isinstance(like, DTensor):
        return tensor
    placed = tensor.to(like.device)
    return distribute_tensor(placed, like.device_mesh, like.placements, src_data_rank=None)


def part_like(part: Tensor, like: Tensor) -> Tensor:
    """This process's `part` of a tensor that is spread as `like` is; shares its memory."""
    if not isinstance(like, DTensor):
        return part
    return DTensor.from_local(part, like.device_mesh, like.placements, run_check=False, shape=like.shape, stride=like.stride())


def sum_over(tensor: Tensor, like: Tensor) -> Tensor:
    """Sum of `tensor` over the processes that `like` is spread over, in place."""
    if isinstance(like, DTensor):
        dist.all_reduce(tensor, group=like.device_mesh.get_group())
    return tensor


def total_norm(tensors: Sequence[Tensor]) -> Tensor:
    """2-norm over all elements of tensors of either kind, () float32; spread ones count once however many processes hold a part."""
    spread = [tensor for tensor in tensors if is_sharded(tensor)]
    if not spread:
        return torch.nn.utils.get_total_norm(tensors)
    whole_ones = [tensor for tensor in tensors if not is_sharded(tensor)]
    square = sum_over(_square([local(tensor) for tensor in spread]), spread[0])
    return (square + _square(whole_ones)).sqrt() if whole_ones else square.sqrt()


def _square(tensors: Sequence[Tensor]) -> Tensor:
    return torch.stack(torch._foreach_norm(list(tensors))).square().sum()
