"""Tagged sounds to Lhotse cuts: the published layouts of AudioSet, VGGSound, FSD50K, ESC-50, MTG-Jamendo and Music4All, and lists of Freesound.

    python local/prepare_tagged.py audioset --root downloads/audioset --out data/corpus/audioset

Every cut is a whole file with one supervision, whose custom field ``label`` is the tags joined by ``;``. Files that a list names and the folder
lacks are counted, as many clips of AudioSet and VGGSound are gone. Splits are the set's own: where it has no valid split, a share of the training
files is, chosen by a hash of their id, and where it has no splits at all, another such share is test.
"""

from __future__ import annotations

import argparse
import csv
import logging
import os
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import NamedTuple

from lhotse import CutSet, SupervisionSegment
from lhotse.cut import Cut, MonoCut

from spear.data.audio import open_recording
from spear.errors import DataError, SpearError
from spear.files import seed_from

logger = logging.getLogger("prepare_tagged")
SUFFIXES = (".flac", ".wav", ".ogg", ".mp3")
CHUNK = 4096


class Clip(NamedTuple):
    """A row of a list: id, where its file may lie (without suffix), tags, and its split; None where the set has no splits."""

    id: str
    places: tuple[Path, ...]
    labels: list[str]
    split: str | None


def audioset(root: Path) -> Iterator[Clip]:
    """``*_train_segments.csv`` and ``eval_segments.csv``, files below a folder named like the list, or in ``audio``: ID or YID.

    The unbalanced list repeats nothing of the balanced one.
    """
    found = sorted(root.glob("*_segments.csv"))
    for path in found:
        for row in csv.reader((line for line in path.open() if not line.startswith("#")), skipinitialspace=True):
            name, folder = row[0], path.stem.removesuffix("_segments")
            places = tuple(root / where / f"{prefix}{name}" for where in (folder, f"{folder}_segments", "audio") for prefix in ("", "Y"))
            yield Clip(name, places, row[3].split(","), "test" if path.stem.startswith("eval") else "train")


def vggsound(root: Path) -> Iterator[Clip]:
    """``vggsound.csv`` (id, start, tag, split) and ``audio/ID_000030.wav``."""
    for name, start, label, split in csv.reader((root / "vggsound.csv").open()):
        clip = f"{name}_{int(start):06d}"
        yield Clip(clip, (root / "audio" / clip, root / split / clip, root / clip), [label], split)


def fsd50k(root: Path) -> Iterator[Clip]:
    """``FSD50K.ground_truth/dev.csv`` and ``eval.csv``, files in ``FSD50K.dev_audio`` and ``FSD50K.eval_audio``."""
    for part, split in (("dev", "train"), ("eval", "test")):
        with (root / "FSD50K.ground_truth" / f"{part}.csv").open() as file:
            for row in csv.DictReader(file):
                yield Clip(row["fname"], (root / f"FSD50K.{part}_audio" / row["fname"],), row["labels"].split(","), split)


def esc50(root: Path) -> Iterator[Clip]:
    """``meta/esc50.csv`` and ``audio``: of the five folds the last is test and the one before it valid."""
    with (root / "meta" / "esc50.csv").open() as file:
        for row in csv.DictReader(file):
            name, split = Path(row["filename"]).stem, {"4": "valid", "5": "test"}.get(row["fold"], "train")
            yield Clip(name, (root / "audio" / name,), [row["category"]], split)


def mtg_jamendo(root: Path) -> Iterator[Clip]:
    """``data/splits/split-0/autotagging-{train,validation,test}.tsv``, files ``audio/14/214.mp3`` or ``214.low.mp3``; tags are the last columns."""
    for part, split in (("train", "train"), ("validation", "valid"), ("test", "test")):
        with (root / "data" / "splits" / "split-0" / f"autotagging-{part}.tsv").open() as file:
            for track, _, _, path, _, *tags in islice(csv.reader(file, delimiter="\t"), 1, None):
                place = root / "audio" / path.removesuffix(".mp3")
                yield Clip(track, (place, place.with_name(f"{place.name}.low")), tags, split)


def music4all(root: Path) -> Iterator[Clip]:
    """``id_genres.csv`` (id, genres with commas, tabs between) and ``audios``; there are no splits."""
    with (root / "id_genres.csv").open() as file:
        for row in csv.DictReader(file, delimiter="\t"):
            yield Clip(row["id"], (root / "audios" / row["id"],), row["genres"].split(","), None)


def freesound(root: Path) -> Iterator[Clip]:
    """``freesound.csv`` (id, tags with blanks) and ``audio/ID``, as a download by a list of ids leaves them; there are no splits."""
    with (root / "freesound.csv").open() as file:
        for row in csv.DictReader(file):
            yield Clip(row["id"], (root / "audio" / row["id"],), (row.get("tags") or "").split(), None)


LAYOUTS: dict[str, Callable[[Path], Iterator[Clip]]] = {
    "audioset": audioset,
    "vggsound": vggsound,
    "fsd50k": fsd50k,
    "esc50": esc50,
    "mtg_jamendo": mtg_jamendo,
    "music4all": music4all,
    "freesound": freesound,
}
OWN_VALID = ("esc50", "mtg_jamendo")


def find(clip: Clip) -> Path | None:
    """The file of a clip."""
    return next((path for place in clip.places for suffix in SUFFIXES if (path := place.with_name(place.name + suffix)).is_file()), None)


def make_cut(clip: Clip) -> Cut | None:
    """The cut of a clip, None where its file is missing or cannot be read."""
    path = find(clip)
    if path is None:
        return None
    try:
        recording = open_recording(path, clip.id)
    except DataError as error:
        logger.warning("%s", error)
        return None
    cut = recording.to_cut()
    cut.id = clip.id
    channel = 0 if isinstance(cut, MonoCut) else recording.channel_ids
    label = ";".join(sorted({name.strip() for name in clip.labels}))
    cut.supervisions = [SupervisionSegment(clip.id, clip.id, 0.0, recording.duration, channel=channel, custom={"label": label})]
    return cut


def split_of(clip: Clip, held_share: float) -> str:
    """Where a clip goes: its own split, or by a hash of its id."""
    place = seed_from("valid", clip.id) / 2**63
    if clip.split is None:
        return "valid" if place < held_share else "test" if place < 2 * held_share else "train"
    return "valid" if clip.split == "train" and place < held_share else clip.split


def prepare(layout: str, root: Path, out: Path, valid_share: float) -> dict[str, int]:
    """Write ``cuts_{train,valid,test}.jsonl.gz``, each at once when all are whole; returns cuts per split, and clips without a readable file as
    ``missing``.

    Raises:
        DataError: a split has no cut.
    """
    out.mkdir(parents=True, exist_ok=True)
    counts = {"train": 0, "valid": 0, "test": 0, "missing": 0}
    seen: set[int] = set()
    clips = LAYOUTS[layout](root.resolve())
    unfinished = {split: out / f".cuts_{split}.jsonl.gz" for split in ("train", "valid", "test")}
    writers = {split: CutSet.open_writer(path, overwrite=True) for split, path in unfinished.items()}
    with ThreadPoolExecutor(8) as pool:
        while chunk := list(islice(clips, CHUNK)):
            for clip, cut in zip(chunk, pool.map(make_cut, chunk)):
                key = seed_from(clip.id)
                if cut is None or key in seen:
                    counts["missing"] += cut is None
                    continue
                seen.add(key)
                split = split_of(clip, 0.0 if layout in OWN_VALID else valid_share)
                writers[split].write(cut)
                counts[split] += 1
    for split, writer in writers.items():
        writer.close()
        if counts[split]:
            os.replace(unfinished[split], out / f"cuts_{split}.jsonl.gz")
    for split, path in unfinished.items():
        if not counts[split]:
            path.unlink(missing_ok=True)
            raise DataError(f"{root} gives no cut for the split {split} ({counts['missing']} files of the lists are missing)", cause="empty")
    return counts


def main() -> int:
    """Read the options and prepare one set."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("layout", choices=sorted(LAYOUTS))
    parser.add_argument("--root", type=Path, required=True, help="folder of the set as its authors lay it out")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--valid-share", type=float, default=0.01, help="of the training files (default: 0.01)")
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        counts = prepare(options.layout, options.root, options.out, options.valid_share)
    except (SpearError, OSError) as error:
        sys.stderr.write(f"error: {error}\n")
        return 1
    logger.info("%s: %s", options.layout, ", ".join(f"{number} {name}" for name, number in counts.items()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
