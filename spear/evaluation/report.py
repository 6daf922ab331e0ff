"""The report: one HTML page that needs nothing but itself, for one run or several side by side."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined
from numpy.typing import NDArray

from spear.evaluation.facts import FOLDER, RunFacts, gather
from spear.evaluation.figures import both_worlds, codebook_bars, curves, example_figure, model_bars
from spear.evaluation.report_parts import confusion_figures, layer_figures, model_rows, of_section, robustness_figures, token_table
from spear.evaluation.scoring import Scores
from spear.evaluation.side_by_side import run_figures
from spear.files import write_text
from spear.progress import clock

TEMPLATE = Path(__file__).with_name("report.html.j2")
MOST_POINTS = 400
"""Points per training curve; longer ones are averaged in groups, so that the page stays small."""


def write_report(exps: Sequence[Path], out: Path | None = None, folder: str = FOLDER) -> Path:
    """Write the report of one or several runs; returns its path.

    Args:
        exps: run folders. out: file to write; None: ``EXP/evaluate/report.html`` of a single run, else ``report.html`` here. folder: of the
            evaluation in a run.
    Raises:
        ArtifactError: a folder does not exist or a file in it is damaged. SpearError: `out` cannot be written.
    """
    names = run_names(exps)
    page = render([gather(exp, name, folder) for exp, name in zip(exps, names)])
    if out is None:
        out = exps[0] / folder / "report.html" if len(exps) == 1 else Path("report.html")
    write_text(out, page)
    return out


def run_names(exps: Sequence[Path]) -> list[str]:
    """Shortest trailing part of each path, of one length for all, that tells the runs apart."""
    parts = [exp.resolve().parts[1:] for exp in exps]
    for length in range(1, max((len(part) for part in parts), default=1) + 1):
        names = ["/".join(part[-length:]) for part in parts]
        if len(set(names)) == len(names):
            break
    return names


def render(runs: Sequence[RunFacts]) -> str:
    """The page as text; a part that a run lacks is left out, and the page says so."""
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    template = environment.from_string(TEMPLATE.read_text())
    sections = [section(run, f"r{i}") for i, run in enumerate(runs)]
    page: str = template.render(title=" · ".join(run.name for run in runs), comparison=comparison(runs), runs=sections)
    return page


def comparison(runs: Sequence[RunFacts]) -> dict[str, Any] | None:
    """Students of several runs, one row each; None for a single run."""
    if len(runs) < 2:
        return None
    merged: Scores = {}
    for run in runs:
        for task, models in run.scores.items():
            if "student" in models:
                merged.setdefault(task, {})[run.name] = {**models["student"], "label": run.name}
    if not merged:
        return None
    tokens = token_table(merged)
    probes = of_section(merged, "probes")
    models = {run.name: cost_of_run(run) for run in runs}
    return {**score_table(probes), "tokens": tokens, "models": models, "figures": run_figures(runs, probes)}


def cost_of_run(run: RunFacts) -> dict[str, str]:
    """Parameters of the student and the time of all stages, in words."""
    size = next((f"{model['parameters'] / 1e6:.2f} M parameters" for model in run.models if model["kind"] == "student"), "")
    total = sum(row["wall_s"] for row in run.costs)
    return {"size": size, "time": clock(total + 0.5) if total else ""}


def section(run: RunFacts, prefix: str) -> dict[str, Any]:
    """Everything the template shows of one run; figures are ready SVG."""
    probes = of_section(run.scores, "probes")
    return {
        "id": prefix,
        "name": run.name,
        "table": score_table(probes) if probes else None,
        "summary": summary(probes),
        "worlds": worlds_figure(probes, f"{prefix}-worlds"),
        "tasks": [model_bars(task_title(task, models), models, f"{prefix}-task{i}") for i, (task, models) in enumerate(probes.items())],
        "layers": layer_figures(run.scores, run.analysis, prefix),
        "tokens": token_table(run.scores),
        "confusions": confusion_figures(probes, prefix),
        "robustness": robustness_figures(run.analysis, prefix),
        "clips": min((found["clips"] for found in run.analysis.values()), default=0),
        "models": model_rows(run.models),
        "curves": curve_figures(run.metrics, prefix),
        "codebooks": codebook_rows(run.cards, prefix),
        "examples": [example_row(facts, arrays, f"{prefix}-example{i}") for i, (facts, arrays) in enumerate(run.examples)],
        "costs": cost_rows(run.costs),
    }


def example_row(facts: Mapping[str, Any], arrays: Mapping[str, NDArray[Any]], name: str) -> dict[str, Any]:
    """One example: its figure and how many codebooks of each teacher it shows."""
    teachers = {teacher: {**times, "shown": arrays[f"tokens.{teacher}"].shape[1]} for teacher, times in facts["teachers"].items()}
    return {**facts, "teachers": teachers, "figure": example_figure(facts, arrays, name)}


def task_title(task: str, models: Mapping[str, Mapping[str, Any]]) -> str:
    """Task and its domain."""
    domain = next(iter(models.values())).get("domain", "")
    return f"{task} ({domain})" if domain and domain not in task else task


def score_table(scores: Scores) -> dict[str, Any]:
    """Rows of models, columns of tasks; the best of a column is marked."""
    labels: dict[str, dict[str, Any]] = {}
    for models in scores.values():
        for name, record in models.items():
            labels.setdefault(name, record)
    columns, rows = [], {name: {"label": record["label"], "kind": record["kind"], "cells": []} for name, record in labels.items()}
    for task, models in scores.items():
        first = next(iter(models.values()))
        arrow = "↑" if first["higher_is_better"] else "↓"
        columns.append({"task": task, "domain": first.get("domain", ""), "metric": first["metric"], "arrow": arrow})
        choose = max if first["higher_is_better"] else min
        best = choose(round(record["value"], 3) for record in models.values())
        for name, row in rows.items():
            row["cells"].append(cell(models.get(name), best))
    return {"columns": columns, "rows": list(rows.values())}


def cell(record: Mapping[str, Any] | None, best: float) -> dict[str, Any]:
    """One cell of the table."""
    if record is None:
        return {"value": "–", "detail": "not scored", "std": "", "best": False}
    low, high = record["ci"]
    detail = f"layer: {record['layer']}; 95 % interval {low:.3f} to {high:.3f}"
    std = "" if record.get("seeds") == 1 else f"± {record['std']:.3f}"
    return {"value": f"{record['value']:.3f}", "std": std, "detail": detail, "best": round(record["value"], 3) == best}


def summary(scores: Scores) -> list[str]:
    """One sentence per task: the student against the best teacher and the best log-mel."""
    found = []
    for task, models in scores.items():
        student = models.get("student")
        if student is None:
            continue
        higher = student["higher_is_better"]
        choose = max if higher else min
        parts = [f"{task}: the student reaches {student['value']:.3f} {student['metric']}"]
        teachers = [record for record in models.values() if record["kind"] == "teacher"]
        if teachers:
            best = choose(teachers, key=lambda record: record["value"])
            share = f", {student['value'] / best['value']:.0%} of {best['label']} ({best['value']:.3f})"
            parts.append(share if higher and best["value"] > 0 else f", {best['label']} {best['value']:.3f}")
        logmel = [record for record in models.values() if record["kind"] == "logmel"]
        if logmel:
            best = choose(logmel, key=lambda record: record["value"])
            parts.append(f"; {best['label']} {best['value']:.3f}")
        found.append("".join(parts) + ".")
    return found


def worlds_figure(scores: Scores, name: str) -> str | None:
    """Dots of all models over the first task of each of two domains; None where there is only one domain."""
    first: dict[str, str] = {}
    for task, models in scores.items():
        for record in models.values():
            if record["higher_is_better"]:
                first.setdefault(record.get("domain", ""), task)
    if len(first) < 2:
        return None
    (_, x_task), (_, y_task) = list(first.items())[:2]
    points = [
        (record["label"], record["kind"], record["value"], scores[y_task][model]["value"])
        for model, record in scores[x_task].items()
        if model in scores[y_task]
    ]
    if not points:
        return None
    titles = [f"{task_title(task, scores[task])}: {next(iter(scores[task].values()))['metric']}" for task in (x_task, y_task)]
    return both_worlds(points, titles[0], titles[1], name)


def curve_figures(metrics: Sequence[Mapping[str, Any]], prefix: str) -> list[str]:
    """Losses and accuracies over steps, train and valid."""
    figures = []
    for quantity, title in (("loss", "Loss per token"), ("accuracy", "Token accuracy")):
        series: dict[str, tuple[list[float], list[float]]] = {}
        for line in metrics:
            for key, value in line.items():
                if (key == quantity or key.startswith(quantity + "/")) and isinstance(value, (int, float)) and "step" in line:
                    _, _, rest = key.partition("/")
                    teacher, _, domain = rest.partition("/")
                    what = f"{teacher} tokens on {domain}" if domain else teacher or "total"
                    steps, values = series.setdefault(f"{what}, {line.get('split', 'train')}", ([], []))
                    steps.append(float(line["step"]))
                    values.append(float(value))
        if len(series) > 2:
            series = {label: found for label, found in series.items() if not label.startswith("total, ")}
        if series:
            thinned = {label: (*thin(*found), label.rpartition(", ")[2]) for label, found in sorted(series.items())}
            figures.append(curves(title, thinned, f"{prefix}-{quantity}"))
    return figures


def thin(steps: Sequence[float], values: Sequence[float], most: int = MOST_POINTS) -> tuple[list[float], list[float]]:
    """Means of equal groups of neighbours, at most `most` of them."""
    group = -(-len(steps) // most)
    starts = range(0, len(steps), group)
    return tuple([sum(found[i : i + group]) / len(found[i : i + group]) for i in starts] for found in (steps, values))  # type: ignore[return-value]


def codebook_rows(cards: Mapping[str, Mapping[str, Any]], prefix: str) -> list[dict[str, Any]]:
    """Facts and figure of each teacher's quantizer."""
    rows = []
    for i, (teacher, card) in enumerate(sorted(cards.items())):
        perplexity, active = (_numbers(card.get(key)) for key in ("perplexity", "active_entries"))
        size = int(card.get("codebook_size") or max([*perplexity, 1.0]))
        usage = [count / size for count in active]
        facts = {
            "bits per frame": _shown(card, "bits_per_frame", "{:g}"),
            "relative reconstruction loss": _shown(card, "relative_loss", "{:.3f}"),
            "mean perplexity": f"{sum(perplexity) / len(perplexity):.1f} of {size}" if perplexity else None,
            "entries in use": f"{sum(usage) / len(usage):.1%}" if usage else None,
        }
        figure = codebook_bars(teacher, perplexity, usage, size, f"{prefix}-codebook{i}") if perplexity or usage else None
        rows.append({"teacher": teacher, "facts": {key: text for key, text in facts.items() if text is not None}, "figure": figure})
    return rows


def _numbers(value: Any) -> list[float]:
    values = value if isinstance(value, list) else [value]
    return [float(item) for item in values if isinstance(item, (int, float))]


def _shown(card: Mapping[str, Any], key: str, form: str) -> str | None:
    value = card.get(key)
    return form.format(value) if isinstance(value, (int, float)) else None


def cost_rows(costs: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    """Rows of the cost table and their total; None where no stage is finished."""
    if not costs:
        return None
    gpu = any(row["gpu_hours"] for row in costs)
    total = {
        "stage": "all",
        "audio_s": 0.0,
        "wall_s": sum(row["wall_s"] for row in costs),
        "peak_memory_mb": max(row["peak_memory_mb"] for row in costs),
        "gpu_hours": sum(row["gpu_hours"] for row in costs),
    }
    rows = [
        {
            "stage": row["stage"],
            "audio": hours(row["audio_s"]),
            "wall": clock(row["wall_s"] + 0.5),
            "memory": f"{row['peak_memory_mb'] / 1024:.2f} GiB",
            "gpu": f"{row['gpu_hours']:.2f}" if gpu else "",
        }
        for row in (*costs, total)
    ]
    return {"rows": rows, "gpu": gpu}


def hours(seconds: float) -> str:
    """Seconds of audio as hours; a dash where a stage heard none."""
    return f"{seconds / 3600:.2f} h" if seconds >= 36 else f"{seconds:.0f} s" if seconds else "–"
