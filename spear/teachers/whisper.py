"""Whisper's encoder as a teacher: windows of 30 s, of which only the frames with audio under them are kept."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from spear.teachers.base import Teacher, resolve_layer
from spear.teachers.huggingface import HuggingFaceConfig, Source, load_model
from spear.types import TeacherOutput

WINDOWS_AT_ONCE = 8


class WhisperTeacher(Teacher):
    """One hidden state of a Whisper encoder: 50 Hz, first frame centred at 0 s.

    Audio longer than the encoder's window (30 s) is cut into windows that are encoded one by one and joined.
    The last hidden state is that after the final LayerNorm.
    """

    def __init__(self, source: Source, config: HuggingFaceConfig) -> None:
        from transformers import WhisperFeatureExtractor, WhisperModel
        from transformers.models.whisper.modeling_whisper import WhisperEncoder

        alone = any("Encoder" in name for name in source.config.get("architectures") or [])
        model = load_model(source, WhisperEncoder) if alone else load_model(source, WhisperModel, part="encoder.")
        encoder = model if alone else model.get_encoder()
        own = encoder.config
        values = {key: value for key, value in (source.preprocessor or {}).items() if key not in ("feature_extractor_type", "processor_class")}
        extractor = WhisperFeatureExtractor(**{**values, "feature_size": own.num_mel_bins, "dither": 0.0})
        num_layers = int(own.encoder_layers) + 1
        layer = resolve_layer(config.layer, num_layers, source.name)
        self_rate = int(extractor.sampling_rate)
        super().__init__(
            name=source.name,
            sample_rate=self_rate,
            frame_rate_hz=self_rate / (2 * extractor.hop_length),
            first_frame_s=0.0,
            dim=int(own.d_model),
            num_layers=num_layers,
            depends_on_padding=False,
            settings=source.settings(layer=layer, normalize=bool(config.normalize), num_mel_bins=own.num_mel_bins, hop_length=extractor.hop_length),
        )
        self.model, self.layer, self.normalize, self.extractor = encoder, layer, bool(config.normalize), extractor
        self.hop_samples = 2 * int(extractor.hop_length)
        self.window_samples = int(own.max_source_positions) * self.hop_samples

    def num_frames(self, samples: int) -> int:
        """See Teacher.num_frames: frames whose centre lies within the audio, ceil(S / 320)."""
        return -(-samples // self.hop_samples)

    def encode(self, audio: Tensor, lens: Tensor) -> TeacherOutput:
        """See Teacher.encode; every window is padded to full length with zeros, as the model was trained."""
        counts = torch.tensor([self.num_frames(n) for n in lens.tolist()])
        windows = [piece for item, samples in zip(audio, lens.tolist()) for piece in item[:samples].split(self.window_samples)]
        encoded: list[Tensor] = []
        for start in range(0, len(windows), WINDOWS_AT_ONCE):
            group = windows[start : start + WINDOWS_AT_ONCE]
            out = self._windows(group)
            encoded.extend(features[: self.num_frames(len(piece))] for features, piece in zip(out, group))
        items: list[Tensor] = []
        for samples in lens.tolist():
            pieces = -(-samples // self.window_samples)
            items.append(torch.cat(encoded[:pieces]))
            encoded = encoded[pieces:]
        return TeacherOutput(nn.utils.rnn.pad_sequence(items, batch_first=True), counts)

    def _windows(self, windows: list[Tensor]) -> Tensor:
        """(W, T, D) frames of up to WINDOWS_AT_ONCE windows of full length."""
        device = windows[0].device
        inputs = self.extractor(
            [window.cpu().numpy() for window in windows],
            sampling_rate=self.sample_rate,
            padding="max_length",
            max_length=self.window_samples,
            do_normalize=self.normalize,
            return_tensors="pt",
            device=str(device),
        )
        out = self.model(inputs["input_features"].to(device), output_hidden_states=self.layer is not None)
        features: Tensor = out.last_hidden_state if self.layer is None else out.hidden_states[self.layer]
        return features
