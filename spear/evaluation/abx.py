"""ABX: is a phone closer to another token of itself than to another phone? Which items are compared, and the error rate.

After the ABX tests of the ZeroSpeech challenges (Schatz et al., Interspeech 2013; arXiv:2011.11588): A and X are the same phone, B is
another one in the same context. *Within*: all three by one speaker. *Across*: A and B by one speaker, X by another.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from spear.evaluation.dtw import Metric, dtw_distances
from spear.files import seed_from

Mode = Literal["within", "across"]
Indexes = NDArray[np.int64]
Floats = NDArray[np.float64]


class Item(NamedTuple):
    """One phone in a cut: its times in seconds, its neighbours as `context`, its speaker."""

    cut: str
    start: float
    end: float
    phone: str
    context: str
    speaker: str


class Cell(NamedTuple):
    """One comparison: numbers of the items that may be A, B and X; `speaker` is that of A and B."""

    phone: str
    other: str
    context: str
    speaker: str
    a: tuple[int, ...]
    b: tuple[int, ...]
    x: tuple[int, ...]


class Limits(NamedTuple):
    """Most items of one phone, context and speaker; most speakers of X for one A and B; most cells in all."""

    items: int = 10
    across: int = 5
    cells: int = 10_000


def items_of(
    cut: str, segments: Sequence[tuple[float, float, str]], speaker: str, *, span: Literal["phone", "triphone"], context: Literal["within", "any"]
) -> list[Item]:
    """Items of one cut: every segment that has one before and one after it.

    Args:
        segments: (start, end, symbol), ordered. span: what an item covers, the phone or also its neighbours. context: ``within``: only
            items between the same neighbours are compared; ``any``: all.
    """
    return [
        Item(
            cut,
            (before if span == "triphone" else here)[0],
            (after if span == "triphone" else here)[1],
            here[2],
            f"{before[2]}\t{after[2]}" if context == "within" else "",
            speaker,
        )
        for before, here, after in zip(segments, segments[1:], segments[2:])
    ]


def make_cells(items: Sequence[Item], mode: Mode, limits: Limits, seed: int) -> list[Cell]:
    """All comparisons that the items allow, thinned to the limits by hashes of the items, so that their order plays no part."""
    groups: dict[str, dict[str, dict[str, list[int]]]] = defaultdict(lambda: defaultdict(lambda: defaultdict(list)))
    order = sorted(range(len(items)), key=lambda i: seed_from(seed, "item", items[i].cut, items[i].start))
    for i in order:
        group = groups[items[i].context][items[i].speaker][items[i].phone]
        if len(group) < limits.items:
            group.append(i)
    cells: list[Cell] = []
    for context in sorted(groups):
        for speaker in sorted(groups[context]):
            phones = groups[context][speaker]
            for phone in sorted(phones):
                for other in sorted(phones):
                    if phone != other:
                        found = [speaker] if mode == "within" else _speakers_of_x(groups[context], speaker, phone, other, limits.across, seed)
                        for of_x in found:
                            x = tuple(groups[context][of_x][phone])
                            if mode == "across" or len(x) > 1:
                                cells.append(Cell(phone, other, context, speaker, tuple(phones[phone]), tuple(phones[other]), x))
    if len(cells) > limits.cells:
        cells = sorted(cells, key=lambda cell: seed_from(seed, "cell", *cell[:4], items[cell.x[0]].speaker))[: limits.cells]
    return cells


def _speakers_of_x(group: dict[str, dict[str, list[int]]], speaker: str, phone: str, other: str, most: int, seed: int) -> Iterable[str]:
    found = sorted(name for name in group if name != speaker and phone in group[name])
    return found if len(found) <= most else sorted(found, key=lambda name: seed_from(seed, "x", speaker, phone, other, name))[:most]


def used_items(cells: Iterable[Cell]) -> list[int]:
    """Numbers of the items that cells name, in order."""
    return sorted({i for cell in cells for i in (*cell.a, *cell.b, *cell.x)})


def cell_errors(cells: Sequence[Cell], frames: NDArray[np.float32], starts: Indexes, lens: Indexes, metric: Metric) -> Floats:
    """Error rate of every cell: over its triples, the share where X is closer to B than to A; a tie counts one half.

    Args:
        frames: (M, D). starts, lens: (I,) where each item's frames lie. metric: of frames, see `dtw_distances`.
    """
    count = len(starts)
    shapes = [(len(cell.x), len(cell.a), len(cell.b)) for cell in cells]
    keys = [np.concatenate([np.add.outer(np.array(cell.x) * count, np.array(side)).ravel() for side in (cell.a, cell.b)]) for cell in cells]
    wanted, place = np.unique(np.concatenate(keys), return_inverse=True)
    found = dtw_distances(frames, starts, lens, np.stack([wanted // count, wanted % count], axis=1), metric)[place]
    errors, start = np.empty(len(cells)), 0
    for i, (cell, (x, a, b)) in enumerate(zip(cells, shapes)):
        to_a, to_b = found[start : start + x * a].reshape(x, a, 1), found[start + x * a : start + x * (a + b)].reshape(x, 1, b)
        start += x * (a + b)
        wrong = 0.5 * (1 + np.sign(to_a - to_b))
        other = np.broadcast_to((np.array(cell.x)[:, None] != np.array(cell.a)[None])[:, :, None], wrong.shape)  # X is never A
        errors[i] = wrong[other].mean()
    return errors


def pair_errors(cells: Sequence[Cell], errors: Floats) -> dict[tuple[str, str], float]:
    """Error rate of every ordered pair of phones: the mean over contexts (and speakers of X), then over speakers of A and B."""
    by_speaker: dict[tuple[str, str], dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for cell, error in zip(cells, errors):
        by_speaker[cell.phone, cell.other][cell.speaker].append(float(error))
    return {pair: float(np.mean([np.mean(values) for values in speakers.values()])) for pair, speakers in sorted(by_speaker.items())}
