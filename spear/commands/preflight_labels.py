"""Which splits of which corpora have the labels that the tasks of the evaluation read: a part of ``spear preflight``."""

from __future__ import annotations

import itertools
from collections.abc import Callable

from spear.data.corpora import SPLITS, CorpusConfig
from spear.data.scan import Entry
from spear.errors import DataError, SpearError
from spear.recipe import Run
from spear.stages.evaluate import corpora_of

LOOK_AT, THEN_EVERY = 5000, 100
"""Labelled cuts of a split that are read in search of a task's labels, and afterwards one of how many."""


class LabelCheck:
    """Looks for one cut with every task's labels in every split."""

    def __init__(self, run: Run) -> None:
        self.run, self.tasks = run, run.recipe.evaluation.build(run.recipe.seed)
        self.splits: dict[str, list[str]] = {}
        """Of every corpus that was read to its end; what another one lacks is not known."""
        self.labelled: set[tuple[str, str, str]] = set()

    def looker(self, corpus: CorpusConfig, split: str) -> Callable[[Entry], None]:
        """What takes note of the entries of a split."""
        wanted = {name for name in self.tasks if self._reads(name, corpus)}
        seen = 0

        def look(entry: Entry) -> None:
            nonlocal seen
            if not wanted or not entry.labelled:
                return
            seen += 1
            if seen > LOOK_AT and seen % THEN_EVERY:
                return
            cut = entry.load().cut
            for name in [name for name in wanted if cut is not None and self.tasks[name].wants(cut)]:
                self.labelled.add((name, corpus.name, split))
                wanted.discard(name)

        return look

    def _reads(self, name: str, corpus: CorpusConfig) -> bool:
        try:
            return corpus in corpora_of(name, self.run.recipe.evaluation.tasks[name], self.run.corpora)
        except SpearError:
            return False  # `require` says so

    def require(self, name: str) -> None:
        """Check a task once all cuts were seen.

        Raises:
            ConfigError: it names a corpus or domain that the run lacks.
            DataError: a corpus of the task lacks a split, or no cut of a split has the task's labels.
        """
        corpora = corpora_of(name, self.run.recipe.evaluation.tasks[name], self.run.corpora)
        if any(corpus.name not in self.splits for corpus in corpora):
            return
        for corpus, split in itertools.product(corpora, SPLITS):
            if split not in self.splits[corpus.name]:
                raise DataError(f"task `{name}` reads the {split} split, which the corpus {corpus.name} lacks", cause="manifest")
        for split in SPLITS:
            if not any((name, corpus.name, split) in self.labelled for corpus in corpora):
                where = ", ".join(corpus.name for corpus in corpora)
                raise DataError(f"task `{name}` finds no labelled cut in the {split} split of {where} ({self.tasks[name].needs()})")
