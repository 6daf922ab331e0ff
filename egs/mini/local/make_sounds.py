"""Make the sound corpus of the mini road: ten synthesised classes of sounds, about two seconds each.

The classes differ in what happens over time, not in what is heard on average: pitch, resonances, tone or noise, level and background noise are drawn
from the same ranges for every class. A mean over time therefore keeps little of the label, by design: log-mels averaged over a clip are a weak
baseline here (a linear classifier reaches 27 % of the test clips; with the deviation over time beside the mean, 53 %). What they still tell is how
tonal and how wide a sound is, so they stay above chance; a model has to follow modulations of 2 to 40 Hz.
No class is another one played backwards, so the direction of time is never all that separates two of them.

    python local/make_sounds.py --config conf/corpus.yaml --out data/corpus/sounds

writes ``OUT/cuts_{train,valid,test}.jsonl.gz`` (Lhotse, paths relative to OUT) and 16 kHz FLAC files. The folder is a resumable artifact, and its
bytes do not depend on the number of workers or on where a killed run was taken up again.
"""

from __future__ import annotations

import argparse
import gzip
import json
import logging
import math
import multiprocessing
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
import yaml
from lhotse import AudioSource, MonoCut, Recording, SupervisionSegment
from numpy.typing import NDArray
from scipy.signal import lfilter

from spear.errors import SpearError
from spear.files import make_folder, seed_from, write_atomic, write_bytes
from spear.progress import track
from spear.stages.artifact import Artifact

Audio = NDArray[np.float64]
Rng = np.random.Generator

SAMPLE_RATE = 16000
SPLITS = ("train", "valid", "test")
CLIPS_AT_ONCE = 50


@dataclass(frozen=True)
class Clip:
    """Everything one file depends on."""

    id: str
    label: str
    seconds: float
    gain_db: float
    snr_db: float


def tone(rng: Rng, pitch_hz: Audio) -> Audio:
    """(S,) harmonics of a moving pitch; how fast they fall off and which of them resonate is drawn."""
    phase = 2 * np.pi * np.cumsum(pitch_hz) / SAMPLE_RATE
    slope, centre, width = rng.uniform(0.4, 1.6), rng.uniform(400, 4000), rng.uniform(300, 1500)
    mean, highest, out = float(pitch_hz.mean()), float(pitch_hz.max()), np.zeros(len(pitch_hz))
    for harmonic in range(1, min(24, int(7000 / highest)) + 1):
        resonance = 1 + 4 * math.exp(-(((harmonic * mean - centre) / width) ** 2))
        out += resonance * harmonic**-slope * np.sin(harmonic * phase + rng.uniform(0, 2 * np.pi))
    return _unit(out)


def noise(rng: Rng, size: int) -> Audio:
    """(S,) white noise through one drawn resonance."""
    frequency, radius = rng.uniform(200, 4500), rng.uniform(0.6, 0.97)
    poles = [1, -2 * radius * math.cos(2 * np.pi * frequency / SAMPLE_RATE), radius**2]
    return _unit(np.asarray(lfilter([1.0], poles, rng.standard_normal(size))))


def pitch(rng: Rng) -> float:
    """A pitch in Hz, log-uniform."""
    return float(math.exp(rng.uniform(math.log(130), math.log(900))))


def carrier(rng: Rng, size: int) -> Audio:
    """(S,) something that goes on: a tone, a noise, or both."""
    share = rng.choice([0.0, 1.0, rng.uniform(0.2, 0.8)])
    return share * tone(rng, np.full(size, pitch(rng))) + (1 - share) * noise(rng, size)


def strokes(rng: Rng, size: int, starts_s: Sequence[float], loudness: Sequence[float]) -> Audio:
    """(S,) one drawn short sound that dies away, at every start."""
    decay = np.exp(-np.arange(size) / (rng.uniform(0.015, 0.06) * SAMPLE_RATE))
    stroke = decay * carrier(rng, size)
    out = np.zeros(size)
    for start_s, level in zip(starts_s, loudness):
        start = int(start_s * SAMPLE_RATE)
        if start < size:
            out[start:] += level * stroke[: size - start]
    return out


def _times(size: int) -> Audio:
    return np.arange(size) / SAMPLE_RATE


def _swell(rng: Rng, size: int, low_hz: float, high_hz: float) -> Audio:
    depth, rate, phase = rng.uniform(0.6, 1.0), rng.uniform(low_hz, high_hz), rng.uniform(0, 2 * np.pi)
    return 1 - depth * (0.5 + 0.5 * np.sin(2 * np.pi * rate * _times(size) + phase))


def hum(rng: Rng, size: int) -> Audio:
    """Goes on evenly, with a slow drift in level."""
    knots = rng.uniform(0.7, 1.0, 5)
    return carrier(rng, size) * np.interp(np.linspace(0, 4, size), np.arange(5), knots)


def tremolo(rng: Rng, size: int) -> Audio:
    """Level swells 3 to 7 times a second."""
    return carrier(rng, size) * _swell(rng, size, 3, 7)


def flutter(rng: Rng, size: int) -> Audio:
    """Level flutters 16 to 40 times a second."""
    return carrier(rng, size) * _swell(rng, size, 16, 40)


def knocking(rng: Rng, size: int) -> Audio:
    """Strokes at even intervals."""
    period = 1 / rng.uniform(3, 7)
    starts = np.arange(rng.uniform(0, period), size / SAMPLE_RATE, period)
    return strokes(rng, size, list(starts), list(rng.uniform(0.8, 1.0, len(starts))))


def pattering(rng: Rng, size: int) -> Audio:
    """Strokes at chance moments, as many as in knocking."""
    count = max(3, int(rng.uniform(3, 7) * size / SAMPLE_RATE))
    return strokes(rng, size, list(rng.uniform(0, size / SAMPLE_RATE, count)), list(rng.uniform(0.8, 1.0, count)))


def bouncing(rng: Rng, size: int) -> Audio:
    """Strokes that come faster and softer, then start over."""
    seconds, starts, levels = size / SAMPLE_RATE, [], []
    start = rng.uniform(-0.3, 0.2)
    while start < seconds:
        gap, ratio, level, at = rng.uniform(0.3, 0.45), rng.uniform(0.72, 0.85), 1.0, start
        while gap > 0.03:
            if at >= 0:
                starts.append(float(at))
                levels.append(level)
            at, gap, level = at + gap, gap * ratio, level * ratio**0.5
        start = at + rng.uniform(0.05, 0.2)
    return strokes(rng, size, starts, levels)


def siren(rng: Rng, size: int) -> Audio:
    """Two pitches in turn."""
    low, ratio, period = pitch(rng), rng.uniform(1.2, 1.7), rng.uniform(0.3, 0.8)
    high = (_times(size) / period + rng.uniform()) % 1 > 0.5
    return tone(rng, np.where(high, low * ratio, low))


def whooping(rng: Rng, size: int) -> Audio:
    """A pitch that rises, again and again."""
    low, ratio, period = pitch(rng), rng.uniform(1.4, 2.5), rng.uniform(0.25, 0.7)
    position = (_times(size) / period + rng.uniform()) % 1
    return tone(rng, low * ratio**position) * np.minimum(1, np.minimum(position, 1 - position) * 12)


def wavering(rng: Rng, size: int) -> Audio:
    """A pitch that wavers 4 to 9 times a second."""
    depth, rate = rng.uniform(0.03, 0.12), rng.uniform(4, 9)
    return tone(rng, pitch(rng) * (1 + depth * np.sin(2 * np.pi * rate * _times(size) + rng.uniform(0, 2 * np.pi))))


def babbling(rng: Rng, size: int) -> Audio:
    """A new chance pitch every 80 to 180 ms."""
    low, period = pitch(rng), rng.uniform(0.08, 0.18)
    position = _times(size) / period
    steps = 2 ** (rng.integers(0, 13, int(position[-1]) + 1) / 12)
    return tone(rng, low * steps[position.astype(int)]) * np.minimum(1, (1 - position % 1) * 8)


SOUNDS: dict[str, Callable[[Rng, int], Audio]] = {
    sound.__name__: sound for sound in (hum, tremolo, flutter, knocking, pattering, bouncing, siren, whooping, wavering, babbling)
}


def draw_clips(config: dict[str, Any], split: str, seed: int) -> list[Clip]:
    """The clips of one split; all classes are equally frequent."""
    rng, labels, drawn = np.random.default_rng(seed_from(seed, "clips", split)), sorted(SOUNDS), []
    for index in range(config["clips"][split]):
        levels = {key: float(rng.uniform(*config[key])) for key in ("seconds", "gain_db", "snr_db")}
        drawn.append(Clip(id=f"sound-{split}-{index:05d}", label=labels[index % len(labels)], **levels))
    return drawn


def make_clip(clip: Clip, seed: int) -> Audio:
    """(S,) samples of one clip: the sound, coloured noise under it, at the clip's level."""
    rng = np.random.default_rng(seed_from(seed, "sound", clip.id))
    size = int(clip.seconds * SAMPLE_RATE)
    background = np.asarray(lfilter([1.0], [1.0, -rng.uniform(0, 0.95)], rng.standard_normal(size)))
    audio = _unit(SOUNDS[clip.label](rng, size)) + 10 ** (-clip.snr_db / 20) * _unit(background)
    return audio * (10 ** (clip.gain_db / 20) / float(np.abs(audio).max()))


def _unit(audio: Audio) -> Audio:
    return audio / max(float(np.sqrt(np.mean(audio**2))), 1e-9)


def write_clips(clips: Sequence[Clip], folder: Path, seed: int) -> None:
    """Write ``ID.flac`` of several clips."""
    for clip in clips:
        audio = make_clip(clip, seed)

        def write(path: Path, audio: Audio = audio) -> None:
            soundfile.write(path, audio, SAMPLE_RATE, subtype="PCM_16", format="FLAC")

        write_atomic(folder / f"{clip.id}.flac", write)


def cut_of(clip: Clip, folder: Path) -> MonoCut:
    """The Lhotse cut of a finished clip; its path is relative to the parent of `folder`."""
    samples = soundfile.info(folder / f"{clip.id}.flac").frames
    seconds = samples / SAMPLE_RATE
    recording = Recording(clip.id, [AudioSource("file", [0], f"{folder.name}/{clip.id}.flac")], SAMPLE_RATE, samples, seconds)
    supervision = SupervisionSegment(clip.id, clip.id, 0.0, seconds, custom={"label": clip.label})
    return MonoCut(clip.id, 0.0, seconds, 0, supervisions=[supervision], recording=recording, custom={"domain": "audio"})


def make_split(config: dict[str, Any], split: str, out: Path, seed: int, workers: int) -> list[MonoCut]:
    """Make what is missing of one split, `workers` processes at a time, and write its manifest; returns its cuts.

    Raises:
        SpearError: a process failed; its own message is on stderr.
    """
    clips, folder = draw_clips(config, split, seed), make_folder(out / split)
    missing = [clip for clip in clips if not (folder / f"{clip.id}.flac").exists()]
    rounds = range(0, len(missing), CLIPS_AT_ONCE * workers)
    for start in track(rounds, f"sounds {split}", len(rounds), unit=f"rounds of {CLIPS_AT_ONCE * workers} clips"):
        batch = missing[start : start + CLIPS_AT_ONCE * workers]
        fork = multiprocessing.get_context("fork")
        processes = [fork.Process(target=write_clips, args=(batch[rank::workers], folder, seed)) for rank in range(workers)]
        for process in processes:
            process.start()
        for process in processes:
            process.join()
        if any(process.exitcode != 0 for process in processes):
            raise SpearError(f"{batch[0].id} to {batch[-1].id}: a process ended with an error, see above")
    cuts = [cut_of(clip, folder) for clip in clips]
    lines = "".join(json.dumps(cut.to_dict(), ensure_ascii=False) + "\n" for cut in cuts)
    write_bytes(out / f"cuts_{split}.jsonl.gz", gzip.compress(lines.encode(), mtime=0))
    return cuts


def main() -> int:
    """Make the corpus; returns the exit code."""
    parser = argparse.ArgumentParser(description="Make the sound corpus of the mini road.")
    parser.add_argument("--config", type=Path, required=True, metavar="FILE", help="YAML with `seed` and `sounds`")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder of the corpus")
    parser.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)), help="processes at a time; the result does not depend on it")
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO, stream=sys.stderr, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    try:
        config = yaml.safe_load(options.config.read_text())
        artifact = Artifact(options.out, kind="corpus of sounds", config={**config["sounds"], "seed": config["seed"]}, inputs={})
        if artifact.is_done():
            return 0
        with artifact.making() as record:
            for split in SPLITS:
                cuts = make_split(config["sounds"], split, options.out, config["seed"], options.workers)
                record.counts[split] = len(cuts)
                record.audio_s += sum(cut.duration for cut in cuts)
    except SpearError as error:
        print(f"make_sounds: error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
