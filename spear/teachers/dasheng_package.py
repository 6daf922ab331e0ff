"""Dasheng from its authors' package ``dasheng``: frames of a released ``.pt`` (arXiv:2406.06992)."""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from spear.errors import ConfigError
from spear.teachers.base import Teacher, TeacherConfig, resolve_layer, verified
from spear.teachers.checkpoint import read_checkpoint
from spear.types import TeacherOutput

SAMPLE_RATE = 16000
PACKAGE = "dasheng.pretrained.pretrained"
HEADS = {768: 12, 1280: 16, 1536: 24}
"""Width -> attention heads of the published models (base, 0.6B, 1.2B), for files that do not say."""


@dataclass(frozen=True, kw_only=True, slots=True)
class DashengConfig(TeacherConfig):
    """A Dasheng from its authors' weights and their package ``dasheng``, which needs torchaudio."""

    weights: str
    """``.pt`` of a release (`model` and `config`), relative to the run's data folder, or a path; read without running code."""
    layer: int | Literal["last"] | None = "last"
    """0 is the input of the first block, k the output of block k; ``last`` is the output after the final LayerNorm."""

    def build(self, folder: Path | None = None) -> Teacher:
        """See TeacherConfig.build."""
        state, settings = read_release(self.weights, folder)
        try:
            dasheng: Any = importlib.import_module(PACKAGE).Dasheng
        except (ImportError, OSError, AttributeError) as error:
            reason = " ".join(str(error).split())[:120]
            raise ConfigError(f"`type` dasheng needs the package dasheng and torchaudio, `pip install dasheng` ({reason})") from error
        try:
            model = dasheng(**settings)
            model.load_state_dict(state, strict=True)
        except (TypeError, RuntimeError, ValueError, AssertionError, KeyError) as error:
            raise ConfigError(f"`weights` {self.weights} do not fit the package dasheng: {' '.join(str(error).split())[:200]}") from error
        return verified(DashengPackageTeacher(self.weights, model.float(), settings, self.layer))


def read_release(name: str, folder: Path | None) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Weights of a released file, and what the package's class is to be built with.

    Width and depth are those of the weights; the number of heads, which weights do not show, is the file's or that of the published model.

    Raises:
        ConfigError: no such file, damaged, another content, or of an unknown number of heads.
    """
    found = read_checkpoint(name, folder)
    if not isinstance(found, dict) or not all(isinstance(found.get(key), dict) for key in ("model", "config")):
        raise ConfigError(f"`weights` {name} must hold model and config, but does not")
    state, settings = found["model"], dict(found["config"])
    blocks = {key.split(".")[1] for key in state if key.startswith("blocks.")}
    if not blocks or "norm.weight" not in state:
        raise ConfigError(f"`weights` {name} must hold the encoder's blocks and norm, but do not")
    settings |= {"embed_dim": len(state["norm.weight"]), "depth": len(blocks)}
    settings.setdefault("num_heads", HEADS.get(settings["embed_dim"]))
    if settings["num_heads"] is None:
        raise ConfigError(f"`config` in `weights` {name} must have `num_heads`: a width of {settings['embed_dim']} is none of the published models'")
    return state, settings


class DashengPackageTeacher(Teacher):
    """One block's output: 25 Hz, first frame centred at 15 ms, in pieces of 10.08 s that do not hear each other.

    The package takes the loudest item of a batch as the reference of all levels; here every item goes through its front end alone.
    """

    def __init__(self, name: str, model: Any, settings: dict[str, Any], layer: int | str | None) -> None:
        if model.pooling == "token":
            raise ConfigError(f"`pooling` in the config of {name} must not be token: its first frame of every piece is none of the audio's")
        num_layers = len(model.blocks) + 1
        index = resolve_layer(layer, num_layers, name)
        patch = int(model.patch_stride[-1])
        super().__init__(
            name=name,
            sample_rate=SAMPLE_RATE,
            frame_rate_hz=SAMPLE_RATE / model.hop_size / patch,
            first_frame_s=(patch - 1) / 2 * model.hop_size / SAMPLE_RATE,
            dim=int(model.embed_dim),
            num_layers=num_layers,
            depends_on_padding=True,
            settings={"type": "dasheng", "layer": index, "config": repr(sorted(settings.items()))},
        )
        self.model, self.layer, self.patch = model, index, patch

    def num_frames(self, samples: int) -> int:
        """See Teacher.num_frames: floor((floor(S / 160) + 1) / 4); at least 480 samples."""
        return (samples // int(self.model.hop_size) + 1) // self.patch  # type: ignore[arg-type]

    def encode(self, audio: Tensor, lens: Tensor) -> TeacherOutput:
        """See Teacher.encode; all items have the same length."""
        model: Any = self.model
        mel = torch.cat([model.forward_to_spec(item) for item in audio.split(1)])
        caught: list[Tensor] = []
        if self.layer is None:
            features = model.forward_spectrogram(mel)
        else:
            if self.layer == 0:
                hook = model.blocks[0].register_forward_pre_hook(lambda _, inputs: caught.append(inputs[0].clone()))
            else:
                hook = model.blocks[self.layer - 1].register_forward_hook(lambda _, inputs, output: caught.append(output.clone()))
            try:
                model.forward_spectrogram(mel)
            finally:
                hook.remove()
            features = torch.cat(caught, dim=1)  # one piece after the other
        return TeacherOutput(features, torch.tensor([self.num_frames(n) for n in lens.tolist()]))
