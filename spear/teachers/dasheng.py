"""Dasheng as a teacher: mel patches of 40 ms, in pieces of 10.08 s (arXiv:2406.06992).

Its Hugging Face folders bring their own code, whose extractor needs torchaudio and takes the level of the loudest item of a batch
as the reference of all, and whose model mixes up the pieces of different items. So the front end is our own, and the model only
ever sees pieces of one length.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from spear.errors import ConfigError
from spear.teachers.base import Teacher, resolve_layer
from spear.teachers.frontend import HOP_SAMPLES, decibel_mel
from spear.teachers.huggingface import HuggingFaceConfig, Source
from spear.teachers.remote import load_own_code
from spear.types import TeacherOutput


class DashengTeacher(Teacher):
    """One block's output of a Dasheng encoder: 25 Hz, first frame centred at 15 ms; ``last`` is after the final LayerNorm."""

    def __init__(self, source: Source, config: HuggingFaceConfig) -> None:
        model = load_own_code(source)
        encoder: Any = model.encoder
        patch = int(encoder.patch_stride[-1])
        num_layers = len(encoder.blocks) + 1
        layer = resolve_layer(config.layer, num_layers, source.name)
        sample_rate = int(source.preprocess("sampling_rate", 16000))
        hop, bins = int(source.preprocess("hop_size", HOP_SAMPLES)), int(encoder.n_mels)
        if hop != HOP_SAMPLES or int(source.preprocess("feature_size", bins)) != bins or int(source.preprocess("n_fft", 512)) != 512:
            raise ConfigError(f"preprocessor_config.json must have hop_size 160, n_fft 512 and feature_size {bins}, but differs ({source.name})")
        super().__init__(
            name=source.name,
            sample_rate=sample_rate,
            frame_rate_hz=sample_rate / hop / patch,
            first_frame_s=(patch - 1) / 2 * hop / sample_rate,
            dim=int(encoder.embed_dim),
            num_layers=num_layers,
            depends_on_padding=True,
            settings=source.settings(layer=layer, sample_rate=sample_rate),
        )
        self.model, self.layer, self.patch, self.num_mel_bins = model, layer, patch, bins
        self.piece_frames = int(encoder.target_length)

    def num_frames(self, samples: int) -> int:
        """See Teacher.num_frames: floor((floor(S / 160) + 1) / 4); at least 480 samples."""
        return (samples // HOP_SAMPLES + 1) // self.patch if samples > 256 else 0

    def encode(self, audio: Tensor, lens: Tensor) -> TeacherOutput:
        """See Teacher.encode; all items have the same length."""
        mel = torch.stack([decibel_mel(item, num_mel_bins=self.num_mel_bins, sample_rate=self.sample_rate) for item in audio])
        mel = mel[:, :, : mel.shape[2] // self.patch * self.patch]
        pieces = [self._piece(piece) for piece in mel.split(self.piece_frames, dim=2)]
        features = torch.cat(pieces, dim=1)
        return TeacherOutput(features, torch.tensor([self.num_frames(n) for n in lens.tolist()]))

    def _piece(self, mel: Tensor) -> Tensor:
        """(N, T, D) of one piece (N, F, 4 T); a block's value is caught on its way, for the model does not return it."""
        caught: list[Tensor] = []
        blocks: Any = self.model.encoder.blocks
        if self.layer is None:
            features: Tensor = self.model(mel).hidden_states
            return features
        if self.layer == 0:
            hook = blocks[0].register_forward_pre_hook(lambda _, inputs: caught.append(inputs[0].clone()))
        else:
            hook = blocks[self.layer - 1].register_forward_hook(lambda _, inputs, output: caught.append(output.clone()))
        try:
            self.model(mel)
        finally:
            hook.remove()
        return caught[0]
