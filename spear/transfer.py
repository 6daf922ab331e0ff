"""Tensors on their way to a GPU, which neither the host nor the GPU waits for."""

from __future__ import annotations

import torch
from torch import Tensor


def send(x: Tensor, device: object) -> Tensor:
    """`x` on `device`; itself where it is there already.

    A copy from the CPU to a GPU goes through page-locked memory, for from any other the host waits until the GPU has done all it was given.
    """
    target = torch.device(device)  # type: ignore[call-overload]
    if x.device.type == "cpu" and target.type == "cuda":
        x = x.pin_memory()
    return x.to(target, non_blocking=target.type != "cpu")
