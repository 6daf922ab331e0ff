"""w2v-BERT 2.0 as a teacher: stacked log-mels of 25 ms frames, normalised per mel bin."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from spear.errors import ConfigError
from spear.teachers.base import Teacher, resolve_layer
from spear.teachers.frontend import FRAME_SAMPLES, HOP_SAMPLES, kaldi_log_mel, num_kaldi_frames
from spear.teachers.huggingface import HuggingFaceConfig, Source, load_model
from spear.types import TeacherOutput


class W2VBertTeacher(Teacher):
    """One hidden state of a w2v-BERT encoder: with stride 2, 50 Hz, first frame centred at 17.5 ms."""

    def __init__(self, source: Source, config: HuggingFaceConfig) -> None:
        model = load_model(source)
        own = model.config
        stride, bins = int(source.preprocess("stride", 2)), int(source.preprocess("num_mel_bins", 80))
        if source.preprocessor is None:
            bins = int(own.feature_projection_input_dim) // stride
        width = int(own.feature_projection_input_dim)
        if bins * stride != width:
            raise ConfigError(f"`feature_projection_input_dim` must be num_mel_bins x stride = {bins * stride}, but is {width} ({source.name})")
        sample_rate = int(source.preprocess("sampling_rate", 16000))
        normalize = True if config.normalize is None else config.normalize
        num_layers = int(own.num_hidden_layers) + 1
        layer = resolve_layer(config.layer, num_layers, source.name)
        super().__init__(
            name=source.name,
            sample_rate=sample_rate,
            frame_rate_hz=sample_rate / HOP_SAMPLES / stride,
            first_frame_s=(FRAME_SAMPLES / 2 + (stride - 1) / 2 * HOP_SAMPLES) / sample_rate,
            dim=int(own.hidden_size),
            num_layers=num_layers,
            depends_on_padding=False,
            settings=source.settings(layer=layer, normalize=normalize, sample_rate=sample_rate, stride=stride, num_mel_bins=bins),
        )
        self.model, self.layer, self.normalize, self.stride, self.num_mel_bins = model, layer, normalize, stride, bins

    def num_frames(self, samples: int) -> int:
        """See Teacher.num_frames: floor(25 ms frames / stride); one alone has no variance and does not count."""
        frames = num_kaldi_frames(samples)
        return frames // self.stride if frames > 1 else 0

    def encode(self, audio: Tensor, lens: Tensor) -> TeacherOutput:
        """See Teacher.encode; normalisation is over all frames of the item, stacking drops an odd last one."""
        counts = torch.tensor([self.num_frames(n) for n in lens.tolist()])
        stacked: list[Tensor] = []
        for item, samples, count in zip(audio, lens.tolist(), counts.tolist()):
            mel = kaldi_log_mel(item[:samples], num_mel_bins=self.num_mel_bins, sample_rate=self.sample_rate, window="povey", scale=2.0**15)
            if self.normalize:
                mel = (mel - mel.mean(dim=0)) / (mel.var(dim=0) + 1e-7).sqrt()
            stacked.append(mel[: count * self.stride].reshape(count, -1))
        inputs = nn.utils.rnn.pad_sequence(stacked, batch_first=True)
        mask = (torch.arange(inputs.shape[1]) < counts[:, None]).long().to(audio.device)
        out = self.model(inputs, attention_mask=mask, output_hidden_states=self.layer is not None)
        return TeacherOutput(out.last_hidden_state if self.layer is None else out.hidden_states[self.layer], counts)
