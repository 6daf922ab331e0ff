"""The encoder as users meet it: waveforms in, frames out; saved to and loaded from a model folder."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from spear.errors import ArtifactError, CheckpointError
from spear.export.audio import check_audio, encode_audio, encode_features
from spear.export.huggingface import write_folder
from spear.export.layout import MODEL_TYPE, parse_student
from spear.export.weights import encoder_state, load_strictly, read_weights
from spear.files import read_json
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
        groups = [(lens == length).nonzero()[:, 0] for length in lens.unique().tolist()]
        parts = [self._at_frame_rate(encode_audio(self.encoder, audio[rows, : int(lens[rows[0]])])) for rows in groups]
        return _scatter(parts, groups)

    def forward_features(self, features: Tensor, lens: Tensor | None = None) -> EncoderOutput:
        """Encode log-mels (N, T, F) at 100 Hz (`spear.data.fbank`), lens (N,) valid frames; else as `forward`."""
        return self._at_frame_rate(encode_features(self.encoder, features, lens))

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


def _scatter(parts: list[EncoderOutput], groups: list[Tensor]) -> EncoderOutput:
    """Put the outputs of groups of items back in their order, zero-padded to the longest."""
    items = sum(len(rows) for rows in groups)

    def join(tensors: list[Tensor]) -> Tensor:
        out = tensors[0].new_zeros((items, max(part.shape[1] for part in tensors), tensors[0].shape[2]))
        for part, rows in zip(tensors, groups):
            out[rows, : part.shape[1]] = part
        return out

    lens = parts[0].lens.new_zeros(items)
    for part, rows in zip(parts, groups):
        lens[rows] = part.lens
    states = tuple(join([part.hidden_states[layer] for part in parts]) for layer in range(len(parts[0].hidden_states)))
    return EncoderOutput(join([part.features for part in parts]), lens, states)


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
        path_or_id: an export folder, a released SPEAR folder (weights under ``model.`` or ``model.model.``; training heads are
            dropped and logged), or a Hugging Face id. device: where to put it. revision: branch, tag or commit of a Hugging Face id.
    Raises:
        CheckpointError: nothing is there, it is no SPEAR encoder, or weights are missing, left over or of another shape.
    """
    folder = find_folder(path_or_id, revision)
    config = read_config(folder)
    student = parse_student(config, str(folder / "config.json"))
    state, _ = encoder_state(read_weights(folder), str(folder))
    return build_encoder(student, state, str(folder)).to(device)


def build_encoder(student: StudentConfig, state: Mapping[str, Tensor], source: str) -> AudioEncoder:
    """An encoder of the given config with the given weights (own names), in ``eval`` mode.

    Raises:
        CheckpointError: weights are missing, left over or of another shape.
    """
    encoder: Encoder = student.build()
    load_strictly(encoder, {key: value.float() for key, value in state.items()}, source)
    return AudioEncoder(encoder, student).eval()


def read_config(folder: Path) -> dict[str, Any]:
    """The ``config.json`` of a SPEAR model folder.

    Raises:
        CheckpointError: it is missing, no JSON object, or that of another kind of model.
    """
    try:
        config = read_json(folder / "config.json")
    except ArtifactError as error:
        raise CheckpointError(str(error)) from error
    if not isinstance(config, dict):
        raise CheckpointError(f"{folder / 'config.json'} must hold a JSON object")
    kind = config.get("model_type", MODEL_TYPE)
    if kind != MODEL_TYPE:
        raise CheckpointError(f"`model_type` must be {MODEL_TYPE!r}, but is {kind!r} ({folder / 'config.json'})")
    return config


def find_folder(path_or_id: str | Path, revision: str | None = None) -> Path:
    """A local model folder as it is, or the downloaded (or cached) copy of a Hugging Face id.

    Raises:
        CheckpointError: neither exists, or the hub cannot be reached.
    """
    path = Path(path_or_id)
    if path.is_dir():
        return path
    name = str(path_or_id)
    if path.exists() or path.is_absolute() or name.startswith((".", "~")) or name.count("/") != 1:
        raise CheckpointError(f"{path} is not a folder" if path.exists() else f"{path} does not exist")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=["*.json", "*.safetensors"]))
    except (HfHubHTTPError, HFValidationError, OSError, ValueError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise CheckpointError(f"{name} is no folder and cannot be fetched from the Hugging Face hub: {reason}") from error
