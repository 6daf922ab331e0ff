"""What parts of a module observe in a batch and act on in later ones, brought together from all batches and processes of an update."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from spear.transfer import send


class Reports:
    """Yes-or-no reports of parts with ``take_reports()`` and ``settle(reports, yes)``.

    Without this, what a part observes in one batch would change the next one of the same process, and training would depend on how the
    batches of an update are dealt out among processes.

    Args:
        module: whose parts are asked; from now on they change through `settle` alone.
    """

    def __init__(self, module: nn.Module) -> None:
        self._parts = [cast(Any, part) for part in module.modules() if hasattr(part, "take_reports")]
        for part in self._parts:
            part.take_reports()

    def take(self, device: torch.device) -> Tensor:
        """What this process's batches say, to be summed over processes; (2 P,) float64: numbers of reports, then of those that say yes."""
        found: list[list[Tensor]] = [part.take_reports() for part in self._parts]
        counts = send(torch.tensor([len(reports) for reports in found], dtype=torch.float64), device)
        none = torch.zeros((), dtype=torch.int64, device=device)
        yes = [torch.stack(reports).sum() if reports else none for reports in found]
        return torch.cat([counts, torch.stack(yes).double()]) if yes else counts

    def settle(self, sums: Sequence[float]) -> None:
        """Tell the parts what all processes together say, in the order of `take`."""
        for i, part in enumerate(self._parts):
            part.settle(int(sums[i]), int(sums[len(self._parts) + i]))
