"""ReDimNet frame by frame: what the speaker encoder hands to its pooling, or one of its stages (arXiv:2407.18223)."""

from __future__ import annotations

import importlib
import sys
import types
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from spear.errors import ConfigError
from spear.teachers.base import Teacher, TeacherConfig, find_model, resolve_layer, verified
from spear.teachers.checkpoint import read_checkpoint
from spear.types import TeacherOutput

HOP_SAMPLES, SAMPLE_RATE = 160, 16000
PACKAGE = "redimnet"
MIN_SAMPLES = 400


@dataclass(frozen=True, kw_only=True, slots=True)
class ReDimNetConfig(TeacherConfig):
    """A ReDimNet from its authors' weights and code; torchaudio must be installed."""

    weights: str
    """``.pt`` of a release (`model_config` and `state_dict`), relative to the run's data folder, or a path; read without running code."""
    layer: int | Literal["last"] | None = "last"
    """0 is the stem, k the output of stage k; ``last`` is the weighted sum of all of them that is pooled."""

    code: str | None = None
    """Checkout of the authors' code, e.g. torch.hub's, relative to the run's data folder, or a path; its Python is run. Null: it is on PYTHONPATH."""

    def build(self, folder: Path | None = None) -> Teacher:
        """See TeacherConfig.build."""
        values = read_weights(self.weights, folder)
        settings: dict[str, Any] = values["model_config"]
        if settings.get("tf_optimized_arch") or not str(settings.get("feat_type", "pt")).startswith("pt"):
            raise ConfigError(f"`weights` {self.weights} must be of a model with the front end `pt`, but `feat_type` is {settings.get('feat_type')}")
        if self.code is not None:
            use_checkout(self.code, folder)
        try:
            wrap: Any = importlib.import_module("redimnet.model").ReDimNetWrap
        except (ImportError, OSError, AttributeError) as error:
            reason = "name a checkout of ReDimNet in `code` or put it on PYTHONPATH, and install torchaudio"
            raise ConfigError(f"`redimnet.model` cannot be imported ({' '.join(str(error).split())[:120]}): {reason}") from error
        try:
            model = wrap(**{**settings, "return_all_outputs": True})
            model.load_state_dict(values["state_dict"])
        except (TypeError, RuntimeError, ValueError, AssertionError, AttributeError) as error:
            raise ConfigError(f"`weights` {self.weights} do not fit the code of `redimnet.model`: {' '.join(str(error).split())[:200]}") from error
        return verified(ReDimNetTeacher(self.weights, model.float(), settings, self.layer))


def use_checkout(code: str, folder: Path | None) -> None:
    """Make the package ``redimnet`` that of a checkout, whatever PYTHONPATH says.

    Raises:
        ConfigError: there is no such package.
    """
    path = find_model(code, folder)
    if path is None or not (path / PACKAGE / "model.py").is_file():
        raise ConfigError(f"`code` must be a checkout with {PACKAGE}/model.py, but is {code}")
    where = [str((path / PACKAGE).resolve())]
    if list(getattr(sys.modules.get(PACKAGE), "__path__", [])) == where:
        return
    for name in [name for name in sys.modules if name == PACKAGE or name.startswith(f"{PACKAGE}.")]:
        del sys.modules[name]
    package = types.ModuleType(PACKAGE)
    package.__path__ = where
    sys.modules[PACKAGE] = package


def read_weights(name: str, folder: Path | None) -> dict[str, Any]:
    """The two entries of a released file.

    Raises:
        ConfigError: no such file, damaged, or another content.
    """
    found = read_checkpoint(name, folder)
    if not isinstance(found, dict) or not {"model_config", "state_dict"} <= set(found):
        raise ConfigError(f"`weights` {name} must hold model_config and state_dict, but does not")
    return found


class ReDimNetTeacher(Teacher):
    """Frames of one stage: 100 Hz, or 66.7 Hz where the checkpoint's hop is 240 samples; the first frame is centred at 0 s.

    The front end takes the mean over the utterance and attention is over all of it: audio is never padded.
    """

    def __init__(self, name: str, model: Any, settings: dict[str, Any], layer: int | str | None) -> None:
        backbone = model.backbone
        num_layers = int(backbone.num_stages) + 2
        index = resolve_layer(layer, num_layers, name)
        hop = int(settings.get("hop_length", HOP_SAMPLES))
        super().__init__(
            name=name,
            sample_rate=SAMPLE_RATE,
            frame_rate_hz=SAMPLE_RATE / hop,
            first_frame_s=0.0,
            dim=int(backbone.F) * int(backbone.C),
            num_layers=num_layers,
            depends_on_padding=True,
            settings={"type": "redimnet", "layer": num_layers - 1 if index is None else index, "config": repr(sorted(settings.items()))},
        )
        self.model, self.layer, self.hop = model, num_layers - 1 if index is None else index, hop

    def num_frames(self, samples: int) -> int:
        """See Teacher.num_frames: floor(S / hop) + 1; at least 400 samples."""
        return samples // self.hop + 1 if samples >= MIN_SAMPLES else 0

    def encode(self, audio: Tensor, lens: Tensor) -> TeacherOutput:
        """See Teacher.encode; all items have the same length.

        Raises:
            ConfigError: the model has another number of stages than it says.
        """
        found: Any = self.model
        _, stages = found.backbone(found.spec(audio).unsqueeze(1))
        if len(stages) != self.num_layers:
            raise ConfigError(f"{self.name} must give {self.num_layers} layers, but gives {len(stages)}")
        return TeacherOutput(stages[self.layer].transpose(1, 2), torch.tensor([self.num_frames(n) for n in lens.tolist()]))
