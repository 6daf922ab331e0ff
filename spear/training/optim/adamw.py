"""AdamW, fused where torch can, with an optional limit on the gradient norm."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from spear.bounds import above, at_least
from spear.training.optim.base import OptimizerConfig, check_betas, parameter_groups
from spear.training.sharding import is_sharded, local, total_norm

CLIP_EPS = 1e-6


@dataclass(frozen=True, kw_only=True, slots=True)
class AdamWConfig(OptimizerConfig):
    """AdamW (arXiv:1711.05101); defaults of HuBERT and WavLM pre-training."""

    lr: float = 5e-4
    """Base learning rate."""
    betas: tuple[float, float] = (0.9, 0.98)
    """Decay of the two moments."""
    eps: float = 1e-6
    """Added to the root of the second moment."""
    weight_decay: float = 0.01
    """Decay of tensors with two or more axes; biases, gains and scalars have none."""
    clip_norm: float | None = 1.0
    """Largest norm of the gradient of the mean loss over all parameters; null: no limit."""

    def __post_init__(self) -> None:
        above("lr", self.lr, 0)
        check_betas(self.betas)
        above("eps", self.eps, 0)
        at_least("weight_decay", self.weight_decay, 0)
        if self.clip_norm is not None:
            above("clip_norm", self.clip_norm, 0)

    def build(self, module: nn.Module) -> Optimizer:
        """AdamW over the parameters of `module` that need a gradient."""
        groups: list[dict[str, Any]] = []
        for group in parameter_groups(module, self.lr):
            kinds: dict[tuple[bool, bool], list[Tensor]] = {}
            for p in group["params"]:
                kinds.setdefault((p.ndim < 2, not is_sharded(p)), []).append(p)
            groups += [
                {"params": params, "lr": group["lr"], "weight_decay": 0.0 if vectors else self.weight_decay}
                for (vectors, _), params in sorted(kinds.items(), key=lambda item: item[0])
            ]
        return AdamW(groups, betas=tuple(self.betas), eps=self.eps, clip_norm=self.clip_norm)


class AdamW(torch.optim.AdamW):
    """torch's AdamW that first scales gradients down to a global norm of `clip_norm`."""

    def __init__(self, groups: list[dict[str, Any]], *, betas: tuple[float, ...], eps: float, clip_norm: float | None) -> None:
        fusible = all(p.is_floating_point() and p.device.type in ("cpu", "cuda") for group in groups for p in group["params"])
        super().__init__(groups, betas=(betas[0], betas[1]), eps=eps, fused=True if fusible else None)
        self.clip_norm = clip_norm

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One update from the gradients that are there."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if self.clip_norm is not None:
            grads: list[Tensor] = [p.grad for group in self.param_groups for p in group["params"] if p.grad is not None]
            factor = (self.clip_norm / (total_norm(grads) + CLIP_EPS)).clamp(max=1.0)
            torch._foreach_mul_([local(grad) for grad in grads], factor)
        super().step()
        return loss
