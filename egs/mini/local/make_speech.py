"""Make the speech corpus of the mini road: sentences of a small seeded grammar, read by espeak-ng with many voices, with phone and word times.

The voices of valid and test are not heard in train. Phone and word times are espeak-ng's own events: a phone lasts until the next event, and what
lies between words and in pauses has no label. espeak-ng often gives an /l/ after a vowel no time of its own; by convention it then gets the last
40 % of that vowel. Stress marks are dropped. Words that espeak-ng speaks as one ("for the") are one item of the tier ``word``.

    python local/make_speech.py --config conf/corpus.yaml --out data/corpus/speech

writes ``OUT/cuts_{train,valid,test}.jsonl.gz`` (Lhotse, paths relative to OUT) and 16 kHz FLAC files. The folder is a resumable artifact, and its
bytes do not depend on the number of workers or on where a killed run was taken up again.
"""

from __future__ import annotations

import argparse
import gzip
import importlib.metadata
import json
import logging
import math
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
import yaml
from lhotse import AudioSource, MonoCut, Recording, SupervisionSegment
from lhotse.supervision import AlignmentItem
from numpy.typing import NDArray
from scipy.signal import resample_poly

from spear.errors import SpearError
from spear.files import make_folder, read_json, seed_from, write_atomic, write_bytes, write_json
from spear.progress import track
from spear.stages.artifact import Artifact

Interval = tuple[str, float, float]

SAMPLE_RATE = 16000
SPLITS = ("train", "valid", "test")
LATE_L_SHARE = 0.4
SHORTEST_PHONE_S = 0.005
VOWELS = frozenset("aeiouæɐɑɒɔəɚɛɜɝɪʊʌᵻ")
REQUESTS_AHEAD = 2


@dataclass(frozen=True)
class Utterance:
    """Everything one file depends on."""

    id: str
    speaker: str
    text: str
    rate: int
    pitch: int
    range: int
    gain_db: float
    snr_db: float


def draw_utterances(config: dict[str, Any], split: str, seed: int) -> list[Utterance]:
    """The utterances of one split; words are dealt from shuffled decks, so that all words of a kind are equally frequent."""
    rng = np.random.default_rng(seed_from(seed, "utterances", split))
    decks: dict[str, list[str]] = {}

    def deal(kind: str) -> str:
        if not decks.get(kind):
            words = config["words"][kind] if kind else config["sentences"]
            decks[kind] = [words[i] for i in rng.permutation(len(words))]
        return decks[kind].pop()

    def sentence() -> str:
        parts = deal("").replace("{", "\0{").replace("}", "}\0").split("\0")
        return "".join(deal(part[1:-1]) if part.startswith("{") else part for part in parts)

    names = sorted(config["speakers"][split])
    manners = {name: {key: int(rng.integers(*config[key])) for key in ("rate", "pitch", "range")} for name in names}
    drawn = []
    for index in range(config["utterances"][split]):
        name = names[index % len(names)]
        manner = {key: value + int(rng.integers(-6, 7)) for key, value in manners[name].items()}
        levels = {key: float(rng.uniform(*config[key])) for key in ("gain_db", "snr_db")}
        drawn.append(Utterance(id=f"speech-{split}-{index:05d}", speaker=name, text=sentence(), **manner, **levels))
    return drawn


def speak(utterances: Sequence[Utterance], language: str, workers: int) -> Iterator[tuple[dict[str, Any], NDArray[np.int16]]]:
    """Header and (S,) samples of every utterance, in order, from `workers` processes of ``espeak.py``.

    Raises:
        SpearError: espeak-ng failed; it names the utterance.
    """
    command = [sys.executable, str(Path(__file__).with_name("espeak.py"))]
    processes = [subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) for _ in range(workers)]
    try:
        for index in range(min(workers * REQUESTS_AHEAD, len(utterances))):
            _request(processes[index % workers], utterances[index], language)
        for index, utterance in enumerate(utterances):
            yield _answer(processes[index % workers], utterance)
            if (ahead := index + workers * REQUESTS_AHEAD) < len(utterances):
                _request(processes[ahead % workers], utterances[ahead], language)
    finally:
        for process in processes:
            process.kill()
            process.communicate()


def _request(process: subprocess.Popen[bytes], utterance: Utterance, language: str) -> None:
    assert process.stdin is not None
    request = {key: getattr(utterance, key) for key in ("text", "rate", "pitch", "range")} | {"voice": f"{language}+{utterance.speaker}"}
    try:
        process.stdin.write(json.dumps(request).encode() + b"\n")
        process.stdin.flush()
    except BrokenPipeError as error:
        raise SpearError(f"espeak-ng ended before {utterance.id} ({utterance.speaker})") from error


def _answer(process: subprocess.Popen[bytes], utterance: Utterance) -> tuple[dict[str, Any], NDArray[np.int16]]:
    assert process.stdout is not None
    line = process.stdout.readline()
    header = json.loads(line) if line else {"num_bytes": 0}
    samples = process.stdout.read(header["num_bytes"])
    if not samples or len(samples) < header["num_bytes"]:
        raise SpearError(f"espeak-ng did not speak {utterance.id} (voice {utterance.speaker!r}, text {utterance.text!r})")
    return header, np.frombuffer(samples, np.int16)


def intervals(events: Sequence[Sequence[Any]], duration_s: float) -> dict[str, list[Interval]]:
    """Tiers ``phone`` and ``word`` of (symbol, start, duration) in seconds; a word begins and ends with its phones."""
    phones: list[Interval] = []
    words: list[tuple[str, list[Interval]]] = []
    ends = [min(start, duration_s) for _, start, _ in events[1:]] + [duration_s]
    for (kind, start, name), end in zip(events, ends):
        if kind == "word":
            words.append((name, []))
            continue
        length = end - start
        if kind == "phone" and length >= SHORTEST_PHONE_S:
            phones.append((name, start, length))
        elif name == "l" and phones and phones[-1][0][0] in VOWELS:
            vowel, at, whole = phones.pop()
            late = whole * LATE_L_SHARE
            phones += [(vowel, at, whole - late), ("l", at + whole - late, late)]
            if words and words[-1][1]:
                words[-1][1][-1:] = phones[-2:-1]
        else:
            continue
        if words:
            words[-1][1].append(phones[-1])
    spans = [(word, own[0][1], own[-1][1] + own[-1][2] - own[0][1]) for word, own in words if own]
    return {tier: [(symbol, round(at, 6), round(length, 6)) for symbol, at, length in found] for tier, found in (("phone", phones), ("word", spans))}


def write_utterance(utterance: Utterance, header: dict[str, Any], samples: NDArray[np.int16], folder: Path, seed: int) -> None:
    """Write ``ID.json`` (labels), then ``ID.flac`` at 16 kHz; an utterance with a FLAC file is finished."""
    common = math.gcd(header["sample_rate"], SAMPLE_RATE)
    audio = resample_poly(samples / 32768, SAMPLE_RATE // common, header["sample_rate"] // common)
    noise = np.random.default_rng(seed_from(seed, "noise", utterance.id)).standard_normal(len(audio))
    audio = audio + noise * float(np.sqrt(np.mean(audio**2))) * 10 ** (-utterance.snr_db / 20)
    audio *= 10 ** (utterance.gain_db / 20) / float(np.abs(audio).max())
    write_json(folder / f"{utterance.id}.json", intervals(header["events"], len(audio) / SAMPLE_RATE))
    path = folder / f"{utterance.id}.flac"
    write_atomic(path, lambda temporary: soundfile.write(temporary, audio, SAMPLE_RATE, subtype="PCM_16", format="FLAC"))


def cut_of(utterance: Utterance, folder: Path) -> MonoCut:
    """The Lhotse cut of a finished utterance; its path is relative to the parent of `folder`."""
    samples = soundfile.info(folder / f"{utterance.id}.flac").frames
    seconds = samples / SAMPLE_RATE
    recording = Recording(utterance.id, [AudioSource("file", [0], f"{folder.name}/{utterance.id}.flac")], SAMPLE_RATE, samples, seconds)
    tiers = read_json(folder / f"{utterance.id}.json")
    supervision = SupervisionSegment(
        utterance.id,
        utterance.id,
        0.0,
        seconds,
        text=utterance.text,
        language="English",
        speaker=utterance.speaker,
        alignment={tier: [AlignmentItem(*interval) for interval in tiers[tier]] for tier in sorted(tiers)},
    )
    return MonoCut(utterance.id, 0.0, seconds, 0, supervisions=[supervision], recording=recording, custom={"domain": "speech"})


def make_split(config: dict[str, Any], split: str, out: Path, seed: int, workers: int) -> list[MonoCut]:
    """Speak what is missing of one split and write its manifest; returns its cuts."""
    utterances, folder = draw_utterances(config, split, seed), make_folder(out / split)
    missing = [utterance for utterance in utterances if not (folder / f"{utterance.id}.flac").exists()]
    spoken = zip(missing, speak(missing, config["language"], workers))
    for utterance, (header, samples) in track(spoken, f"speech {split}", len(missing), unit="utterances"):
        write_utterance(utterance, header, samples, folder, seed)
    cuts = [cut_of(utterance, folder) for utterance in utterances]
    lines = "".join(json.dumps(cut.to_dict(), ensure_ascii=False) + "\n" for cut in cuts)
    write_bytes(out / f"cuts_{split}.jsonl.gz", gzip.compress(lines.encode(), mtime=0))
    return cuts


def main() -> int:
    """Make the corpus; returns the exit code."""
    parser = argparse.ArgumentParser(description="Make the speech corpus of the mini road.")
    parser.add_argument("--config", type=Path, required=True, metavar="FILE", help="YAML with `seed` and `speech`")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder of the corpus")
    parser.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)), help="processes at a time; the result does not depend on it")
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO, stream=sys.stderr, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    try:
        config = yaml.safe_load(options.config.read_text())
        inputs = {"espeakng-loader": importlib.metadata.version("espeakng-loader")}
        settings = {**config["speech"], "seed": config["seed"]}
        artifact = Artifact(options.out, kind="corpus of speech", config=settings, inputs=inputs)
        if artifact.is_done():
            return 0
        with artifact.making() as record:
            for split in SPLITS:
                cuts = make_split(config["speech"], split, options.out, config["seed"], options.workers)
                record.counts[split] = len(cuts)
                record.audio_s += sum(cut.duration for cut in cuts)
    except SpearError as error:
        print(f"make_speech: error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
