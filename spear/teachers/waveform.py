"""Teachers that hear the waveform through strided convolutions: WavLM, HuBERT, wav2vec 2.0, Data2Vec, UniSpeech, MERT."""

from __future__ import annotations

import logging
import math
import warnings

import torch
from torch import Tensor, nn

from spear.teachers.base import Teacher, resolve_layer
from spear.teachers.huggingface import HuggingFaceConfig, Source, load_model
from spear.types import TeacherOutput

# WavLM of transformers hands torch masks of two types; nothing a user can do about it
warnings.filterwarnings("ignore", message="Support for mismatched key_padding_mask", category=UserWarning)

logger = logging.getLogger(__name__)


def conv_frames(samples: int, kernels: list[int], strides: list[int]) -> int:
    """Frames left by convolutions without padding: floor((n - k) / s) + 1, layer after layer."""
    for kernel, stride in zip(kernels, strides):
        samples = (samples - kernel) // stride + 1 if samples >= kernel else 0
    return samples


def receptive_field(kernels: list[int], strides: list[int]) -> int:
    """Samples that one output frame of a stack of convolutions sees."""
    field, stride = 1, 1
    for kernel, step in zip(kernels, strides):
        field += (kernel - 1) * stride
        stride *= step
    return field


def unit_variance(audio: Tensor, lens: Tensor) -> Tensor:
    """Zero mean and unit variance of each item over its own valid samples, zero past them (wav2vec 2.0 section 2)."""
    valid = torch.arange(audio.shape[1], device=audio.device) < lens[:, None].to(audio.device)
    count = valid.sum(dim=1, keepdim=True)
    mean = (audio * valid).sum(dim=1, keepdim=True) / count
    centred = (audio - mean) * valid
    variance = centred.square().sum(dim=1, keepdim=True) / count
    return centred / (variance + 1e-7).sqrt()


class ValidGroupNorm(nn.GroupNorm):
    """A norm of every channel over time that leaves padding out: with `lens` set, its mean and variance are those of valid frames only.

    So the first convolution of the Base models gives a padded item what it gives the item alone, up to float rounding. Weights keep their names.
    """

    lens: Tensor | None = None
    """(N,) valid frames of the coming batch; None where nothing is padded, which is torch's own norm bit for bit."""

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, T) of one group per channel."""
        if self.lens is None:
            return super().forward(x)
        valid = (torch.arange(x.shape[2], device=x.device) < self.lens[:, None].to(x.device))[:, None]
        count = self.lens.to(x)[:, None, None]
        centred = torch.where(valid, x - torch.where(valid, x, 0.0).sum(dim=2, keepdim=True) / count, 0.0)
        deviation = (centred.square().sum(dim=2, keepdim=True) / count + self.eps).sqrt()
        return centred / deviation * self.weight[:, None] + self.bias[:, None] * valid

    @classmethod
    def put_into(cls, model: nn.Module) -> ValidGroupNorm | None:
        """Take the place of the norm over time in the first convolution of a model; None where it has none."""
        first = getattr(getattr(model, "feature_extractor", None), "conv_layers", [None])[0]
        norm = getattr(first, "layer_norm", None)
        if not isinstance(norm, nn.GroupNorm) or norm.num_groups != norm.num_channels or not norm.affine:
            return None
        own = cls(norm.num_groups, norm.num_channels, eps=norm.eps)
        own.weight, own.bias = norm.weight, norm.bias
        first.layer_norm = own
        return own


class WaveformTeacher(Teacher):
    """One hidden state of a wav2vec 2.0 like model.

    With WavLM's convolutions: 50 Hz, first frame centred at 12.5 ms, T = floor((S - 400) / 320) + 1.
    A GroupNorm in the front end would see padding even under an attention mask; it is made to leave it out (see `ValidGroupNorm`).
    """

    def __init__(self, source: Source, config: HuggingFaceConfig) -> None:
        model = load_model(source)
        norm = ValidGroupNorm.put_into(model)
        own = model.config
        kernels, strides = [int(k) for k in own.conv_kernel], [int(s) for s in own.conv_stride]
        sample_rate = int(source.preprocess("sampling_rate", 16000))
        normalize = config.normalize
        if normalize is None:
            normalize = bool(source.preprocess("do_normalize", True))
            if source.preprocessor is None:
                logger.warning("%s has no preprocessor_config.json: its input is normalised to unit variance (set `normalize`)", source.name)
        num_layers = int(own.num_hidden_layers) + 1
        layer = resolve_layer(config.layer, num_layers, source.name)
        super().__init__(
            name=source.name,
            sample_rate=sample_rate,
            frame_rate_hz=sample_rate / math.prod(strides),
            first_frame_s=receptive_field(kernels, strides) / 2 / sample_rate,
            dim=int(own.hidden_size if layer is not None else getattr(own, "output_hidden_size", None) or own.hidden_size),
            num_layers=num_layers,
            depends_on_padding=getattr(own, "feat_extract_norm", "layer") == "group" and norm is None,
            settings=source.settings(layer=layer, normalize=normalize, sample_rate=sample_rate),
        )
        self.model, self.layer, self.normalize = model, layer, normalize
        self.norms = [] if norm is None else [norm]  # a list, so that its weights are counted once
        self.kernels, self.strides = kernels, strides

    def num_frames(self, samples: int) -> int:
        """See Teacher.num_frames."""
        return conv_frames(samples, self.kernels, self.strides)

    def encode(self, audio: Tensor, lens: Tensor) -> TeacherOutput:
        """See Teacher.encode; the attention mask is always passed."""
        if self.normalize:
            audio = unit_variance(audio, lens)
        mask = (torch.arange(audio.shape[1], device=audio.device) < lens[:, None].to(audio.device)).long()
        for norm in self.norms:
            first = [conv_frames(n, self.kernels[:1], self.strides[:1]) for n in lens.tolist()]
            norm.lens = None if len(set(first)) == 1 else torch.tensor(first, device=audio.device)
        out = self.model(audio, attention_mask=mask, output_hidden_states=self.layer is not None)
        features = out.last_hidden_state if self.layer is None else out.hidden_states[self.layer]
        return TeacherOutput(features, torch.tensor([self.num_frames(n) for n in lens.tolist()]))
