"""Examples for the report: one cut per domain with its log-mel, a mask, the tokens of every teacher and its phones."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from spear.data.fbank import fbank
from spear.errors import ArtifactError
from spear.evaluation.embedders import Audio, Extract, QuantizerLike, TeacherLike
from spear.evaluation.tasks.base import alignment_of
from spear.files import read_json, read_tensors, write_json, write_tensors

SHOWN_CODEBOOKS = 4
LONGEST_S = 4.0


class Labeller(NamedTuple):
    """A teacher with its quantizer."""

    teacher: TeacherLike
    extract: Extract
    quantizer: QuantizerLike


def choose_example(cuts: Sequence[Any]) -> Any:
    """The cut nearest to three seconds, of equals the first by id; labelled cuts before others."""
    return min(cuts, key=lambda cut: (not cut.supervisions, abs(cut.duration - 3.0), cut.id))


def make_example(
    cut: Any, domain: str, load: Any, labellers: Mapping[str, Labeller], draw_mask: Any, tier: str
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Description and arrays of one example.

    Args:
        cut: labelled or not. load: (cut, sample rate) -> samples. labellers: teacher -> its parts.
        draw_mask: number of 10 ms frames -> (T100,) bool, the time mask of training. tier: alignment tier to draw.
    Returns:
        JSON value {id, domain, duration, segments, label, teachers: {name: {rate, first}}} and tensors ``logmel`` (T100, F) float16,
        ``mask`` (T100,) uint8, ``tokens.<teacher>`` (T, C') int32, the first codebooks only.
    """
    logmel = fbank(torch.from_numpy(load(cut, 16000)))
    tensors = {"logmel": logmel.half(), "mask": draw_mask(len(logmel)).to(torch.uint8)}
    teachers = {}
    for name, (teacher, extract, quantizer) in labellers.items():
        audio: Audio = load(cut, teacher.sample_rate)
        codes = quantizer.encode(extract([torch.from_numpy(audio)])[0])
        tensors[f"tokens.{name}"] = codes[:, :SHOWN_CODEBOOKS].to(torch.int32)
        teachers[name] = {"frame_rate_hz": teacher.frame_rate_hz, "first_frame_s": teacher.first_frame_s, "num_codebooks": codes.shape[1]}
    labels = [str((s.custom or {})["label"]) for s in cut.supervisions if "label" in (s.custom or {})]
    segments = [[round(start, 4), round(end, 4), symbol] for start, end, symbol in alignment_of(cut, tier)]
    facts = {"id": cut.id, "domain": domain, "duration_s": cut.duration, "segments": segments, "label": labels[0] if labels else None}
    return {**facts, "teachers": teachers}, tensors


def write_examples(folder: Path, found: Sequence[tuple[dict[str, Any], dict[str, Tensor]]]) -> None:
    """Write ``examples.json`` and ``examples.safetensors``."""
    write_tensors(folder / "examples.safetensors", {f"{i}.{name}": x for i, (_, tensors) in enumerate(found) for name, x in tensors.items()})
    write_json(folder / "examples.json", [facts for facts, _ in found])


def read_examples(folder: Path) -> list[tuple[dict[str, Any], dict[str, NDArray[Any]]]]:
    """What `write_examples` wrote; empty where there is nothing.

    Raises:
        ArtifactError: the two files do not belong together.
    """
    if not (folder / "examples.json").exists():
        return []
    described, tensors = read_json(folder / "examples.json"), read_tensors(folder / "examples.safetensors")
    found = [
        (facts, {name.partition(".")[2]: x.numpy() for name, x in tensors.items() if name.partition(".")[0] == str(i)})
        for i, facts in enumerate(described)
    ]
    if any("logmel" not in arrays for _, arrays in found):
        raise ArtifactError(f"{folder / 'examples.safetensors'} lacks an example that examples.json names")
    return found


def spans(mask: NDArray[Any]) -> list[tuple[int, int]]:
    """First and one-past-last index of every run of true values in (T,)."""
    edges = np.flatnonzero(np.diff(np.concatenate([[0], np.asarray(mask, dtype=np.int8), [0]])))
    return [(int(a), int(b)) for a, b in zip(edges[::2], edges[1::2])]
