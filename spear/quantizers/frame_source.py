"""Frames to fit on, in memory or on disk, read in pieces by one process or by several.

A fit must come out the same whoever read what. So the work is cut into units that do not depend on the number of processes, every
unit is computed as a whole, and what units add up is added as whole numbers (`Sums`), whose order does not matter.
"""

from __future__ import annotations

import hashlib
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from spear.errors import ArtifactError, DataError
from spear.files import seed_from
from spear.quantizers.normalize import Normalizer

if TYPE_CHECKING:
    from spear.training.distributed import World

UNIT_FRAMES = 2048
"""Neighbouring frames that are read and searched together."""
_POOL_BYTES = 32 * 1024**2
_MOST_LANES, _LEAST_LANE = 8, 64
_PIECES_PER_LANE = 8
_PIECE_FRAMES = 256
_BITS = 62


class _Block(NamedTuple):
    """A part of the frames: a tensor (m, D), or a file with a tensor `frames` of that shape."""

    place: Tensor | Path
    size: int


class Draw(NamedTuple):
    """Some frames (B, D), and their places (B,) int64 among all."""

    places: Tensor
    frames: Tensor


class FrameSource:
    """Frames (M, D) float32 of several blocks, one after the other.

    Args:
        blocks: tensors (m, D), or safetensors files with a tensor `frames` of that shape, which are read anew whenever they are needed.
        world: the processes that share the work, None: this one alone. All must be given the same blocks.

    Attributes:
        dim: D. normalizer: applied to all that is read, None at first. peak: largest absolute value of normalised frames, once `measure` ran.
    Raises:
        ArtifactError: a file is missing, damaged, or lacks its frames; blocks have several widths.
    """

    def __init__(self, blocks: Sequence[Tensor | Path], world: World | None = None) -> None:
        shapes = [tuple(place.shape) if isinstance(place, Tensor) else _shape(place) for place in blocks]
        widths = {shape[1] for shape in shapes}
        if len(widths) > 1:
            raise ArtifactError(f"frames have several widths, {', '.join(str(width) for width in sorted(widths))}")
        self.dim: int = shapes[0][1]
        self._blocks = [_Block(place, shape[0]) for place, shape in zip(blocks, shapes)]
        self._starts = [0, *accumulate(block.size for block in self._blocks)]
        self._world = world
        self.normalizer: Normalizer | None = None
        self.peak = 0.0

    def __len__(self) -> int:
        return self._starts[-1]

    @property
    def rank(self) -> int:
        """Of this process among those that share the work."""
        return 0 if self._world is None else self._world.rank

    @property
    def size(self) -> int:
        """Processes that share the work."""
        return 1 if self._world is None else self._world.size

    def share(self, tensor: Tensor) -> Tensor:
        """Sum a tensor of whole numbers over the processes, in place."""
        return tensor if self._world is None else self._world.sum_(tensor)

    def agree(self, value: float) -> list[float]:
        """The values of all processes, in the order of their ranks."""
        return [value] if self._world is None else self._world.gather(value)

    def wait(self) -> None:
        """Until all processes are here."""
        if self._world is not None:
            self._world.barrier()

    def read(self, start: int, stop: int) -> Tensor:
        """Frames `start` to `stop`, normalised, (stop - start, D) float32; a copy where they were on disk."""
        parts = []
        for index in range(bisect_right(self._starts, start) - 1, len(self._blocks)):
            first, last = max(start - self._starts[index], 0), min(stop - self._starts[index], self._blocks[index].size)
            if last <= 0:
                break
            if last > first:
                parts.append(_rows(self._blocks[index].place, first, last))
        if not parts:
            return torch.empty(0, self.dim)
        rows = torch.cat(parts) if len(parts) > 1 else parts[0]
        return rows if self.normalizer is None else self.normalizer.apply_to(rows)

    @property
    def num_units(self) -> int:
        """Units that the frames fall into."""
        return -(-len(self) // UNIT_FRAMES)

    def units(self, start: int = 0, step: int = 1) -> Iterator[Tensor]:
        """Every step-th unit from `start` on, those of this process: the n-th of them belongs to rank n modulo the processes."""
        for unit in range(start + self.rank * step, self.num_units, self.size * step):
            yield self.read(unit * UNIT_FRAMES, min((unit + 1) * UNIT_FRAMES, len(self)))

    def sample(self, most: int) -> Tensor:
        """At most `most` frames from places all over the data, the same in every process."""
        if len(self) <= most:
            return self.read(0, len(self))
        pieces = max(1, most // _PIECE_FRAMES)
        starts = [piece * (len(self) - most // pieces) // max(1, pieces - 1) for piece in range(pieces)]
        return torch.cat([self.read(start, start + most // pieces) for start in starts])

    def measure(self, normalize: bool) -> None:
        """Fit the normaliser, where there is to be one, and find the largest value.

        Raises:
            DataError: a value is not finite.
        """
        peaks, finite = torch.zeros(self.dim), True
        for rows in self.units():
            finite = finite and bool(rows.isfinite().all())
            peaks = torch.maximum(peaks, rows.abs().amax(dim=0))
        if not all(self.agree(float(finite))):
            raise DataError("training frames have non-finite values", cause="not_finite")
        if self.size > 1:
            every = torch.zeros(self.size, self.dim)
            every[self.rank] = peaks
            peaks = self.share(every).amax(dim=0)
        if not normalize:
            self.peak = float(peaks.max())
            return
        mean = Sums((self.dim,), peaks.double(), len(self))
        for rows in self.units():
            mean.add(rows.double().sum(dim=0))
        middle = mean.total(self) / len(self)
        reach = peaks.double() + middle.abs()
        squares = Sums((self.dim,), reach.square(), len(self))
        for rows in self.units():
            squares.add((rows.double() - middle).square().sum(dim=0))
        std = (squares.total(self) / len(self)).sqrt()
        self.normalizer = Normalizer(middle.float(), std.float())
        self.peak = float(self.normalizer.apply_to(torch.stack([peaks, -peaks])).abs().max())

    def lanes(self, batch_frames: int) -> list[tuple[int, int]]:
        """First frame and end of each lane that batches are put together from: up to eight, whatever the number of processes."""
        count = _MOST_LANES if batch_frames >= _MOST_LANES * _LEAST_LANE and len(self) >= 4 * batch_frames else 1
        length = len(self) // count
        return [(lane * length, (lane + 1) * length) for lane in range(count)]

    def owns(self, lane: int) -> bool:
        """Whether this process reads a lane."""
        return lane % self.size == self.rank

    def steps(self, batch_frames: int) -> int:
        """Batches of an epoch."""
        lanes = self.lanes(batch_frames)
        return (lanes[0][1] - lanes[0][0]) // (min(batch_frames, len(self)) // len(lanes))

    def epoch(self, batch_frames: int, seed: int) -> Iterator[list[Draw]]:
        """Batches in random order, each as the draws of this process from its lanes.

        Every lane has its own part of the data, mixes as many pieces of it as 32 MiB hold, and gives an equal share of every batch.
        What is left at the end of an epoch is not used.
        """
        lanes, steps = self.lanes(batch_frames), self.steps(batch_frames)
        share = min(batch_frames, len(self)) // len(lanes)
        readers = [self._lane(*ends, share, steps, seed_from(seed, "lane", lane)) for lane, ends in enumerate(lanes) if self.owns(lane)]
        for _ in range(steps):
            yield [next(reader) for reader in readers]

    def _lane(self, start: int, stop: int, share: int, steps: int, seed: int) -> Iterator[Draw]:
        """`steps` times `share` frames of one lane: its pieces in random order, mixed within pools."""
        piece = max(1, min(_PIECE_FRAMES, (stop - start) // _PIECES_PER_LANE))
        generator = torch.Generator().manual_seed(seed)
        starts = (start + torch.randperm(-(-(stop - start) // piece), generator=generator) * piece).tolist()
        pool_pieces = max(1, _POOL_BYTES // (4 * self.dim * piece), -(-share // piece))
        pool = Draw(torch.empty(0, dtype=torch.int64), torch.empty(0, self.dim))
        for first in range(0, len(starts), pool_pieces):
            ends = [(begin, min(begin + piece, stop)) for begin in starts[first : first + pool_pieces]]
            places = torch.cat([pool.places, *(torch.arange(*pair) for pair in ends)])
            frames = torch.cat([pool.frames, *(self.read(*pair) for pair in ends)])
            order = torch.randperm(len(frames), generator=generator)
            while len(order) >= share and steps:
                yield Draw(places[order[:share]], frames[order[:share]])
                order, steps = order[share:], steps - 1
            pool = Draw(places[order], frames[order])

    def fingerprint(self) -> str:
        """SHA-256 of all frames as they are before normalisation, made by rank 0."""
        digest = hashlib.sha256()
        if self.rank == 0:
            for block in self._blocks:
                for start in range(0, block.size, UNIT_FRAMES):
                    digest.update(_rows(block.place, start, min(start + UNIT_FRAMES, block.size)).contiguous().numpy().tobytes())
        return digest.hexdigest() if self._world is None else self._world.gather(digest.hexdigest())[0]


class Sums:
    """Sums of numbers as whole multiples of a power of two, so that neither order nor grouping changes them.

    Args:
        shape: of what is summed. bound: largest absolute value of one summand, a number or one per last dimension. count: summands at most.
    """

    def __init__(self, shape: tuple[int, ...], bound: float | Tensor, count: int) -> None:
        limit = torch.as_tensor(bound, dtype=torch.float64).clamp(min=1e-30) * max(count, 1)
        self._scale = torch.pow(2.0, _BITS - 1 - limit.log2().ceil())
        self._value = torch.zeros(shape, dtype=torch.int64)

    def add(self, part: Tensor) -> None:
        """Add a partial sum."""
        self._value += (part.double() * self._scale).round_().long()

    def add_at(self, places: Tensor, rows: Tensor) -> None:
        """Add row m of `rows` (M, D) at each of the places (M, C) of its line."""
        whole = (rows.double() * self._scale).round_().long()
        for column in places.T.contiguous():
            self._value.index_add_(0, column, whole)

    def total(self, source: FrameSource) -> Tensor:
        """The sum over all processes, float64."""
        return source.share(self._value.clone()).double() / self._scale


def _shape(path: Path) -> tuple[int, int]:
    try:
        with safe_open(path, "pt") as file:
            shape = tuple(file.get_slice("frames").get_shape()) if "frames" in file.keys() else None  # noqa: SIM118
    except FileNotFoundError as error:
        raise ArtifactError(f"{path} does not exist") from error
    except (SafetensorError, OSError) as error:
        raise ArtifactError(f"{path} is damaged: {error}") from error
    if shape is None or len(shape) != 2:
        raise ArtifactError(f"{path} must have a tensor `frames` of shape (frames, channels), but has {'none' if shape is None else shape}")
    return shape[0], shape[1]


def _rows(place: Tensor | Path, start: int, stop: int) -> Tensor:
    if isinstance(place, Tensor):
        return place[start:stop].float()
    try:
        with safe_open(place, "pt") as file:  # opened for each read: pages of a file that stays open would stay in memory
            return torch.as_tensor(file.get_slice("frames")[start:stop]).to(torch.float32, copy=True)
    except (SafetensorError, OSError) as error:
        raise ArtifactError(f"{place} is damaged: {error}") from error
