"""Neural codecs as teachers: what the encoders of EnCodec, DAC and Mimi give before their own quantizers, and the codebooks of those."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from spear.errors import ConfigError
from spear.teachers.base import Teacher, resolve_layer
from spear.teachers.huggingface import HuggingFaceConfig, Source, load_model
from spear.types import CodecCodebooks, TeacherOutput


def causal_frames(samples: int, strides: list[int]) -> int:
    """Frames of strided convolutions that are padded to whole strides: ceil(n / s), one after the other."""
    for stride in strides:
        samples = -(-samples // stride)
    return samples


def centred_frames(samples: int, strides: list[int]) -> int:
    """Frames of convolutions of kernel 2 s and stride s with ceil(s / 2) zeros on both sides: floor((n + 2 ceil(s / 2)) / s) - 1."""
    for stride in strides:
        samples = max(0, (samples + 2 * -(-stride // 2)) // stride - 1)
    return samples


def _encodec(model: Any, audio: Tensor) -> Tensor:
    return torch.as_tensor(model.encoder(audio))


def _mimi(model: Any, audio: Tensor) -> Tensor:
    return torch.as_tensor(model.encoder(audio).latents)


def _encodec_books(model: Any) -> CodecCodebooks:
    """One chain; arXiv:2210.13438, section 3.2."""
    return CodecCodebooks(torch.stack([level.codebook.embed for level in model.quantizer.layers]), (0,), "squared")


def _mimi_books(model: Any) -> CodecCodebooks:
    """A semantic chain, then an acoustic one, each with its projections (arXiv:2410.00037, section 3.3.3)."""
    chains = [model.quantizer.semantic_residual_vector_quantizer, model.quantizer.acoustic_residual_vector_quantizer]
    chains = [chain for chain in chains if len(chain.layers)]
    entries = torch.stack([level.codebook.embed for chain in chains for level in chain.layers])
    starts = tuple(itertools.accumulate((len(chain.layers) for chain in chains[:-1]), initial=0))
    if chains[0].input_proj is None:
        return CodecCodebooks(entries, starts, "distance")
    into, back = (torch.stack([getattr(chain, name).weight[:, :, 0] for chain in chains]) for name in ("input_proj", "output_proj"))
    return CodecCodebooks(entries, starts, "distance", into, back)


def _dac_books(model: Any) -> CodecCodebooks:
    """One chain of factorised codebooks: each searches by angle in a space of its own (arXiv:2306.06546, section 3.2)."""
    levels = list(model.quantizer.quantizers)
    into, back = (
        (torch.stack([part.weight[:, :, 0] for part in parts]), torch.stack([part.bias for part in parts]))
        for parts in ([level.in_proj for level in levels], [level.out_proj for level in levels])
    )
    return CodecCodebooks(torch.stack([level.codebook.weight for level in levels]), (0,), "direction", level_in=into, level_out=back)


BOOKS: dict[str, Callable[[Any], CodecCodebooks]] = {"encodec": _encodec_books, "mimi": _mimi_books, "dac": _dac_books}


class CodecTeacher(Teacher):
    """Latents of a codec's encoder: one frame per hop, whose time is the middle of the hop that it stands for.

    The only layer is number 0. Reading: EnCodec arXiv:2210.13438, DAC arXiv:2306.06546, Mimi arXiv:2410.00037.
    """

    def __init__(self, source: Source, config: HuggingFaceConfig) -> None:
        kind = str(source.config["model_type"])
        model = load_model(source)
        own = model.config
        sample_rate = int(own.sampling_rate)
        self.check(source.name, kind, model)
        strides = list(reversed(own.upsampling_ratios)) if kind != "dac" else list(own.downsampling_ratios)
        if kind == "mimi" and model.encoder.downsample is not None:
            strides.append(int(model.encoder.downsample.conv.stride[0]))
        layer = resolve_layer(config.layer, 1, source.name)
        hop = math.prod(strides)
        super().__init__(
            name=source.name,
            sample_rate=sample_rate,
            frame_rate_hz=sample_rate / hop,
            first_frame_s=hop / 2 / sample_rate,
            dim=int(own.hidden_size),
            num_layers=1,
            depends_on_padding=True,
            settings=source.settings(layer=layer, sample_rate=sample_rate),
        )
        self.model, self.strides, self.hop = model, strides, hop
        self.count = centred_frames if kind == "dac" else causal_frames
        self.run: Callable[[Any, Tensor], Tensor] = _mimi if kind == "mimi" else _encodec
        self.books = BOOKS[kind]

    @staticmethod
    def check(name: str, kind: str, model: Any) -> None:
        """Refuse what one pass over mono audio cannot give.

        Raises:
            ConfigError: stereo, level-normalised pieces (EnCodec at 48 kHz), not causal, or another version of transformers.
        """
        own = model.config
        for key, wanted in {"audio_channels": 1, "normalize": False, "chunk_length_s": None, "use_causal_conv": True}.items():
            found = getattr(own, key, wanted)
            if found != wanted:
                raise ConfigError(f"`{key}` of a codec must be {wanted}, but is {found} ({name}/config.json)")
        if kind == "mimi" and not hasattr(model.encoder, "downsample"):
            raise ConfigError(f"{name} needs a newer version of transformers, in which Mimi's encoder is one module (5.23 is)")

    def num_frames(self, samples: int) -> int:
        """See Teacher.num_frames: ceil(S / hop); DAC: about floor(S / hop)."""
        return self.count(samples, self.strides) if samples >= self.hop else 0

    def codebooks(self) -> CodecCodebooks:
        """See Teacher.codebooks: all levels of the model's quantizer."""
        return self.books(self.model)

    def encode(self, audio: Tensor, lens: Tensor) -> TeacherOutput:
        """See Teacher.encode; all items have the same length."""
        features = self.run(self.model, audio[:, None]).transpose(1, 2)  # (N, T, D)
        return TeacherOutput(features, torch.tensor([self.num_frames(n) for n in lens.tolist()]))
