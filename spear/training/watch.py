"""What is watched beside the loss: sizes of weights and updates, speed, share of time at work, and the work itself."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from spear.training.sharding import local, part_like, total_norm

logger = logging.getLogger(__name__)
COMPUTING = ("forward", "backward", "optimizer")
PASSES = 3
"""Forward passes that an update costs: the backward pass takes twice as long as the forward one."""


class Change:
    """Measures how far an optimiser step moves the weights; holds a copy of them meanwhile.

    Args:
        module: whose parameters that learn are measured.
    """

    def __init__(self, module: nn.Module) -> None:
        self._parameters = [p for p in module.parameters() if p.requires_grad]
        self._before = [local(p.detach()).clone() for p in self._parameters]

    def norms(self) -> dict[str, Tensor]:
        """``param_norm`` and ``update_norm``, 2-norms of all weights now and of their change since, as ``[sum, count]``."""
        now = [p.detach() for p in self._parameters]
        torch._foreach_sub_(self._before, [local(value) for value in now])
        moved = [part_like(before, value) for before, value in zip(self._before, now)]
        norms = {"param_norm": total_norm(now), "update_norm": total_norm(moved)}
        return {name: torch.stack([value, torch.ones_like(value)]) for name, value in norms.items()}


def speeds(wall: float, phases: Mapping[str, float], audio_s: float, steps: int, left: int, flops: float) -> dict[str, float]:
    """Figures of a lap.

    Args:
        wall: its seconds. phases: seconds of each phase. audio_s: seconds of audio of all processes in it. steps: updates in it.
        left: updates to go. flops: operations per second of audio, 0 where unknown.
    Returns:
        ``audio_s_per_s``, which is also hours per hour; ``utilisation``, share of the time that this process computes; ``eta_s``; ``tflops``
        per second of all processes.
    """
    speed = audio_s / wall
    found = {"audio_s_per_s": speed, "utilisation": sum(phases.get(name, 0.0) for name in COMPUTING) / wall, "wall_s": wall}
    found["eta_s"] = left * wall / max(steps, 1)
    if flops:
        found["tflops"] = flops * speed / 1e12
    return found


def count_flops(module: nn.Module, run: Callable[[], Any], seconds: float) -> float:
    """Operations of training per second of audio: those of one forward pass as torch counts products and convolutions, times `PASSES`.

    Compiled loops of this package are not counted. The module runs in evaluation, by plain code even where layers are compiled
    (what torch counts with cannot be traced), and is left as it was.

    Args:
        module: put into evaluation meanwhile. run: its forward pass on a batch. seconds: of audio in that batch.
    """
    state = torch.get_rng_state()
    was_training = module.training
    module.eval()
    counter = FlopCounterMode(display=False)
    try:
        with torch.no_grad(), torch.compiler.set_stance("force_eager"), counter:
            run()
    except (RuntimeError, NotImplementedError) as error:
        logger.warning("the operations of an update cannot be counted: %s", " ".join(str(error).split())[:200])
        return 0.0
    finally:
        module.train(was_training)
        torch.set_rng_state(state)
    return PASSES * float(counter.get_total_flops()) / seconds
