"""What a frozen teacher promises, how its outputs are extracted, and how its promises are verified when it is built."""

from __future__ import annotations

import abc
import hashlib
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from spear.errors import ConfigError, DataError
from spear.files import sha256_json
from spear.registry import Registry
from spear.types import CodecCodebooks, TeacherOutput

PADDING_TOLERANCE = 1e-5
"""Largest difference, relative to the largest feature, that padding may make before a teacher counts as depending on it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TeacherConfig(Registry):
    """Family of teacher configs: one file per input convention."""

    TABLE: ClassVar[dict[str, str]] = {
        "huggingface": "spear.teachers.huggingface:HuggingFaceConfig",
        "layers": "spear.teachers.layers:LayersConfig",
        "spear": "spear.teachers.spear:SpearTeacherConfig",
        "redimnet": "spear.teachers.redimnet:ReDimNetConfig",
        "beats": "spear.teachers.beats:BEATsConfig",
        "atst": "spear.teachers.atst:ATSTConfig",
        "dasheng": "spear.teachers.dasheng_package:DashengConfig",
        "python": "spear.teachers.python:PythonConfig",
        "logmel": "spear.teachers.logmel:LogMelConfig",
        "mfcc": "spear.teachers.logmel:MfccConfig",
    }

    def build(self, folder: Path | None = None) -> Teacher:
        """Make the frozen teacher and verify it on a dummy signal.

        Args:
            folder: where relative model paths start from, a run's DATA directory.
        Raises:
            ConfigError: the model cannot be had, or does not keep its promises.
        """
        raise NotImplementedError


class Teacher(nn.Module, abc.ABC):
    """A frozen model that turns audio into frames of one of its layers.

    Args:
        name: as the user wrote it, for messages. sample_rate: Hz of the audio it hears.
        frame_rate_hz: frames per second. first_frame_s: centre of the first frame in seconds.
        dim: D. num_layers: number of hidden states, the input of the first block included.
        depends_on_padding: whether padding or batch mates of another length would change its output;
            ``forward`` then runs equal lengths together and never pads.
        settings: JSON value of everything but the weights that its output depends on.

    ``num_parts`` says of how many layers, side by side, a frame is made; each is D / num_parts wide.
    """

    def __init__(
        self,
        *,
        name: str,
        sample_rate: int,
        frame_rate_hz: float,
        first_frame_s: float,
        dim: int,
        num_layers: int,
        depends_on_padding: bool,
        settings: dict[str, Any],
    ) -> None:
        super().__init__()
        self.name, self.sample_rate, self.dim, self.num_layers = name, sample_rate, dim, num_layers
        self.frame_rate_hz, self.first_frame_s = frame_rate_hz, first_frame_s
        self.depends_on_padding, self.settings = depends_on_padding, settings
        self.num_parts = 1
        self._fingerprint = ""

    @abc.abstractmethod
    def num_frames(self, samples: int) -> int:
        """Exact number of frames for `samples` samples of audio; 0 where it is too short."""

    @abc.abstractmethod
    def encode(self, audio: Tensor, lens: Tensor) -> TeacherOutput:
        """Frames of a batch that needs no further care: (N, S) float32 zero past `lens`, equal lengths where padding matters."""

    def codebooks(self) -> CodecCodebooks:
        """The codebooks that the model itself codes these frames with, where it is a codec.

        Raises:
            ConfigError: it has none.
        """
        raise ConfigError(f"a quantizer of `type` codec needs a teacher with codebooks of its own (EnCodec, DAC, Mimi), but {self.name} has none")

    def frozen(self) -> Teacher:
        """Self, in eval mode and without gradients."""
        self.requires_grad_(False)
        return self.train(False)

    def train(self, mode: bool = True) -> Teacher:
        """Stay in eval mode: a teacher is frozen."""
        del mode
        return super().train(False)

    @torch.no_grad()
    def forward(self, audio: Tensor, lens: Tensor) -> TeacherOutput:
        """Frames of each item, the same whatever else is in the batch.

        Args:
            audio: (N, S) float32 in [-1, 1] at ``sample_rate``. lens: (N,) int64 valid samples.
        Returns:
            features (N, T, D) float32, zero past their length; lens (N,) int64.
        Raises:
            DataError: an item is too short for one frame.
        """
        for samples in lens.tolist():
            if self.num_frames(samples) < 1:
                raise DataError(f"audio of {samples} samples is too short for one frame of {self.name}", cause="too_short")
        with torch.autocast(audio.device.type, enabled=False), full_precision(audio.device):
            distinct = sorted(set(lens.tolist()))
            if not self.depends_on_padding or len(distinct) == 1:
                return self._encode(audio, lens)
            out_lens = torch.zeros_like(lens)
            groups: list[tuple[Tensor, Tensor]] = []
            for samples in distinct:
                index = (lens == samples).nonzero().flatten()
                features, frames = self._encode(audio[index], lens[index])
                out_lens[index] = frames
                groups.append((index, features))
            out = audio.new_zeros(len(lens), int(out_lens.max()), self.dim)
            for index, features in groups:
                out[index, : features.shape[1]] = features
            return TeacherOutput(out, out_lens)

    def _encode(self, audio: Tensor, lens: Tensor) -> TeacherOutput:
        audio = audio[:, : int(lens.max())].float()
        past = torch.arange(audio.shape[1], device=audio.device) >= lens[:, None].to(audio.device)
        features, frames = self.encode(audio.masked_fill(past, 0.0), lens)
        features = features[:, : int(frames.max())].float()
        past = torch.arange(features.shape[1], device=features.device) >= frames[:, None].to(features.device)
        return TeacherOutput(features.masked_fill(past[:, :, None], 0.0), frames.to(lens))

    def fingerprint(self) -> str:
        """SHA-256 over the bytes of the weights and the settings; paths and names do not count."""
        if not self._fingerprint:
            self._fingerprint = sha256_json({"weights": hash_weights(self), "settings": self.settings})
        return self._fingerprint


def full_precision(device: torch.device) -> AbstractContextManager[object]:
    """On CUDA, convolutions in float32 by one fixed algorithm: TF32 would make them depend on the shape of the batch."""
    if device.type != "cuda":
        return nullcontext()
    flags: AbstractContextManager[object] = torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=False)
    return flags


def hash_weights(module: nn.Module) -> str:
    """SHA-256 over name, dtype, shape and bytes of every entry of the state dict, in order of names."""
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def resolve_layer(layer: int | str | None, num_layers: int, name: str) -> int | None:
    """Index into the hidden states, or None for the model's last output.

    Raises:
        ConfigError: the model has no such layer.
    """
    if layer is None or isinstance(layer, str):
        return None
    if not -num_layers <= layer < num_layers:
        raise ConfigError(f"`layer` must be between 0 and {num_layers - 1}, but is {layer} ({name}; negative layers count from the end)")
    return layer % num_layers


def find_model(model: str, folder: Path | None) -> Path | None:
    """The folder that `model` names: under `folder` if it is there, else as a path; None where it is neither."""
    candidates = [Path(model).expanduser()] if folder is None else [folder / model, Path(model).expanduser()]
    return next((path for path in candidates if path.is_dir()), None)


def default_device() -> torch.device:
    """The first CUDA device, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def extract(teacher: Teacher, audio: Sequence[Tensor], device: torch.device | str | None = None) -> list[Tensor]:
    """Frames of several recordings, each exactly as if it were alone.

    Args:
        audio: one (S,) float32 per recording. device: where the teacher lies; default: the device of its first weight.
    Returns:
        one (T, D) float32 per recording, on the CPU.
    Raises:
        DataError: a recording is too short for one frame.
    """
    if not audio:
        return []
    if device is None:
        device = next((tensor.device for tensor in teacher.state_dict().values()), torch.device("cpu"))
    lens = torch.tensor([len(item) for item in audio])
    batch = nn.utils.rnn.pad_sequence([item.float() for item in audio], batch_first=True).to(device)
    features, frames = teacher(batch, lens.to(device))
    features = features.cpu()
    return [item[:count].clone() for item, count in zip(features, frames.tolist())]


def verified(teacher: Teacher) -> Teacher:
    """Freeze a new teacher and hold it to its promises on a second of noise.

    Frame counts, rate and width must be as promised; where padding turns out to change the output, ``depends_on_padding`` is set.

    Raises:
        ConfigError: a promise is broken; the message names it with both values.
    """
    teacher.frozen()
    noise = 0.1 * torch.randn(2, teacher.sample_rate, generator=torch.Generator().manual_seed(1))
    lens = torch.tensor([teacher.sample_rate, int(0.63 * teacher.sample_rate) + 7])
    with torch.no_grad():
        alone = [teacher._encode(noise[i : i + 1], lens[i : i + 1]) for i in range(2)]
    for samples, (features, frames) in zip(lens.tolist(), alone):
        expected = teacher.num_frames(samples)
        if features.shape[1] != expected or int(frames) != expected:
            raise ConfigError(
                f"{teacher.name} must give {expected} frames for {samples} samples ({teacher.frame_rate_hz:g} Hz), but gives {features.shape[1]}"
            )
        if features.shape[2] != teacher.dim:
            raise ConfigError(f"{teacher.name} must give frames of width {teacher.dim}, but gives {features.shape[2]}")
        if not bool(features.isfinite().all()):
            raise ConfigError(f"{teacher.name} must give finite frames, but does not for noise")
    span = (teacher.num_frames(11 * teacher.sample_rate) - teacher.num_frames(teacher.sample_rate)) / 10
    if abs(span - teacher.frame_rate_hz) > 0.11:
        raise ConfigError(f"{teacher.name} must give {teacher.frame_rate_hz:g} frames per second, but gives {span:g}")
    if not teacher.depends_on_padding:
        with torch.no_grad():
            padded, _ = teacher._encode(noise, lens)
        single = alone[1].features[0]
        change = (padded[1, : len(single)] - single).abs().max()
        teacher.depends_on_padding = bool(change > PADDING_TOLERANCE * single.abs().max().clamp(min=1.0))
    return teacher
