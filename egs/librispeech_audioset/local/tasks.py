"""Fit a recipe's evaluation to the corpora: print the overrides, one word a line, that `spear evaluate` needs on this road.

    python local/tasks.py RECIPE CORPORA DATA [a.b=c ...]

A task without `corpora` is restricted to LibriSpeech or AudioSet where the corpora file has it: other sets share speakers with it or name their
classes differently. A task on an alignment tier that the manifests of its corpora do not have is left out, with a line that says so.
"""

from __future__ import annotations

import gzip
import json
import logging
import sys
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

from spear.data.corpora import SPLITS
from spear.errors import SpearError
from spear.recipe import Run, load_run
from spear.stages.manifests import manifest_path

logger = logging.getLogger("tasks")
HOMES = {"speech": "librispeech", "audio": "audioset"}
LOOK_AT = 5000
"""Cuts of a manifest that are read in search of a tier."""


def has_tier(data: Path, corpora: list[str], split: str, tier: str) -> bool:
    """Whether one of the first cuts of the corpora has an alignment of that name."""
    for path in (manifest_path(data, corpus, split) for corpus in corpora):
        if not path.exists():
            continue
        with gzip.open(path, "rt") as lines:
            for line in islice(lines, LOOK_AT):
                if any((supervision.get("alignment") or {}).get(tier) for supervision in json.loads(line).get("supervisions", [])):
                    return True
    return False


def overrides_of(run: Run) -> Iterator[str]:
    """``key=value`` of every task that has to be changed."""
    domains = {corpus.name: corpus.domain for corpus in run.corpora}
    for name, task in run.recipe.evaluation.tasks.items():
        home = HOMES.get(task.domain or "", "")
        chosen = task.corpora or ([home] if domains.get(home) == task.domain else [])
        read = chosen or [corpus for corpus, domain in domains.items() if task.domain in (None, domain)]
        tier = getattr(task, "tier", None)
        lacking = [split for split in SPLITS if tier is not None and not has_tier(run.data, read, split, tier)]
        if lacking:
            where = f"{', '.join(read) or 'any corpus'} ({', '.join(lacking)})"
            logger.info("task %s is left out: no alignment of the tier `%s` in %s", name, tier, where)
            yield f"evaluation.tasks.{name}=null"
        elif chosen != task.corpora:
            yield f"evaluation.tasks.{name}.corpora=[{home}]"


def main() -> int:
    """Run the command; returns the exit code."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    recipe, corpora, data, *overrides = sys.argv[1:]
    try:
        for override in overrides_of(load_run(Path(recipe), Path(corpora), Path(data), Path(data), overrides)):
            sys.stdout.write(f"--set\n{override}\n")
    except (SpearError, OSError) as error:
        sys.stderr.write(f"error: {error}\n")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
