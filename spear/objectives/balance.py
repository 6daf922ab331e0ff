"""How the losses of several teachers are weighed against each other, beside the fixed weights of the recipe."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from spear.bounds import within
from spear.registry import Registry
from spear.transfer import send


@dataclass(frozen=True, kw_only=True, slots=True)
class BalanceConfig(Registry):
    """Settings of a balance; the table of balances."""

    TABLE: ClassVar[dict[str, str]] = {
        "fixed": "spear.objectives.balance:FixedConfig",
        "running": "spear.objectives.balance:RunningConfig",
        "drop": "spear.objectives.balance:DropConfig",
    }

    def build(self, teachers: Sequence[str]) -> Balance:
        """Make the balance of `teachers`, in the order of the columns it will see."""
        raise NotImplementedError


class Balance(nn.Module):
    """Factors on the weights of the teachers' losses; in training only."""

    def forward(self, losses: Tensor, counts: Tensor) -> Tensor | None:
        """The factor of every cut and teacher.

        Args:
            losses: (N, K) sums of the frames' losses per cut and teacher, detached. counts: (N, K) frames in them, 0 where a teacher says nothing.
        Returns:
            (N, K), or None for ones.
        """
        return None

    def after_step(self) -> None:
        """Called after every update, on all processes alike."""

    def discard_step(self) -> None:
        """Called instead where an update was left out: forget its batches."""


@dataclass(frozen=True, kw_only=True, slots=True)
class FixedConfig(BalanceConfig):
    """The weights of the recipe as they are."""

    def build(self, teachers: Sequence[str]) -> Balance:
        """A balance that does nothing."""
        return Balance()


@dataclass(frozen=True, kw_only=True, slots=True)
class RunningConfig(BalanceConfig):
    """Each teacher's loss is divided by its own running mean, so that one that is hard to predict does not drown the others."""

    decay: float = 0.99
    """Share of the running mean that an update keeps."""

    def __post_init__(self) -> None:
        within("decay", self.decay, 0, 0.999999)

    def build(self, teachers: Sequence[str]) -> Balance:
        """A balance with one running mean per teacher."""
        return RunningBalance(len(teachers), self.decay)


class RunningBalance(Balance):
    """Factor ``1 / mean_k``, the running mean loss per frame of teacher k over all processes; 1 until a teacher was heard.

    The means change after an update, from all of its batches, and are part of the module's state.
    """

    running: Tensor

    def __init__(self, teachers: int, decay: float) -> None:
        super().__init__()
        self.decay = decay
        # rows: decayed sum of the mean losses, decayed sum of ones
        self.register_buffer("running", torch.zeros(2, teachers))
        self._seen: Tensor | None = None

    def forward(self, losses: Tensor, counts: Tensor) -> Tensor | None:
        """See `Balance.forward`."""
        seen = torch.stack([losses.double().sum(dim=0), counts.double().sum(dim=0)])
        self._seen = seen if self._seen is None else self._seen + seen
        total, weight = self.running
        factors = torch.where(weight > 0, weight / total.clamp(min=1e-8), torch.ones_like(total))
        return factors.expand_as(losses)

    @torch.no_grad()
    def after_step(self) -> None:
        """Move the means towards those of this update."""
        seen, self._seen = self._seen, None
        if seen is None:
            return
        if dist.is_available() and dist.is_initialized():
            dist.all_reduce(seen)
        heard = seen[1] > 0
        fresh = torch.stack([seen[0] / seen[1].clamp(min=1), torch.ones_like(seen[1])]).to(self.running.dtype)
        self.running.copy_(torch.where(heard, self.decay * self.running + (1 - self.decay) * fresh, self.running))

    def discard_step(self) -> None:
        """Forget the batches of an update that was left out."""
        self._seen = None


@dataclass(frozen=True, kw_only=True, slots=True)
class DropConfig(BalanceConfig):
    """For every cut the teacher with the largest loss stays, and each of the others is dropped with probability `p`."""

    p: float = 0.5
    """Probability that a teacher is dropped for a cut where another one is harder."""

    def __post_init__(self) -> None:
        within("p", self.p, 0, 1)

    def build(self, teachers: Sequence[str]) -> Balance:
        """A balance with random choices, which keeps nothing between updates."""
        return DropBalance(self.p)


class DropBalance(Balance):
    """Factors of 0 and 1, drawn from torch's global CPU generator (teacher dropping of UNIC, arXiv:2408.05088)."""

    def __init__(self, p: float) -> None:
        super().__init__()
        self.p = p

    def forward(self, losses: Tensor, counts: Tensor) -> Tensor | None:
        """See `Balance.forward`."""
        means = torch.where(counts > 0, losses / counts.clamp(min=1), -torch.inf)
        hardest = means >= means.amax(dim=1, keepdim=True)
        kept = send(torch.rand(losses.shape) >= self.p, losses.device)
        return (hardest | kept).to(losses.dtype)
