"""Manifests and lists of trials of VoxCeleb, and of Speakers in the Wild (SITW); no audio is copied.

Training cuts are VoxCeleb2's dev part (``ID/VIDEO/FILE.wav``, or .flac), cut off at ``--max-s`` seconds. A share of its speakers, drawn by a hash of
the id, is valid. Test cuts are exactly the recordings of VoxCeleb1 (and SITW) that a list of trials names. Ids are paths with ``-`` for ``/``, as
`evaluation.tasks.NAME.trials` expects. Gender and, for VoxCeleb1, nationality come from the sets' csv files where they are given.

    python local/prepare.py --vox2 DIR --vox1 DIR --lists DIR [--sitw DIR] [--meta CSV ...] --out data/corpus

writes ``OUT/cuts_{train,valid,test}.jsonl.gz`` (Lhotse, absolute paths) and ``OUT/trials/{vox1_o,vox1_e,vox1_h,sitw}.txt``. The folder is a
resumable artifact.
"""

from __future__ import annotations

import argparse
import csv
import gzip
import json
import logging
import sys
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

from lhotse import MonoCut, Recording, SupervisionSegment

from spear.errors import DataError, SpearError
from spear.evaluation.trials import cut_id, read_trials
from spear.files import seed_from, sha256_file, sha256_json, write_bytes, write_text
from spear.progress import track
from spear.stages.artifact import Artifact

SUFFIXES = (".wav", ".flac")
SITW = "sitw"
LISTS = {"vox1_o": "veri_test2.txt", "vox1_e": "list_test_all2.txt", "vox1_h": "list_test_hard2.txt"}
"""Name here -> file of the cleaned list as it is published."""


class File(NamedTuple):
    """One recording: id of its cut, where it is, and who speaks."""

    id: str
    path: Path
    speaker: str


def find_files(folder: Path) -> list[File]:
    """Recordings ``ID/VIDEO/FILE`` of a folder, sorted.

    Raises:
        DataError: there is none.
    """
    found = [path for path in sorted(folder.glob("*/*/*")) if path.suffix in SUFFIXES]
    if not found:
        raise DataError(f"{folder} must hold ID/VIDEO/FILE.wav or .flac, but holds none", cause="missing_file")
    return [File(cut_id(str(path.relative_to(folder))), path, path.relative_to(folder).parts[0]) for path in found]


def listed_files(trials: Path, folder: Path, speakers: dict[str, str] | None = None) -> list[File]:
    """Recordings that a list of trials names, sorted.

    Args:
        folder: where the named paths start. speakers: path -> speaker; else the first folder of a path.
    Raises:
        DataError: a named recording is neither there nor there with the other suffix.
    """
    names = {name for pair in read_trials(str(trials)).pairs for name in pair}
    found = []
    for name in sorted(names):
        path = next((path for path in (folder / name, *((folder / name).with_suffix(suffix) for suffix in SUFFIXES)) if path.is_file()), None)
        if path is None:
            raise DataError(f"{trials} names {name}, which {folder} does not hold", cause="missing_file")
        found.append(File(cut_id(name), path, name.split("/")[0] if speakers is None else speakers[name]))
    return found


def sitw_trials(folder: Path) -> tuple[str, dict[str, str]]:
    """The core-core condition of SITW's eval part as lines ``1 sitw/audio/A.flac sitw/audio/B.flac``, and path -> speaker.

    A test recording's speaker is the model that it is a target of; where it is none's, its own name.

    Raises:
        DataError: a list is missing or names an unknown model.
    """
    models: dict[str, str] = {}
    for number, (model, path) in enumerate(_rows(folder / "lists" / "enroll-core.lst", 2), 1):
        if model in models:
            raise DataError(f"line {number} of enroll-core.lst names the model {model} twice", cause="manifest")
        models[model] = f"{SITW}/{path}"
    speakers = {path: f"{SITW}-{model}" for model, path in models.items()}
    lines = []
    for model, path, key in _rows(folder / "keys" / "core-core.lst", 3):
        if model not in models or key not in ("tgt", "imp"):
            raise DataError(
                f"core-core.lst must have models of enroll-core.lst, files, and tgt or imp, but has {model} {path} {key}", cause="manifest"
            )
        lines.append(f"{int(key == 'tgt')} {models[model]} {SITW}/{path}\n")
        if key == "tgt":
            speakers[f"{SITW}/{path}"] = f"{SITW}-{model}"
        else:
            speakers.setdefault(f"{SITW}/{path}", cut_id(f"{SITW}/{path}"))
    return "".join(lines), speakers


def sitw_files(folder: Path, speakers: dict[str, str]) -> list[File]:
    """Recordings of SITW by the names of `sitw_trials`.

    Raises:
        DataError: one is not there.
    """
    found = []
    for name, speaker in speakers.items():
        path = folder / name.removeprefix(f"{SITW}/")
        if not path.is_file():
            raise DataError(f"the lists of SITW name {path.relative_to(folder)}, which {folder} does not hold", cause="missing_file")
        found.append(File(cut_id(name), path, speaker))
    return found


def _rows(path: Path, width: int) -> Iterator[list[str]]:
    if not path.is_file():
        raise DataError(f"{path} does not exist: `--sitw` must be the folder with lists/ and keys/, e.g. sitw_database.v4/eval", cause="missing_file")
    for line in path.read_text().splitlines():
        if line.strip():
            row = line.split()
            if len(row) != width:
                raise DataError(f"a line of {path} must have {width} words, but is {line[:80]!r}", cause="manifest")
            yield row


def read_meta(paths: Sequence[Path]) -> dict[str, dict[str, str]]:
    """Speaker -> gender (``female`` or ``male``) and nationality, as far as the csv files (commas or tabs, a header line) say.

    Raises:
        DataError: a file has no column of ids or of genders.
    """
    found: dict[str, dict[str, str]] = {}
    for path in paths:
        lines = path.read_text().splitlines()
        rows = list(csv.reader(lines, delimiter="\t" if "\t" in lines[0] else ","))
        header = [name.strip().lower() for name in rows[0]]
        number = next((i for i, name in enumerate(header) if "voxceleb" in name and "id" in name), None)
        if number is None or "gender" not in header:
            raise DataError(f"{path} must have a column of VoxCeleb ids and one named Gender, but has {', '.join(header)}", cause="manifest")
        for row in (list(map(str.strip, row)) for row in rows[1:] if row):
            about = {"gender": {"f": "female", "m": "male"}.get(row[header.index("gender")].lower(), "")}
            if "nationality" in header:
                about["nationality"] = row[header.index("nationality")]
            found[row[number]] = {key: value for key, value in about.items() if value}
    return found


def split_speakers(speakers: Iterable[str], num_valid: int, seed: int) -> set[str]:
    """The speakers of the valid split, drawn by a hash of their ids.

    Raises:
        DataError: there are not more speakers than that.
    """
    names = sorted(set(speakers), key=lambda name: seed_from(seed, "valid speakers", name))
    if num_valid >= len(names):
        raise DataError(f"`--valid-speakers` must be less than the {len(names)} speakers there are, but is {num_valid}")
    return set(names[:num_valid])


def make_cut(file: File, meta: dict[str, dict[str, str]], max_s: float | None) -> MonoCut:
    """The Lhotse cut of a recording, of its first `max_s` seconds if given."""
    about = meta.get(file.speaker, {})
    recording = Recording.from_file(file.path.resolve(), recording_id=file.id)
    seconds = recording.duration if max_s is None else min(max_s, recording.duration)
    custom = {key: value for key, value in about.items() if key != "gender"}
    supervision = SupervisionSegment(file.id, file.id, 0.0, seconds, speaker=file.speaker, gender=about.get("gender"), custom=custom or None)
    return MonoCut(file.id, 0.0, seconds, 0, supervisions=[supervision], recording=recording)


def write_cuts(path: Path, files: Sequence[File], meta: dict[str, dict[str, str]], max_s: float | None, threads: int) -> float:
    """Write a manifest; returns its seconds."""
    total, lines = 0.0, []
    with ThreadPoolExecutor(threads) as pool:
        for cut in track(pool.map(lambda file: make_cut(file, meta, max_s), files), path.name.split(".")[0], len(files), unit="recordings"):
            total += cut.duration
            lines.append(json.dumps(cut.to_dict(), ensure_ascii=False) + "\n")
    write_bytes(path, gzip.compress("".join(lines).encode(), mtime=0))
    return total


def prepare(options: argparse.Namespace) -> None:
    """Make the manifests and the lists."""
    lists = {name: options.lists / file for name, file in LISTS.items() if (options.lists / file).is_file()}
    if "vox1_o" not in lists:
        raise DataError(f"{options.lists} must hold {LISTS['vox1_o']}, but does not", cause="missing_file")
    train = find_files(options.vox2)
    config: dict[str, Any] = {key: getattr(options, key) for key in ("valid_speakers", "valid_per_speaker", "max_s", "seed")}
    inputs = {name: sha256_file(path) for name, path in {**lists, **{path.name: path for path in options.meta}}.items()}
    inputs["train"] = sha256_json([[file.id, file.path.stat().st_size] for file in train])
    if options.sitw:
        inputs[SITW] = sha256_file(options.sitw / "keys" / "core-core.lst")
    artifact = Artifact(options.out, kind="manifests of VoxCeleb", config=config, inputs=inputs)
    if artifact.is_done():
        return
    with artifact.making() as record:
        test = {file.id: file for path in lists.values() for file in listed_files(path, options.vox1)}
        for name, path in lists.items():
            write_text(options.out / "trials" / f"{name}.txt", path.read_text())
        if options.sitw:
            text, speakers = sitw_trials(options.sitw)
            write_text(options.out / "trials" / f"{SITW}.txt", text)
            test.update({file.id: file for file in sitw_files(options.sitw, speakers)})
        valid = split_speakers((file.speaker for file in train), options.valid_speakers, options.seed)
        first = sorted((file for file in train if file.speaker in valid), key=lambda file: seed_from(options.seed, file.id))
        heard: dict[str, list[File]] = {}
        for file in first:
            heard.setdefault(file.speaker, []).append(file)
        splits = {
            "train": ([file for file in train if file.speaker not in valid], options.max_s),
            "valid": (sorted(file for files in heard.values() for file in files[: options.valid_per_speaker]), options.max_s),
            "test": (sorted(test.values()), None),
        }
        meta = read_meta(options.meta)
        for split, (files, max_s) in splits.items():
            record.audio_s += write_cuts(options.out / f"cuts_{split}.jsonl.gz", files, meta, max_s, options.threads)
            record.counts[split] = len(files)


def main() -> int:
    """Run the command; returns the exit code."""
    parser = argparse.ArgumentParser(description="Manifests and lists of trials of VoxCeleb and SITW.")
    parser.add_argument("--vox2", type=Path, required=True, metavar="DIR", help="VoxCeleb2 dev: ID/VIDEO/FILE.wav")
    parser.add_argument("--vox1", type=Path, required=True, metavar="DIR", help="VoxCeleb1, dev and test in one folder: ID/VIDEO/FILE.wav")
    parser.add_argument("--lists", type=Path, required=True, metavar="DIR", help=f"holds {', '.join(LISTS.values())}; the last two may be missing")
    parser.add_argument("--sitw", type=Path, metavar="DIR", help="SITW's eval part, with audio/, lists/ and keys/")
    parser.add_argument("--meta", type=Path, nargs="*", default=[], metavar="CSV", help="vox1_meta.csv, vox2_meta.csv")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR")
    parser.add_argument("--max-s", type=float, default=16.0, help="longest training and valid cut in seconds")
    parser.add_argument("--valid-speakers", type=int, default=100, help="speakers of VoxCeleb2 kept for valid")
    parser.add_argument("--valid-per-speaker", type=int, default=20, help="recordings of each of them")
    parser.add_argument("--seed", type=int, default=20)
    parser.add_argument("--threads", type=int, default=16, help="files whose header is read at a time")
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO, stream=sys.stderr, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    try:
        prepare(options)
    except SpearError as error:
        print(f"prepare: error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
