"""Scores of several models on several tasks, one small file per pair, so that a stopped evaluation goes on where it was."""

from __future__ import annotations

import logging
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch

from spear.evaluation.collect import LoadAudio, Plan
from spear.evaluation.embedders import Embedder
from spear.files import make_folder, read_json, write_json

logger = logging.getLogger(__name__)
PARTIAL, SCRATCH = "partial", ".scratch-"
SIZE = "model-size.json"
SPEED = "speed"

Scores = dict[str, dict[str, dict[str, Any]]]
"""task -> model -> {metric, value, std, ci, layer, by_layer, ...} (see `spear.evaluation.tasks.base.Score`)."""


class Model(NamedTuple):
    """A model to score: its file-safe name, and how to make its embedder when it is needed."""

    name: str
    make: Callable[[], Embedder]
    codes: bool = False
    """Whether it gives tokens themselves, which only some tasks judge."""


def score_models(models: list[Model], plan: Plan, domains: Mapping[str, str], load: LoadAudio, folder: Path) -> Scores:
    """Score every model on every task of the plan; pairs found in ``folder/partial`` are not scored again.

    Args:
        models: in the order of the report. plan: tasks, their cuts and batches. domains: task -> domain it stands for.
        load: reads a cut. folder: of the evaluation.
    Returns:
        task -> model -> score, also when all came from files.
    """
    for leftover in (folder / PARTIAL).rglob(".*.tmp"):  # of a killed run
        leftover.unlink()
    for unused in folder.glob(f"{SCRATCH}*"):
        shutil.rmtree(unused)
    for model in models:
        missing = [task for task in judged(plan, model) if not _path(folder, model.name, task).exists()]
        if not missing:
            continue
        embedder = model.make()
        with tempfile.TemporaryDirectory(prefix=SCRATCH, dir=make_folder(folder)) as scratch:
            features = plan.embed(embedder, missing, load, Path(scratch))

            def judge(task: str, embedder: Embedder = embedder, features: dict[str, Any] = features, model: Model = model) -> None:
                score = plan.tasks[task].score(features.pop(task), embedder.layer_names)
                section = plan.tasks[task].section
                record = {**score.to_json(), "kind": embedder.kind, "label": embedder.label, "domain": domains[task], "section": section}
                write_json(_path(folder, model.name, task), record)
                logger.info("evaluate: %s on %s: %s %.4f (%s)", embedder.label, task, score.metric, score.value, score.layer)

            # before the scores: a killed run does not come back to a model that has all of them
            audio_s, wall_s = plan.heard[embedder.name]
            write_json(folder / SPEED / f"{model.name}.json", {"audio_s": round(audio_s, 3), "wall_s": round(wall_s, 3)})
            write_json(folder / PARTIAL / model.name / SIZE, {"label": embedder.label, "kind": embedder.kind, "parameters": embedder.num_parameters})
            side_by_side(judge, missing)
    return {
        task: {
            model.name: {**read_json(_path(folder, model.name, task)), "order": [i, j]}
            for j, model in enumerate(models)
            if task in judged(plan, model)
        }
        for i, task in enumerate(plan.tasks)
    }


def judged(plan: Plan, model: Model) -> list[str]:
    """Names of the tasks that judge a model."""
    return [name for name, task in plan.tasks.items() if task.codes or not model.codes]


def side_by_side(work: Callable[[str], None], names: Sequence[str]) -> None:
    """Call `work` with every name, each call on one thread, as many at a time as torch has threads.

    Raises:
        Exception: the first that a call ends in; calls that have not begun are then left out.
    """
    threads = torch.get_num_threads()
    with one_thread(), ThreadPoolExecutor(min(threads, len(names))) as pool:
        running = [pool.submit(work, name) for name in names]
        try:
            for call in running:
                call.result()
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


@contextmanager
def one_thread() -> Iterator[None]:
    """Run torch on one CPU thread: probes are too small to share out, and their sums stay in one order on every machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def ordered(scores: Scores) -> Scores:
    """Tasks and models in the order of the recipe, which the sorted keys of a JSON file lose but ``order`` keeps."""

    def place(record: Mapping[str, Any]) -> list[int]:
        return list(record.get("order", [0, 0]))

    models = {task: dict(sorted(found.items(), key=lambda item: place(item[1]))) for task, found in scores.items()}
    return dict(sorted(models.items(), key=lambda item: min((place(record) for record in item[1].values()), default=[0, 0])))


def _path(folder: Path, model: str, task: str) -> Path:
    return folder / PARTIAL / model / f"{task}.json"
