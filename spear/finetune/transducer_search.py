"""From a transducer's frames to symbols: greedy search of a batch, and beam search with at most one symbol per frame."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from spear.finetune.decoding import NEVER, log_add
from spear.finetune.text import BLANK

Step = Callable[[Tensor, Tensor], Tensor]
"""(H, J) frames and (H, C) last symbols -> (H, V) log probabilities of the next one."""


def greedy_search(step: Step, frames: Tensor, lens: Tensor, context: int, max_symbols: int) -> list[list[int]]:
    """The best symbol again and again until it is the blank, or `max_symbols` were said, at every frame (arXiv:1211.3711, section 2.5).

    Args:
        frames: (N, T, J). lens: (N,). context: symbols that `step` sees.
    """
    last = torch.full((len(frames), context), BLANK, device=frames.device)
    said = [last[:, :0]]
    for t in range(frames.shape[1]):
        going = lens > t
        for _ in range(max_symbols):
            best = step(frames[:, t], last).argmax(dim=1).where(going, BLANK)
            going = best != BLANK
            if not going.any():
                break
            said.append(best[:, None])
            last = torch.where(going[:, None], torch.cat([last[:, 1:], best[:, None]], dim=1), last)
    return [[symbol for symbol in row if symbol != BLANK] for row in torch.cat(said, dim=1).tolist()]


def beam_search(step: Step, frames: Tensor, context: int, beam: int) -> list[int]:
    """Modified beam search, one item at a time: each frame says one symbol or none, equal texts are added up.

    Of the last texts the one with the best mean log probability wins, the `context` blanks before it counted as symbols (as in icefall).

    Args:
        frames: (T, J). context: symbols that `step` sees. beam: texts kept after each frame.
    """
    texts: dict[tuple[int, ...], float] = {(): 0.0}
    for frame in frames:
        before = list(texts)
        last = torch.tensor([((BLANK,) * context + text)[-context:] for text in before], device=frame.device)
        scores = step(frame.expand(len(before), -1), last).double()
        scores = scores + torch.tensor(list(texts.values()), dtype=torch.float64, device=frame.device)[:, None]
        values, places = scores.flatten().topk(min(beam, scores.numel()))
        texts = {}
        for value, place in zip(values.tolist(), places.tolist()):
            row, symbol = divmod(place, scores.shape[1])
            text: tuple[int, ...] = before[row] if symbol == BLANK else (*before[row], symbol)
            texts[text] = log_add(texts.get(text, NEVER), value)
    means = [(score / (len(text) + context), text) for text, score in texts.items()]
    return list(max(means)[1])
