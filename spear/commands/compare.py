"""``spear compare``: the tokenizers of several recipes on the same audio, in one table and one plot."""

from __future__ import annotations

import argparse
import heapq
import itertools
import logging
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from spear.config import to_json
from spear.data.audio import load_audio
from spear.errors import ConfigError, DataError
from spear.evaluation.compare import compare, write_comparison
from spear.evaluation.perturb import CHANGES, SAME_LENGTH
from spear.evaluation.robustness import frame_shift
from spear.files import make_folder, seed_from
from spear.progress import track
from spear.recipe import Run, load_run
from spear.stages.artifact import DONE, read_artifact
from spear.stages.features import choose_frames, plan
from spear.stages.manifests import find_manifest, manifest_path
from spear.stages.quantizers import read_frames
from spear.teachers.base import Teacher, TeacherConfig, default_device, extract
from spear.teachers.extraction import corpora_of, read_cuts
from spear.teachers.pipeline import extract_cuts

logger = logging.getLogger(__name__)


class Sample(NamedTuple):
    """Frames of one teacher: (M, D) to fit on, (H, D) to judge on, and (T, D) per cut, unchanged and after each change."""

    train: Tensor
    heldout: Tensor
    clean: list[Tensor]
    changed: dict[str, list[Tensor]]


def compare_tokenizers(options: argparse.Namespace) -> str:
    """Fit the quantizer that each recipe has for one teacher, and compare them; writes into ``options.out``.

    Args:
        options: recipes, add, corpora, data, teacher, out, cuts (see ``spear compare --help``).
    Returns:
        the table, as Markdown.
    Raises:
        ConfigError: a recipe has no such teacher. ArtifactError: there are no manifests. DataError: there is too little audio.
    """
    make_folder(options.out)
    rows: list[dict[str, Any]] = []
    shifts: dict[str, dict[str, float]] = {}
    for runs in grouped(load_runs(options), options.teacher):
        run, config = runs[0], runs[0].recipe.teachers[options.teacher]
        name = describe(config)
        logger.info("compare: frames of %s", name)
        teacher = config.build(run.data).to(default_device())
        sample = gather(run, options.teacher, teacher, options.cuts)
        shifts[name] = {change: round(frame_shift(sample.clean, sample.changed[change]), 4) for change in SAME_LENGTH}
        configs = [item.recipe.quantizers[options.teacher].knowing(teacher.codebooks) for item in runs]
        for quantizer in track(configs, f"compare {name}", len(configs), unit="tokenizers"):
            rows += compare([quantizer], *sample, teacher=name, frame_rate_hz=teacher.frame_rate_hz, seed=run.recipe.seed)
            logger.info("compare: %s", ", ".join(f"{key} {value}" for key, value in rows[-1].items()))
    return write_comparison(options.out, rows, shifts)


def load_runs(options: argparse.Namespace) -> list[Run]:
    """A run per recipe, then one per ``--add`` with the first recipe's teacher.

    Raises:
        ConfigError: a recipe has no teacher of that name, or is no recipe.
    """
    pairs: list[tuple[Path, list[str]]] = [(path, []) for path in options.recipes]
    pairs += [(options.recipes[0], [f"quantizers.{options.teacher}={text}"]) for text in options.add]
    runs = []
    for path, overrides in pairs:
        run = load_run(path, options.corpora, options.data, options.out, overrides)
        if options.teacher not in run.recipe.teachers:
            raise ConfigError(f"{path} has no teacher {options.teacher!r}: `teachers` has {', '.join(sorted(run.recipe.teachers)) or 'none'}")
        runs.append(run)
    return runs


def grouped(runs: list[Run], teacher: str) -> list[list[Run]]:
    """Runs with the same teacher together, in order; of runs whose quantizer is the same too, only the first."""
    groups: list[list[Run]] = []
    for run in runs:
        group = next((found for found in groups if found[0].recipe.teachers[teacher] == run.recipe.teachers[teacher]), None)
        if group is None:
            groups.append([run])
        elif all(other.recipe.quantizers[teacher] != run.recipe.quantizers[teacher] for other in group):
            group.append(run)
    return groups


def describe(config: TeacherConfig) -> str:
    """A teacher in a few words: its type and the settings that are not the defaults."""
    values = to_json(config, TeacherConfig)
    kind = values.pop("type")
    defaults = {item.name: item.default for item in fields(config)}
    return " ".join([kind, *(f"{key} {value}" for key, value in values.items() if value != defaults[key])])


def gather(run: Run, name: str, teacher: Teacher, count: int) -> Sample:
    """Frames of a teacher.

    Those to fit and judge on are the features in ``DATA/features``, if they were made by this very teacher; else they are made here, of the
    same cuts. The cuts that are changed are `count` valid cuts, which no quantizer was fitted on.

    Raises:
        DataError: there are fewer than two such cuts, or one cannot be read.
    """
    corpora = corpora_of(name, run.corpora, run.labels, run.recipe.features.domains.get(name))
    features = run.data / "features" / name
    if (features / DONE).exists() and read_artifact(features)["inputs"]["teacher"] == teacher.fingerprint():
        train, heldout = read_frames(features)
    else:
        train, heldout = make_frames(run, corpora, teacher)
    paths = [manifest_path(run.data, corpus.name, "valid") for corpus in corpora]
    valid = (cut for path in paths if path.exists() for cut in read_cuts(path))
    cuts = heapq.nsmallest(count, valid, key=lambda cut: seed_from(run.recipe.seed, "compare", cut.id))
    if len(cuts) < 2:
        where = ", ".join(map(str, paths)) or "no corpus"
        raise DataError(f"comparing tokenizers needs at least 2 valid cuts, but {where} has {len(cuts)}", cause="empty")
    clean: list[Tensor] = []
    changed: dict[str, list[Tensor]] = {change: [] for change in CHANGES}
    for cut in track(cuts, "compare: changed audio", len(cuts), unit="cuts"):
        audio = load_audio(cut, teacher.sample_rate)
        clean += extract(teacher, [torch.from_numpy(audio)])
        for change, work in CHANGES.items():
            after = work(audio, teacher.sample_rate, seed_from(run.recipe.seed, change, cut.id))
            changed[change] += extract(teacher, [torch.from_numpy(after)])
    return Sample(train, heldout, clean, changed)


def make_frames(run: Run, corpora: Sequence[Any], teacher: Teacher) -> tuple[Tensor, Tensor]:
    """Training and held-out frames as the stage `features` would choose them, in memory."""
    config, seed = run.recipe.features, run.recipe.seed
    paths = {corpus.name: find_manifest(run.data, corpus.name, "train") for corpus in corpora}
    found = []
    for picks in reversed(plan(teacher, {corpus: read_cuts(path) for corpus, path in paths.items()}, config, seed)):
        wanted = {pick.cut.id: pick.frames for pick in picks}
        outcomes = itertools.chain.from_iterable(
            extract_cuts(teacher, [pick.cut for pick in picks], batch_seconds=config.batch_seconds, device=default_device())
        )
        # only what is chosen stays, off the device
        good = {
            item.cut_id: choose_frames(item.features.cpu(), wanted[item.cut_id], seed, item.cut_id) for item in outcomes if item.features is not None
        }
        rows = [good[cut_id] for cut_id in wanted if cut_id in good]
        if not rows:
            raise DataError(f"no cut of {', '.join(map(str, paths.values()))} gives frames of {teacher.name}", cause="empty")
        found.append(torch.cat(rows))
    return found[0], found[1]
