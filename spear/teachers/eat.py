"""EAT as a teacher (arXiv:2401.03497): patches of 16 x 16 log-mels, through the Python code of its Hugging Face folders."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from spear.errors import ConfigError
from spear.teachers.base import resolve_layer
from spear.teachers.huggingface import HuggingFaceConfig, Source
from spear.teachers.patches import Caught, PatchTeacher
from spear.teachers.remote import load_own_code

MEAN, STD = -4.268, 4.569
"""Of AudioSet's log-mels, as the authors' extraction uses them."""
PIECE_FRAMES = 1024
"""10.24 s, the length it was trained on."""


class EATTeacher(PatchTeacher):
    """One block's output of an EAT encoder without its class token; ``last`` is what its own ``extract_features`` gives.

    Layer 0 is the input of the first block. Longer audio is heard in pieces of 10.24 s.
    """

    def __init__(self, source: Source, config: HuggingFaceConfig) -> None:
        model = load_own_code(source)
        found = find_blocks(model)
        if found is None or not hasattr(model, "extract_features"):
            raise ConfigError(f"the code of {source.name} must have `extract_features` and a list `blocks`, but has not")
        own = source.config
        patch, width = int(own.get("patch_size", 16)), int(own.get("embed_dim", 768))
        image = own.get("img_size") or [PIECE_FRAMES, 128]
        num_layers = len(found) + 1
        layer = resolve_layer(config.layer, num_layers, source.name)
        mean, std = float(source.preprocess("mean", MEAN)), float(source.preprocess("std", STD))
        super().__init__(
            name=source.name,
            sample_rate=int(source.preprocess("sampling_rate", 16000)),
            patch=patch,
            num_mel_bins=int(image[1]),
            window="hann",
            scale=1.0,
            mean=mean,
            std=std,
            piece_frames=int(image[0]) // patch * patch,
            frequency=config.frequency,
            width=width,
            num_layers=num_layers,
            settings=source.settings(layer=layer, frequency=config.frequency, mean=mean, std=std),
        )
        self.model, self.layer = model, layer

    def tokens(self, mel: Tensor) -> Tensor:
        """See PatchTeacher.tokens; the class token comes first."""
        model: Any = self.model
        if self.layer is None:
            last: Tensor = model.extract_features(mel[:, None])
            return last[:, 1:]
        blocks = find_blocks(model)
        with Caught(blocks, self.layer) as caught:
            model.extract_features(mel[:, None])
        return caught[0][:, 1:]


def find_blocks(model: Any) -> Any:
    """The list ``blocks`` of a model or of the model in it."""
    return getattr(model, "blocks", getattr(getattr(model, "model", None), "blocks", None))
