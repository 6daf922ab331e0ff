"""Where in time a teacher's frames lie, measured: a short piece of noise is exchanged here and there, and the frames that change most are noted."""

from __future__ import annotations

import torch

from spear.teachers.base import Teacher, extract

PIECES = 12
PIECE_S, NOISE_S = 0.01, 2.0
LEAST_AGREEING = 0.6


def first_frame_probe(teacher: Teacher, device: torch.device | None = None) -> float | None:
    """Time of the first frame's centre in seconds, to about a quarter of a frame's length.

    In two seconds of noise, 10 ms are exchanged for other noise as loud, at each of `PIECES` places spread evenly over the phases of a frame. The
    frame that changes most, relative to its length, is taken for the one centred there; the first frame lies where most of those then do.

    Args:
        teacher: frozen. device: where it lies.
    Returns:
        None where the places do not agree: each frame then hears far around itself, and this says nothing.
    """
    generator = torch.Generator().manual_seed(2)
    samples, piece = int(NOISE_S * teacher.sample_rate), int(PIECE_S * teacher.sample_rate)
    noise = 0.1 * torch.randn(samples, generator=generator)
    hop_s = 1 / teacher.frame_rate_hz
    times = torch.tensor([0.6 + (7 + 1 / PIECES) * i * hop_s % 0.8 for i in range(PIECES)])
    audio = [noise]
    for time in times.tolist():
        start = round((time - PIECE_S / 2) * teacher.sample_rate)
        audio.append(noise.clone())
        audio[-1][start : start + piece] = 0.1 * torch.randn(piece, generator=generator)
    before, *after = extract(teacher, audio, device)
    change = torch.stack([(frames - before).norm(dim=1) / (frames.norm(dim=1) + before.norm(dim=1) + 1e-9) for frames in after])  # (PIECES, T)
    heard = change.argmax(dim=1) * hop_s
    firsts = times - heard
    middle = firsts.median()
    agreeing = (firsts - middle).abs() <= 0.75 * hop_s
    return float(firsts[agreeing].mean()) if agreeing.float().mean() >= LEAST_AGREEING else None
