"""Running average of the weights over a whole run, from which the mean over any stretch of it follows.

A running average A_b at update b is the mean of the snapshots taken every P updates up to b. Two of them give the mean over
the updates in between: ``(b2 A2 - b1 A1) / (b2 - b1)``. Source: icefall's model averaging (arXiv:2310.11230, section 4).
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from spear.errors import CheckpointError
from spear.training.sharding import local, spread_like


class RunningAverage:
    """Float64 running average of all floating-point entries of a module's state dict.

    Args:
        module: whose weights; its present state is the first average and has no weight after the first update.
        period: P, updates between two snapshots.
    """

    def __init__(self, module: nn.Module, period: int) -> None:
        self.module, self.period = module, period
        self.values = {name: value.double() for name, value in floating(module.state_dict()).items()}

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Take a snapshot where `step`, updates done, is a multiple of the period: ``A += (weights - A) P / step``."""
        if step % self.period:
            return
        weight = self.period / step
        for name, value in floating(self.module.state_dict()).items():
            self.values[name].mul_(1 - weight).add_(value.double(), alpha=weight)

    def load(self, values: Mapping[str, Tensor]) -> None:
        """Continue from saved `values`.

        Raises:
            CheckpointError: they belong to another module.
        """
        if set(values) != set(self.values):
            name = sorted(set(values) ^ set(self.values))[0]
            raise CheckpointError(f"the weight average does not fit the module: {name} is in one of them only")
        for name, value in values.items():
            self.values[name].copy_(spread_like(value, self.values[name]))


def floating(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Floating-point entries of a state dict; of entries that share memory only the first, as copies of one are averaged once."""
    found: dict[str, Tensor] = {}
    seen: set[tuple[int, torch.Size, tuple[int, ...]]] = set()
    for name, value in state.items():
        key = (local(value).data_ptr(), value.shape, value.stride())
        if value.is_floating_point() and (local(value).numel() == 0 or key not in seen):
            seen.add(key)
            found[name] = value.detach()
    return found


def average_between(start: Mapping[str, Tensor], start_step: int, end: Mapping[str, Tensor], end_step: int) -> dict[str, Tensor]:
    """Mean of the weights over updates (start_step, end_step] from the running averages at its ends.

    Evaluated as ``(A2 + A1 * w1 / w2) * w2`` with ``w2 = b2 / (b2 - b1)``, ``w1 = 1 - w2``, in float64.

    Args:
        start, end: A1, A2, same names and shapes. start_step, end_step: b1 >= 0, b2, multiples of the period.
    Returns:
        name -> float64 tensor.
    Raises:
        CheckpointError: the stretch is empty, or the averages are of different modules.
    """
    if not 0 <= start_step < end_step:
        raise CheckpointError(f"weights can be averaged over updates ({start_step}, {end_step}] only if the first is smaller")
    if set(start) != set(end):
        raise CheckpointError(f"the checkpoints at {start_step} and {end_step} have different weights: {sorted(set(start) ^ set(end))[0]}")
    weight = end_step / (end_step - start_step)
    return {name: (value.double() + start[name].double() * ((1 - weight) / weight)) * weight for name, value in end.items()}
