"""Compare the self-distillation objective with a loop over layers, from the layers of teacher and student to gradients and moved codebooks.

python tools/bench_objectives.py --seconds 160 --repeats 5
Both give the same loss and codebooks, which is checked first. All times are of one thread, medians of interleaved repeats.
--encoder also times what both share in a step of SpidR Base: the teacher's forward, the student's forward and backward (once, on 20 s).
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from spear.models.conv_transformer import ConvTransformerConfig
from spear.models.heads import LayerHeads
from spear.objectives.ema import Frames, choose_frames, normalised
from spear.objectives.online_codebooks import OnlineCodebooks
from spear.types import StudentOutput

LAYERS, SIZE, DIM, RATE_HZ, CUT_S = 8, 256, 768, 50, 10


class Batched(nn.Module):
    """What `spear.objectives.self_distillation` does."""

    def __init__(self) -> None:
        super().__init__()
        self.books = OnlineCodebooks(LAYERS, SIZE, DIM, 0.9)
        self.heads = LayerHeads([DIM] * LAYERS, SIZE)

    def step(self, output: StudentOutput, teacher: list[Tensor], frames: Frames | None = None) -> Tensor:
        """Loss; gradients and books move."""
        frames = frames or choose_frames(output, masked_only=True)
        targets = torch.stack([normalised(state, frames) for state in teacher])
        codes = self.books.assign(targets)
        logits = self.heads([frames.of(state) for state in output.hidden_states])
        losses = F.cross_entropy(logits.flatten(0, 1), codes.flatten(), reduction="none").view_as(codes)
        loss = (losses.mean(dim=0) * frames.weight).sum()
        loss.backward()
        self.books.collect(targets, codes, logits.detach().argmax(dim=2), frames.weight)
        self.books.update()
        return loss.detach()


class Loops(nn.Module):
    """One layer after the other."""

    def __init__(self, other: Batched) -> None:
        super().__init__()
        self.sums, self.counts = list(other.books.sums.clone()), list(other.books.counts.clone())
        self.heads = nn.ModuleList(nn.Linear(DIM, SIZE) for _ in range(LAYERS))
        with torch.no_grad():
            for head, proj in zip(self.heads, other.heads.projs):
                head.load_state_dict(proj.state_dict())

    def step(self, output: StudentOutput, teacher: list[Tensor]) -> Tensor:
        """Loss; gradients and books move."""
        mask = output.masked_share >= 0.5
        losses = []
        for k in range(LAYERS):
            with torch.no_grad():
                z = F.instance_norm(teacher[k].transpose(1, 2)).transpose(1, 2)[mask]
                codes = torch.cdist(z, self.sums[k] / self.counts[k][:, None]).argmin(dim=1)
                chosen = F.one_hot(codes, SIZE).float()
                hits, sums = chosen.sum(dim=0), chosen.T @ z
                hit = hits > 0
                self.counts[k][hit] = 0.9 * self.counts[k][hit] + 0.1 * hits[hit]
                self.sums[k][hit] = 0.9 * self.sums[k][hit] + 0.1 * sums[hit]
            logits = self.heads[k](output.hidden_states[k][mask])
            losses.append(F.cross_entropy(logits, codes, reduction="sum"))
            for counts in (hits, F.one_hot(logits.detach().argmax(dim=1), SIZE).float().sum(dim=0)):
                p = counts / counts.sum()
                torch.exp(-torch.special.xlogy(p, p).sum())
        loss = torch.stack(losses).mean()
        loss.backward()
        return loss.detach()


class Count(TorchDispatchMode):
    """Counts operators, each of which is at least one kernel on a GPU."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """One operator."""
        self.calls += 1
        return func(*args, **(kwargs or {}))


def inputs(seconds: float) -> tuple[StudentOutput, list[Tensor]]:
    """Student and teacher layers (N, T, D) of cuts of 10 s; about half of the frames are masked."""
    generator = torch.Generator().manual_seed(0)
    n, t = max(1, int(seconds / CUT_S)), CUT_S * RATE_HZ
    teacher = [torch.randn(n, t, DIM, generator=generator) for _ in range(LAYERS)]
    student = tuple(torch.randn(n, t, DIM, generator=generator).requires_grad_() for _ in range(LAYERS))
    masked = (torch.rand(n, t, generator=generator) < 0.5).float()
    return StudentOutput(student[-1], torch.full((n,), t), student, masked), teacher


def timed(work: Callable[[], Tensor], states: tuple[Tensor, ...]) -> float:
    """Seconds of one call with fresh gradients."""
    for state in states:
        state.grad = None
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def encoder_s(seconds: float) -> float:
    """Seconds of the teacher's forward and of the student's forward and backward on cuts of 10 s, SpidR Base."""
    encoder = ConvTransformerConfig().build()
    features = torch.randn(max(1, int(seconds / CUT_S)), CUT_S * 100, 160)
    lens = torch.full((len(features),), CUT_S * 100)
    start = time.perf_counter()
    with torch.no_grad():
        encoder.eval()(features, lens)
    encoder.train()(features, lens).features.sum().backward()
    return time.perf_counter() - start


def main() -> None:
    """Print the check and the medians."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=160.0, help="of audio in a batch")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--encoder", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    batched = Batched()
    loops = Loops(batched)
    output, teacher = inputs(options.seconds)
    first, second = batched.step(output, teacher), loops.step(output, teacher)
    torch.testing.assert_close(first, second, rtol=1e-3, atol=0)
    apart = float((batched.books.sums - torch.stack(loops.sums)).abs().max())
    times: dict[str, list[float]] = {"loops": [], "batched": []}
    for _ in range(options.repeats):
        times["loops"].append(timed(lambda: loops.step(output, teacher), output.hidden_states))
        times["batched"].append(timed(lambda: batched.step(output, teacher), output.hidden_states))
    medians = {name: statistics.median(values) for name, values in times.items()}
    elsewhere = Frames(None, (output.masked_share >= 0.5).float().flatten(), torch.ones_like(output.masked_share, dtype=torch.bool))
    for name, call in (("loops", lambda: loops.step(output, teacher)), ("batched, as on a GPU", lambda: batched.step(output, teacher, elsewhere))):
        with Count() as count:
            call()
        sys.stdout.write(f"{name}: {count.calls} operators\n")
    frames = int((output.masked_share >= 0.5).sum())
    sys.stdout.write(f"{LAYERS} x {SIZE} x {DIM}, {frames} masked frames; largest difference of the sums {apart:.1e}\n")
    sys.stdout.write(f"loops {medians['loops']:.3f} s, batched {medians['batched']:.3f} s, ratio {medians['loops'] / medians['batched']:.2f}\n")
    if options.encoder:
        shared = encoder_s(20.0) * options.seconds / 20.0
        ratio = (shared + medians["loops"]) / (shared + medians["batched"])
        sys.stdout.write(f"student and teacher {shared:.1f} s, so that a step with loops takes {ratio:.3f} times as long\n")


if __name__ == "__main__":
    main()
