"""An exported student as the teacher of the next one."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from spear.errors import ConfigError
from spear.teachers.base import Teacher, TeacherConfig, find_model, resolve_layer, verified
from spear.types import TeacherOutput

STEM_RATE_HZ = 50.0
STEM_FRAMES = 7
"""Log-mel frames that the student's front end takes before its first output (its first output is centred on the fifth)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SpearTeacherConfig(TeacherConfig):
    """An encoder written by `spear export` or `spear import`."""

    model: str
    """Export folder (relative to the run's data folder, or a path) or Hugging Face id."""
    layer: int | Literal["last"] | None = "last"
    """Index into the encoder's hidden states: 0 is the output of its first layer; ``last`` is the encoder's output."""

    def build(self, folder: Path | None = None) -> Teacher:
        """See TeacherConfig.build."""
        from spear.export import load_encoder

        path = find_model(self.model, folder)
        return verified(SpearTeacher(self.model, load_encoder(str(path) if path is not None else self.model), self.layer))


class SpearTeacher(Teacher):
    """One hidden state or the output of an exported encoder.

    Its convolutional front end reads a few frames past the end, so padding would change the last frames.
    """

    def __init__(self, name: str, encoder: Any, layer: int | str | None) -> None:
        index = resolve_layer(layer, int(encoder.num_layers), name)
        rate = float(encoder.frame_rate_hz)
        ratio = round(STEM_RATE_HZ / rate)
        if ratio * rate != STEM_RATE_HZ:
            raise ConfigError(f"{name} must have frames at 50 Hz or a whole fraction of it, but has {rate:g} Hz")
        super().__init__(
            name=name,
            sample_rate=int(encoder.sample_rate),
            frame_rate_hz=rate,
            first_frame_s=float(encoder.first_frame_s),
            dim=int(encoder.dim) if index is None else int(encoder.encoder.layer_dims[index]),
            num_layers=int(encoder.num_layers),
            depends_on_padding=True,
            settings={"type": "spear", "layer": index, "student": asdict(encoder.student)},
        )
        self.model, self.layer, self.ratio = encoder, index, ratio

    def num_frames(self, samples: int) -> int:
        """See Teacher.num_frames: floor((round(S / 160) - 7) / 2) at 50 Hz, then rounded up at lower rates."""
        from spear.data.fbank import num_fbank_frames

        return -(-max(0, (num_fbank_frames(samples) - STEM_FRAMES) // 2) // self.ratio)

    def encode(self, audio: Tensor, lens: Tensor) -> TeacherOutput:
        """See Teacher.encode."""
        out = self.model(audio, lens)
        features = out.features if self.layer is None else out.hidden_states[self.layer]
        return TeacherOutput(features, torch.tensor([self.num_frames(n) for n in lens.tolist()]))
