"""Fit of MVQ by turns: codes for fixed centres, then the least-squares centres for fixed codes.

Start: product k-means on groups of principal directions with balanced variance. Rounds: sweeps of coordinate descent over the
codebooks on perturbed centres (noise falls to zero, so that poor local optima are left), then a closed-form update of all
centres at once; the first three quarters of the rounds take turns on shares of the frames, where there are many. Polish: the
search that encoding will use takes the place of the sweeps; the round with the lowest held-out loss is kept. The predictor of the
codes is then a linear discriminant analysis, in closed form too.
Sources: local search quantisation with stochastic relaxation (Martinez et al., ECCV 2018), optimised product quantisation
(Ge et al., CVPR 2013) for the balanced start.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from spear.errors import ArtifactError
from spear.files import read_tensors, seed_from, write_tensors
from spear.progress import Meter
from spear.quantizers.mvq import MVQ
from spear.quantizers.search import BLOCK_FRAMES, frame_costs, make_tables, refine, sweep

logger = logging.getLogger(__name__)

_KMEANS_FRAMES = 50
_KMEANS_ITERS = 8
_DISCRIMINANT_SHRINKAGE = 0.01
_QUIET_ROUNDS = 2
_JUDGED_FRAMES = 2000
_EARLY_FRAMES = 15
_SPREAD_FRAMES = 4096


@dataclass(frozen=True)
class Settings:
    """rounds: with sweeps. sweeps: passes over the codebooks per round. polish_rounds: most rounds with the search.
    noise: initial standard deviation of the perturbation, relative to a codebook's share of the data's. ridge: pull of a centre
    towards its last place, in frames."""

    rounds: int
    sweeps: int
    polish_rounds: int
    noise: float
    ridge: float


@dataclass
class _State:
    """Between rounds: centres (C, K, D), codes (M, C) int64, rounds made, and the best round so far."""

    centers: Tensor
    codes: Tensor
    made: int
    best_centers: Tensor
    best_codes: Tensor
    best_loss: float
    best_made: int

    def save(self, path: Path, signature: str) -> None:
        tensors = {
            "centers": self.centers,
            "codes": self.codes.short(),
            "best_centers": self.best_centers,
            "best_codes": self.best_codes.short(),
            "made": torch.tensor(self.made),
            "best_made": torch.tensor(self.best_made),
            "best_loss": torch.tensor(self.best_loss, dtype=torch.float64),
            "signature": torch.tensor(list(signature.encode()), dtype=torch.uint8),
        }
        write_tensors(path, tensors)

    @classmethod
    def load(cls, path: Path, signature: str) -> _State:
        tensors = read_tensors(path)
        if bytes(tensors.get("signature", torch.empty(0, dtype=torch.uint8)).tolist()).decode() != signature:
            raise ArtifactError(f"{path} was saved by a fit with other settings or frames; remove it")
        return cls(
            centers=tensors["centers"],
            codes=tensors["codes"].long(),
            made=int(tensors["made"]),
            best_centers=tensors["best_centers"],
            best_codes=tensors["best_codes"].long(),
            best_loss=float(tensors["best_loss"]),
            best_made=int(tensors["best_made"]),
        )


@torch.no_grad()
def fit_alternating(
    frames: Tensor,
    heldout: Tensor,
    blank: MVQ,
    settings: Settings,
    *,
    seed: int,
    checkpoint: Path | None,
    signature: str,
) -> MVQ:
    """Fit on normalised frames (M, D), judged on normalised held-out frames (H, D).

    Args:
        blank: quantizer of the wanted sizes; its weights are set and it is returned.
        checkpoint: file to resume from and to save every round in. signature: what run the file belongs to.
    """
    last = settings.rounds + settings.polish_rounds
    judged = heldout[:: max(1, len(heldout) // _JUDGED_FRAMES)]
    with Meter("quantizers: alternating fit", last + 1, unit="rounds") as meter:
        if checkpoint is not None and checkpoint.exists():
            state = _State.load(checkpoint, signature)
        else:
            centers, codes = start_centers(frames, blank.num_codebooks, blank.entries, seed)
            state = _State(centers, codes, 0, centers, codes, float("inf"), 0)
        meter.advance(state.made + 1)
        while state.made < last and not (state.best_made and state.made - state.best_made >= _QUIET_ROUNDS):
            _round(state, frames, settings, seed)
            state.made += 1
            if state.made > settings.rounds or state.made == last:
                loss = _judge(state, frames, judged, blank)
                if loss < state.best_loss:
                    state.best_centers, state.best_codes, state.best_loss, state.best_made = state.centers, state.codes, loss, state.made
                logger.info("quantizers: round %d of %d, held-out relative loss %.5f", state.made, last, loss)
            if checkpoint is not None:
                state.save(checkpoint, signature)
            meter.advance()
    _fill(blank, state.best_centers, state.best_codes, frames)
    return blank


def _round(state: _State, frames: Tensor, settings: Settings, seed: int) -> None:
    """One turn: new codes, then new centres. Early rounds take every n-th frame only, where that leaves enough of them."""
    sweeping = state.made < settings.rounds
    early = 4 * state.made < 3 * settings.rounds
    step = max(1, len(frames) // (_EARLY_FRAMES * state.centers[..., 0].numel())) if early else 1
    part = slice(state.made % step, None, step)
    tables = make_tables(_perturbed(state, frames, settings, seed) if sweeping else state.centers)
    found = []
    for rows, codes in zip(frames[part].split(BLOCK_FRAMES), state.codes[part].split(BLOCK_FRAMES)):
        costs = frame_costs(tables, rows)
        found.append(sweep(tables, costs, codes, settings.sweeps) if sweeping else refine(tables, costs, codes, 1))
    state.codes = state.codes.clone()
    state.codes[part] = torch.cat(found)
    state.centers = solve_centers(frames[part], state.codes[part], state.centers, settings.ridge)


def _perturbed(state: _State, frames: Tensor, settings: Settings, seed: int) -> Tensor:
    """Centres with noise that falls to zero over the rounds, so that poor local optima are left."""
    scale = settings.noise * (1 - (state.made + 1) / settings.rounds)
    if not scale:
        return state.centers
    generator = torch.Generator().manual_seed(seed_from(seed, "noise", state.made))
    spread = frames[:: max(1, len(frames) // _SPREAD_FRAMES)].std(dim=0, correction=0) / state.centers.shape[0] ** 0.5
    noise = spread * torch.randn(state.centers.shape, generator=generator)
    return torch.add(state.centers, noise, alpha=scale)


def _judge(state: _State, frames: Tensor, heldout: Tensor, blank: MVQ) -> float:
    """Held-out loss, relative to the spread around the mean, of encoding as a user would."""
    _fill(blank, state.centers, state.codes, frames)
    error = blank.reconstruct(blank.search(heldout, 5)) - heldout
    spread = (heldout - heldout.mean(dim=0)).double().square().sum()
    return float(error.double().square().sum() / (spread + 1e-20))


def _fill(quantizer: MVQ, centers: Tensor, codes: Tensor, frames: Tensor) -> None:
    """Set the weights of `quantizer` from centres, and its predictor from the codes of `frames`; unused entries become zeros."""
    used = quantizer.entries
    weight, bias = discriminants(frames, codes, used)
    quantizer.centers.zero_()[:, :used] = centers
    quantizer.to_logits.weight.zero_().view(quantizer.num_codebooks, quantizer.codebook_size, -1)[:, :used] = weight
    quantizer.to_logits.bias.zero_().view(quantizer.num_codebooks, quantizer.codebook_size)[:, :used] = bias


def start_centers(frames: Tensor, num_codebooks: int, entries: int, seed: int) -> tuple[Tensor, Tensor]:
    """Product k-means: centres (C, K, D) and codes (M, C) for frames (M, D).

    Principal directions are dealt out, largest variance first, to the group with the smallest product of variances. Where there
    are fewer directions than codebooks, the codebooks left over cluster what the others leave.
    """
    centred = frames - frames.mean(dim=0)
    covariance = sum((rows.T.double() @ rows.double() for rows in centred.split(8192)), torch.zeros((), dtype=torch.float64)) / len(frames)
    variances, directions = torch.linalg.eigh(covariance)
    groups = _deal(variances.flip(0).clamp(min=0.0), num_codebooks)
    directions = directions.flip(1).float()
    centers = torch.zeros(num_codebooks, entries, frames.shape[1])
    codes = torch.zeros(len(frames), num_codebooks, dtype=torch.int64)
    remaining = frames.clone()
    for codebook, group in enumerate(groups):
        generator = torch.Generator().manual_seed(seed_from(seed, "k-means", codebook))
        basis = directions[:, group] if group else None
        points = remaining @ basis if basis is not None else remaining
        means = _kmeans(points, entries, generator)
        codes[:, codebook] = _nearest(points, means)
        centers[codebook] = means @ basis.T if basis is not None else means
        remaining -= centers[codebook][codes[:, codebook]]
    return centers, codes


def _deal(variances: Tensor, num_groups: int) -> list[list[int]]:
    """Share out directions of falling variance among groups of almost equal size and product of variances."""
    safe = (variances + 1e-6 * variances.max() + 1e-30).log()
    logs: list[float] = (safe - safe.min()).tolist()
    room = -(-len(logs) // num_groups)
    groups: list[list[int]] = [[] for _ in range(num_groups)]
    products = [0.0] * num_groups
    for direction, value in enumerate(logs):
        group = min((g for g in range(num_groups) if len(groups[g]) < room), key=lambda g: (products[g], len(groups[g])))
        groups[group].append(direction)
        products[group] += value
    return groups


def _nearest(points: Tensor, means: Tensor) -> Tensor:
    """Index (M,) of the nearest mean."""
    norms = means.square().sum(dim=1)
    return torch.cat([torch.addmm(norms, rows, means.T, alpha=-2.0).argmin(dim=1) for rows in points.split(8192)])


def _kmeans(points: Tensor, entries: int, generator: torch.Generator) -> Tensor:
    """Lloyd's algorithm on a sample of points (M, d); an empty cluster restarts at a random point."""
    sample = points[torch.randperm(len(points), generator=generator)[: entries * _KMEANS_FRAMES]]
    means = sample[torch.randperm(len(sample), generator=generator)[:entries]].clone()
    for _ in range(_KMEANS_ITERS):
        nearest = _nearest(sample, means)
        counts = torch.bincount(nearest, minlength=entries)
        means = torch.zeros_like(means).index_add_(0, nearest, sample) / counts.clamp(min=1)[:, None]
        empty = (counts == 0).nonzero()[:, 0]
        means[empty] = sample[torch.randint(len(sample), (len(empty),), generator=generator)]
    return means


def solve_centers(frames: Tensor, codes: Tensor, previous: Tensor, ridge: float) -> Tensor:
    """Centres (C, K, D) that minimise the squared error of frames (M, D) for codes (M, C), plus ridge * |change|^2.

    Normal equations of the one-hot design matrix: co-occurrence counts of codes on the left, sums of frames on the right, float64.
    """
    num, size, dim = previous.shape
    counts = torch.zeros(num, size, num, size, dtype=torch.float64)
    sums = torch.zeros(num, size, dim, dtype=torch.float64)
    for first in range(num):
        for rows, index in zip(frames.split(8192), codes[:, first].split(8192)):
            sums[first].add_(torch.zeros(size, dim).index_add_(0, index, rows))
        for second in range(first, num):
            pairs = torch.bincount(codes[:, first] * size + codes[:, second], minlength=size * size).view(size, size).double()
            counts[first, :, second] = pairs
            counts[second, :, first] = pairs.T
    matrix = counts.view(num * size, num * size)
    matrix.diagonal().add_(ridge)
    right = (sums + ridge * previous.double()).flatten(0, 1)
    solution = torch.cholesky_solve(right, torch.linalg.cholesky(matrix))
    return solution.float().view(num, size, dim)


def discriminants(frames: Tensor, codes: Tensor, entries: int) -> tuple[Tensor, Tensor]:
    """Linear discriminant analysis of the codes of each codebook: weights (C, K, D) and biases (C, K) of log-odds.

    Frames with the same entry are taken as Gaussian around their mean with one covariance for all entries of a codebook, its
    diagonal raised by one percent of the total variance.
    """
    num, dim = codes.shape[1], frames.shape[1]
    mean = frames.double().mean(dim=0)
    centred = frames.double() - mean
    total = centred.T @ centred / len(frames)
    raised = torch.diag(_DISCRIMINANT_SHRINKAGE * total.diagonal() + 1e-8)
    weight, bias = torch.empty(num, entries, dim), torch.empty(num, entries)
    for codebook in range(num):
        counts = torch.bincount(codes[:, codebook], minlength=entries).double()
        sums = torch.zeros(entries, dim, dtype=torch.float64).index_add_(0, codes[:, codebook], centred)
        means = sums / (counts + 1.0)[:, None]
        within = total - (means.T * (counts / len(frames))) @ means + raised
        rows = torch.linalg.solve(within, means.T).T
        weight[codebook] = rows.float()
        bias[codebook] = ((counts + 0.5).div(len(frames)).log() - 0.5 * (rows * means).sum(dim=1) - rows @ mean).float()
    return weight, bias
