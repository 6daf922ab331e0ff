"""Write tests/finetune/rnnt.safetensors: losses of k2 and texts of a search loop by hand, on small drawn inputs.

Needs an environment of its own, Python 3.10 with `torch==1.13.1 numpy<2 graphviz safetensors`, then `pip install --no-deps k2==1.23.4`:

    python tools/golden_rnnt.py tests/finetune/rnnt.safetensors
"""

from __future__ import annotations

import math
import sys
from typing import Any

import k2
import numpy as np
import torch
from safetensors.numpy import save_file
from torch.nn import functional as F

FRAMES, SYMBOLS, VOCABULARY, ROWS = (9, 5, 7), (5, 2, 0), 6, 3
MANY_FRAMES, MANY_SYMBOLS = (8, 8, 5, 7, 3, 8), (7, 3, 5, 1, 6, 0)
LM_SCALE, AM_SCALE = 0.25, 0.1
CONTEXT, DIM, HIDDEN, MOST = 2, 8, 12, 3


def draw(rng: np.random.Generator, *shape: int, scale: float = 1.0) -> torch.Tensor:
    return torch.from_numpy((scale * rng.standard_normal(shape)).astype(np.float32)).requires_grad_()


def losses(rng: np.random.Generator) -> dict[str, torch.Tensor]:
    """Every step of a pruned loss, with its gradients; lengths differ but for the one with a mean over the batch."""
    n, frames, longest = len(FRAMES), max(FRAMES), max(SYMBOLS)
    labels = torch.from_numpy(rng.integers(1, VOCABULARY, (n, longest)))
    boundary = torch.zeros(n, 4, dtype=torch.int64)
    boundary[:, 2], boundary[:, 3] = torch.tensor(SYMBOLS), torch.tensor(FRAMES)
    found = {"labels": labels, "frames": boundary[:, 3].clone(), "symbols": boundary[:, 2].clone()}

    def keep(name: str, loss: torch.Tensor, **inputs: torch.Tensor) -> None:
        grads = torch.autograd.grad(loss.sum(), list(inputs.values()))
        found.update({f"{name}.loss": loss.detach(), **{f"{name}.{key}": value.detach() for key, value in inputs.items()}})
        found.update({f"{name}.{key}_grad": grad for key, grad in zip(inputs, grads)})

    logits = draw(rng, n, frames, longest + 1, VOCABULARY)
    keep("full", k2.rnnt_loss(logits, labels, 0, boundary, reduction="none"), logits=logits)
    am, lm = draw(rng, n, frames, VOCABULARY), draw(rng, n, longest + 1, VOCABULARY)
    keep("simple", k2.rnnt_loss_simple(lm, am, labels, 0, boundary, reduction="none"), am=am, lm=lm)
    scales: dict[str, Any] = {"lm_only_scale": LM_SCALE, "am_only_scale": AM_SCALE}
    keep("both_scales", k2.rnnt_loss_smoothed(lm, am, labels, 0, boundary=None, reduction="none", **scales), am=am, lm=lm)
    scales["am_only_scale"] = 0.0
    loss, grads = k2.rnnt_loss_smoothed(lm, am, labels, 0, boundary=boundary, reduction="none", return_grad=True, **scales)
    keep("smoothed", loss, am=am, lm=lm)
    found["smoothed.px_grad"], found["smoothed.py_grad"] = (grad.detach().contiguous() for grad in grads)
    ranges = k2.get_rnnt_prune_ranges(*grads, boundary, ROWS)
    pruned = draw(rng, n, frames, ROWS, VOCABULARY)
    keep("pruned", k2.rnnt_loss_pruned(pruned, labels, ranges, 0, boundary, reduction="none"), logits=pruned)
    found["pruned.ranges"] = ranges
    px, py = (torch.from_numpy(rng.random(shape, dtype=np.float32)) for shape in ((6, 7, 9), (6, 8, 8)))
    many = torch.zeros(6, 4, dtype=torch.int64)
    many[:, 2], many[:, 3] = torch.tensor(MANY_SYMBOLS), torch.tensor(MANY_FRAMES)
    found.update({"drawn.px": px, "drawn.py": py, "drawn.frames": many[:, 3].clone(), "drawn.symbols": many[:, 2].clone()})
    found.update({f"drawn.ranges{rows}": k2.get_rnnt_prune_ranges(px, py, many, rows) for rows in (2, 3, 5)})
    return found


class Network:
    """Predictor and joint network by hand; one text at a time."""

    def __init__(self, rng: np.random.Generator) -> None:
        sizes = {"embed": (VOCABULARY, DIM), "conv": (DIM, 4, CONTEXT), "frame": (HIDDEN, DIM), "text": (HIDDEN, DIM), "out": (VOCABULARY, HIDDEN)}
        self.weights = {name: draw(rng, *shape, scale=1.5 * shape[-1] ** -0.5).detach() for name, shape in sizes.items()}

    def log_probs(self, frame: torch.Tensor, said: list[int]) -> torch.Tensor:
        w, context = self.weights, ([0] * CONTEXT + said)[-CONTEXT:]
        text = F.relu(F.conv1d(w["embed"][context].T[None], w["conv"], groups=DIM // 4))[0, :, 0]
        return (w["out"] @ torch.tanh(w["frame"] @ frame + w["text"] @ text)).log_softmax(0)

    def greedy(self, frames: torch.Tensor, most: int) -> list[int]:
        said: list[int] = []
        for frame in frames:
            for _ in range(most):
                best = int(self.log_probs(frame, said).argmax())
                if best == 0:
                    break
                said.append(best)
        return said

    def beam(self, frames: torch.Tensor, beam: int) -> list[int]:
        """At most one symbol a frame; equal texts are added up; the end is decided by the mean over the symbols, context included."""
        texts: dict[tuple[int, ...], float] = {(): 0.0}
        for frame in frames:
            steps = [(said, v, score + float(p)) for said, score in texts.items() for v, p in enumerate(self.log_probs(frame, list(said)))]
            texts = {}
            for said, v, score in sorted(steps, key=lambda step: -step[2])[:beam]:
                longer = said if v == 0 else (*said, v)
                texts[longer] = score if longer not in texts else max(score, texts[longer]) + math.log1p(math.exp(-abs(score - texts[longer])))
        return list(max(texts, key=lambda said: texts[said] / (len(said) + CONTEXT)))


def searches(rng: np.random.Generator) -> dict[str, torch.Tensor]:
    network, frames = Network(rng), draw(rng, 4, 12, DIM, scale=1.5).detach()
    lens = torch.tensor([12, 5, 9, 1])
    found = {"search.features": frames, "search.lens": lens, **{f"search.{name}": value for name, value in network.weights.items()}}
    ways = {"greedy": lambda x: network.greedy(x, MOST), "one": lambda x: network.greedy(x, 1), "beam": lambda x: network.beam(x, 4)}
    for name, way in ways.items():
        for i, length in enumerate(lens.tolist()):
            found[f"search.{name}{i}"] = torch.tensor(way(frames[i, :length]), dtype=torch.int64)
    return found


def main() -> None:
    rng = np.random.default_rng(20)
    found = {**losses(rng), **searches(rng)}
    arrays = {name: np.ascontiguousarray(value.numpy()) for name, value in found.items()}
    small = {name: value.astype(np.int16) if value.dtype == np.int64 else value for name, value in arrays.items()}
    save_file(small, sys.argv[1], {"made_with": f"k2 1.23.4, torch {torch.__version__}"})


if __name__ == "__main__":
    main()
