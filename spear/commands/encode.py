"""``spear encode``: the features of audio files, one ``.npz`` each."""

from __future__ import annotations

import hashlib
import io
import logging
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from spear.errors import ConfigError, DataError
from spear.export.audio import read_audio
from spear.export.encoder import AudioEncoder, load_encoder
from spear.files import make_folder, write_bytes
from spear.progress import track
from spear.types import EncoderOutput

logger = logging.getLogger(__name__)


def encode_files(export: str | Path, files: Sequence[Path], out: Path, layer: Literal["last", "all"] | int = "last") -> list[Path]:
    """Encode audio files one by one, so that no result depends on the other files.

    Each ``.npz`` holds ``features`` (T, D) float32, or (L, T, D) for all layers, ``frame_rate_hz``, ``first_frame_s`` and ``source``,
    the audio's path as given. It is named after its audio; where that name belongs to another audio already, a part of the
    path's hash is added.

    Args:
        export: export folder or Hugging Face id. files: audio of any rate and number of channels. out: folder, made if absent.
        layer: ``last``: the encoder's output; a number: that hidden state, 0 is the first layer; ``all``: every hidden state.
    Returns:
        the files written, in the order of the distinct inputs.
    Raises:
        ConfigError: `layer` is out of range, or layers of different widths cannot be stacked.
        DataError: a file is missing (nothing is written then) or cannot be read.
        CheckpointError: `export` is no encoder.
    """
    files = list(dict.fromkeys(Path(file) for file in files))
    for file in files:
        if not file.is_file():
            raise DataError(f"{file} is not a file", cause="missing_file")
    encoder = load_encoder(export)
    _check_layer(encoder, layer, export)
    make_folder(out)
    targets = output_names(files, out)
    for file in track(files, "encode", len(files), unit="files"):
        with torch.inference_mode():
            output = encoder(read_audio(file, encoder.sample_rate))
        buffer = io.BytesIO()
        np.savez(
            buffer,
            features=_select(output, layer).numpy(),
            frame_rate_hz=np.float64(encoder.frame_rate_hz),
            first_frame_s=np.float64(encoder.first_frame_s),
            source=np.str_(file),
        )
        write_bytes(targets[file], buffer.getvalue())
    return [targets[file] for file in files]


def output_names(files: Sequence[Path], out: Path) -> dict[Path, Path]:
    """A distinct ``.npz`` in `out` for each audio file, none of which belongs to another audio already."""
    stems = [file.stem for file in files]
    targets: dict[Path, Path] = {}
    for file in files:
        plain = out / f"{file.stem}.npz"
        taken = stems.count(file.stem) > 1 or _source(plain) not in (None, str(file))
        targets[file] = plain.with_name(f"{file.stem}-{_hash(file)}.npz") if taken else plain
    if len(set(targets.values())) < len(files):
        targets = {file: out / f"{file.stem}-{_hash(file)}.npz" for file in files}
    return targets


def _hash(file: Path) -> str:
    return hashlib.sha256(str(file).encode()).hexdigest()[:12]


def _source(path: Path) -> str | None:
    """The audio that an existing ``.npz`` was made from; None where there is no file or it does not say."""
    try:
        with np.load(path, allow_pickle=False) as content:
            return str(content["source"])
    except (OSError, KeyError, ValueError, zipfile.BadZipFile):
        return None


def _check_layer(encoder: AudioEncoder, layer: str | int, export: str | Path) -> None:
    widths = encoder.encoder.layer_dims
    if isinstance(layer, int) and not 0 <= layer < encoder.num_layers:
        raise ConfigError(f"`layer` must be between 0 and {encoder.num_layers - 1}, but is {layer} ({export})")
    if isinstance(layer, str) and layer not in ("last", "all"):
        raise ConfigError(f"`layer` must be a number, all or last, but is {layer!r}")
    if layer == "all" and len(set(widths)) > 1:
        listed = ", ".join(map(str, widths))
        raise ConfigError(f"`layer` must be a number or last, but is 'all': the layers of {export} have different widths ({listed})")


def _select(output: EncoderOutput, layer: str | int) -> Tensor:
    """(T, D) or (L, T, D) float32 of the one item in `output`."""
    if layer == "all":
        return torch.stack([state[0] for state in output.hidden_states]).float()
    chosen = output.hidden_states[layer] if isinstance(layer, int) else output.features
    return chosen[0].float()
