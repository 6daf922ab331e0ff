"""``spear encode``: the features of audio files, one ``.npz`` each."""

from __future__ import annotations

import hashlib
import logging
import shutil
import tempfile
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from spear.errors import ConfigError, DataError
from spear.export.audio import read_audio
from spear.export.encoder import AudioEncoder, load_encoder
from spear.export.long_audio import OVERLAP_S, WINDOW_S, AudioFile
from spear.files import check_names, make_folder, write_atomic
from spear.progress import track
from spear.types import EncoderOutput

logger = logging.getLogger(__name__)


LONG_S = 60.0
"""Recordings longer than this go through the encoder in windows."""
_Array = np.ndarray[Any, np.dtype[np.float32]]


def encode_files(
    export: str | Path, files: Sequence[Path], out: Path, layer: Literal["last", "all"] | int = "last", window_s: float = WINDOW_S
) -> list[Path]:
    """Encode audio files one by one, so that no result depends on the other files.

    A recording of more than a minute is read, encoded (`spear.export.long_audio`) and written piece by piece, in bounded memory.

    Each ``.npz`` holds ``features`` (T, D) float32, or (L, T, D) for all layers, ``frame_rate_hz``, ``first_frame_s`` and ``source``,
    the audio's path as given. It is named after its audio; where that name belongs to another audio already, a part of the
    path's hash is added.

    Args:
        export: export folder or Hugging Face id. files: audio of any rate and number of channels. out: folder, made if absent.
        layer: ``last``: the encoder's output; a number: that hidden state, 0 is the first layer; ``all``: every hidden state.
        window_s: seconds of a window; 0: every recording at once, whatever its length.
    Returns:
        the files written, in the order of the distinct inputs.
    Raises:
        ConfigError: `layer` is out of range, layers of different widths cannot be stacked, or the window is too short.
        DataError: a file is missing (nothing is written then) or cannot be read.
        CheckpointError: `export` is no encoder.
    """
    files = existing_files(files)
    if window_s != 0 and window_s < 2 * OVERLAP_S:
        raise ConfigError(f"`window` must be 0 or at least {2 * OVERLAP_S:g} s, twice the overlap of windows, but is {window_s:g}")
    encoder = load_encoder(export)
    check_layer(encoder, layer, export)
    make_folder(out)
    targets = output_names(files, out)
    facts = {"frame_rate_hz": np.float64(encoder.frame_rate_hz), "first_frame_s": np.float64(encoder.first_frame_s)}
    for file in track(files, "encode", len(files), unit="files"):
        pieces = _encode(encoder, file, layer, window_s)
        write_atomic(targets[file], partial(_write_npz, pieces=pieces, others={**facts, "source": np.str_(file)}))
    return [targets[file] for file in files]


def existing_files(files: Sequence[Path]) -> list[Path]:
    """The distinct files, all of which are there.

    Raises:
        DataError: one is not, or its name is not UTF-8; names it.
    """
    found = list(dict.fromkeys(Path(file) for file in files))
    check_names(map(str, found))
    for file in found:
        if not file.is_file():
            raise DataError(f"{file} is not a file", cause="missing_file")
    return found


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


def check_layer(encoder: AudioEncoder, layer: str | int, export: str | Path) -> None:
    """Check a layer's number or word.

    Raises:
        ConfigError: there is no such layer, or all of them cannot be stacked.
    """
    widths = encoder.encoder.layer_dims
    if isinstance(layer, int) and not 0 <= layer < encoder.num_layers:
        raise ConfigError(f"`layer` must be between 0 and {encoder.num_layers - 1}, but is {layer} ({export})")
    if isinstance(layer, str) and layer not in ("last", "all"):
        raise ConfigError(f"`layer` must be a number, all or last, but is {layer!r}")
    if layer == "all" and len(set(widths)) > 1:
        listed = ", ".join(map(str, widths))
        raise ConfigError(f"`layer` must be a number or last, but is 'all': the layers of {export} have different widths ({listed})")


def _encode(encoder: AudioEncoder, file: Path, layer: str | int, window_s: float) -> Iterator[_Array]:
    """Features of a file, in pieces (T, D) or (L, T, D)."""
    recording = AudioFile(file, encoder.sample_rate)
    if window_s and len(recording) > LONG_S * encoder.sample_rate:
        for piece in encoder.iter_long(recording, window_s=window_s):
            yield select(piece, layer)
    else:
        with torch.inference_mode():
            output = encoder(read_audio(file, encoder.sample_rate))
        yield select(output, layer)


def select(output: EncoderOutput, layer: str | int) -> _Array:
    """(T, D) or (L, T, D) float32 of the one item in `output`, which may be on any device."""
    if layer == "all":
        return torch.stack([state[0] for state in output.hidden_states]).float().cpu().numpy()
    chosen = output.hidden_states[layer] if isinstance(layer, int) else output.features
    return chosen[0].float().cpu().numpy()


def _write_npz(path: Path, pieces: Iterator[_Array], others: Mapping[str, Any]) -> None:
    """Write ``features``, joined along time, and `others` as `numpy.savez` would; memory holds one piece.

    The shape of an array stands before its values, so the values wait in files without a name until the last piece is there.
    """
    first = next(pieces)
    layers = 1 if first.ndim == 2 else len(first)
    with ExitStack() as stack:
        waiting = [stack.enter_context(tempfile.TemporaryFile(dir=path.parent)) for _ in range(layers)]
        frames = 0
        for piece in chain([first], pieces):
            frames += piece.shape[-2]
            for file, values in zip(waiting, piece.reshape(layers, *piece.shape[-2:])):
                file.write(np.ascontiguousarray(values).tobytes())
        archive = stack.enter_context(zipfile.ZipFile(path, "w"))
        header = {"descr": "<f4", "fortran_order": False, "shape": (*first.shape[:-2], frames, first.shape[-1])}
        with archive.open(zipfile.ZipInfo("features.npy"), "w", force_zip64=True) as target:
            np.lib.format.write_array_header_1_0(target, header)
            for file in waiting:
                file.seek(0)
                shutil.copyfileobj(file, target)
        for name, value in others.items():
            with archive.open(zipfile.ZipInfo(f"{name}.npy"), "w") as target:
                np.lib.format.write_array(target, np.asarray(value), allow_pickle=False)
