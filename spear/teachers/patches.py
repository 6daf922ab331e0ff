"""Teachers that see log-mels as square patches that do not overlap: a grid of time and frequency, read along time."""

from __future__ import annotations

import abc

import torch
from torch import Tensor

from spear.teachers.base import Teacher
from spear.teachers.frontend import FRAME_SAMPLES, HOP_SAMPLES, kaldi_log_mel, num_kaldi_frames
from spear.types import TeacherOutput


class PatchTeacher(Teacher):
    """One layer of a grid of patches: with patches of 16 x 16 and 128 mels, 6.25 Hz, first frame centred at 87.5 ms, 8 patches a frame.

    An incomplete patch at the end is dropped. Equal lengths are fed together.

    Args:
        sample_rate: Hz. patch: side of a patch in 10 ms frames and mel bins. num_mel_bins: F. window, scale: see `kaldi_log_mel`.
        mean, std: log-mels are brought to (x - mean) / (2 std). piece_frames: longer audio is cut into pieces of so many 10 ms frames, a multiple
            of `patch`, that do not see each other; 0: never. frequency: ``mean`` of the patches of a frame, or ``concat``. The rest: see Teacher.
    """

    def __init__(
        self,
        *,
        name: str,
        sample_rate: int,
        patch: int,
        num_mel_bins: int,
        window: str,
        scale: float,
        mean: float,
        std: float,
        piece_frames: int,
        frequency: str,
        width: int,
        num_layers: int,
        settings: dict[str, object],
    ) -> None:
        bands = num_mel_bins // patch
        super().__init__(
            name=name,
            sample_rate=sample_rate,
            frame_rate_hz=sample_rate / HOP_SAMPLES / patch,
            first_frame_s=(FRAME_SAMPLES / 2 + (patch - 1) / 2 * HOP_SAMPLES) / sample_rate,
            dim=width * (bands if frequency == "concat" else 1),
            num_layers=num_layers,
            depends_on_padding=True,
            settings=settings,
        )
        self.patch, self.bands, self.num_mel_bins, self.frequency = patch, bands, num_mel_bins, frequency
        self.window, self.scale, self.mean, self.std, self.piece_frames = window, scale, mean, std, piece_frames

    @abc.abstractmethod
    def tokens(self, mel: Tensor) -> Tensor:
        """(N, T bands, D) patches of one layer, time by time and lowest band first, of normalised log-mels (N, T patch, F)."""

    def num_frames(self, samples: int) -> int:
        """See Teacher.num_frames: floor(F / patch), F = floor((S - 400) / 160) + 1."""
        return num_kaldi_frames(samples) // self.patch

    def encode(self, audio: Tensor, lens: Tensor) -> TeacherOutput:
        """See Teacher.encode; all items have the same length."""
        options = {"num_mel_bins": self.num_mel_bins, "sample_rate": self.sample_rate}
        mel = torch.stack([kaldi_log_mel(item, window=self.window, scale=self.scale, **options) for item in audio])
        mel = (mel[:, : mel.shape[1] // self.patch * self.patch] - self.mean) / (2 * self.std)
        pieces = mel.split(self.piece_frames or mel.shape[1], dim=1)
        grid = torch.cat([self.tokens(piece).unflatten(1, (-1, self.bands)) for piece in pieces], dim=1)  # (N, T, bands, D)
        features = grid.flatten(2) if self.frequency == "concat" else grid.mean(dim=2)
        return TeacherOutput(features, torch.tensor([self.num_frames(n) for n in lens.tolist()]))


class Caught:
    """The value that passes a module while something else runs: the input of a block, or its output (the first of several).

    Args:
        blocks: of a model, in order. layer: 0 is the input of the first block, k the output of block k.
    """

    def __init__(self, blocks: torch.nn.ModuleList | torch.nn.Sequential, layer: int) -> None:
        self.blocks, self.layer, self.values = blocks, layer, list[Tensor]()

    def __enter__(self) -> list[Tensor]:
        """A list that the value is put into."""
        if self.layer == 0:
            self.hook = self.blocks[0].register_forward_pre_hook(lambda _, inputs: self.values.append(inputs[0].clone()))
        else:
            self.hook = self.blocks[self.layer - 1].register_forward_hook(
                lambda _, inputs, output: self.values.append((output[0] if isinstance(output, tuple) else output).clone())
            )
        return self.values

    def __exit__(self, *error: object) -> None:
        """Take the hook away."""
        self.hook.remove()
