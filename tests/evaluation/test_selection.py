"""Cuts that are kept while corpora are read: the tasks choose the same of them as of all, and few are in memory."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from lhotse import MonoCut

from spear.errors import DataError
from spear.evaluation.collect import Plan
from spear.evaluation.selection import keep_cuts
from spear.evaluation.tasks.abx import AbxConfig
from spear.evaluation.tasks.base import SPLITS, Settings, Split, Task, TaskConfig
from spear.evaluation.tasks.ctc import CtcConfig
from spear.evaluation.tasks.frames import FramesConfig
from spear.evaluation.tasks.leakage import LeakageConfig
from spear.evaluation.tasks.profiling import ProfilingConfig
from spear.evaluation.tasks.speaker_count import SpeakerCountConfig
from spear.evaluation.tasks.units import UnitsConfig
from spear.evaluation.tasks.utterances import UtterancesConfig
from spear.evaluation.tasks.verification import VerificationConfig
from tests.evaluation.cuts import make_cut

SETTINGS = Settings(seed=3)
CORPORA = ("one", "two")
SIZES: dict[Split, int] = {"train": 300, "valid": 120, "test": 120}


def read(corpus: str, split: Split) -> Iterator[Any]:
    """Cuts of a made manifest: some without labels, some speakers of train in the other splits, durations of one to three seconds."""
    rng = np.random.default_rng([CORPORA.index(corpus), SPLITS.index(split)])
    for i in range(SIZES[split]):
        voice = int(rng.integers(12))
        speaker = None if i % 11 == 0 else f"{corpus}{voice}" if voice < 3 else f"{corpus}-{split}{voice}"
        duration = round(float(rng.uniform(1, 3)), 3)
        tiers = {"phone": [("x", 0.0, 0.37), ("y", 0.37, 0.41)]} if i % 7 else None
        yield make_cut(f"{corpus}-{split}-{i}", duration=duration, speaker=speaker, label=f"e{i % 3}" if i % 5 else None, tiers=tiers)


CONFIGS: dict[str, TaskConfig] = {
    "all": UtterancesConfig(),
    "some": UtterancesConfig(max_cuts=17),
    "exactly all": FramesConfig(max_cuts=10_000),
    "frames": FramesConfig(max_cuts=23),
    "abx": AbxConfig(max_seconds=40.0),
    "abx units": AbxConfig(max_seconds=40.0, max_cuts=30, num_units=4),
    "ctc": CtcConfig(max_seconds=31.0, max_cuts=9),
    "ctc whole": CtcConfig(max_seconds=1e6),
    "units": UnitsConfig(max_seconds=0.5),
    "leakage": LeakageConfig(max_cuts=40),
    "leakage of train": LeakageConfig(split="train"),
    "voices": VerificationConfig(max_cuts=19),
    "voices known": VerificationConfig(max_cuts=19, held_out=False),
    "count": SpeakerCountConfig(max_cuts=25),
    "age": ProfilingConfig(label="label", max_cuts=21),
    "age known": ProfilingConfig(label="label", max_cuts=21, held_out=False),
}


def build(config: TaskConfig) -> Task:
    return config.build("task", SETTINGS)


def all_cuts() -> dict[Split, list[Any]]:
    return {split: [cut for corpus in CORPORA for cut in read(corpus, split)] for split in SPLITS}


def ids(chosen: dict[Split, list[Any]]) -> dict[str, list[str]]:
    return {split: [cut.id for cut in found] for split, found in chosen.items()}


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())
def test_tasks_choose_the_same_of_the_kept_cuts_in_the_same_order(config: TaskConfig) -> None:
    whole, task = build(config), build(config)
    expected = whole.select(all_cuts())
    chosen = task.select(keep_cuts({"task": task}, {corpus: ["task"] for corpus in CORPORA}, read)["task"])
    assert ids(chosen) == ids(expected)
    assert getattr(task, "_known", None) == getattr(whole, "_known", None)


def test_listed_trials_keep_their_cuts(tmp_path: Path) -> None:
    (tmp_path / "list.txt").write_text("1 one-test-4 two-test-9\n0 one-test-4 two-test-3\n")
    config = VerificationConfig(trials=str(tmp_path / "list.txt"), max_cuts=2, held_out=False)
    whole, task = build(config), build(config)
    kept = keep_cuts({"task": task}, {corpus: ["task"] for corpus in CORPORA}, read)["task"]
    assert len(kept["test"]) == 3
    assert ids(task.select(kept)) == ids(whole.select(all_cuts()))


def test_profiling_names_held_out_of_kept_cuts_too() -> None:
    cuts: dict[Split, list[Any]] = {split: [make_cut(f"{split}{i}", speaker=f"s{i % 2}", label="a") for i in range(4)] for split in SPLITS}
    task = build(ProfilingConfig(label="label"))
    kept = keep_cuts({"task": task}, {"one": ["task"]}, lambda _, split: cuts[split])["task"]
    assert kept["valid"] == []
    with pytest.raises(DataError, match="every labelled speaker of the valid split is in the train split, too"):
        task.select(kept)


def test_tasks_share_cuts_and_every_manifest_is_read_once() -> None:
    tasks = {name: config.build(name, SETTINGS) for name, config in CONFIGS.items() if not name.startswith(("leakage", "abx"))}
    reads: list[tuple[str, str]] = []

    def counted(corpus: str, split: Split) -> Iterator[Any]:
        reads.append((corpus, split))
        return read(corpus, split)

    kept = keep_cuts(tasks, {corpus: list(tasks) for corpus in CORPORA}, counted)
    assert sorted(reads) == sorted((corpus, split) for corpus in CORPORA for split in SPLITS)
    again = {name: config.build(name, SETTINGS) for name, config in CONFIGS.items() if name in tasks}
    expected = Plan.make(again, dict.fromkeys(again, all_cuts()), batch_s=20.0)
    plan = Plan.make(tasks, kept, batch_s=20.0)  # DataError where two objects have one id
    assert plan.users == expected.users
    assert {split: [[cut.id for cut in batch] for batch in found] for split, found in plan.batches.items()} == {
        split: [[cut.id for cut in batch] for batch in found] for split, found in expected.batches.items()
    }


def test_corpora_keep_their_order_and_their_tasks() -> None:
    tasks = {"second": UtterancesConfig().build("second", SETTINGS), "both": UtterancesConfig().build("both", SETTINGS)}
    kept = keep_cuts(tasks, {"one": ["both"], "two": ["second", "both"]}, read)
    assert {cut.id.split("-")[0] for cut in kept["second"]["train"]} == {"two"}
    assert [cut.id for cut in kept["both"]["train"]] == [cut.id for cut in all_cuts()["train"] if tasks["both"].wants(cut)]


def test_few_cuts_are_in_memory_at_once() -> None:
    alive: weakref.WeakSet[Watched] = weakref.WeakSet()
    peak = 0

    def watched(_: str, split: Split) -> Iterator[Any]:
        nonlocal peak
        for i in range(2000):
            cut = make_cut(f"{split}-{i}", speaker=f"{split}{i % 40}", label="ab"[i % 2], tiers={"phone": [("x", 0.0, 0.5)]})
            shown = Watched(**{name: getattr(cut, name) for name in ("id", "start", "duration", "channel", "supervisions")})
            del cut
            alive.add(shown)
            peak = max(peak, len(alive))
            yield shown
            del shown

    configs = {name: replace(config, max_cuts=10) for name, config in CONFIGS.items()}
    tasks = {name: config.build(name, SETTINGS) for name, config in configs.items()}
    gc.collect()
    kept = keep_cuts(tasks, {"one": list(tasks)}, watched)
    assert sum(len(found) for splits in kept.values() for found in splits.values()) > 100
    assert peak <= len(SPLITS) * len(tasks) * 12


class Watched(MonoCut):
    """A cut that can be counted while it lives."""

    __hash__ = object.__hash__
