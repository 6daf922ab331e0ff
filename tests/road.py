"""A tiny run from audio to report and what its tests need: the command in this process, and disks that are full or read-only."""

from __future__ import annotations

import contextlib
import ctypes
import io
import json
import logging
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import numpy as np
import pytest
import torch
from lhotse import SupervisionSegment
from lhotse.cut import MonoCut
from lhotse.supervision import AlignmentItem

from spear.cli import main
from spear.stages import STAGES
from tests.data.cuts import cut_of, save, write_cuts

DATA_STAGES, SPLITS = STAGES[:5], ("train", "valid", "test")
RECIPE = """
teachers:
  speech: {type: huggingface, model: teachers/speech, layer: 1}
  audio: {type: logmel, num_mel_bins: 16, stack: 2}
quantizers:
  speech: {type: mvq, num_codebooks: 2, codebook_size: 16, rounds: 3}
  audio: {type: kmeans, codebook_size: 16}
manifests: {max_failed_share: 0.0}
features: {num_frames: 700, heldout_share: 0.1}
tokens: {pairs: all, cuts_per_block: 5, batch_seconds: 6}
shards: {cuts_per_shard: 5}
student:
  type: zipformer
  downsampling_factor: [1, 2]
  num_encoder_layers: 1
  encoder_dim: [32, 48]
  encoder_unmasked_dim: [16, 24]
  feedforward_dim: 48
  num_heads: 2
  query_head_dim: 8
  value_head_dim: 6
  cnn_module_kernel: [7, 5]
  conv_channels: [4, 8, 8]
objective: {type: masked_prediction, weights: {speech: {speech: 1.0}, audio: {speech: 1.0, audio: 0.5}}}
sampling: {max_batch_s: 6, num_buckets: 2}
training:
  max_steps: 6
  precision: fp32
  device: cpu
  log_every: 2
  validate_every: 3
  save_every: 2
  keep_checkpoints: 2
  average_period: 2
  reference_s: 6
export: {average_share: 0.7}
evaluation:
  seeds: [0, 1]
  learning_rates: [0.01]
  weight_decays: [0.0]
  steps: 15
  resamples: 20
  tasks:
    phones: {type: frames, domain: speech, tier: phone}
    words: {type: segments, domain: speech, tier: word}
    speakers: {type: verification, domain: speech}
    events: {type: utterances, domain: audio, label: label}
"""
MODELS = ("logmel", "logmel_3", "teacher_speech", "tokens_speech", "teacher_audio", "tokens_audio", "untrained", "student")
TASKS = ("phones", "words", "speakers", "events")
FORMANTS = {"a": (700.0, 1200.0), "i": (300.0, 2300.0), "u": (320.0, 800.0), "s": None}
WORDS = {"sa": ("s", "a"), "isi": ("i", "s", "i"), "ua": ("u", "a")}
EVENTS = ("beep", "hiss")
Audio = Any


@dataclass(frozen=True)
class Road:
    """Files of one run. root: holds the corpora and the recipe; data, exp: its two folders."""

    root: Path
    data: Path
    exp: Path

    @property
    def recipe(self) -> Path:
        """What is trained."""
        return self.root / "recipe.yaml"

    @property
    def corpora(self) -> Path:
        """On what."""
        return self.root / "corpora.yaml"

    def arguments(self, stage: str, *more: str) -> list[str]:
        """A stage's command line."""
        options = {"--recipe": self.recipe, "--corpora": self.corpora, "--data": self.data, "--exp": self.exp}
        return [stage, *(text for key, path in options.items() for text in (key, str(path))), *more]

    def copy(self, target: Path, stage: str) -> Road:
        """The same run in another place, with the finished folders of all stages before `stage`."""
        later = STAGES[STAGES.index(stage) :]
        new = Road(self.root, target / "data", target / "exp")
        shutil.copytree(self.data, new.data, ignore=lambda folder, _: later if Path(folder) == self.data else ())
        if "pretrain" not in later:
            shutil.copytree(self.exp, new.exp, ignore=lambda folder, _: later if Path(folder) == self.exp else ())
        return new

    def made_by(self, stage: str) -> Path:
        """The folder that a stage writes; that of pretrain holds those of export and evaluate, too."""
        return self.data / stage if stage in DATA_STAGES else self.exp if stage == "pretrain" else self.exp / stage


def make_road(root: Path) -> Road:
    """Write corpora, the teacher that needs a folder, and the two YAML files."""
    road = Road(root, root / "data", root / "exp")
    speakers = {"train": ("ann", "bob", "cat"), "valid": ("dan", "eve"), "test": ("fay", "gus")}
    entries = []
    for name, domain, make in (("voices", "speech", speech_cut), ("sounds", "audio", sound_cut)):
        paths = {}
        for split in SPLITS:
            count = 12 if split == "train" else 6
            cuts = [make(root / "audio" / name, f"{name}-{split}-{i:02d}", i, speakers[split]) for i in range(count)]
            paths[split] = Path(write_cuts(root / "manifests" / f"{name}_{split}.jsonl.gz", cuts)).relative_to(root)
        places = ", ".join(f"{split}: {path}" for split, path in paths.items())
        entries.append(f"  - {{name: {name}, domain: {domain}, source: {{type: cuts, {places}}}}}\n")
    road.corpora.write_text("corpora:\n" + "".join(entries))
    road.recipe.write_text(RECIPE)
    save_teacher(road.data / "teachers" / "speech")
    return road


def speech_cut(folder: Path, cut_id: str, index: int, speakers: Sequence[str]) -> MonoCut:
    """Four "words" of tones and noise with the times of their "phones"; a speaker is a pitch."""
    rng = np.random.default_rng([index, len(cut_id), *cut_id.encode()])
    speaker = speakers[index % len(speakers)]
    pitch_hz = 80.0 + 17.0 * "abcdefg".index(speaker[0])
    pieces, phones, words = [], [], []
    now = 0.0
    for number in range(4):
        word = sorted(WORDS)[(index + number) % len(WORDS)]
        start = now
        for phone in WORDS[word]:
            seconds = round(float(rng.uniform(0.1, 0.16)), 2)
            pieces.append(phone_audio(phone, pitch_hz, round(seconds * 16000), rng))
            phones.append(AlignmentItem(phone, round(now, 2), seconds))
            now += seconds
        words.append(AlignmentItem(word, round(start, 2), round(now - start, 2)))
    cut = cut_of(save(folder / f"{cut_id}.flac", np.concatenate(pieces)), cut_id)
    text, alignment = " ".join(word.symbol for word in words), {"phone": phones, "word": words}
    cut.supervisions = [SupervisionSegment(cut_id, cut_id, 0.0, cut.duration, speaker=speaker, text=text, alignment=alignment)]
    return cut


def phone_audio(phone: str, pitch_hz: float, samples: int, rng: np.random.Generator) -> Audio:
    """(S,) a buzz with two stronger partials, or noise."""
    noise = rng.standard_normal(samples)
    formants = FORMANTS[phone]
    if formants is None:
        return (0.1 * noise).astype(np.float32)
    time_s = np.arange(samples) / 16000
    buzz = 0.1 * np.sign(np.sin(2 * np.pi * pitch_hz * time_s))
    return (buzz + sum(0.15 * np.sin(2 * np.pi * hz * time_s) for hz in formants) + 0.005 * noise).astype(np.float32)


def sound_cut(folder: Path, cut_id: str, index: int, _: Sequence[str]) -> MonoCut:
    """A labelled beep or hiss."""
    rng = np.random.default_rng([index, *cut_id.encode()])
    event, samples = EVENTS[index % 2], int(rng.integers(12000, 20000))
    time_s = np.arange(samples) / 16000
    wave = np.sin(2 * np.pi * rng.uniform(900, 3000) * time_s) if event == "beep" else rng.standard_normal(samples)
    audio = 0.2 * wave * np.minimum(1.0, np.arange(samples) / rng.integers(500, 4000)) + 0.003 * rng.standard_normal(samples)
    cut = cut_of(save(folder / f"{cut_id}.flac", audio.astype(np.float32)), cut_id)
    cut.supervisions = [SupervisionSegment(cut_id, cut_id, 0.0, cut.duration, custom={"label": event})]
    return cut


def save_teacher(folder: Path, seed: int = 3, layers: int = 2) -> None:
    """A random WavLM of small layers in the Hugging Face layout."""
    from transformers import Wav2Vec2FeatureExtractor, WavLMConfig, WavLMModel

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = WavLMModel(
            WavLMConfig(
                hidden_size=16,
                num_hidden_layers=layers,
                num_attention_heads=2,
                intermediate_size=32,
                conv_dim=(8,) * 7,
                num_conv_pos_embeddings=16,
                num_conv_pos_embedding_groups=4,
            )
        )
    model.save_pretrained(folder)
    Wav2Vec2FeatureExtractor(do_normalize=True, return_attention_mask=True).save_pretrained(folder)


class Outcome(NamedTuple):
    """What a command left. code: its exit code; out, err: what it wrote."""

    code: int
    out: str
    err: str

    def error(self) -> str:
        """The text behind ``spear: error:``, of which there is exactly one line, and no traceback."""
        lines = [line for line in self.err.splitlines() if line.startswith("spear: error: ")]
        assert self.code == 1, self.err
        assert len(lines) == 1, self.err
        assert "Traceback" not in self.err
        return lines[0].removeprefix("spear: error: ")


def command(*arguments: object) -> Outcome:
    """Run ``spear`` in this process, on one thread and without a GPU."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.ExitStack() as stack:
        stack.enter_context(_same_logging())
        stack.enter_context(_plain_torch())
        stack.enter_context(contextlib.redirect_stdout(out))
        stack.enter_context(contextlib.redirect_stderr(err))
        code = main([str(argument) for argument in arguments])
    return Outcome(code, out.getvalue(), err.getvalue())


@contextlib.contextmanager
def _same_logging() -> Iterator[None]:
    """Undo what the command does to the root logger, which would go on writing to a closed stream."""
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    root.handlers = []
    try:
        yield
    finally:
        root.handlers = handlers
        root.setLevel(level)


@contextlib.contextmanager
def _plain_torch() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with mock.patch("torch.cuda.is_available", return_value=False):
            yield
    finally:
        torch.set_num_threads(threads)


def contents(folder: Path, leave_out: Callable[[str], bool] = lambda name: False) -> dict[str, Any]:
    """Relative name -> bytes of every file (artifacts without what was measured) and None for every folder."""
    found: dict[str, Any] = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if leave_out(name):
            continue
        if path.name == "artifact.json":
            found[name] = {key: value for key, value in json.loads(path.read_text()).items() if key != "measured"}
        else:
            found[name] = path.read_bytes() if path.is_file() else None
    return found


@contextlib.contextmanager
def mounted(folder: Path, options: str) -> Iterator[None]:
    """A small memory disk at `folder`; skips where the system does not allow it."""
    libc = ctypes.CDLL(None, use_errno=True)
    folder.mkdir(parents=True, exist_ok=True)
    if libc.mount(b"tmpfs", os.fsencode(folder), b"tmpfs", 0, options.encode()) != 0:
        pytest.skip(f"mounting a tmpfs is not permitted here: {os.strerror(ctypes.get_errno())}")
    try:
        yield
    finally:
        libc.umount2(os.fsencode(folder), 2)


def make_read_only(folder: Path) -> None:
    """Mount the memory disk at `folder` again, read-only."""
    remount, read_only = 32, 1
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.mount(b"tmpfs", os.fsencode(folder), b"tmpfs", remount | read_only, None) != 0:
        pytest.skip(f"a read-only mount is not permitted here: {os.strerror(ctypes.get_errno())}")
