"""Time one ScaledAdam update of a base Zipformer against the same arithmetic in torch for one tensor after the other, side by side.

python tools/bench_optimizer.py --device cuda
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch
from torch import Tensor, nn

from spear.models.zipformer import ZipformerConfig
from spear.training.optim.base import parameter_groups
from spear.training.optim.scaled_adam import ScaledAdam, ScaledAdamConfig, Stack


class OneByOne(ScaledAdam):
    """The same update without stacks and without compiled loops."""

    def _stack(self, params: list[Tensor]) -> list[Stack]:
        stacks = [stack for parameter in params for stack in super(OneByOne, self)._stack([parameter])]
        for stack in stacks:
            stack.loops = None
        return stacks


def seconds(optimizer: ScaledAdam, device: str) -> float:
    """Time of one update."""
    if device == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter() if device == "cuda" else time.process_time()
    optimizer.step()
    if device == "cuda":
        torch.cuda.synchronize()
    return (time.perf_counter() if device == "cuda" else time.process_time()) - start


def main() -> None:
    """Print both times, interleaved, and their ratio."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    config = ScaledAdamConfig()
    optimizers: list[ScaledAdam] = []
    for kind in (OneByOne, ScaledAdam):
        torch.manual_seed(0)
        module: nn.Module = ZipformerConfig().build().to(args.device)
        for parameter in module.parameters():
            parameter.grad = torch.randn_like(parameter) * 1e-3 if parameter.requires_grad else None
        optimizers.append(kind(parameter_groups(module, config.lr), config))
    times: list[list[float]] = [[], []]
    for repeat in range(args.repeats + 2):
        for seen, optimizer in zip(times, optimizers):
            spent = seconds(optimizer, args.device)
            if repeat >= 2:
                seen.append(spent)
    tensors = sum(len(group["params"]) for group in optimizers[0].param_groups)
    print(f"ScaledAdam, base Zipformer, {tensors} tensors, {args.device}, {args.threads} thread(s), median of {args.repeats}")
    for name, seen in zip(("one by one", "spear"), times):
        print(f"  {name:10} {1e3 * statistics.median(seen):8.1f} ms")
    print(f"  ratio {statistics.median(a / b for a, b in zip(*times)):.2f}")


if __name__ == "__main__":
    main()
