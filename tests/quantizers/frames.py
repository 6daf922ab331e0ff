"""Frames and references that the quantizer tests share."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from spear.quantizers.mvq import MVQ


def clustered(num_frames: int, dim: int, seed: int = 0, clusters: int = 24) -> Tensor:
    """Frames around random cluster centres, with an offset and a scale per channel."""
    generator = torch.Generator().manual_seed(seed)
    places = torch.Generator().manual_seed(99)
    centres = torch.randn(clusters, dim, generator=places)
    which = torch.randint(clusters, (num_frames,), generator=generator)
    frames = centres[which] + 0.4 * torch.randn(num_frames, dim, generator=generator)
    return frames * torch.linspace(0.5, 4.0, dim) + torch.linspace(-3.0, 3.0, dim)


def squared_error(quantizer: MVQ, frames: Tensor, refine_iters: int) -> float:
    """Summed over all frames, in the normalised domain."""
    rows = quantizer.normalize(frames)
    return float((quantizer.reconstruct(quantizer.search(rows, refine_iters)) - rows).square().sum())


def merge_search(centres: Tensor, frame: Tensor, codes: list[int], base: int) -> list[int]:
    """One round of the search for one frame, by the definition: vectors, lists of tuples, float64."""
    num, size, _ = centres.shape
    error = sum(centres[n, codes[n]] for n in range(num)) - frame
    groups = [[((k,), centres[n, k] - centres[n, codes[n]]) for k in range(size)] for n in range(num)]
    length = 1
    while True:
        groups = [sorted(group, key=lambda option: float((error + option[1]).square().sum())) for group in groups]
        keep, covered = base, length
        while covered >= 4:
            keep, covered = keep * 2, covered // 4
        groups = [group[: 1 if len(groups) == 1 else min(128, keep)] for group in groups]
        if len(groups) == 1:
            return list(groups[0][0][0])
        pairs = zip(groups[0::2], groups[1::2])
        groups = [[(a + b, da + db) for a, da in even for b, db in odd] for even, odd in pairs]
        length *= 2


def random_mvq(dim: int, num_codebooks: int, codebook_size: int, seed: int = 0) -> MVQ:
    """An MVQ with overlapping random codebooks, so that the search has work to do."""
    quantizer = MVQ(dim, num_codebooks, codebook_size, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        quantizer.centers.copy_(torch.randn(quantizer.centers.shape, generator=generator) * num_codebooks**-0.5)
        quantizer.to_logits.weight.copy_(functional.normalize(quantizer.centers.flatten(0, 1), dim=1))
        quantizer.centers_scale.fill_(0.02)
        quantizer.logits_scale.fill_(-0.01)
    return quantizer
