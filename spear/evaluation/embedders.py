"""One interface for everything that turns audio into frames: log-mel, teachers, their tokens, the student, an untrained student."""

from __future__ import annotations

import abc
from collections.abc import Callable, Sequence
from typing import Literal, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from spear.data.fbank import fbank
from spear.errors import DataError
from spear.types import EncoderOutput

Audio = NDArray[np.float32]
Layers = list[NDArray[np.float32]]
Kind = Literal["logmel", "teacher", "tokens", "codes", "other", "student", "untrained"]


class Embedder(abc.ABC):
    """Audio in, one array of frames per layer out.

    Attributes: name (a file-safe word), label (for readers), kind, sample_rate, frame_rate_hz, first_frame_s (centre of frame 0),
    layer_names, codebook_size (K where frames are codes, else 0), num_parameters (0 where nothing is trained).
    """

    name: str
    label: str
    kind: Kind
    sample_rate: int = 16000
    frame_rate_hz: float
    first_frame_s: float
    layer_names: list[str]
    codebook_size: int = 0
    num_parameters: int = 0

    @abc.abstractmethod
    def embed_batch(self, audios: Sequence[Audio]) -> list[Layers]:
        """Embed several utterances (S_i,) float32 in [-1, 1]: for each, one (T, D_l) float32 array per layer, all of the same T."""

    def embed(self, audio: Audio) -> Layers:
        """Embed one utterance (S,): one (T, D_l) float32 array per layer."""
        return self.embed_batch([audio])[0]

    def times(self, num_frames: int) -> NDArray[np.float64]:
        """Centre of every frame in seconds from the start of the audio, (T,)."""
        return self.first_frame_s + np.arange(num_frames) / self.frame_rate_hz


class LogMel(Embedder):
    """Log-mel energies, pairs of 10 ms frames averaged to 50 Hz, with `context` frames of each side beside every frame."""

    kind: Kind = "logmel"
    frame_rate_hz = 50.0
    first_frame_s = 0.01  # the pair's centres lie at 5 and 15 ms

    def __init__(self, *, context: int = 0, num_mel_bins: int = 128) -> None:
        self.context, self.num_mel_bins = context, num_mel_bins
        self.name = f"logmel_{context}" if context else "logmel"
        self.label = f"log-mel ±{context} frames" if context else "log-mel"
        self.layer_names = ["log-mel"]

    def embed_batch(self, audios: Sequence[Audio]) -> list[Layers]:
        """See `Embedder`; D is ``num_mel_bins * (2 * context + 1)``, and edge frames are repeated beyond the ends."""
        return [[self._one(audio)] for audio in audios]

    def _one(self, audio: Audio) -> NDArray[np.float32]:
        frames = fbank(torch.from_numpy(audio), self.num_mel_bins).numpy()
        pairs = len(frames) // 2
        if pairs == 0:
            raise DataError(f"log-mel needs at least 20 ms of audio, but got {len(audio)} samples", cause="too_short")
        halved = frames[: 2 * pairs].reshape(pairs, 2, -1).mean(axis=1)
        index = np.arange(pairs)[:, None] + np.arange(-self.context, self.context + 1)
        return np.ascontiguousarray(halved[index.clip(0, pairs - 1)].reshape(pairs, -1), dtype=np.float32)


class TeacherLike(Protocol):
    """What is read of a teacher (see `spear.teachers`)."""

    sample_rate: int
    frame_rate_hz: float
    first_frame_s: float


class QuantizerLike(Protocol):
    """What is read of a quantizer (see `spear.quantizers`)."""

    def encode(self, frames: Tensor) -> Tensor:
        """Frames (T, D) -> codes (T, C)."""

    def decode(self, codes: Tensor) -> Tensor:
        """Codes (T, C) -> frames (T, D)."""


Extract = Callable[[list[Tensor]], list[Tensor]]
"""Audio (S_i,) -> frames (T_i, D) of a teacher's configured layer, on the CPU, free of batch mates."""


class TeacherFrames(Embedder):
    """The configured layer of a frozen teacher; with a quantizer, that layer rebuilt from its tokens."""

    def __init__(self, name: str, teacher: TeacherLike, extract: Extract, *, quantizer: QuantizerLike | None = None) -> None:
        self.kind = "teacher" if quantizer is None else "tokens"
        self.name = f"{self.kind}_{name}"
        self.label = f"teacher {name}" if quantizer is None else f"{name} from tokens"
        self.sample_rate, self.frame_rate_hz, self.first_frame_s = teacher.sample_rate, teacher.frame_rate_hz, teacher.first_frame_s
        self.layer_names = ["layer"]
        self._extract, self._quantizer = extract, quantizer

    def embed_batch(self, audios: Sequence[Audio]) -> list[Layers]:
        """See `Embedder`; one layer."""
        frames = self._extract([torch.from_numpy(audio) for audio in audios])
        if self._quantizer is not None:
            lens = [len(x) for x in frames]
            frames = list(self._quantizer.decode(self._quantizer.encode(torch.cat(frames))).split(lens))
        return [[x.float().numpy()] for x in frames]


class OtherModel(TeacherFrames):
    """A model that is no teacher of the run, under the name that the recipe gives it."""

    def __init__(self, name: str, teacher: TeacherLike, extract: Extract) -> None:
        super().__init__(name, teacher, extract)
        self.kind, self.name, self.label = "other", f"beside_{name}", name


class TeacherCodes(Embedder):
    """The tokens of a teacher themselves: one "layer" per codebook, and one of all codebooks side by side where there are several."""

    kind: Kind = "codes"

    def __init__(self, name: str, teacher: TeacherLike, extract: Extract, quantizer: QuantizerLike, num_codebooks: int, size: int) -> None:
        self.name, self.label = f"codes_{name}", f"{name} tokens"
        self.sample_rate, self.frame_rate_hz, self.first_frame_s = teacher.sample_rate, teacher.frame_rate_hz, teacher.first_frame_s
        self.layer_names = [*(f"codebook {i + 1}" for i in range(num_codebooks)), *(["all codebooks"] if num_codebooks > 1 else [])]
        self._extract, self._quantizer, self._num_codebooks, self.codebook_size = extract, quantizer, num_codebooks, size

    def embed_batch(self, audios: Sequence[Audio]) -> list[Layers]:
        """See `Embedder`; codes as float32, (T, 1) for a codebook, (T, C) for all."""
        frames = self._extract([torch.from_numpy(audio) for audio in audios])
        codes = self._quantizer.encode(torch.cat(frames)).float().numpy()
        found = []
        for part in np.split(codes, np.cumsum([len(x) for x in frames])[:-1]):
            books = [np.ascontiguousarray(part[:, i : i + 1]) for i in range(self._num_codebooks)]
            found.append([*books, part] if self._num_codebooks > 1 else books)
        return found


class Encoded(Embedder):
    """Every layer and the output of a student encoder.

    Padded batches: the convolutional front end reads the padding, so the last few frames of an utterance may depend on the longest
    of its batch; batches are therefore the same in every run (see `spear.evaluation.collect`).
    """

    def __init__(
        self,
        kind: Literal["student", "untrained"],
        forward: Callable[[Tensor, Tensor], EncoderOutput],
        *,
        num_layers: int,
        frame_rate_hz: float,
        first_frame_s: float,
        sample_rate: int = 16000,
    ) -> None:
        self.kind, self.name = kind, kind
        self.label = "student" if kind == "student" else "untrained student"
        self.frame_rate_hz, self.first_frame_s, self.sample_rate = frame_rate_hz, first_frame_s, sample_rate
        self.layer_names = [*(f"layer {i + 1}" for i in range(num_layers)), "output"]
        self._forward = forward

    @torch.inference_mode()
    def embed_batch(self, audios: Sequence[Audio]) -> list[Layers]:
        """See `Embedder`.

        Raises:
            DataError: the number of hidden states is not `num_layers`, or a layer has another length than the output.
        """
        lens = torch.tensor([len(audio) for audio in audios])
        padded = torch.zeros(len(audios), int(lens.max()))
        for row, audio in zip(padded, audios):
            row[: len(audio)] = torch.from_numpy(audio)
        output = self._forward(padded, lens)
        layers = [*output.hidden_states, output.features]
        if len(layers) != len(self.layer_names):
            raise DataError(f"the encoder must give {len(self.layer_names) - 1} hidden states, but gives {len(output.hidden_states)}")
        if len({x.shape[1] for x in layers}) > 1:
            raise DataError(f"the encoder's layers must all have its frame rate, but have {[x.shape[1] for x in layers]} frames")
        arrays = [x.float().cpu().numpy() for x in layers]
        return [[x[row, :length].copy() for x in arrays] for row, length in enumerate(output.lens.tolist())]
