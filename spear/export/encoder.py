"""The encoder as users meet it: waveforms in, frames out; saved to and loaded from a model folder."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from spear.errors import CheckpointError
from spear.export.audio import by_length, check_audio, check_features, encode_audio, encode_features
from spear.export.huggingface import write_folder
from spear.export.layout import check_same_network
from spear.export.long_audio import OVERLAP_S, WINDOW_S, Loaded, Samples, encode_windows, join_pieces
from spear.export.source import read_source
from spear.export.streaming import AudioStream
from spear.export.weights import load_strictly
from spear.models.base import Encoder, StudentConfig
from spear.types import EncoderOutput

logger = logging.getLogger(__name__)


class AudioEncoder(nn.Module):
    """A student encoder with its front end.

    Attributes:
        encoder: the network. sample_rate: Hz of the audio it reads. frame_rate_hz, first_frame_s: rate of its frames and the time of
        the first one's centre. dim: D of ``features``. num_layers: number of ``hidden_states``.
    Args:
        encoder: a trained network. student: the config it was built from.
    """

    def __init__(self, encoder: Encoder, student: StudentConfig) -> None:
        super().__init__()
        self.encoder = encoder
        self.student = student
        self.sample_rate: int = encoder.sample_rate
        self.frame_rate_hz: float = encoder.frame_rate_hz
        self.first_frame_s: float = encoder.first_frame_s
        self.dim: int = encoder.dim
        self.num_layers: int = encoder.num_layers

    def forward(self, audio: Tensor, lens: Tensor | None = None, *, batch_independent: bool = False) -> EncoderOutput:
        """Encode waveforms.

        In a padded batch, the front end of a Zipformer sees the padding at the last three frames of the shorter utterances, and its
        downsampled stacks at the last group of frames, as in the released models. Those frames differ from what the same utterance
        gives alone, and a little of it reaches the other frames through attention. ``batch_independent`` rules that out: utterances
        of different lengths go through one after the other, and the padded frames of the result are zeros.

        Args:
            audio: (N, S) or (S,) floating, in [-1, 1] at `sample_rate`; less than the shortest possible input is padded with silence.
            lens: (N,) valid samples, 1..S; None means all. What lies past them is never read.
            batch_independent: make the valid frames independent of the other items, at the cost of speed.
        Returns:
            features (N, T, D), lens (N,) and one (N, T, D_l) per layer, all at `frame_rate_hz`. Frames past ``lens`` have no meaning.
        Raises:
            DataError: wrong type, shape, range or length, or a value that is not finite.
        """
        if not batch_independent:
            return self._at_frame_rate(encode_audio(self.encoder, audio, lens))
        audio, lens = check_audio(audio, lens, next(self.encoder.parameters()).device)
        return by_length(lens, lambda rows, length: self._at_frame_rate(encode_audio(self.encoder, audio[rows, :length])))

    def forward_features(self, features: Tensor, lens: Tensor | None = None, *, batch_independent: bool = False) -> EncoderOutput:
        """Encode log-mels (N, T, F) at 100 Hz (`spear.data.fbank`), lens (N,) valid frames; else as `forward`."""
        if not batch_independent:
            return self._at_frame_rate(encode_features(self.encoder, features, lens))
        features, lens = check_features(features, lens, self.encoder)
        return by_length(lens, lambda rows, length: self._at_frame_rate(encode_features(self.encoder, features[rows, :length])))

    def encode_long(
        self, audio: Tensor | Samples, *, window_s: float = WINDOW_S, overlap_s: float = OVERLAP_S, hidden_states: bool = False
    ) -> EncoderOutput:
        """Encode one recording of any length in overlapping windows, without gradients.

        Where two windows meet, frames are those of the nearer middle; the rule is in `spear.export.long_audio`. Convolutions see no
        seam while half the overlap exceeds their reach; attention hears the window instead of the whole recording. A recording
        that fits into one window is encoded as by `forward`.

        Args:
            audio: (S,) floating in [-1, 1] at `sample_rate`, or something that reads pieces of it (`AudioFile`).
            window_s, overlap_s: seconds; the overlap at most half the window. hidden_states: keep those of all layers, which takes
            `num_layers` times the memory of the features.
        Returns:
            features (1, T, D), lens (1,), and the hidden states or none.
        Raises:
            DataError: wrong type, shape or range. ConfigError: the overlap does not fit the window.
        """
        return join_pieces(self.iter_long(audio, window_s=window_s, overlap_s=overlap_s), hidden_states=hidden_states)

    def iter_long(self, audio: Tensor | Samples, *, window_s: float = WINDOW_S, overlap_s: float = OVERLAP_S) -> Iterator[EncoderOutput]:
        """As `encode_long`, piece by piece in bounded memory, always with hidden states; the pieces joined are its result."""
        samples: Samples = audio if isinstance(audio, Samples) else Loaded(audio)
        if len(samples) <= window_s * self.sample_rate:
            with torch.no_grad():
                return iter((self(samples.read(0, len(samples))),))
        return encode_windows(
            self.forward_features,
            samples,
            num_mel_bins=self.encoder.num_mel_bins,
            frame_rate_hz=self.frame_rate_hz,
            grid=self.student.grid(),
            window_s=window_s,
            overlap_s=overlap_s,
            reads=self.encoder.reads,
        )

    def stream(self, chunk_size: int | None = None, left_context_frames: int | None = None) -> AudioStream:
        """Encode audio as it comes in; for causal encoders (see `AudioStream`)."""
        return AudioStream(self.encoder, chunk_size, left_context_frames)

    def _at_frame_rate(self, output: EncoderOutput) -> EncoderOutput:
        """Bring the hidden states, which an encoder gives at its inner rate, to the rate of its output."""
        frames = output.features.shape[1]
        if all(state.shape[1] == frames for state in output.hidden_states):
            return output
        weights = self._downsampling_weights()
        return output._replace(hidden_states=tuple(_downsample(state, weights) for state in output.hidden_states))

    def _downsampling_weights(self) -> Tensor:
        """(factor,) weights with which the encoder itself joins neighbouring frames at its end."""
        bias = dict(self.encoder.named_parameters()).get("encoder.downsample_output.bias")
        if bias is None:
            name = type(self.encoder).__name__
            raise CheckpointError(f"{name} gives hidden states at another rate than its output and no way to join their frames")
        return bias.softmax(dim=0)


def _downsample(state: Tensor, weights: Tensor) -> Tensor:
    """Weighted mean of every `len(weights)` frames of (N, T, D); the last frame is repeated to fill the last group."""
    factor = len(weights)
    pad = -state.shape[1] % factor
    state = torch.cat([state, state[:, -1:].expand(-1, pad, -1)], dim=1)
    grouped = state.unflatten(1, (-1, factor))  # (N, T / factor, factor, D)
    joined: Tensor = (grouped * weights.to(state.dtype)[:, None]).sum(dim=2)
    return joined


def save_encoder(folder: Path, encoder: Encoder, student_config: StudentConfig, info: Mapping[str, Any] | None = None) -> None:
    """Write a model folder that `load_encoder` and Transformers read (see `spear.export.huggingface`).

    Args:
        folder: made if absent; files of an earlier export are replaced. encoder: the network; its weights are stored in float32.
        student_config: the config it was built from. info: JSON values for the model card and ``config.json`` (`spear.export.model_card`).
    Raises:
        CheckpointError: the network is not one that the folder can describe, or a weight is not finite.
    """
    write_folder(Path(folder), encoder, student_config, dict(info or {}))


def load_encoder(path_or_id: str | Path, device: str | torch.device = "cpu", *, revision: str | None = None) -> AudioEncoder:
    """Load an encoder, ready for inference (``eval`` mode), in float32.

    No code from the folder is run; the network is always this package's own.

    Args:
        path_or_id: an export folder, a released SPEAR folder (weights under ``model.`` or ``model.model.``), an icefall ``.pt``
            checkpoint, or a Hugging Face id; see `spear.export.source.read_source`. Training heads are set aside and logged.
            device: where to put it. revision: branch, tag or commit of a Hugging Face id.
    Raises:
        CheckpointError: nothing is there, it is no SPEAR encoder, or weights are missing, left over or of another shape.
    """
    found = read_source(path_or_id, revision=revision)
    return build_encoder(found.student, found.encoder, found.name).to(device)


def build_encoder(student: StudentConfig, state: Mapping[str, Tensor], source: str) -> AudioEncoder:
    """An encoder of the given config with the given weights (own names), in ``eval`` mode.

    Raises:
        CheckpointError: weights are missing, left over or of another shape.
    """
    encoder: Encoder = student.build()
    load_strictly(encoder, {key: value.float() for key, value in state.items()}, source)
    return AudioEncoder(encoder, student).eval()


def start_from(encoder: Encoder, student: StudentConfig, path_or_id: str | Path) -> None:
    """Give an encoder that is to be trained the weights of a trained one.

    Args:
        encoder: its weights are replaced. student: the config it was built from. path_or_id: as for `load_encoder`.
    Raises:
        CheckpointError: the two are different networks (every differing setting is named), or weights are missing, left over or
            of another shape.
    """
    found = read_source(path_or_id)
    check_same_network(student, found.student, found.name)
    load_strictly(encoder, {key: value.float() for key, value in found.encoder.items()}, found.name)
