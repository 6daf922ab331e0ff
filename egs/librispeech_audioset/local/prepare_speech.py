"""Read speech to Lhotse cuts: LibriSpeech through Lhotse's own recipe, Libriheavy from its published manifests.

    python local/prepare_speech.py librispeech --root downloads/LibriSpeech --out data/corpus/librispeech
    python local/prepare_speech.py libriheavy --root downloads/libriheavy --audio downloads --out data/corpus/libriheavy

Train, valid and test are the set's own parts. ``--alignments`` is a folder of LibriSpeech alignments as Lhotse reads them; the tasks on phones and
words need it.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

from lhotse import CutSet
from lhotse.cut import Cut

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
    """Cuts of the parts that are there."""
    from lhotse.recipes import prepare_librispeech

    parts = [part for part in LIBRISPEECH[split] if (options.root / part).is_dir()]
    if not parts:
        return
    found = prepare_librispeech(options.root, alignments_dir=options.alignments, dataset_parts=parts, num_jobs=options.jobs)
    for part in parts:
        yield from CutSet.from_manifests(recordings=found[part]["recordings"], supervisions=found[part]["supervisions"]).trim_to_supervisions()


def libriheavy(options: Options, split: str) -> Iterator[Cut]:
    """Cuts of ``libriheavy_cuts_PART.jsonl.gz``, whose audio paths start from ``--audio``, the folder that holds Libri-Light."""
    for part in LIBRIHEAVY[split]:
        path = options.root / f"libriheavy_cuts_{part}.jsonl.gz"
        if not path.exists():
            continue
        for cut in CutSet.from_jsonl_lazy(path):
            for source in cut.recording.sources:
                name = str(source.source)
                source.source = os.path.abspath(options.audio / name.removeprefix("download/"))
            yield cut


SETS: dict[str, Callable[[Options, str], Iterator[Cut]]] = {"librispeech": librispeech, "libriheavy": libriheavy}


def prepare(options: Options) -> dict[str, int]:
    """Write ``cuts_{train,valid,test}.jsonl.gz``; returns cuts per split.

    Raises:
        DataError: a split has no cut.
    """
    options.out.mkdir(parents=True, exist_ok=True)
    counts = {"train": 0, "valid": 0, "test": 0}
    for split in counts:
        with CutSet.open_writer(options.out / f"cuts_{split}.jsonl.gz", overwrite=True) as writer:
            for cut in SETS[options.set](options, split):
                writer.write(cut)
                counts[split] += 1
        if not counts[split]:
            raise DataError(f"{options.root} gives no cut for the split {split}", cause="empty")
    return counts


def main() -> int:
    """Read the options and prepare one set."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("set", choices=sorted(SETS))
    parser.add_argument("--root", type=Path, required=True, help="LibriSpeech: the folder with its parts; Libriheavy: that of its manifests")
    parser.add_argument("--audio", type=Path, default=Path("downloads"), help="Libriheavy: folder with librilight in it")
    parser.add_argument("--alignments", type=Path, help="LibriSpeech: folder of alignments")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--jobs", type=int, default=4)
    options = parser.parse_args()
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
