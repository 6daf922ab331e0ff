"""Transformers feature extractor of an exported encoder: raw waveforms to a checked, padded batch.

The log-mels are computed inside the model, always in float32, so that they do not depend on the type of its weights.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from transformers import BatchFeature, SequenceFeatureExtractor

from spear.errors import DataError
from spear.export.audio import check_audio


class SpearFeatureExtractor(SequenceFeatureExtractor):
    """``extractor(waveforms, sampling_rate=16000)`` gives ``audio`` (N, S) float32 and ``audio_lens`` (N,) int64."""

    model_input_names = ["audio", "audio_lens"]  # noqa: RUF012 - the base class declares it so

    def __init__(self, feature_size: int = 1, sampling_rate: int = 16000, padding_value: float = 0.0, **values: Any) -> None:
        super().__init__(feature_size=feature_size, sampling_rate=sampling_rate, padding_value=padding_value, **values)

    def __call__(self, raw_speech: Any, sampling_rate: int | None = None, return_tensors: str | None = "pt", **_: Any) -> BatchFeature:
        """Pad waveforms to one batch.

        Args:
            raw_speech: one waveform (S,) or several, as arrays, tensors or lists of floats in [-1, 1].
            sampling_rate: their rate in Hz; None takes it on trust. return_tensors: "pt" or "np".
        Raises:
            DataError: another rate than the model's, or a waveform that breaks a rule of `check_audio`.
        """
        if sampling_rate is not None and sampling_rate != self.sampling_rate:
            raise DataError(f"`sampling_rate` must be {self.sampling_rate}, but is {sampling_rate}: resample first, as SpearModel.load_audio does")
        rows = [self._row(row) for row in (raw_speech if self._is_batch(raw_speech) else [raw_speech])]
        if not rows:
            raise DataError("`raw_speech` must hold at least one waveform, but is empty", cause="empty")
        lens = torch.tensor([len(row) for row in rows], dtype=torch.int64)
        audio = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=self.padding_value)
        return BatchFeature({"audio": audio, "audio_lens": lens}, tensor_type=return_tensors)

    @staticmethod
    def _is_batch(value: Any) -> bool:
        if isinstance(value, (np.ndarray, torch.Tensor)):
            return value.ndim > 1
        return len(value) == 0 or np.ndim(value[0]) > 0

    @staticmethod
    def _row(value: Any) -> torch.Tensor:
        if isinstance(value, (list, tuple)):
            value = np.asarray(value, dtype=np.float32)
        audio, _ = check_audio(value, None, torch.device("cpu"))
        if len(audio) != 1:
            raise DataError(f"each waveform must have the shape (S,), but one has {tuple(audio.shape)}", cause="decode")
        return audio[0]
