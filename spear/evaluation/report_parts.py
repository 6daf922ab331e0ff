"""Parts of the report about layers, tokens, confusions, robustness and models: data for the template, figures as ready SVG."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from spear.evaluation.pictures import Confusion, LayerRow, cka_map, confusion_map, layer_map, retrieval_curves
from spear.evaluation.scoring import Scores

TOKEN_COLUMNS = (
    ("PNMI", "PNMI", True, "{:.3f}"),
    ("PNMI", "phone_purity", True, "{:.3f}"),
    ("PNMI", "bits_per_s", None, "{:.0f}"),
    ("PNMI", "dedup_bits_per_s", None, "{:.0f}"),
    ("ABX", "across", False, "{:.1%}"),
    ("ABX", "within", False, "{:.1%}"),
)
"""Family of the task, key of the score, whether higher is better (None: neither), and how it is written."""
TOKEN_TITLES = {
    "PNMI": "PNMI",
    "phone_purity": "phone purity",
    "bits_per_s": "bits per second",
    "dedup_bits_per_s": "without repeats",
    "across": "ABX across speakers",
    "within": "ABX within speakers",
}


def of_section(scores: Scores, section: str) -> Scores:
    """Tasks that a section of the report shows: ``probes`` or ``tokens``."""
    return {task: models for task, models in scores.items() if models and next(iter(models.values())).get("section", "probes") == section}


def depth(name: str) -> tuple[int, int]:
    """Sort key of layers: numbers ascending, then the output, then the weighted sum."""
    number = name.rpartition(" ")[2]
    return (0, int(number)) if number.isdigit() else (2 if name == "weighted sum" else 1, 0)


def layer_figures(scores: Scores, analysis: Mapping[str, Any], prefix: str) -> list[str]:
    """The map of layers of the student over all tasks, and per domain its similarity with the teachers."""
    students = {task: models["student"] for task, models in scores.items() if "student" in models}
    layers = sorted({layer for record in students.values() for layer in record["by_layer"]}, key=depth)
    figures = []
    if len(layers) > 1:
        rows = [
            LayerRow(f"{task}, {record['metric']}", [record["by_layer"].get(x, {}).get("test") for x in layers], record["higher_is_better"])
            for task, record in students.items()
            if len(record["by_layer"]) > 1
        ]
        for domain, found in analysis.items():
            rows.append(LayerRow(f"directions in use, {domain}", [found["effective_rank"].get(x) for x in layers], True))
        figures.append(layer_map("Test score of every layer", layers, rows, f"{prefix}-layers"))
    for i, (domain, found) in enumerate(analysis.items()):
        if found["cka"]:
            names = sorted(found["effective_rank"], key=depth)
            figures.append(cka_map(f"Likeness to the teachers on {domain} (CKA)", names, found["cka"], f"{prefix}-cka{i}"))
    return figures


def token_table(scores: Scores) -> dict[str, Any] | None:
    """Rows of models, columns of what is known of their units; the best of a column is marked. None where no task judged them."""
    tasks = of_section(scores, "tokens")
    columns = [
        (task, key, better, form)
        for family, key, better, form in TOKEN_COLUMNS
        for task, models in tasks.items()
        if next(iter(models.values()))["metric"].startswith(family)
    ]
    if not columns:
        return None
    several = len({task for task, *_ in columns}) > len({family for family, *_ in TOKEN_COLUMNS})
    labels = {name: record for models in tasks.values() for name, record in models.items()}
    rows = [{"label": record["label"], "kind": record["kind"], "cells": []} for record in labels.values()]
    titles = []
    for task, key, better, form in columns:
        values = [_value(tasks[task].get(name), key) for name in labels]
        known = [x for x in values if x is not None]
        best = None if better is None or not known else (max if better else min)(known)
        titles.append({"title": TOKEN_TITLES[key], "task": task if several else "", "arrow": {True: "↑", False: "↓", None: ""}[better]})
        for row, name, value in zip(rows, labels, values):
            record = tasks[task].get(name)
            row["cells"].append(
                {
                    "value": "–" if value is None else form.format(value),
                    "best": value is not None and value == best,
                    "detail": f"layer: {record['layer']}" if record else "not scored",
                }
            )
    return {"columns": titles, "rows": rows}


def _value(record: Mapping[str, Any] | None, key: str) -> float | None:
    found = None if record is None else record["value"] if key == "PNMI" else record.get(key)
    return None if found is None else float(found)


def confusion_figures(scores: Scores, prefix: str) -> list[dict[str, str]]:
    """Confusions of the student on the first task of each domain that has them."""
    figures, seen = [], set()
    for i, (task, models) in enumerate(scores.items()):
        record = models.get("student", {})
        found = Confusion.of(record)
        if found is None or record.get("domain") in seen:
            continue
        seen.add(record.get("domain"))
        figures.append(
            {
                "figure": confusion_map(f"{task}, student", found, f"{prefix}-confusion{i}"),
                "worst": ", ".join(found.worst()),
                "wide": "wide" if len(found.classes) > 20 else "",
            }
        )
    return figures


def robustness_figures(analysis: Mapping[str, Any], prefix: str) -> list[str]:
    """Curves of retrieval, one figure per domain."""
    figures = []
    for i, (domain, found) in enumerate(analysis.items()):
        known = {label: found["retrieval"][label] for label in found["models"] if label in found["retrieval"]}
        if known:
            figures.append(retrieval_curves(f"Does a changed clip find itself? {domain}", known, found["clips"], f"{prefix}-robust{i}"))
    return figures


def model_rows(models: Sequence[Mapping[str, Any]]) -> list[dict[str, str]]:
    """Size and speed of every model that has weights."""
    rows = []
    for model in models:
        if model["parameters"]:
            speed = (
                model["audio_s"] / model["wall_s"] if model["wall_s"] > 0 and model["kind"] in ("student", "untrained", "teacher", "other") else None
            )
            rows.append(
                {
                    "label": model["label"],
                    "kind": model["kind"],
                    "parameters": f"{model['parameters'] / 1e6:.2f} M",
                    "speed": "–" if speed is None else f"{speed:.0f} ×",
                }
            )
    return rows
