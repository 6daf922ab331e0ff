"""What no label is needed for: how alike student and teachers are, how many directions are used, and whether a clip finds itself when changed."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
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


def retrieval(model: Embedder, cuts: Sequence[Any], load: LoadAudio, batch_s: float, seed: int) -> dict[str, dict[str, float]]:
    """Whether a changed clip is nearest to itself among all clips: mean frames of the last layer, cosine.

    Returns:
        {noise: {dB: recall}, speed: {factor: recall}}; chance is one over the number of clips.
    """
    batches = batches_of(cuts, batch_s)

    def vectors(change: Callable[[Audio, Any], Audio]) -> Tensor:
        rows = []
        for batch in batches:
            changed = [change(load(cut, model.sample_rate), cut) for cut in batch]
            rows += [torch.from_numpy(layers[-1].mean(axis=0)) for layers in model.embed_batch(changed)]
        return torch.stack(rows)

    def noisy(snr_db: float) -> Callable[[Audio, Any], Audio]:
        return lambda audio, cut: _within(add_noise(audio, model.sample_rate, seed_from(seed, "noise", cut.id), snr_db))

    def faster(factor: Fraction) -> Callable[[Audio, Any], Audio]:
        return lambda audio, cut: _within(change_speed(audio, model.sample_rate, 0, factor))

    clean = vectors(lambda audio, cut: audio)
    noise = {f"{snr:g}": round(recall_at_one(vectors(noisy(snr)), clean), 4) for snr in SNRS_DB}
    return {"noise": noise, "speed": {f"{float(factor):g}": round(recall_at_one(vectors(faster(factor)), clean), 4) for factor in SPEEDS}}


def _within(audio: Audio) -> Audio:
    """Audio scaled down to [-1, 1] where it is louder."""
    return audio / np.float32(max(1.0, float(np.abs(audio).max(initial=0.0))))


def choose_cuts(cuts: Sequence[Any], count: int, seed: int) -> list[Any]:
    """Up to `count` cuts, drawn by a hash of their ids."""
    return sorted(cuts, key=lambda cut: seed_from(seed, "analysis", cut.id))[:count]
