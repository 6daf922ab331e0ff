"""BEATs as a teacher (arXiv:2212.09058), from a released ``.pt`` file and a checkout of its authors' code, without torchaudio."""

from __future__ import annotations

import importlib.util
import sys
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, Literal

from torch import Tensor, nn

from spear.errors import ConfigError
from spear.teachers.base import Teacher, TeacherConfig, find_model, resolve_layer, verified
from spear.teachers.checkpoint import read_checkpoint
from spear.teachers.patches import Caught, PatchTeacher

MEAN, STD = 15.41663, 6.55582
NUM_MEL_BINS, SAMPLE_RATE = 128, 16000
DEFAULTS = {"conv_bias": False, "layer_wise_gradient_decay_ratio": 1.0, "deep_norm": False, "relative_position_embedding": False}
FILES = ("modules", "backbone")


@dataclass(frozen=True, kw_only=True, slots=True)
class BEATsConfig(TeacherConfig):
    """A BEATs encoder from its authors' weights and code, of which only ``backbone.py`` and ``modules.py`` are run."""

    weights: str
    """``.pt`` of a release (`cfg` and `model`), relative to the run's data folder, or a path; read without running code, a predictor is left out."""
    code: str
    """Folder of the authors' code with backbone.py, relative to the run's data folder, or a path; its Python is run: read it first."""
    layer: int | Literal["last"] | None = "last"
    """0 is the input of the first block, k the output of block k; ``last`` is the encoder's output."""
    frequency: Literal["mean", "concat"] = "mean"
    """The frequency patches of one time step are averaged, or put beside each other."""

    def build(self, folder: Path | None = None) -> Teacher:
        """See TeacherConfig.build."""
        values = read_weights(self.weights, folder)
        settings: dict[str, Any] = {**DEFAULTS, **values["cfg"]}
        backbone = load_backbone(self.code, folder)
        try:
            model = BEATsEncoder(SimpleNamespace(**settings), backbone)
            wanted = model.state_dict()
            missing = sorted(set(wanted) - set(values["model"]))
            if missing:
                raise KeyError(f"they lack {missing[0]} and {len(missing) - 1} more")
            model.load_state_dict({name: values["model"][name] for name in wanted})
        except (TypeError, RuntimeError, ValueError, AssertionError, AttributeError, KeyError) as error:
            raise ConfigError(f"`weights` {self.weights} do not fit the code of {self.code}: {' '.join(str(error).split())[:200]}") from error
        return verified(BEATsTeacher(self, model.float(), settings))


class BEATsEncoder(nn.Module):
    """Patch embedding, norm and Transformer of BEATs, with the names of its released weights."""

    def __init__(self, settings: SimpleNamespace, backbone: ModuleType) -> None:
        super().__init__()
        patch, width = int(settings.input_patch_size), int(settings.embed_dim)
        self.patch_embedding = nn.Conv2d(1, width, patch, patch, bias=bool(settings.conv_bias))
        self.layer_norm = nn.LayerNorm(width)
        self.post_extract_proj = nn.Linear(width, settings.encoder_embed_dim) if width != settings.encoder_embed_dim else None
        self.encoder = backbone.TransformerEncoder(settings)

    def forward(self, mel: Tensor) -> Tensor:
        """(N, T bands, D) from normalised log-mels (N, T patch, F)."""
        x = self.layer_norm(self.patch_embedding(mel[:, None]).flatten(2).transpose(1, 2))
        if self.post_extract_proj is not None:
            x = self.post_extract_proj(x)
        encoder: Any = self.encoder
        features: Tensor = encoder(x, padding_mask=None)[0]
        return features


class BEATsTeacher(PatchTeacher):
    """One layer of BEATs."""

    def __init__(self, config: BEATsConfig, model: BEATsEncoder, settings: dict[str, Any]) -> None:
        encoder: Any = model.encoder
        num_layers = len(encoder.layers) + 1
        layer = resolve_layer(config.layer, num_layers, config.weights)
        super().__init__(
            name=config.weights,
            sample_rate=SAMPLE_RATE,
            patch=int(settings["input_patch_size"]),
            num_mel_bins=NUM_MEL_BINS,
            window="povey",
            scale=2.0**15,
            mean=MEAN,
            std=STD,
            piece_frames=0,
            frequency=config.frequency,
            width=int(settings["encoder_embed_dim"]),
            num_layers=num_layers,
            settings={"type": "beats", "layer": layer, "frequency": config.frequency, "cfg": {key: settings[key] for key in sorted(settings)}},
        )
        self.model, self.layer = model, layer

    def tokens(self, mel: Tensor) -> Tensor:
        """See PatchTeacher.tokens; blocks work on (T, N, D)."""
        if self.layer is None:
            last: Tensor = self.model(mel)
            return last
        encoder: Any = self.model.encoder
        with Caught(encoder.layers, self.layer) as caught:
            self.model(mel)
        return caught[0].transpose(0, 1)


def read_weights(name: str, folder: Path | None) -> dict[str, Any]:
    """The two entries of a released file.

    Raises:
        ConfigError: no such file, or not one of BEATs.
    """
    values = read_checkpoint(name, folder)
    if not isinstance(values, dict) or not {"cfg", "model"} <= set(values):
        raise ConfigError(f"`weights` {name} must hold `cfg` and `model`, as the releases of BEATs do")
    return values


def load_backbone(code: str, folder: Path | None) -> ModuleType:
    """The module ``backbone`` of a checkout, which imports its neighbour ``modules`` by that bare name.

    Raises:
        ConfigError: the files are not there or cannot be run.
    """
    where = find_model(code, folder)
    if where is None or not all((where / f"{name}.py").is_file() for name in FILES):
        raise ConfigError(f"`code` must be a folder with {' and '.join(f'{name}.py' for name in FILES)}, but is {code}")
    before = {name: sys.modules.get(name) for name in FILES}
    try:
        for name in FILES:
            spec = importlib.util.spec_from_file_location(name, where / f"{name}.py")
            assert spec is not None
            assert spec.loader is not None
            module = sys.modules[name] = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(module)
        return sys.modules[FILES[-1]]
    except (ImportError, SyntaxError, AttributeError, NameError, TypeError) as error:
        raise ConfigError(f"`code` {code} cannot be run: {' '.join(str(error).split())[:200]}") from error
    finally:
        for name, module_before in before.items():
            if module_before is None:
                sys.modules.pop(name, None)
            else:
                sys.modules[name] = module_before
