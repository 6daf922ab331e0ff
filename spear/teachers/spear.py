"""An exported student as the teacher of the next one."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from spear.teachers.base import Teacher, TeacherConfig, find_model, resolve_layer, verified
from spear.types import TeacherOutput


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
        super().__init__(
            name=name,
            sample_rate=int(encoder.sample_rate),
            frame_rate_hz=float(encoder.frame_rate_hz),
            first_frame_s=float(encoder.first_frame_s),
            dim=int(encoder.dim) if index is None else int(encoder.encoder.layer_dims[index]),
            num_layers=int(encoder.num_layers),
            depends_on_padding=True,
            settings={"type": "spear", "layer": index, "student": asdict(encoder.student)},
        )
        self.model, self.layer = encoder, index

    def num_frames(self, samples: int) -> int:
        """See Teacher.num_frames: what the encoder says for round(S / 160) frames of 10 ms."""
        from spear.data.fbank import num_fbank_frames

        return int(self.model.encoder.output_frames(num_fbank_frames(samples)))

    def encode(self, audio: Tensor, lens: Tensor) -> TeacherOutput:
        """See Teacher.encode."""
        out = self.model(audio, lens)
        features = out.features if self.layer is None else out.hidden_states[self.layer]
        return TeacherOutput(features, torch.tensor([self.num_frames(n) for n in lens.tolist()]))
