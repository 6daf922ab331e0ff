"""What no label is needed for: how alike student and teachers are, how many directions are used, and whether a clip finds itself when changed."""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterable, Mapping, Sequence
from fractions import Fraction
from typing import Any

import numpy as np
import torch
from torch import Tensor

from spear.data.batches import batches_of
from spear.evaluation.collect import LoadAudio
from spear.evaluation.embedders import Audio, Embedder
from spear.evaluation.perturb import add_noise, change_speed
from spear.evaluation.similarity import CrossSums, nearest_frames, recall_at_one
from spear.files import seed_from

SNRS_DB = (20.0, 10.0, 0.0, -10.0)
SPEEDS = (Fraction(4, 5), Fraction(9, 10), Fraction(11, 10), Fraction(5, 4))
Change = Callable[[Audio, int, int], Audio]


def compare_layers(student: Embedder, teachers: Mapping[str, Embedder], cuts: Sequence[Any], load: LoadAudio, batch_s: float) -> dict[str, Any]:
    """Linear CKA of every layer of the student with every teacher, on the teacher's frames and the student's nearest ones.

    Returns:
        {cka: {teacher: {layer: value}}, effective_rank: {layer: value}, width: {layer: D}}.
    """
    sums = {name: [CrossSums() for _ in student.layer_names] for name in teachers}
    alone = [CrossSums() for _ in student.layer_names]
    widths = [0] * len(alone)
    for batch in batches_of(cuts, batch_s):
        found = [[torch.from_numpy(x) for x in layers] for layers in student.embed_batch([load(cut, student.sample_rate) for cut in batch])]
        for layers in found:
            for i, x in enumerate(layers):
                alone[i].add(x, x[:, :1])
                widths[i] = x.shape[1]
        for name, teacher in teachers.items():
            for layers, (frames, *_) in zip(found, teacher.embed_batch([load(cut, teacher.sample_rate) for cut in batch])):
                times = [torch.from_numpy(model.times(count)) for model, count in ((teacher, len(frames)), (student, len(layers[0])))]
                places = nearest_frames(times[0], times[1])
                for i, x in enumerate(layers):
                    sums[name][i].add(x[places], torch.from_numpy(frames))
    names = student.layer_names
    return {
        "cka": {name: {layer: round(part.cka(), 5) for layer, part in zip(names, parts)} for name, parts in sums.items()},
        "effective_rank": {layer: round(part.effective_rank(), 3) for layer, part in zip(names, alone)},
        "width": dict(zip(names, widths)),
    }


class ChangedClips:
    """Clips as they are, with noise and at other speeds, made once for all models that hear at one sample rate.

    Args:
        cuts: the clips. load: reads one. seed: of the noise.
    """

    def __init__(self, cuts: Sequence[Any], load: LoadAudio, seed: int) -> None:
        self.cuts, self._load, self._seed = cuts, load, seed
        self._made: dict[tuple[str, str, int], Audio] = {}

    def __call__(self, change: str, cut: Any, sample_rate: int) -> Audio:
        """Audio of a cut after one of `CHANGES`."""
        key = change, cut.id, sample_rate
        if key not in self._made:
            seed = seed_from(self._seed, "noise", cut.id)
            self._made[key] = CHANGES[change](self._load(cut, sample_rate), sample_rate, seed)
        return self._made[key]


def retrieval(model: Embedder, clips: ChangedClips, batch_s: float) -> dict[str, dict[str, float]]:
    """Whether a changed clip is nearest to itself among all clips: mean frames of the last layer, cosine.

    Returns:
        {noise: {dB: recall}, speed: {factor: recall}}; chance is one over the number of clips.
    """
    batches = batches_of(clips.cuts, batch_s)

    def vectors(change: str) -> Tensor:
        rows = []
        for batch in batches:
            changed = [clips(change, cut, model.sample_rate) for cut in batch]
            rows += [torch.from_numpy(layers[-1].mean(axis=0)) for layers in model.embed_batch(changed)]
        return torch.stack(rows)

    clean = vectors("clean")

    def recall(kind: str, amounts: Iterable[float]) -> dict[str, float]:
        return {f"{amount:g}": round(recall_at_one(vectors(f"{kind} {amount:g}"), clean), 4) for amount in amounts}

    return {"noise": recall("noise", SNRS_DB), "speed": recall("speed", map(float, SPEEDS))}


def _noisy(snr_db: float) -> Change:
    return lambda audio, rate, seed: _within(add_noise(audio, rate, seed, snr_db))


def _faster(factor: Fraction) -> Change:
    return lambda audio, rate, seed: _within(change_speed(audio, rate, seed, factor))


def _within(audio: Audio) -> Audio:
    """Audio scaled down to [-1, 1] where it is louder."""
    return audio / np.float32(max(1.0, float(np.abs(audio).max(initial=0.0))))


CHANGES: dict[str, Change] = {
    "clean": lambda audio, rate, seed: audio,
    **{f"noise {snr:g}": _noisy(snr) for snr in SNRS_DB},
    **{f"speed {float(factor):g}": _faster(factor) for factor in SPEEDS},
}
"""Name and amount -> what makes of audio (S,) at a sample rate, with a seed, the changed audio."""


def choose_cuts(cuts: Iterable[Any], count: int, seed: int) -> list[Any]:
    """Up to `count` cuts, drawn by a hash of their ids; memory holds no more."""
    return heapq.nsmallest(count, cuts, key=lambda cut: seed_from(seed, "analysis", cut.id))
