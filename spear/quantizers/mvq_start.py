"""The start of a fit of MVQ: product k-means on groups of principal directions with balanced variance.

Source: optimised product quantisation, parametric start (Ge et al., CVPR 2013).
"""

from __future__ import annotations

import torch
from torch import Tensor

from spear.files import seed_from

_KMEANS_FRAMES = 50
_KMEANS_ITERS = 8


def start_centers(frames: Tensor, covariance: Tensor, num_codebooks: int, entries: int, seed: int) -> tuple[Tensor, Tensor]:
    """Product k-means: centres (C, K, D) and codes (M, C) for frames (M, D) whose directions come from `covariance` (D, D) float64.

    Principal directions are dealt out, largest variance first, to the group with the smallest product of variances. Where there
    are fewer directions than codebooks, the codebooks left over cluster what the others leave.
    """
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
