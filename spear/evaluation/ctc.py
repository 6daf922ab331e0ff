"""Connectionist temporal classification on frozen features: the network, its training and the two ways of reading it."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from spear.files import seed_from

BLANK = 0
CLIP_NORM = 5.0
"""Gradients are clipped: a first loss over long utterances is large."""


DRAWING = threading.Lock()
"""Held while torch's global generator is borrowed: tasks may be scored side by side."""


class CtcRun(NamedTuple):
    """Settings of one training."""

    learning_rate: float
    steps: int
    batch_cuts: int
    seed: int
    network: Literal["linear", "blstm"]
    hidden: int


class CtcNetwork(nn.Module):
    """Weighted sum of layers, perhaps one bidirectional LSTM, then scores of the blank (0) and the symbols."""

    def __init__(self, num_layers: int, dim: int, num_symbols: int, run: CtcRun) -> None:
        super().__init__()
        self.layer_logits = nn.Parameter(torch.zeros(num_layers))
        self.lstm = nn.LSTM(dim, run.hidden, batch_first=True, bidirectional=True) if run.network == "blstm" else None
        self.out = nn.Linear(2 * run.hidden if self.lstm is not None else dim, num_symbols + 1)

    def forward(self, x: Tensor) -> Tensor:
        """Log-probabilities (N, T, V + 1) of features (L, N, T, D)."""
        pooled = x[0] if len(x) == 1 else torch.einsum("l,lntd->ntd", self.layer_logits.softmax(0), x)
        if self.lstm is not None:
            pooled, _ = self.lstm(pooled)
        scores: Tensor = self.out(pooled).log_softmax(dim=-1)
        return scores


def train_ctc(
    read: Callable[[Sequence[int]], tuple[Tensor, Tensor]], targets: Sequence[NDArray[np.int64]], sizes: tuple[int, int, int], run: CtcRun
) -> CtcNetwork:
    """Train with Adam and a cosine learning rate.

    Args:
        read: numbers of cuts -> padded features (L, N, T, D) and frames (N,). targets: symbols 1 to V of each cut.
        sizes: L, D and V. run: settings; cuts are drawn anew in every pass.
    Source: Graves et al., ICML 2006; the frozen encoder with a weighted sum of layers is SUPERB's (arXiv:2105.01051).
    """
    with DRAWING, torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed_from(run.seed, "ctc"))
        network = CtcNetwork(*sizes, run)
    generator = torch.Generator().manual_seed(seed_from(run.seed, "ctc order"))
    optimizer = torch.optim.Adam(network.parameters(), run.learning_rate)
    order: list[int] = []
    size = min(run.batch_cuts, len(targets))
    for step in range(run.steps):
        if len(order) < size:
            order += torch.randperm(len(targets), generator=generator).tolist()
        chosen, order = order[:size], order[size:]
        x, lens = read(chosen)
        network.to(x.device)
        wanted = torch.from_numpy(np.concatenate([targets[i] for i in chosen])).to(x.device)
        counts = torch.tensor([len(targets[i]) for i in chosen])
        scores = network(x).transpose(0, 1)
        loss = F.ctc_loss(scores, wanted, lens, counts, blank=BLANK, reduction="sum", zero_infinity=True) / max(len(wanted), 1)
        for group in optimizer.param_groups:
            group["lr"] = run.learning_rate * 0.5 * (1 + math.cos(math.pi * step / run.steps))
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(network.parameters(), CLIP_NORM)
        optimizer.step()
    return network.eval()


def greedy(scores: NDArray[np.float32]) -> NDArray[np.int64]:
    """The best symbol of every frame of log-probabilities (T, V + 1), repeats merged and blanks left out."""
    best = scores.argmax(axis=1)
    new = np.concatenate([[True], best[1:] != best[:-1]]) if len(best) else np.zeros(0, bool)
    return np.asarray(best[new & (best != BLANK)], np.int64)


def beam_search(scores: NDArray[np.float32], beam: int, symbols: int = 8) -> NDArray[np.int64]:
    """The likeliest labelling that a prefix beam search finds (Hannun et al., arXiv:1408.2873, without a language model).

    Args:
        scores: (T, V + 1) log-probabilities. beam: prefixes kept. symbols: likeliest symbols of a frame that may be added.
    """
    prefixes: dict[tuple[int, ...], tuple[float, float]] = {(): (0.0, -math.inf)}  # log-probability of ending in a blank, and not
    for frame in scores:
        found: dict[tuple[int, ...], list[float]] = {}

        def add(prefix: tuple[int, ...], place: int, value: float, found: dict[tuple[int, ...], list[float]] = found) -> None:
            both = found.setdefault(prefix, [-math.inf, -math.inf])
            both[place] = log_sum(both[place], value)

        top = [int(i) for i in np.argsort(-frame)[:symbols] if i != BLANK]
        for prefix, (blank, other) in prefixes.items():
            total = log_sum(blank, other)
            add(prefix, 0, total + float(frame[BLANK]))
            if prefix:
                add(prefix, 1, other + float(frame[prefix[-1]]))
            for symbol in top:
                before = blank if prefix and prefix[-1] == symbol else total
                add((*prefix, symbol), 1, before + float(frame[symbol]))
        ranked = sorted(found.items(), key=lambda item: -log_sum(*item[1]))[:beam]
        prefixes = {prefix: (values[0], values[1]) for prefix, values in ranked}
    return np.array(max(prefixes, key=lambda prefix: log_sum(*prefixes[prefix])), dtype=np.int64)


def log_sum(a: float, b: float) -> float:
    """log(e^a + e^b)."""
    high, low = max(a, b), min(a, b)
    return high if low == -math.inf else high + math.log1p(math.exp(low - high))
