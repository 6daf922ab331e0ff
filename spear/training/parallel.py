"""How a module works on several processes: alone, replicated (DDP) or with its weights spread over them (FSDP2)."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from spear.training.distributed import World

Kind = Literal["ddp", "fsdp"]
UNIT = "training_unit"
"""A class attribute, true on the layers that are recomputed and spread one by one."""
ALL_LAYERS = "runs_all_layers"
"""An attribute of modules that may skip layers: set to true, they run them all the same."""
USES_ALL = "uses_all"
"""An attribute of the whole module, true where every training batch gives all parameters a gradient."""


class Alone:
    """A module of one process; the base of the others.

    model: what is called in training; it takes and returns what the module does.
    """

    sharded = False

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.model: Any = module

    def sync(self, last: bool) -> AbstractContextManager[Any]:
        """Around forward and backward of one batch of an update; gradients are summed over processes in the last one."""
        return nullcontext()

    def finish(self) -> None:
        """Called when all gradients of an update are there."""


class Replicated(Alone):
    """DDP: every process holds all weights, gradients are averaged."""

    def __init__(self, module: nn.Module, world: World, device: torch.device, *, find_unused: bool) -> None:
        super().__init__(module)
        ids = [device.index] if device.type == "cuda" else None
        how: dict[str, Any] = {"find_unused_parameters": find_unused, "gradient_as_bucket_view": True}
        self.model = DistributedDataParallel(module, device_ids=ids, broadcast_buffers=False, **how)

    def sync(self, last: bool) -> AbstractContextManager[Any]:
        """See `Alone.sync`."""
        return nullcontext() if last else self.model.no_sync()


class Sharded(Alone):
    """FSDP2: weights, gradients and optimiser state are spread over the processes, layer by layer; gradients are averaged.

    Scalars, which cannot be split, are held by all; their gradients are averaged here. Every process must use the same parameters in an update.
    """

    sharded = True

    def __init__(self, module: nn.Module, world: World, device: torch.device) -> None:
        from torch.distributed.fsdp import fully_shard  # takes a second to import

        super().__init__(module)
        for part in module.modules():
            if hasattr(part, ALL_LAYERS):
                setattr(part, ALL_LAYERS, True)
        mesh = init_device_mesh(device.type, (world.size,))
        scalars = {p for p in module.parameters() if p.ndim == 0}
        for unit in units(module):
            fully_shard(unit, mesh=mesh, ignored_params=scalars)
        fully_shard(module, mesh=mesh, ignored_params=scalars)
        self.scalars = [p for p in module.parameters() if p in scalars and p.requires_grad]
        self.size = world.size

    def sync(self, last: bool) -> AbstractContextManager[Any]:
        """See `Alone.sync`."""
        self.model.set_requires_gradient_sync(last)
        return nullcontext()

    def finish(self) -> None:
        """Average the gradients of the scalars, all in one message."""
        if not self.scalars:
            return
        grads = torch.stack([torch.zeros_like(p) if p.grad is None else p.grad for p in self.scalars])
        dist.all_reduce(grads)
        for p, grad in zip(self.scalars, (grads / self.size).unbind(0)):
            p.grad = grad


def spread(kind: Kind, module: nn.Module, world: World, device: torch.device, *, find_unused: bool | None = None) -> Alone:
    """Make `module`, which is on `device`, work on all processes of `world`.

    Args:
        find_unused: DDP searches every batch for parameters that it does not use; None: unless the module says that there are none.
    """
    if world.size == 1:
        return Alone(module)
    if find_unused is None:
        find_unused = not getattr(module, USES_ALL, False)
    return Sharded(module, world, device) if kind == "fsdp" else Replicated(module, world, device, find_unused=find_unused)


def units(module: nn.Module) -> list[nn.Module]:
    """Layers of `module` that are marked as units (see `UNIT`), in order."""
    return [part for part in module.modules() if getattr(part, UNIT, False)]


def recompute(module: nn.Module) -> None:
    """Let all units that learn keep only their inputs in training, and compute the rest again in the backward pass.

    The second pass draws the same random numbers as the first: losses and gradients are those without recomputation.
    """
    for unit in units(module):
        if any(p.requires_grad for p in unit.parameters()):
            unit.forward = partial(_recomputed, unit, unit.forward)


def _recomputed(unit: nn.Module, forward: Any, *args: Any, **kwargs: Any) -> Any:
    if not (unit.training and torch.is_grad_enabled()):
        return forward(*args, **kwargs)
    return checkpoint(forward, *args, use_reentrant=False, **kwargs)
