"""The HEAR 2021 interface: any export under ``hear-validator`` and ``heareval``.

    hear-validator spear.evaluation.hear --model EXPORT
    python -m heareval.embeddings.runner spear.evaluation.hear --model EXPORT --tasks-dir tasks

``EXPORT#all`` concatenates all hidden states, ``EXPORT#3`` takes one. Source: the common API of HEAR 2021 (arXiv:2203.03022, section 3;
hearbenchmark.com/hear-api.html).
"""

from __future__ import annotations

from torch import Tensor

from spear.evaluation.frozen import FrozenFrames, load_frames


class HearModel(FrozenFrames):
    """What `load_model` gives: `FrozenFrames` with the sizes that HEAR asks for.

    Attributes: sample_rate (Hz), scene_embedding_size, timestamp_embedding_size.
    """

    scene_embedding_size: int
    timestamp_embedding_size: int


def load_model(model_file_path: str = "", layer: str | int | None = None) -> HearModel:
    """Load an export.

    Args:
        model_file_path: ``EXPORT`` or ``EXPORT#LAYER``; empty: what the environment variable ``SPEAR_EXPORT`` says.
        layer: ``last`` (the output, the default), ``all`` (every hidden state, concatenated) or a number; goes before the path's.
    Raises:
        ConfigError: no export is named, or it has no such layer. CheckpointError: it is no encoder.
    """
    frames = load_frames(model_file_path, layer)
    model = HearModel(frames.encoder, frames.layer)
    model.scene_embedding_size = model.timestamp_embedding_size = model.dim
    return model


def get_timestamp_embeddings(audio: Tensor, model: HearModel) -> tuple[Tensor, Tensor]:
    """Frames of equally long sounds, and when they are.

    Args:
        audio: (N, S) in [-1, 1] at ``model.sample_rate``. model: from `load_model`.
    Returns:
        embeddings (N, T, D) float32, and the centres of the frames in ms (N, T) float32. Frames whose centre lies past the end of
        audio that is shorter than the encoder's shortest input are left out; one frame is always there, at the end at the latest.
    Raises:
        DataError: wrong type, shape or range, or a value that is not finite.
    """
    embeddings = model(audio)
    end_ms = 1000.0 * audio.shape[1] / model.sample_rate
    times = model.times_ms(embeddings.shape[1])
    kept = max(int((times <= end_ms).sum()), 1)
    times = times[:kept].clamp(max=end_ms).to(embeddings.device, embeddings.dtype)
    return embeddings[:, :kept], times.expand(len(embeddings), -1).contiguous()


def get_scene_embeddings(audio: Tensor, model: HearModel) -> Tensor:
    """One embedding (N, D) float32 per sound: the mean over its frames; arguments and errors as of `get_timestamp_embeddings`."""
    embeddings, _ = get_timestamp_embeddings(audio, model)
    return embeddings.mean(dim=1)
