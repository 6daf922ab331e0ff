"""Speech to Lhotse cuts: LibriSpeech through Lhotse's own recipe, Libriheavy from its published manifests, others from those of `lhotse prepare`.

    python local/prepare_speech.py librispeech --root downloads/LibriSpeech --out data/corpus/librispeech
    python local/prepare_speech.py libriheavy --root downloads/libriheavy --audio downloads --out data/corpus/libriheavy
    python local/prepare_speech.py manifests --out data/corpus/gigaspeech --train RECORDINGS SUPERVISIONS --valid RECORDINGS SUPERVISIONS

Train, valid and test are the set's own parts, for ``manifests`` those that are given. ``--alignments`` is a folder of LibriSpeech alignments as
Lhotse reads them, or the folder above it; the task on words needs it.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

from lhotse import CutSet, Recording, RecordingSet, SupervisionSet
from lhotse.cut import Cut

from spear.data.corpora import SPLITS
from spear.errors import DataError, SpearError

logger = logging.getLogger("prepare_speech")
Options = argparse.Namespace
LIBRISPEECH = {
    "train": ("train-clean-100", "train-clean-360", "train-other-500"),
    "valid": ("dev-clean", "dev-other"),
    "test": ("test-clean", "test-other"),
}
LIBRIHEAVY = {"train": ("small", "medium", "large"), "valid": ("dev",), "test": ("test_clean", "test_other")}


def librispeech(options: Options, split: str) -> Iterator[Cut]:
    """Cuts of the parts that are there.

    Raises:
        DataError: a folder of alignments is given that holds none of these parts.
    """
    from lhotse.recipes import prepare_librispeech

    root = options.root.resolve()
    parts = [part for part in LIBRISPEECH[split] if (root / part).is_dir()]
    if not parts:
        return
    alignments = find_alignments(options.alignments) if options.alignments is not None else None
    found = prepare_librispeech(root, alignments_dir=alignments, dataset_parts=parts, num_jobs=options.jobs)
    for part in parts:
        yield from CutSet.from_manifests(recordings=found[part]["recordings"], supervisions=found[part]["supervisions"]).trim_to_supervisions()


def find_alignments(folder: Path) -> Path:
    """The folder whose parts (``dev-clean``, ...) hold ``*.alignment.txt``: the one given, or ``LibriSpeech`` in it.

    Raises:
        DataError: neither does.
    """
    for place in (folder, folder / "LibriSpeech"):
        for part in (part for parts in LIBRISPEECH.values() for part in parts):
            if next((place / part).rglob("*.alignment.txt"), None) is not None:
                return place.resolve()
    raise DataError(
        f"{folder} holds no alignment: PART/SPEAKER/CHAPTER/*.alignment.txt is looked for in it and in its folder LibriSpeech", cause="empty"
    )


def libriheavy(options: Options, split: str) -> Iterator[Cut]:
    """Cuts of ``libriheavy_cuts_PART.jsonl.gz``, whose audio paths start from ``--audio``, the folder that holds Libri-Light."""
    audio = options.audio or Path("downloads")
    for part in LIBRIHEAVY[split]:
        path = options.root / f"libriheavy_cuts_{part}.jsonl.gz"
        if not path.exists():
            continue
        for cut in CutSet.from_jsonl_lazy(path):
            for source in cut.recording.sources:
                source.source = str((audio / str(source.source).removeprefix("download/")).resolve())
            yield cut


def manifests(options: Options, split: str) -> Iterator[Cut]:
    """A cut for every supervision, with its id; relative audio paths start from ``--audio``, by default the current folder.

    Recordings are held in memory, supervisions are not.

    Raises:
        DataError: a recording is missing, or the audio of the first one is.
    """
    first = True
    for recordings, supervisions in getattr(options, split) or ():
        known = {recording.id: recording for recording in RecordingSet.from_jsonl_lazy(recordings)}
        for recording in known.values():
            _resolve(recording, options.audio or Path())
        for supervision in SupervisionSet.from_jsonl_lazy(supervisions):
            recording = known.get(supervision.recording_id)
            if recording is None:
                raise DataError(f"{recordings} lacks the recording {supervision.recording_id} that {supervisions} names", cause="manifest")
            if first and not all(Path(source.source).exists() for source in recording.sources if source.type == "file"):
                raise DataError(f"{recording.sources[0].source} does not exist: relative paths in {recordings} start from --audio", cause="missing")
            first = False
            whole = recording.to_cut()
            whole.supervisions = [supervision]
            (cut,) = whole.trim_to_supervisions(keep_overlapping=False)
            yield cut.with_id(supervision.id)


def _resolve(recording: Recording, folder: Path) -> None:
    for source in recording.sources:
        if source.type == "file":
            source.source = str((folder / str(source.source)).resolve())


SETS: dict[str, Callable[[Options, str], Iterator[Cut]]] = {"librispeech": librispeech, "libriheavy": libriheavy, "manifests": manifests}


def prepare(options: Options) -> dict[str, int]:
    """Write ``cuts_{train,valid,test}.jsonl.gz``, each at once when it is whole; returns cuts per split.

    Raises:
        DataError: a split has no cut.
    """
    options.out.mkdir(parents=True, exist_ok=True)
    counts: dict[str, int] = {}
    for split in SPLITS:
        if options.set == "manifests" and not getattr(options, split):
            continue
        counts[split] = 0
        unfinished = options.out / f".cuts_{split}.jsonl.gz"
        try:
            with CutSet.open_writer(unfinished, overwrite=True) as writer:
                for cut in SETS[options.set](options, split):
                    writer.write(cut)
                    counts[split] += 1
            if not counts[split]:
                raise DataError(f"{options.root or getattr(options, split)[0][1]} gives no cut for the split {split}", cause="empty")
            os.replace(unfinished, options.out / f"cuts_{split}.jsonl.gz")
        finally:
            unfinished.unlink(missing_ok=True)
    return counts


def main() -> int:
    """Read the options and prepare one set."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("set", choices=sorted(SETS))
    parser.add_argument("--root", type=Path, help="LibriSpeech: the folder with its parts; Libriheavy: that of its manifests")
    parser.add_argument(
        "--audio", type=Path, help="Libriheavy: folder with librilight in it (default: downloads); manifests: where relative paths start"
    )
    parser.add_argument("--alignments", type=Path, help="LibriSpeech: folder of alignments")
    for split in SPLITS:
        text = f"manifests: a pair of files for the split {split}; repeatable"
        parser.add_argument(f"--{split}", nargs=2, action="append", metavar=("RECORDINGS", "SUPERVISIONS"), help=text)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--jobs", type=int, default=4)
    options = parser.parse_args()
    if options.set == "manifests":
        if not options.train:
            parser.error("manifests needs --train RECORDINGS SUPERVISIONS")
    elif options.root is None:
        parser.error(f"{options.set} needs --root")
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        counts = prepare(options)
    except (SpearError, OSError) as error:
        sys.stderr.write(f"error: {error}\n")
        return 1
    logger.info("%s: %s", options.set, ", ".join(f"{number} {name}" for name, number in counts.items()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
