"""``spear explore``: a page to look at and listen to a folder of audio as an encoder hears it."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import numpy as np
import torch

from spear.data.sources import AUDIO_SUFFIXES
from spear.errors import ConfigError, DataError
from spear.evaluation.explore import Clip, Tokens, render, sound_seconds
from spear.export.encoder import AudioEncoder, load_encoder
from spear.export.long_audio import AudioFile
from spear.files import write_text
from spear.progress import track
from spear.quantizers.base import Quantizer
from spear.teachers.base import Teacher, extract

logger = logging.getLogger(__name__)

HEARD_S = 10.0
"""Seconds of a clip that can be heard."""


def explore(
    export: str | Path,
    folder: Path,
    out: Path,
    *,
    max_clips: int = 300,
    max_mb: float = 40.0,
    method: str = "tsne",
    tokenizer: tuple[Teacher, Quantizer] | None = None,
) -> Path:
    """Write the page; returns its path.

    Args:
        export: export folder or Hugging Face id. folder: searched with all its folders for wav, flac, ogg and mp3 files; the colour of
            a clip is the folder it lies in. out: page to write. max_clips: of more, evenly spaced ones in the order of their paths are
            taken. max_mb: 10^6 bytes of sound in the page; clips are heard for at most ten seconds, and less where that would not do.
            method: ``tsne`` or ``pca``. tokenizer: teacher and quantizer whose tokens of every clip are shown below its spectrogram.
    Raises:
        DataError: the folder holds fewer than two files, or one cannot be read. ConfigError: an option is out of range.
        CheckpointError: `export` is no encoder. SpearError: `out` cannot be written.
    """
    if max_clips < 2:
        raise ConfigError(f"`max_clips` must be at least 2, but is {max_clips}")
    if out.is_dir():
        raise ConfigError(f"`out` must be a file, but {out} is a folder")
    files = audio_files(folder)
    if len(files) > max_clips:
        logger.info("%d of %d files are taken", max_clips, len(files))
        files = [files[index] for index in np.linspace(0, len(files) - 1, max_clips).round().astype(int)]
    encoder = load_encoder(export)
    recordings = {file: AudioFile(file, encoder.sample_rate) for file in files}
    heard_s = sound_seconds([len(audio) / encoder.sample_rate for audio in recordings.values()], encoder.sample_rate, HEARD_S, max_mb)
    clips = []
    for file in track(files, "explore", len(files), unit="files"):
        clip = read_clip(encoder, recordings[file], file.relative_to(folder), heard_s)
        clips.append(clip if tokenizer is None else clip._replace(tokens=read_tokens(file, *tokenizer, heard_s)))
    write_text(out, render(clips, folder.resolve().name, str(export), method, encoder.sample_rate))
    return out


def audio_files(folder: Path) -> list[Path]:
    """Audio files in `folder` and all below it, sorted by path.

    Raises:
        DataError: it is no folder, or holds fewer than two.
    """
    if not folder.is_dir():
        raise DataError(f"{folder} is not a folder", cause="missing_file")
    files = sorted(path for path in folder.rglob("*") if path.suffix.lower() in AUDIO_SUFFIXES and path.is_file())
    if len(files) < 2:
        raise DataError(f"{folder} must hold at least two audio files ({', '.join(AUDIO_SUFFIXES)}), but holds {len(files)}", cause="empty")
    return files


def read_tokens(file: Path, teacher: Teacher, quantizer: Quantizer, heard_s: float) -> Tokens | None:
    """Tokens of the part of a file that can be heard; None where that is too short for a frame.

    Raises:
        DataError: the file cannot be decoded.
    """
    recording = AudioFile(file, teacher.sample_rate)
    audio = recording.read(0, min(len(recording), round(heard_s * teacher.sample_rate)))
    if teacher.num_frames(len(audio)) < 1:
        return None
    codes = quantizer.encode(extract(teacher, [audio], torch.device("cpu"))[0]).long().numpy()
    return Tokens(codes, teacher.frame_rate_hz, teacher.first_frame_s)


def read_clip(encoder: AudioEncoder, recording: AudioFile, name: Path, heard_s: float) -> Clip:
    """One recording of any length, in bounded memory.

    Args:
        name: of its file, from the folder on. heard_s: seconds of it that can be heard.
    Raises:
        DataError: it cannot be decoded, or holds values that are not finite or out of range.
    """
    total: Any = np.zeros(encoder.dim, np.float64)
    frames = 0
    for piece in encoder.iter_long(recording):
        total += piece.features[0].double().sum(dim=0).cpu().numpy()
        frames += piece.features.shape[1]
    sound = recording.read(0, min(len(recording), round(heard_s * encoder.sample_rate))).numpy()
    group = str(name.parent) if name.parent != Path() else "no folder"
    return Clip(str(name), group, len(recording) / encoder.sample_rate, sound, (total / frames).astype(np.float32))
