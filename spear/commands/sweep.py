"""``spear sweep``: one recipe with a table of overrides, several seeds each, and what came out as mean and deviation over seeds.

Any number of processes may work on one table, on one machine or on many that share the folder: each takes the next run on which no
other is at work, so that a job array of a cluster is the same command sent several times.
"""

from __future__ import annotations

import logging
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import mean, median, stdev
from typing import Any

import torch

from spear.commands.sweep_differences import differences, markdown_differences
from spear.config import load_config, to_json
from spear.errors import ConfigError, SpearError
from spear.files import make_folder, read_json, sha256_json, write_json, write_text
from spear.recipe import Run, load_run
from spear.stages import STAGES, run_stage
from spear.stages.artifact import DONE, read_artifact
from spear.stages.session import BusyError

logger = logging.getLogger(__name__)
RUN_STAGES = STAGES[STAGES.index("pretrain") :]
DATA_STAGES = ("quantizers", "tokens", "shards")
"""Made again for variants with targets of their own."""
SHARED = ("manifests", "features", "teachers", "corpus")
"""What such variants take from the folder of data that is given."""
MODEL = "student"
"""Whose scores the table shows."""
METRICS = ("accuracy",)
"""First words of the validation metrics that the table shows: losses of variants with other weights are no measure of each other."""
RECORDS = {"pretrain": "", "evaluate": "evaluate"}
"""Where below a run's folder the record of a finished stage lies whose values the table shows."""
WAIT_S = 10.0
"""Between two looks at runs on which others are at work."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SweepConfig:
    """The YAML file of a sweep."""

    recipe: str
    """Recipe, relative to the table's file."""
    variants: dict[str, list[str]]
    """Name of a variant -> its overrides, ``a.b=c`` as for ``--set``; the first one is what the others are compared with."""
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2])
    """Seeds of every variant."""
    more_seeds: dict[str, list[int]] = field(default_factory=dict)
    """Variant -> seeds that only it has beside `seeds`."""
    overrides: list[str] = field(default_factory=list)
    """Overrides of all variants, before their own."""
    stages: list[str] = field(default_factory=lambda: list(RUN_STAGES))
    """Stages of every run, in their order. The data stages are run before, once for all; only a variant with other quantizers has its own
    tokens and shards, made here from the same frames."""

    def __post_init__(self) -> None:
        if not self.variants or not self.seeds:
            raise ConfigError("`variants` and `seeds` must have at least one entry each")
        for name, extra in self.more_seeds.items():
            if name not in self.variants:
                raise ConfigError(f"`more_seeds` must name variants, but has {name!r}")
            if len({*self.seeds, *extra}) < len(self.seeds) + len(extra):
                raise ConfigError(f"`more_seeds.{name}` must differ from each other and from `seeds`, but are {', '.join(map(str, extra))}")
        if len(set(self.seeds)) < len(self.seeds):
            raise ConfigError(f"`seeds` must differ from each other, but are {', '.join(map(str, self.seeds))}")
        for name in self.variants:
            if not re.fullmatch(r"[\w.+-]+", name) or name.startswith("."):
                raise ConfigError(f"`variants` must have names of letters, digits and . _ + -, but has {name!r}")
        for stage in self.stages:
            if stage not in RUN_STAGES:
                raise ConfigError(f"`stages` must be among {', '.join(RUN_STAGES)}, but has {stage!r}")

    def runs(self) -> list[tuple[str, int]]:
        """Variant and seed of every run; all variants of the first seed come first, so that a table is there early."""
        extra = [(name, seed) for name, seeds in self.more_seeds.items() for seed in seeds]
        extra.sort(key=lambda pair: self.more_seeds[pair[0]].index(pair[1]))
        return [*((name, seed) for seed in self.seeds for name in self.variants), *extra]


@dataclass(frozen=True)
class _Job:
    """One run of a sweep; `targets` makes the data of a variant with its own."""

    name: str
    seed: int
    run: Run
    targets: Run | None


def sweep(table: Path, corpora: Path, data: Path, out: Path, jobs: int = 1) -> str:
    """Make every run of a table that is not finished into ``OUT/<variant>/seed-<n>``.

    Args:
        table: YAML of a `SweepConfig`. corpora, data: as for a stage. out: gets the runs, ``sweep.json`` and ``sweep.md``.
        jobs: runs at a time, each a process of its own; with GPUs they are dealt out among them in turn.
    Returns:
        The Markdown table.
    Raises:
        ConfigError: the table, the recipe or an override is wrong; found before the first run. SpearError: runs have failed, after all others
            were made; run again to go on with them.
    """
    config = load_config(SweepConfig, table)
    left = _jobs(config, table, corpora, data, out)
    everything = list(left)
    failed: dict[str, str] = {}
    with _helpers([str(table), "--corpora", str(corpora), "--data", str(data), "--out", str(out)], jobs):
        while left:
            busy = []
            for job in left:
                logger.info("sweep: %s with seed %d, %d of %d runs", job.name, job.seed, everything.index(job) + 1, len(everything))
                try:
                    _make(job, config.stages, data)
                except BusyError:
                    busy.append(job)
                except SpearError as error:
                    failed[f"{job.name} with seed {job.seed}"] = str(error)
                    logger.error("sweep: %s with seed %d failed: %s", job.name, job.seed, error)
                _write(config, everything, out)
            if len(busy) == len(left):
                time.sleep(WAIT_S)
            left = busy
    if failed:
        name, reason = next(iter(failed.items()))
        raise SpearError(f"{len(failed)} of {len(everything)} runs of the sweep failed; {name}: {reason}")
    return _write(config, everything, out)


def _jobs(config: SweepConfig, table: Path, corpora: Path, data: Path, out: Path) -> list[_Job]:
    recipe = table.resolve().parent / config.recipe
    common = load_run(recipe, corpora, data, out, config.overrides)
    found = []
    for name, seed in config.runs():
        overrides = [*config.overrides, *config.variants[name]]
        run = load_run(recipe, corpora, data, out / name / f"seed-{seed}", [*overrides, f"seed={seed}"])
        targets = load_run(recipe, corpora, data, out, overrides)
        own = to_json(targets.recipe)["quantizers"]
        if own != to_json(common.recipe)["quantizers"]:
            place = out / "data" / sha256_json(own)[:12]
            found.append(_Job(name, seed, replace(run, data=place), replace(targets, data=place)))
        else:
            found.append(_Job(name, seed, run, None))
    return found


def _make(job: _Job, stages: Sequence[str], data: Path) -> None:
    if job.targets is not None:
        make_folder(job.targets.data)
        for name in SHARED:
            link = job.targets.data / name
            if (data / name).exists() and not link.exists():
                link.symlink_to((data / name).resolve(), target_is_directory=True)
        for stage in DATA_STAGES:
            run_stage(stage, job.targets)
    for stage in (stage for stage in RUN_STAGES if stage in stages):
        run_stage(stage, job.run)


@contextmanager
def _helpers(arguments: Sequence[str], jobs: int) -> Iterator[None]:
    """Run `jobs` - 1 further processes on the same table; they are told to stop when this one fails, and waited for otherwise."""
    gpus = [name for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name] or list(map(str, range(torch.cuda.device_count())))
    processes = []
    for index in range(1, jobs):
        shown = {"CUDA_VISIBLE_DEVICES": gpus[index % len(gpus)]} if gpus else {}
        command = [sys.executable, "-m", "spear", "sweep", *arguments]
        processes.append(subprocess.Popen(command, env={**os.environ, **shown}, stdout=subprocess.DEVNULL))
    try:
        yield
        for process in processes:
            process.wait()
    finally:
        for process in processes:
            if process.poll() is None:
                process.terminate()
        for process in processes:
            process.wait()


def _write(config: SweepConfig, jobs: Sequence[_Job], out: Path) -> str:
    """Write what all processes have made so far; returns the table."""
    found: dict[str, dict[int, dict[str, float]]] = {name: {} for name in config.variants}
    for job in jobs:
        if all((job.run.exp / place / DONE).exists() for stage, place in RECORDS.items() if stage in config.stages):
            found[job.name][job.seed] = read_values(job.run.exp)
    variants = {
        name: {"overrides": config.variants[name], "seeds": list(values), "values": summary(list(values.values()))} for name, values in found.items()
    }
    first, changes = next(iter(variants)), differences(variants)
    result = {"recipe": config.recipe, "overrides": config.overrides, "reference": first, "variants": variants, "differences": changes}
    text = "\n".join(filter(None, [markdown(result), markdown_differences(changes, first)]))
    write_json(out / "sweep.json", result)
    write_text(out / "sweep.md", text)
    return text


def read_values(exp: Path) -> dict[str, float]:
    """What a finished run reached: the model's score on every task, and of the last validation what `METRICS` names."""
    found: dict[str, float] = {}
    scores = exp / "evaluate" / "scores.json"
    if scores.exists():
        for task, models in read_json(scores).items():
            if MODEL in models:
                found[f"{task} ({models[MODEL]['metric']})"] = float(models[MODEL]["value"])
    if (exp / DONE).exists():
        valid = read_artifact(exp).get("extra", {}).get("valid", {})
        found.update({f"valid {name}": float(value) for name, value in sorted(valid.items()) if name.split("/")[0] in METRICS and value is not None})
    return found


def summary(values: Sequence[Mapping[str, float]]) -> dict[str, dict[str, Any]]:
    """Name -> mean, standard deviation (of the sample; None for a single seed), median, least and largest value over seeds, and the values
    themselves; names that a seed lacks are left out.
    """
    names = [name for name in (values[0] if values else ()) if all(name in other for other in values)]
    rows = {name: [value[name] for value in values] for name in names}
    return {
        name: {"mean": mean(row), "std": stdev(row) if len(row) > 1 else None, "median": median(row), "min": min(row), "max": max(row), "seeds": row}
        for name, row in rows.items()
    }


def markdown(result: Mapping[str, Any]) -> str:
    """The table: a row per variant, a column per value, ``mean ± standard deviation``."""
    variants: Mapping[str, Any] = result["variants"]
    columns = list(dict.fromkeys(name for variant in variants.values() for name in variant["values"]))
    lines = [
        "Mean over seeds ± standard deviation of a single seed, where there are several.",
        "",
        "| " + " | ".join(["variant", "overrides", "seeds", *columns]) + " |",
        "| " + " | ".join(["---"] * (3 + len(columns))) + " |",
    ]
    for name, variant in variants.items():
        cells = [_cell(variant["values"].get(column)) for column in columns]
        overrides = "<br>".join(f"`{override}`".replace("|", "\\|") for override in variant["overrides"]) or "none"
        lines.append("| " + " | ".join([name, overrides, str(len(variant["seeds"])), *cells]) + " |")
    return "\n".join(lines) + "\n"


def _cell(value: Mapping[str, Any] | None) -> str:
    if value is None:
        return ""
    return f"{value['mean']:.4f}" + ("" if value["std"] is None else f" ± {value['std']:.4f}")
