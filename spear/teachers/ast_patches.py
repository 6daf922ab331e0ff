"""The Audio Spectrogram Transformer as a teacher: a grid of patches, read along time."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from spear.teachers.base import Teacher, resolve_layer
from spear.teachers.frontend import FRAME_SAMPLES, HOP_SAMPLES, kaldi_log_mel, num_kaldi_frames
from spear.teachers.huggingface import HuggingFaceConfig, Source, load_model
from spear.types import TeacherOutput

SPECIAL_TOKENS = 2
"""The class and the distillation token in front of the patches."""
WINDOWS_AT_ONCE = 8


class ASTTeacher(Teacher):
    """One hidden state of an AST encoder: with time stride 10, 10 Hz, first frame centred at 87.5 ms.

    The model hears windows of a fixed number of 10 ms frames. Windows start a whole number of time steps apart, so that the
    frames of long audio stay evenly spaced. A frame is kept where its patches lie wholly within the audio.
    """

    def __init__(self, source: Source, config: HuggingFaceConfig) -> None:
        model = load_model(source)
        own = model.config
        patch, step = int(own.patch_size), int(own.time_stride)
        bands = (int(own.num_mel_bins) - patch) // int(own.frequency_stride) + 1
        sample_rate = int(source.preprocess("sampling_rate", 16000))
        normalize = bool(source.preprocess("do_normalize", True)) if config.normalize is None else config.normalize
        mean, std = float(source.preprocess("mean", -4.2677393)), float(source.preprocess("std", 4.5689974))
        num_layers = int(own.num_hidden_layers) + 1
        layer = resolve_layer(config.layer, num_layers, source.name)
        super().__init__(
            name=source.name,
            sample_rate=sample_rate,
            frame_rate_hz=sample_rate / HOP_SAMPLES / step,
            first_frame_s=(FRAME_SAMPLES / 2 + (patch - 1) / 2 * HOP_SAMPLES) / sample_rate,
            dim=int(own.hidden_size) * (bands if config.frequency == "concat" else 1),
            num_layers=num_layers,
            depends_on_padding=False,
            settings=source.settings(layer=layer, normalize=normalize, frequency=config.frequency, mean=mean, std=std, sample_rate=sample_rate),
        )
        self.model, self.layer, self.normalize, self.frequency = model, layer, normalize, config.frequency
        self.mean, self.std, self.bands, self.patch, self.step = mean, std, bands, patch, step
        self.window_frames, self.num_mel_bins = int(own.max_length), int(own.num_mel_bins)
        self.window_steps = (self.window_frames - patch) // step + 1

    def num_frames(self, samples: int) -> int:
        """See Teacher.num_frames: floor((10 ms frames - patch) / step) + 1."""
        frames = num_kaldi_frames(samples)
        return (frames - self.patch) // self.step + 1 if frames >= self.patch else 0

    def encode(self, audio: Tensor, lens: Tensor) -> TeacherOutput:
        """See Teacher.encode; windows shorter than the model's are padded with zeros before normalisation, as the model was trained."""
        counts = [self.num_frames(n) for n in lens.tolist()]
        windows: list[Tensor] = []
        for item, samples, count in zip(audio, lens.tolist(), counts):
            mel = kaldi_log_mel(item[:samples], num_mel_bins=self.num_mel_bins, sample_rate=self.sample_rate, window="hann")
            for k in range(math.ceil(count / self.window_steps)):
                piece = mel[k * self.window_steps * self.step :][: self.window_frames]
                windows.append(F.pad(piece, (0, 0, 0, self.window_frames - len(piece))))
        inputs = torch.stack(windows)  # (W, window_frames, F)
        if self.normalize:
            inputs = (inputs - self.mean) / (2 * self.std)
        steps = torch.cat([self._windows(group) for group in inputs.split(WINDOWS_AT_ONCE)])  # (W, window_steps, D)
        items: list[Tensor] = []
        for count in counts:
            pieces = math.ceil(count / self.window_steps)
            items.append(steps[:pieces].flatten(0, 1)[:count])
            steps = steps[pieces:]
        return TeacherOutput(nn.utils.rnn.pad_sequence(items, batch_first=True), torch.tensor(counts))

    def _windows(self, inputs: Tensor) -> Tensor:
        """(W, window_steps, D) from (W, window_frames, F); patches come frequency first."""
        out = self.model(inputs, output_hidden_states=self.layer is not None)
        tokens = out.last_hidden_state if self.layer is None else out.hidden_states[self.layer]
        grid: Tensor = tokens[:, SPECIAL_TOKENS:].unflatten(1, (self.bands, self.window_steps)).transpose(1, 2)  # (W, T, bands, D)
        return grid.flatten(2) if self.frequency == "concat" else grid.mean(dim=2)
