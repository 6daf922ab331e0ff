"""Number formats of the forward pass, and the scale on the loss that keeps float16 gradients in range."""

from __future__ import annotations

import logging
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal

import torch

from spear.errors import SpearError

logger = logging.getLogger(__name__)
Precision = Literal["fp32", "bf16", "fp16"]
AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}
GROW_AFTER = ((8.0, 100), (32.0, 400), (float("inf"), 2000))
"""(scale, updates): below this scale it doubles after so many good updates. The loss is a sum over targets, so that a small scale is normal."""
WARN_BELOW, FAIL_BELOW = 1e-2, 1e-5


def autocast(precision: Precision, device: torch.device) -> AbstractContextManager[Any]:
    """Run the enclosed forward pass in `precision`; weights stay float32."""
    return torch.autocast(device.type, dtype=AUTOCAST[precision]) if precision in AUTOCAST else nullcontext()


class LossScale:
    """Factor on the loss before its backward pass; 1 for ever unless the precision is fp16.

    It is halved where a gradient overflows and doubled after `GROW_AFTER` updates without one. All processes see the same overflows, since
    they look at the norm of the summed gradient, and so have the same scale.
    """

    def __init__(self, precision: Precision) -> None:
        self.moves = precision == "fp16"
        self.value, self.good = 1.0, 0

    def update(self, step: int, *, overflow: bool) -> None:
        """Take note of update `step`.

        Raises:
            SpearError: the scale has fallen below 1e-5, so that no scale will do.
        """
        if not self.moves:
            return
        if overflow:
            self.value, self.good = self.value / 2, 0
            logger.log(logging.WARNING if self.value < WARN_BELOW else logging.INFO, "update %d: the loss scale is now %g", step, self.value)
            if self.value < FAIL_BELOW:
                raise SpearError(
                    f"the loss scale of `precision` fp16 has fallen to {self.value:g} at update {step}: the training has diverged; "
                    "lower the learning rate or use `precision` bf16"
                )
            return
        self.good += 1
        if self.good >= next(after for below, after in GROW_AFTER if self.value < below):
            self.value, self.good = self.value * 2, 0

    def state(self) -> list[float]:
        """Scale and good updates since it changed."""
        return [self.value, float(self.good)]

    def load(self, state: list[float]) -> None:
        """Undo `state`; an empty one changes nothing."""
        if state and self.moves:
            self.value, self.good = float(state[0]), int(state[1])
