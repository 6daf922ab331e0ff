"""Charts that put several runs side by side, one per question: every task, and how well every teacher is matched while training goes on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from spear.evaluation.facts import RunFacts
from spear.evaluation.figures import curves, model_bars

MATCH = "accuracy/"
"""First letters of the validation metrics whose course is shown; losses of runs with other weights or tokens are no measure of each other."""


def run_figures(runs: Sequence[RunFacts], scores: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> list[str]:
    """Figures as ready SVG.

    Args:
        runs: whose courses are shown. scores: task -> run's name -> score record of its student, labelled with the run's name.
    """
    figures = [model_bars(f"How good is each run at {task}?", found, f"runs-task{i}") for i, (task, found) in enumerate(scores.items())]
    for i, (key, series) in enumerate(sorted(courses(runs).items())):
        teacher, _, domain = key.removeprefix(MATCH).partition("/")
        figures.append(curves(f"How many {teacher} tokens on {domain} are right?", series, f"runs-match{i}"))
    return figures


def courses(runs: Sequence[RunFacts]) -> dict[str, dict[str, tuple[list[float], list[float], str]]]:
    """Metric -> "run, valid" -> updates, values and "valid", for metrics of `MATCH` that at least two runs have."""
    found: dict[str, dict[str, tuple[list[float], list[float], str]]] = {}
    for run in runs:
        for line in run.metrics:
            if line.get("split") != "valid" or "step" not in line:
                continue
            for key, value in line.items():
                if key.startswith(MATCH) and isinstance(value, (int, float)):
                    steps, values, _ = found.setdefault(key, {}).setdefault(f"{run.name}, valid", ([], [], "valid"))
                    steps.append(float(line["step"]))
                    values.append(float(value))
    return {key: series for key, series in found.items() if len(series) > 1}
