"""How well discrete units stand for phones, and how many bits they take."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.sparse import csr_matrix
from torch import Tensor

from spear.files import seed_from

Counts = NDArray[np.float64]
Codes = NDArray[np.int64]
BLOCK = 8192
SEED_FRAMES = 50


def contingency(units: Codes, phones: Codes) -> Counts:
    """How often each unit meets each phone, (units, phones), of two (M,) arrays of non-negative numbers."""
    shape = (int(units.max()) + 1, int(phones.max()) + 1)
    return np.bincount(units * shape[1] + phones, minlength=shape[0] * shape[1]).reshape(shape).astype(np.float64)


def entropy(counts: Counts) -> float:
    """Entropy in bits of the distribution that counts (any shape) stand for."""
    shares = counts[counts > 0] / counts.sum()
    return float(-(shares * np.log2(shares)).sum())


def pnmi(counts: Counts) -> float:
    """Phone-normalised mutual information: I(phone; unit) / H(phone) (HuBERT, arXiv:2106.07447, section V-B); 0 where there is one phone.

    Args:
        counts: (units, phones).
    """
    phones = entropy(counts.sum(axis=0))
    return 0.0 if phones == 0 else max(0.0, (phones + entropy(counts.sum(axis=1)) - entropy(counts)) / phones)


def purities(counts: Counts) -> tuple[float, float]:
    """Phone purity: frames whose phone is the commonest one of their unit; cluster purity: whose unit is the commonest one of their phone."""
    total = counts.sum()
    return float(counts.max(axis=1).sum() / total), float(counts.max(axis=0).sum() / total)


def usage(units: Codes, cuts: Codes, frame_rate_hz: float, size: int) -> dict[str, float]:
    """What a stream of units costs and how evenly its entries are used.

    Args:
        units: (M,) of whole cuts, one after the other. cuts: (M,) number of each frame's cut. size: K, entries of the codebook.
    Returns:
        ``active``: entries in use; ``perplexity``: 2^entropy; ``bits_per_s``: frames a second times entropy; ``dedup_bits_per_s``: the same
        of units without repeats, whose durations are then lost; ``raw_bits_per_s``: frames a second times log2(K); ``dedup_share``: units
        left without repeats.
    """
    new = np.concatenate([[True], (units[1:] != units[:-1]) | (cuts[1:] != cuts[:-1])])
    counts, kept = (np.bincount(x).astype(np.float64) for x in (units, units[new]))
    return {
        "active": float((counts > 0).sum()),
        "perplexity": 2 ** entropy(counts),
        "bits_per_s": frame_rate_hz * entropy(counts),
        "dedup_bits_per_s": frame_rate_hz * float(new.mean()) * entropy(kept),
        "raw_bits_per_s": frame_rate_hz * float(np.log2(max(size, 2))),
        "dedup_share": float(new.mean()),
    }


def pnmi_interval(units: Codes, phones: Codes, cuts: Codes, *, resamples: int, seed: int, level: float = 0.95) -> tuple[float, float]:
    """Bootstrap interval of `pnmi` over whole cuts.

    Drawing cuts with replacement raises mutual information, so the draws are moved to have the value itself as their mean.

    Args:
        units, phones, cuts: (M,) numbers of each frame's unit, phone and cut.
    """
    width, found = int(phones.max()) + 1, contingency(units, phones)
    names, index = np.unique(cuts, return_inverse=True)
    by_cut = csr_matrix((np.ones(len(units)), (index, units * width + phones)), shape=(len(names), found.size))
    rng = np.random.default_rng(seed)
    drawn = rng.multinomial(len(names), np.full(len(names), 1 / len(names)), size=resamples)
    values = np.array([pnmi((by_cut.T @ weights.astype(np.float64)).reshape(found.shape)) for weights in drawn])
    low, high = np.quantile(values, [(1 - level) / 2, (1 + level) / 2]) + pnmi(found) - values.mean()
    return float(low), float(high)


def fit_units(frames: Tensor, size: int, seed: int, *, passes: int = 15) -> Tensor:
    """Centres (K, D) of k-means on frames (M, D), M >= K: Lloyd's passes from k-means++ (Arthur and Vassilvitskii, 2007) seeds.

    Seeds come from at most `SEED_FRAMES` frames for each. A centre that loses all its frames moves to the frame that is farthest from
    its own.
    """
    generator = torch.Generator().manual_seed(seed_from(seed, "units"))
    centres = _seeds(frames[torch.randperm(len(frames), generator=generator)[: size * SEED_FRAMES].to(frames.device)], size, generator)
    for _ in range(passes):
        units, distances = assign(frames, centres)
        counts = torch.bincount(units, minlength=size)
        moved = torch.zeros_like(centres).index_add_(0, units, frames) / counts.clamp(min=1)[:, None]
        empty = torch.nonzero(counts == 0)[:, 0]
        moved[empty] = frames[distances.topk(max(len(empty), 1)).indices[: len(empty)]]
        if torch.equal(moved, centres):
            break
        centres = moved
    return centres


def _seeds(frames: Tensor, size: int, generator: torch.Generator) -> Tensor:
    """Frames (K, D), each drawn with a chance that grows with the squared distance from those before it."""
    norms = frames.square().sum(dim=1)
    nearest, chosen = torch.ones_like(norms), []
    for _ in range(size):
        total = nearest.double().cumsum(0)
        place = torch.rand(1, generator=generator, dtype=torch.float64).to(frames.device) * total[-1]
        chosen.append(int(torch.searchsorted(total, place).clamp(max=len(frames) - 1)))
        distances = (norms + norms[chosen[-1]] - 2 * (frames @ frames[chosen[-1]])).clamp(min=0)
        nearest = distances if len(chosen) == 1 else torch.minimum(nearest, distances)
    return frames[chosen]


def assign(frames: Tensor, centres: Tensor) -> tuple[Tensor, Tensor]:
    """Nearest centre (M,) int64 of frames (M, D), and its squared distance (M,)."""
    norms = centres.square().sum(dim=1)
    best = [(norms - 2 * part @ centres.T).min(dim=1) for part in frames.split(BLOCK)]
    units = torch.cat([found.indices for found in best])
    return units, torch.cat([found.values for found in best]) + frames.square().sum(dim=1)
