"""Teachers without weights: log-mels and MFCCs, the targets of first-iteration HuBERT and BEST-RQ recipes."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from spear.bounds import at_least
from spear.teachers.base import Teacher, TeacherConfig, verified
from spear.types import TeacherOutput

SAMPLE_RATE = 16000
FBANK_RATE_HZ = 100.0
MFCC_DIM = 39


@dataclass(frozen=True, kw_only=True, slots=True)
class LogMelConfig(TeacherConfig):
    """The student's own kind of log-mels as target."""

    num_mel_bins: int = 128
    """F."""
    stack: int = 1
    """Neighbouring 10 ms frames put beside each other; the rate is 100 / stack Hz."""

    def __post_init__(self) -> None:
        at_least("num_mel_bins", self.num_mel_bins, 1)
        at_least("stack", self.stack, 1)

    def build(self, folder: Path | None = None) -> Teacher:
        """See TeacherConfig.build."""
        return verified(FilterbankTeacher("logmel", self.num_mel_bins, self.stack))


@dataclass(frozen=True, kw_only=True, slots=True)
class MfccConfig(TeacherConfig):
    """13 cepstral coefficients with first and second differences (HuBERT, arXiv:2106.07447, section IV-A)."""

    stack: int = 1
    """Neighbouring 10 ms frames put beside each other; the rate is 100 / stack Hz."""

    def __post_init__(self) -> None:
        at_least("stack", self.stack, 1)

    def build(self, folder: Path | None = None) -> Teacher:
        """See TeacherConfig.build."""
        return verified(FilterbankTeacher("mfcc", MFCC_DIM, self.stack))


class FilterbankTeacher(Teacher):
    """Stacked log-mels or MFCCs; the first 10 ms frame is centred at 5 ms."""

    def __init__(self, kind: str, width: int, stack: int) -> None:
        super().__init__(
            name=kind,
            sample_rate=SAMPLE_RATE,
            frame_rate_hz=FBANK_RATE_HZ / stack,
            first_frame_s=(0.5 + (stack - 1) / 2) / FBANK_RATE_HZ,
            dim=width * stack,
            num_layers=1,
            depends_on_padding=False,
            settings={"type": kind, "width": width, "stack": stack},
        )
        self.kind, self.width, self.stack = kind, width, stack

    def num_frames(self, samples: int) -> int:
        """See Teacher.num_frames: round(S / 160) frames, an incomplete stack at the end is dropped."""
        from spear.data.fbank import num_fbank_frames

        return num_fbank_frames(samples) // self.stack

    def encode(self, audio: Tensor, lens: Tensor) -> TeacherOutput:
        """See Teacher.encode."""
        from spear.data.fbank import fbank, mfcc

        items: list[Tensor] = []
        for item, samples in zip(audio, lens.tolist()):
            frames = mfcc(item[:samples]) if self.kind == "mfcc" else fbank(item[:samples], self.width)
            count = len(frames) // self.stack
            items.append(frames[: count * self.stack].reshape(count, -1))
        return TeacherOutput(nn.utils.rnn.pad_sequence(items, batch_first=True), torch.tensor([len(item) for item in items]))
