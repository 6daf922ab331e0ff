"""Prepare two public sets of real recordings: spoken digits and environmental sounds.

Digits (Free Spoken Digit Dataset, ``recordings/{digit}_{speaker}_{index}.wav``, 8 kHz). Recordings of one speaker are joined into utterances of
several seconds with short pauses between them; the tier ``word`` says when each digit sounds. The set's own rule decides the splits: indices 0 to 4
are test; 5 to 9 are valid here, the others train. A recording is in one split only, and in as many utterances of it as there are passes.

Sounds (ESC-50, ``meta/esc50.csv`` and ``audio/``). The csv's file names are used as they are. Folds decide the splits, so that clips of one source
stay together: by default the last fold present is test, the one before it valid, the others train. By default only the classes of ESC-10.

    python local/prepare.py --fsdd DIR --esc50 DIR --out data/corpus

writes ``OUT/{digits,sounds}/cuts_{train,valid,test}.jsonl.gz`` (Lhotse, paths relative to that folder) and 16 kHz mono FLAC files. Each of the two
folders is a resumable artifact.
"""

from __future__ import annotations

import argparse
import csv
import gzip
import json
import logging
import re
import sys
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import soundfile
from lhotse import AudioSource, MonoCut, Recording, SupervisionSegment
from lhotse.supervision import AlignmentItem
from numpy.typing import NDArray

from spear.data.audio import load_audio_file
from spear.errors import DataError, SpearError
from spear.files import make_folder, seed_from, sha256_json, write_atomic, write_bytes
from spear.progress import track
from spear.stages.artifact import Artifact

Audio = NDArray[np.float32]

SAMPLE_RATE = 16000
SPLITS = ("train", "valid", "test")
RECORDING_NAME = re.compile(r"(?P<digit>[0-9])_(?P<speaker>[^_]+)_(?P<index>[0-9]+)")
DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
TEST_INDICES, VALID_INDICES = range(5), range(5, 10)


@dataclass(frozen=True)
class Utterance:
    """Recordings of one speaker, each after a pause in seconds; one more pause ends it."""

    id: str
    speaker: str
    files: tuple[Path, ...]
    pauses_s: tuple[float, ...]


@dataclass(frozen=True)
class Clip:
    """One file of ESC-50."""

    id: str
    file: Path
    label: str


# ---- digits ----


def find_digits(folder: Path) -> dict[str, dict[str, list[Path]]]:
    """split -> speaker -> sorted recordings.

    Raises:
        DataError: the folder does not look like the Free Spoken Digit Dataset.
    """
    found: dict[str, dict[str, list[Path]]] = {split: defaultdict(list) for split in SPLITS}
    for path in sorted((folder / "recordings").glob("*.wav")):
        match = RECORDING_NAME.fullmatch(path.stem)
        if match is None:
            raise DataError(f"{path} must be named {{digit}}_{{speaker}}_{{index}}.wav")
        index = int(match["index"])
        split = "test" if index in TEST_INDICES else "valid" if index in VALID_INDICES else "train"
        found[split][match["speaker"]].append(path)
    for split in SPLITS:
        if not found[split]:
            raise DataError(f"{folder}/recordings holds no recordings of the split {split}: is `--fsdd` the clone of free-spoken-digit-dataset?")
    return found


def draw_utterances(speakers: dict[str, list[Path]], split: str, passes: int, seed: int) -> list[Utterance]:
    """Deal the recordings of every speaker into utterances of four to seven, `passes` times, each time in another order."""
    drawn = []
    for speaker in sorted(speakers):
        rng = np.random.default_rng(seed_from(seed, "digits", split, speaker))
        for number in range(passes):
            files = [speakers[speaker][i] for i in rng.permutation(len(speakers[speaker]))]
            while files:
                size = int(rng.integers(4, 8))
                size = len(files) if len(files) - size < 3 else size
                pauses = tuple(float(pause) for pause in rng.uniform(0.05, 0.3, size + 1))
                drawn.append(Utterance(f"digits-{split}-{speaker}-{number}-{len(files):04d}", speaker, tuple(files[:size]), pauses))
                files = files[size:]
    return drawn


def join(utterance: Utterance) -> tuple[Audio, list[tuple[str, float, float]]]:
    """(S,) samples of an utterance at 16 kHz, and (digit, start, duration) in seconds of every recording in it."""
    parts: list[Audio] = []
    words: list[tuple[str, float, float]] = []
    samples = 0
    for file, pause in zip(utterance.files, utterance.pauses_s):
        silence, audio = np.zeros(int(pause * SAMPLE_RATE), np.float32), load_audio_file(file, SAMPLE_RATE)
        digit = DIGITS[int(file.stem[0])]
        words.append((digit, (samples + len(silence)) / SAMPLE_RATE, len(audio) / SAMPLE_RATE))
        parts += [silence, audio]
        samples += len(silence) + len(audio)
    parts.append(np.zeros(int(utterance.pauses_s[-1] * SAMPLE_RATE), np.float32))
    return np.concatenate(parts), words


def make_digits(out: Path, utterances: Sequence[Utterance], split: str) -> list[MonoCut]:
    """Write the utterances of one split; returns their cuts."""
    folder, cuts = make_folder(out / split), []
    for utterance in track(utterances, f"digits {split}", len(utterances), unit="utterances"):
        audio, words = join(utterance)
        _write_flac(folder / f"{utterance.id}.flac", audio)
        supervision = SupervisionSegment(
            utterance.id,
            utterance.id,
            0.0,
            len(audio) / SAMPLE_RATE,
            text=" ".join(word for word, _, _ in words),
            language="English",
            speaker=utterance.speaker,
            alignment={"word": [AlignmentItem(*word) for word in words]},
        )
        cuts.append(_cut(utterance.id, split, len(audio), supervision, "speech"))
    return cuts


# ---- sounds ----


def find_sounds(folder: Path, *, all_classes: bool) -> dict[int, list[Clip]]:
    """fold -> clips, in the csv's order.

    Raises:
        DataError: no csv, a column is missing, or no clip is left.
    """
    table = folder / "meta" / "esc50.csv"
    if not table.is_file():
        raise DataError(f"{table} does not exist: is `--esc50` the clone of ESC-50?", cause="missing_file")
    with table.open(newline="") as file:
        rows = list(csv.DictReader(file))
    for column in ("filename", "fold", "category", "esc10"):
        if rows and column not in rows[0]:
            raise DataError(f"{table} must have a column `{column}`, but has {', '.join(rows[0])}")
    found: dict[int, list[Clip]] = defaultdict(list)
    for row in rows:
        if all_classes or row["esc10"] == "True":
            path = folder / "audio" / row["filename"]
            found[int(row["fold"])].append(Clip(f"esc-{Path(row['filename']).stem}", path, row["category"]))
    if len(found) < 3:
        raise DataError(f"{table} must have at least 3 folds, one per split, but has {sorted(found)}")
    return dict(found)


def split_folds(folds: Sequence[int], test_fold: int | None, valid_fold: int | None) -> dict[str, list[int]]:
    """split -> folds; by default the last is test and the one before it valid.

    Raises:
        DataError: a fold is not there, or is asked for twice.
    """
    present = sorted(folds)
    test = present[-1] if test_fold is None else test_fold
    others = [fold for fold in present if fold != test]
    valid = max((fold for fold in others if fold < test), default=others[-1]) if valid_fold is None else valid_fold
    for name, fold in (("--test-fold", test), ("--valid-fold", valid)):
        if fold not in present:
            raise DataError(f"`{name}` must be one of the folds {present}, but is {fold}")
    if test == valid:
        raise DataError(f"`--test-fold` and `--valid-fold` must differ, but both are {test}")
    return {"train": [fold for fold in others if fold != valid], "valid": [valid], "test": [test]}


def make_sounds(out: Path, clips: Sequence[Clip], split: str) -> list[MonoCut]:
    """Write the clips of one split at 16 kHz; returns their cuts."""
    folder, cuts = make_folder(out / split), []
    for clip in track(clips, f"sounds {split}", len(clips), unit="clips"):
        audio = load_audio_file(clip.file, SAMPLE_RATE)
        _write_flac(folder / f"{clip.id}.flac", audio)
        supervision = SupervisionSegment(clip.id, clip.id, 0.0, len(audio) / SAMPLE_RATE, custom={"label": clip.label})
        cuts.append(_cut(clip.id, split, len(audio), supervision, "audio"))
    return cuts


# ---- both ----


def _write_flac(path: Path, audio: Audio) -> None:
    write_atomic(path, lambda temporary: soundfile.write(temporary, audio.clip(-1, 1), SAMPLE_RATE, subtype="PCM_16", format="FLAC"))


def _cut(cut_id: str, split: str, samples: int, supervision: SupervisionSegment, domain: str) -> MonoCut:
    seconds = samples / SAMPLE_RATE
    recording = Recording(cut_id, [AudioSource("file", [0], f"{split}/{cut_id}.flac")], SAMPLE_RATE, samples, seconds)
    return MonoCut(cut_id, 0.0, seconds, 0, supervisions=[supervision], recording=recording, custom={"domain": domain})


def _sizes(files: Sequence[Path]) -> str:
    """Fingerprint of the source files: names and sizes."""
    missing = next((file for file in files if not file.is_file()), None)
    if missing is not None:
        raise DataError(f"{missing} does not exist", cause="missing_file")
    return sha256_json(sorted([file.name, file.stat().st_size] for file in files))


def _write_cuts(path: Path, cuts: Sequence[MonoCut]) -> None:
    lines = "".join(json.dumps(cut.to_dict(), ensure_ascii=False) + "\n" for cut in cuts)
    write_bytes(path, gzip.compress(lines.encode(), mtime=0))


def prepare_digits(options: argparse.Namespace) -> None:
    """Make ``OUT/digits``."""
    found, out = find_digits(options.fsdd), options.out / "digits"
    files = [file for speakers in found.values() for paths in speakers.values() for file in paths]
    artifact = Artifact(out, kind="corpus of digits", config={"passes": options.passes, "seed": options.seed}, inputs={"recordings": _sizes(files)})
    if artifact.is_done():
        return
    with artifact.making() as record:
        for split in SPLITS:
            passes = options.passes if split == "train" else 1
            cuts = make_digits(out, draw_utterances(found[split], split, passes, options.seed), split)
            _write_cuts(out / f"cuts_{split}.jsonl.gz", cuts)
            record.counts[split] = len(cuts)
            record.audio_s += sum(cut.duration for cut in cuts)


def prepare_sounds(options: argparse.Namespace) -> None:
    """Make ``OUT/sounds``."""
    found, out = find_sounds(options.esc50, all_classes=options.all_classes), options.out / "sounds"
    splits = split_folds(sorted(found), options.test_fold, options.valid_fold)
    files = [clip.file for clips in found.values() for clip in clips]
    artifact = Artifact(out, kind="corpus of sounds", config={"folds": splits, "all_classes": options.all_classes}, inputs={"clips": _sizes(files)})
    if artifact.is_done():
        return
    with artifact.making() as record:
        for split, folds in splits.items():
            cuts = make_sounds(out, [clip for fold in folds for clip in found[fold]], split)
            _write_cuts(out / f"cuts_{split}.jsonl.gz", cuts)
            record.counts[split] = len(cuts)
            record.audio_s += sum(cut.duration for cut in cuts)


def main() -> int:
    """Prepare both sets; returns the exit code."""
    parser = argparse.ArgumentParser(description="Prepare spoken digits and environmental sounds.")
    parser.add_argument(
        "--fsdd", type=Path, default=Path("downloads/free-spoken-digit-dataset"), metavar="DIR", help="clone of free-spoken-digit-dataset"
    )
    parser.add_argument("--esc50", type=Path, default=Path("downloads/ESC-50"), metavar="DIR", help="clone of ESC-50")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder of the two corpora")
    parser.add_argument("--passes", type=int, default=2, help="times each training digit is heard in an utterance")
    parser.add_argument("--seed", type=int, default=20, help="of the utterances")
    parser.add_argument("--test-fold", type=int, metavar="N", help="default: the last fold present")
    parser.add_argument("--valid-fold", type=int, metavar="N", help="default: the one before the test fold")
    parser.add_argument("--all-classes", action="store_true", help="all classes of the csv, not only those of ESC-10")
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO, stream=sys.stderr, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    try:
        prepare_digits(options)
        prepare_sounds(options)
    except SpearError as error:
        print(f"prepare: error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
