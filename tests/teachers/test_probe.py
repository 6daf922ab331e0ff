"""The measured time of the first frame is the declared one, and a wrong declaration is noticed."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from spear.teachers import Teacher
from spear.teachers.logmel import LogMelConfig
from spear.teachers.probe import first_frame_probe
from spear.types import TeacherOutput


@pytest.mark.parametrize("family", ["wavlm_group", "hubert_layer", "data2vec", "w2v_bert", "whisper", "ast"])
def test_probe_finds_the_declared_time(teacher: Callable[..., Teacher], family: str) -> None:
    built = teacher(family, layer=1)
    measured = first_frame_probe(built)
    assert measured is not None
    assert abs(measured - built.first_frame_s) < 0.25 / built.frame_rate_hz


@pytest.mark.parametrize("stack", [1, 2, 5])
def test_probe_tells_where_a_shifted_teacher_listens(stack: int) -> None:
    built = LogMelConfig(stack=stack).build()
    honest = first_frame_probe(built)
    assert honest == pytest.approx(built.first_frame_s, abs=0.002 * stack)
    encode = built.encode

    def late(audio: Tensor, lens: Tensor) -> TeacherOutput:
        """Frames of audio 100 ms before."""
        return encode(torch.nn.functional.pad(audio, (1600, 0))[:, : audio.shape[1]], lens)

    built.encode = late  # type: ignore[method-assign]
    found = first_frame_probe(built)
    assert found == pytest.approx(built.first_frame_s - 0.1, abs=0.003 * stack)


def test_probe_says_nothing_where_frames_hear_everything() -> None:
    built = LogMelConfig(stack=2).build()
    encode = built.encode

    def blurred(audio: Tensor, lens: Tensor) -> TeacherOutput:
        features, frames = encode(audio, lens)
        wild = torch.rand(features.shape[1], features.shape[1], generator=torch.Generator().manual_seed(0))
        return TeacherOutput(wild @ features, frames)

    built.encode = blurred  # type: ignore[method-assign]
    assert first_frame_probe(built) is None
