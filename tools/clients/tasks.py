"""Small tasks in the layouts of HEAR, X-ARES and S3PRL, made from labelled cuts and from espeak-ng."""

from __future__ import annotations

import io
import json
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import soundfile
from lhotse import CutSet
from numpy.typing import NDArray
from scipy.signal import resample_poly

RATE = 16000
CLIP_S = 2.0
SPLITS = {"train": 1500, "valid": 200, "test": 300}
"""Clips of each split at most."""
KEYWORDS = ("yes", "no", "up", "down", "left", "right", "on", "off", "stop", "go")
OTHERS = ("bed", "cat", "house", "tree", "happy")
VARIANTS = ("f1", "f2", "f3", "f4", "f5", "m1", "m2", "m3", "m4", "m5", "m6", "m7", "m8")
LANGUAGES = ("en-us", "en-gb-x-rp")
TEST_VARIANTS = ("f3", "m3", "m7")
Audio = NDArray[np.float32]


def read_clips(corpus: Path, split: str) -> list[tuple[str, str, Audio]]:
    """Id, label and `CLIP_S` seconds (S,) of the cuts in ``cuts_<split>.jsonl.gz``, longer ones cut, shorter ones filled with silence."""
    clips = []
    size = int(CLIP_S * RATE)
    for cut in CutSet.from_file(corpus / f"cuts_{split}.jsonl.gz").with_recording_path_prefix(str(corpus)).subset(first=SPLITS[split]):
        audio = cut.load_audio()[0, :size].astype(np.float32)
        clips.append((cut.id, cut.supervisions[0].custom["label"], np.pad(audio, (0, size - len(audio))).clip(-0.98, 0.98)))
    return clips


def write_hear(corpus: Path, tasks: Path, name: str) -> None:
    """A scene task of heareval: ``tasks/NAME-v1-small``."""
    folder = tasks / f"{name}-v1-small"
    labels: set[str] = set()
    for split in SPLITS:
        (folder / str(RATE) / split).mkdir(parents=True, exist_ok=True)
        found = {}
        for id_, label, audio in read_clips(corpus, split):
            soundfile.write(folder / str(RATE) / split / f"{id_}.wav", audio, RATE)
            found[f"{id_}.wav"] = [label]
            labels.add(label)
        (folder / f"{split}.json").write_text(json.dumps(found))
    rows = "".join(f"{index},{label}\n" for index, label in enumerate(sorted(labels)))
    (folder / "labelvocabulary.csv").write_text(f"idx,label\n{rows}")
    facts = {"task_name": name, "version": "v1", "embedding_type": "scene", "prediction_type": "multiclass", "split_mode": "trainvaltest"}
    facts |= {"sample_duration": CLIP_S, "splits": list(SPLITS), "evaluation": ["top1_acc", "mAP"]}  # type: ignore[dict-item]
    (folder / "task_metadata.json").write_text(json.dumps(facts))


def write_xares(corpus: Path, folder: Path, name: str) -> int:
    """Audio of an X-ARES task: ``folder/env/NAME``; returns the number of classes."""
    target = folder / "env" / name
    target.mkdir(parents=True, exist_ok=True)
    clips = {split: read_clips(corpus, split) for split in SPLITS}
    labels = sorted({label for rows in clips.values() for _, label, _ in rows})
    for split, rows in clips.items():
        with tarfile.open(target / f"{split}-000.tar", "w") as tar:
            for id_, label, audio in rows:
                wave = io.BytesIO()
                soundfile.write(wave, audio, RATE, format="WAV")
                for suffix, data in (("wav", wave.getvalue()), ("json", json.dumps({"label": labels.index(label)}).encode())):
                    entry = tarfile.TarInfo(f"{id_}.{suffix}")
                    entry.size = len(data)
                    tar.addfile(entry, io.BytesIO(data))
    (target / ".audio_tar_ready").touch()
    task = f"""from xares.task import TaskConfig


def {name}_config(encoder):
    return TaskConfig(name={name!r}, encoder=encoder, train_split="train", valid_split="valid", test_split="test", output_dim={len(labels)},
                      label_processor=lambda x: x["label"], eval_weight={SPLITS["test"]}, metric="accuracy", num_encoder_workers=0)
"""
    (folder / f"{name}_task.py").write_text(task)
    return len(labels)


def write_keywords(folder: Path, espeak: Path) -> None:
    """Speech Commands as S3PRL reads it: ``folder/train/WORD/SPEAKER_nohash_K.wav`` and ``folder/test/CLASS/...`` with other speakers.

    Args:
        espeak: the script that speaks, ``egs/mini/local/espeak.py``.
    """
    rng = np.random.default_rng(0)
    with subprocess.Popen([sys.executable, str(espeak)], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as voice:
        assert voice.stdin is not None
        assert voice.stdout is not None
        for language in LANGUAGES:
            for variant in VARIANTS:
                for word in (*KEYWORDS, *OTHERS):
                    for take in range(2):
                        request = {"text": word, "voice": f"{language}+{variant}", "rate": int(rng.integers(120, 220))}
                        request |= {"pitch": int(rng.integers(20, 80)), "range": int(rng.integers(30, 70))}
                        voice.stdin.write(json.dumps(request).encode() + b"\n")
                        voice.stdin.flush()
                        header = json.loads(voice.stdout.readline())
                        samples = np.frombuffer(voice.stdout.read(header["num_bytes"]), dtype=np.int16) / 32768
                        _write_word(folder, word, f"{language}{variant}_nohash_{take}.wav", variant, _one_second(samples, header["sample_rate"], rng))
    for part, count, seconds in (("train/_background_noise_", 3, 20), ("test/_silence_", 20, 1)):
        (folder / part).mkdir(parents=True, exist_ok=True)
        for index in range(count):
            noise = rng.standard_normal(seconds * RATE) * 10 ** rng.uniform(-3, -1.5)
            soundfile.write(folder / part / f"noise_{index}.wav", noise.clip(-0.98, 0.98), RATE)


def _one_second(samples: NDArray[np.float64], rate: int, rng: np.random.Generator) -> NDArray[np.float64]:
    """A word at a random place in one second of weak noise, 5 to 25 dB below it."""
    speech = resample_poly(samples, RATE, rate)[:RATE] if rate != RATE else samples[:RATE]
    start = int(rng.integers(0, RATE - len(speech) + 1))
    padded = np.pad(speech, (start, RATE - len(speech) - start))
    level = np.sqrt(np.mean(speech**2)) * 10 ** (-rng.uniform(5, 25) / 20)
    mixed = padded + level * rng.standard_normal(RATE)
    return mixed * (0.5 / np.abs(mixed).max())


def _write_word(folder: Path, word: str, name: str, variant: str, audio: NDArray[np.float64]) -> None:
    is_test = variant in TEST_VARIANTS
    label = word if word in KEYWORDS or not is_test else "_unknown_"
    target = folder / ("test" if is_test else "train") / label / (name if word == label else f"{word}_{name}")
    target.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(target, audio, RATE)
