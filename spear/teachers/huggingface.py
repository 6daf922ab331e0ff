"""Teachers in the Hugging Face layout: the right adapter is looked up by the ``model_type`` in the folder's config.json."""

from __future__ import annotations

import importlib
import os
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlparse
from urllib.request import getproxies

import torch
from safetensors import SafetensorError
from torch import nn

from spear.errors import ConfigError
from spear.teachers.base import Teacher, TeacherConfig, find_model, verified

WAVEFORM = "spear.teachers.waveform:WaveformTeacher"
ADAPTERS = {
    "wavlm": WAVEFORM,
    "hubert": WAVEFORM,
    "wav2vec2": WAVEFORM,
    "wav2vec2-conformer": WAVEFORM,
    "data2vec-audio": WAVEFORM,
    "unispeech": WAVEFORM,
    "unispeech-sat": WAVEFORM,
    "mert_model": WAVEFORM,
    "wav2vec2-bert": "spear.teachers.w2v_bert:W2VBertTeacher",
    "whisper": "spear.teachers.whisper:WhisperTeacher",
    "audio-spectrogram-transformer": "spear.teachers.ast_patches:ASTTeacher",
    "dasheng": "spear.teachers.dasheng:DashengTeacher",
    "eat": "spear.teachers.eat:EATTeacher",
    "encodec": "spear.teachers.codec:CodecTeacher",
    "dac": "spear.teachers.codec:CodecTeacher",
    "mimi": "spear.teachers.codec:CodecTeacher",
}
"""model_type -> adapter; a new input convention is one file and one line here."""

WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")
TRAINING_ONLY = ("masked_spec_embed",)
"""Weights that only training uses: a checkpoint may lack them."""
VOLATILE = ("_name_or_path", "transformers_version", "torch_dtype", "dtype", "architectures", "auto_map")
"""Keys of config.json that say nothing about the function the model computes."""


@dataclass(frozen=True, kw_only=True, slots=True)
class HuggingFaceConfig(TeacherConfig):
    """In the Hugging Face layout: WavLM, HuBERT, wav2vec 2.0, Data2Vec, UniSpeech(-SAT), MERT, w2v-BERT, Whisper, AST, EAT, Dasheng, codecs."""

    model: str
    """Folder (relative to the run's data folder, or a path) or Hugging Face id."""
    layer: int | Literal["last"] | None = "last"
    """Index into the hidden states: 0 is the input of the first block, L the output of the last; negative counts from the end.
    ``last`` is the model's final output, after its final LayerNorm where it has one."""
    normalize: bool | None = None
    """Whether the input is normalised as the model's feature extractor would; None: as its preprocessor_config.json says."""
    frequency: Literal["mean", "concat"] = "mean"
    """AST and EAT: the frequency patches of one time step are averaged, or put beside each other."""
    trust_remote_code: bool = False
    """Run the Python code that the model's folder brings along (MERT, EAT, Dasheng). Read it before you say true."""
    revision: str | None = None
    """Branch, tag or commit of a Hugging Face id."""

    def build(self, folder: Path | None = None) -> Teacher:
        """See TeacherConfig.build; the adapter is that of the model's ``model_type``."""
        return verified(make_teacher(self, folder))


@dataclass(frozen=True)
class Source:
    """Where a model comes from and what its files say.

    name: as the user wrote it. location: folder or Hugging Face id. is_folder: which of the two. config: config.json as it is on the disk.
    preprocessor: preprocessor_config.json, None where there is none. options: keyword arguments of every ``from_pretrained``.
    """

    name: str
    location: str
    is_folder: bool
    config: dict[str, Any]
    preprocessor: dict[str, Any] | None
    options: dict[str, Any]
    trust_remote_code: bool

    def settings(self, **values: Any) -> dict[str, Any]:
        """What a fingerprint covers beside the weights: the config without volatile keys, and the adapter's choices."""
        return {"type": "huggingface", "config": {k: v for k, v in self.config.items() if k not in VOLATILE}, **values}

    def preprocess(self, key: str, default: Any) -> Any:
        """One value of preprocessor_config.json."""
        value = (self.preprocessor or {}).get(key)
        return default if value is None else value


def make_teacher(config: HuggingFaceConfig, folder: Path | None) -> Teacher:
    """The adapter of the model's ``model_type``, not verified yet.

    Raises:
        ConfigError: another ``model_type``, or the model cannot be had.
    """
    source = find_source(config, folder)
    target = ADAPTERS.get(str(source.config.get("model_type")))
    if target is None:
        raise ConfigError(
            f"`model_type` must be one of {', '.join(sorted(ADAPTERS))}, but is {source.config.get('model_type')!r} ({source.name}/config.json)"
        )
    module, _, name = target.partition(":")
    adapter: Callable[[Source, HuggingFaceConfig], Teacher] = getattr(importlib.import_module(module), name)
    return adapter(source, config)


def find_source(config: HuggingFaceConfig, folder: Path | None) -> Source:
    """Find a model and read its two JSON files.

    Raises:
        ConfigError: no such folder or id, no config.json, no weights.
    """
    from transformers import PretrainedConfig
    from transformers.feature_extraction_utils import FeatureExtractionMixin

    path = find_model(config.model, folder)
    location = str(path) if path is not None else config.model
    options: dict[str, Any] = {"local_files_only": path is not None or offline()}
    if path is not None and not (path / "config.json").is_file():
        raise ConfigError(f"`model` {config.model} must hold config.json, but does not")
    if path is not None and not any((path / name).is_file() for name in WEIGHTS):
        raise ConfigError(f"`model` {config.model} must hold weights ({WEIGHTS[0]}), but does not")
    if path is None and (config.model.startswith((".", "/", "~")) or config.model.count("/") > 1):
        raise ConfigError(f"`model` must be a folder or a Hugging Face id, but {config.model} does not exist")
    if path is None:
        options["revision"] = config.revision or "main"
    with quiet(), loading(config.model, is_folder=path is not None):
        found, _ = PretrainedConfig.get_config_dict(location, **options)
    if not found:
        raise ConfigError(f"`model` {config.model} has no config.json")
    try:
        with quiet():
            preprocessor, _ = FeatureExtractionMixin.get_feature_extractor_dict(location, **options)
    except (OSError, ValueError):
        preprocessor = None
    return Source(config.model, location, path is not None, found, preprocessor, options, config.trust_remote_code)


def offline() -> bool:
    """Whether the Hugging Face hub is switched off or its name does not resolve; asking it would then only cost retries."""
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return True
    if getproxies():
        return False
    try:
        socket.getaddrinfo(urlparse(constants.ENDPOINT).hostname, 443)
    except OSError:
        return True
    return False


@contextmanager
def quiet() -> Iterator[None]:
    """Silence progress bars and advice of transformers and the hub's client while a model is loaded."""
    from huggingface_hub.utils import logging as hub
    from transformers.utils import logging

    verbosity, hub_verbosity = logging.get_verbosity(), hub.get_verbosity()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    hub.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        hub.set_verbosity(hub_verbosity)


@contextmanager
def loading(name: str, *, is_folder: bool) -> Iterator[None]:
    """Turn what goes wrong inside transformers into one line."""
    try:
        yield
    except (OSError, ValueError, RuntimeError, ImportError, AttributeError, KeyError, TypeError, SafetensorError) as error:
        reason = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
        if "trust_remote_code" in str(error):
            reason = "it brings its own Python code; read it, then set `trust_remote_code: true`"
        elif not is_folder and isinstance(error, OSError):
            reason = f"it is no folder here, and the Hugging Face hub does not give it ({reason[:200]})"
        raise ConfigError(f"`model` {name} cannot be loaded: {reason}") from error


def load_model(source: Source, cls: Any = None, *, part: str = "") -> Any:
    """Load weights as float32 and make sure that none is missing.

    Args:
        cls: class with ``from_pretrained``; default: AutoModel. part: only weights under this prefix are needed.
    Raises:
        ConfigError: damaged files, or a weight the checkpoint lacks (transformers would draw it at random).
    """
    from transformers import AutoModel

    options = dict(source.options)
    if cls is None:
        cls = AutoModel
        options["trust_remote_code"] = source.trust_remote_code
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    with quiet(), loading(source.name, is_folder=source.is_folder):
        model, info = cls.from_pretrained(source.location, dtype=torch.float32, output_loading_info=True, **options)
    missing = sorted(key for key in info["missing_keys"] if key.startswith(part) and not key.endswith(TRAINING_ONLY))
    if missing:
        raise ConfigError(f"`model` {source.name} must hold every weight of its config, but lacks {missing[0]} and {len(missing) - 1} more")
    if info["missing_keys"]:
        _clear_training_only(model)
    return model


@torch.no_grad()
def _clear_training_only(model: nn.Module) -> None:
    """Zero what only training uses where the checkpoint lacks it: transformers draws it anew in every process, and the fingerprint holds it."""
    for name, value in model.named_parameters():
        if name.endswith(TRAINING_ONLY):
            value.zero_()
