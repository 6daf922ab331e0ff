"""The largest batch first: a training that will run out of memory is to do so in its first minute, not after a day."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from spear.errors import SpearError
from spear.training.bad_batch import HINT
from spear.training.checkpoint import load_module_states, module_states
from spear.training.sharding import local


def rehearse(module: nn.Module, optimizer: Optimizer, batch: Any, update: Callable[[], None]) -> None:
    """Make an update's passes with the largest batch, and leave everything as it was.

    Args:
        module: whose state is kept. optimizer: memory for its state is taken meanwhile. batch: named in the error. update: forward and
            backward with it.
    Raises:
        SpearError: the memory does not suffice; says what to change.
    """
    with _untouched(module):
        try:
            room = room_for_state(optimizer)
            update()
            del room
        except (torch.OutOfMemoryError, MemoryError) as error:
            text = " ".join(str(error).split())[:160]
            raise SpearError(
                f"the largest batch, {len(batch.ids)} cuts and {batch.seconds:.0f} s, does not fit into the memory ({HINT}): {text}"
            ) from error


def room_for_state(optimizer: Optimizer) -> list[Tensor]:
    """Memory as large as the state that `optimizer` makes in its first step: two moments of every parameter; none once they are there."""
    missing = [p for group in optimizer.param_groups for p in group["params"] if not optimizer.state.get(p)]
    return [torch.empty_like(local(p)) for p in missing for _ in range(2)]


@contextmanager
def _untouched(module: nn.Module) -> Iterator[None]:
    """Put random numbers, buffers and states of parts back, and remove gradients."""
    cuda = range(torch.cuda.device_count()) if torch.cuda.is_available() and torch.cuda.is_initialized() else []
    buffers = {name: value.detach().clone() for name, value in module.named_buffers()}
    states = module_states(module)
    with torch.random.fork_rng(devices=list(cuda)):
        yield
    module.zero_grad(set_to_none=True)
    with torch.no_grad():
        for name, value in module.named_buffers():
            value.copy_(buffers[name])
    load_module_states(module, states)
