"""Tasks of public benchmarks, written down once: which corpus, which labels, which splits, which published metric."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from spear.config import closest, load_config
from spear.data.corpora import CorpusConfig
from spear.errors import ConfigError
from spear.evaluation.tasks.base import TaskConfig

logger = logging.getLogger(__name__)
FOLDER = Path(__file__).parent


@dataclass(frozen=True, kw_only=True)
class SuiteTask:
    """One task of a suite."""

    task: TaskConfig
    """How it is scored here."""
    corpora: list[str] = field(default_factory=list)
    """Names its corpora must have in the corpora file; empty: any corpus of the task's domain."""
    splits: str = ""
    """The published splits, and what goes into train, valid and test."""
    labels: str = ""
    """Which field of a cut holds what the task reads."""
    published: str = ""
    """What the benchmark reports, and how that differs from what is done here."""


@dataclass(frozen=True, kw_only=True)
class Suite:
    """A suite, as its file says."""

    about: str
    """What it is, and its source."""
    tasks: dict[str, SuiteTask]
    """Name of the task -> what it needs."""


def names() -> list[str]:
    """The suites there are."""
    return sorted(path.stem for path in FOLDER.glob("*.yaml"))


def load_suite(name: str) -> Suite:
    """Read one.

    Raises:
        ConfigError: there is no such suite.
    """
    if name not in names():
        raise ConfigError(f"`--suite` must be one of {', '.join(names())}, but is {name!r}{closest(name, names())}")
    return load_config(Suite, FOLDER / f"{name}.yaml")


def tasks_of(name: str, corpora: Sequence[CorpusConfig]) -> dict[str, TaskConfig]:
    """The tasks of a suite that the corpora of a run allow; the others are named in the log.

    Raises:
        ConfigError: there is no such suite, or the corpora allow none of its tasks.
    """
    suite, found = load_suite(name), {}
    known, domains = {corpus.name for corpus in corpora}, {corpus.domain for corpus in corpora}
    for task, about in suite.tasks.items():
        missing = [corpus for corpus in about.corpora if corpus not in known]
        if missing:
            logger.info("suite %s: %s is left out, as there is no corpus %s", name, task, ", ".join(missing))
        elif not about.corpora and about.task.domain is not None and about.task.domain not in domains:
            logger.info("suite %s: %s is left out, as no corpus has the domain %s", name, task, about.task.domain)
        else:
            found[task] = about.task
    if not found:
        wanted = sorted({corpus for about in suite.tasks.values() for corpus in about.corpora})
        rule = f"names corpora of the suite ({', '.join(wanted)})" if wanted else "has the suite's domains"
        raise ConfigError(f"`--suite` {name} has no task for this run: a corpora file {rule}, but this one has {', '.join(sorted(known))}")
    return found
