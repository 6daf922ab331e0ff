"""``spear tokenize``: codes of audio files from a teacher and its quantizer."""

from __future__ import annotations

import argparse
import io
import logging
from pathlib import Path

import numpy as np
import torch

from spear.commands.encode import existing_files, output_names
from spear.data.prepare import load_as_stages
from spear.errors import ConfigError, DataError
from spear.files import make_folder, write_bytes
from spear.progress import track
from spear.quantizers import load_quantizer
from spear.quantizers.base import Quantizer
from spear.recipe import load_recipe
from spear.stages.artifact import DONE, read_artifact
from spear.teachers.base import Teacher, TeacherConfig, extract
from spear.teachers.huggingface import HuggingFaceConfig

logger = logging.getLogger(__name__)


def tokenize_files(options: argparse.Namespace) -> None:
    """Write one ``.npz`` per audio file: ``codes`` (T, C), ``frame_rate_hz``, ``first_frame_s`` and ``source``, the audio's path as given.

    Audio is read as the stages read it, so that the codes are those of ``spear tokens``; files are named as by ``spear encode``.

    Args:
        options: recipe and teacher, or teacher_dir and layer; quantizer; data; audio; out (see ``spear tokenize --help``).
    Raises:
        ConfigError: neither or both ways of naming the teacher, or the quantizer was fitted on another one.
        DataError: an audio file is missing (nothing is written then) or cannot be read.
    """
    files = existing_files(options.audio)
    teacher, quantizer = tokenizer_of(options)
    make_folder(options.out)
    names = output_names(files, options.out)
    for path, target in track(names.items(), "tokenize", len(names), unit="files"):
        audio = torch.from_numpy(load_as_stages(path, teacher.sample_rate))
        if teacher.num_frames(len(audio)) < 1:
            raise DataError(f"{path} is too short for one frame of {teacher.name}", cause="too_short")
        frames = extract(teacher, [audio], torch.device("cpu"))[0]
        buffer = io.BytesIO()
        np.savez(
            buffer,
            codes=quantizer.encode(frames).numpy(),
            frame_rate_hz=np.float64(teacher.frame_rate_hz),
            first_frame_s=np.float64(teacher.first_frame_s),
            source=np.str_(path),
        )
        write_bytes(target, buffer.getvalue())


def tokenizer_of(options: argparse.Namespace) -> tuple[Teacher, Quantizer]:
    """Teacher and quantizer that options name, checked against each other.

    Args:
        options: recipe and teacher, or teacher_dir and layer; quantizer; data.
    Raises:
        ConfigError: neither or both ways of naming the teacher, or the quantizer was fitted on another one.
    """
    teacher = _teacher(options)
    quantizer = load_quantizer(options.quantizer)
    _check_teacher(options.quantizer, quantizer.dim, teacher)
    return teacher, quantizer


def _check_teacher(folder: Path, dim: int, teacher: Teacher) -> None:
    """Compare a teacher with the one that a quantizer was fitted on, as far as the quantizer's folder knows it."""
    if dim != teacher.dim:
        raise ConfigError(f"`--quantizer` {folder} was fitted on {dim} channels, but the teacher gives {teacher.dim}")
    fitted_on = read_artifact(folder)["inputs"].get("teacher") if (folder / DONE).exists() else None
    if fitted_on is None:
        logger.warning("%s does not say which teacher it was fitted on; only the width of its frames was compared", folder)
    elif fitted_on != teacher.fingerprint():
        raise ConfigError(
            f"`--quantizer` {folder} was fitted on the teacher {fitted_on[:12]}, but {teacher.name} is {teacher.fingerprint()[:12]}: "
            "its weights, its layer or another of its settings differ"
        )


def _teacher(options: argparse.Namespace) -> Teacher:
    if (options.teacher_dir is None) == (options.recipe is None):
        raise ConfigError("name the teacher by `--teacher-dir`, or by `--recipe` and `--teacher`")
    if options.teacher_dir is not None:
        return HuggingFaceConfig(model=options.teacher_dir, layer=options.layer).build(options.data)
    teachers: dict[str, TeacherConfig] = load_recipe(options.recipe).teachers
    if options.teacher not in teachers:
        raise ConfigError(f"`--teacher` must be one of {', '.join(sorted(teachers))}, but is {options.teacher!r}")
    return teachers[options.teacher].build(options.data)
