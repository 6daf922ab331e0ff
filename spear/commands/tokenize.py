"""``spear tokenize``: codes of audio files from a teacher and its quantizer."""

from __future__ import annotations

import argparse
import io

import numpy as np
import torch

from spear.commands.encode import output_names
from spear.errors import ConfigError
from spear.export.audio import read_audio
from spear.files import make_folder, write_bytes
from spear.progress import track
from spear.quantizers import load_quantizer
from spear.recipe import load_recipe
from spear.teachers.base import Teacher, TeacherConfig, extract
from spear.teachers.huggingface import HuggingFaceConfig


def tokenize_files(options: argparse.Namespace) -> None:
    """Write one ``.npz`` per audio file: ``codes`` (T, C), ``frame_rate_hz``, ``first_frame_s``.

    Args:
        options: recipe and teacher, or teacher_dir and layer; quantizer; data; audio; out (see ``spear tokenize --help``).
    Raises:
        ConfigError: neither or both ways of naming the teacher, or the widths of teacher and quantizer differ.
        DataError: an audio file cannot be read.
    """
    teacher = _teacher(options)
    quantizer = load_quantizer(options.quantizer)
    if quantizer.dim != teacher.dim:
        raise ConfigError(f"`--quantizer` {options.quantizer} was fitted on {quantizer.dim} channels, but the teacher gives {teacher.dim}")
    make_folder(options.out)
    names = output_names(options.audio, options.out)
    for path, target in track(names.items(), "tokenize", len(names), unit="files"):
        audio = torch.as_tensor(read_audio(path, teacher.sample_rate))
        frames = extract(teacher, [audio], torch.device("cpu"))[0]
        codes = quantizer.encode(frames).numpy()
        buffer = io.BytesIO()
        np.savez(buffer, codes=codes, frame_rate_hz=np.float64(teacher.frame_rate_hz), first_frame_s=np.float64(teacher.first_frame_s))
        write_bytes(target, buffer.getvalue())


def _teacher(options: argparse.Namespace) -> Teacher:
    if (options.teacher_dir is None) == (options.recipe is None):
        raise ConfigError("name the teacher by `--teacher-dir`, or by `--recipe` and `--teacher`")
    if options.teacher_dir is not None:
        return HuggingFaceConfig(model=options.teacher_dir, layer=options.layer).build(options.data)
    teachers: dict[str, TeacherConfig] = load_recipe(options.recipe).teachers
    if options.teacher not in teachers:
        raise ConfigError(f"`--teacher` must be one of {', '.join(sorted(teachers))}, but is {options.teacher!r}")
    return teachers[options.teacher].build(options.data)
