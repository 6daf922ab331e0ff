"""What a sweep says about its first variant: differences on the same seeds, and which of them are larger than chance."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from scipy.stats import t as student_t

LEVEL = 0.05
"""Chance, over all variants of one column, that any difference is marked where there is none."""


def differences(variants: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Differences of every variant from the first one, seeds as blocks (two-way analysis of variance without interaction).

    A value of variant v with seed s is taken as mean(v) + effect(s) + error, errors of one size for all variants; the error is estimated from
    all variants that have the seeds of the first one, (V - 1)(S - 1) degrees of freedom. A difference is beyond chance where it is larger than
    Student's t at the level 0.05, divided by the number of variants (Bonferroni).

    Args:
        variants: those of ``sweep.json``: name -> ``seeds`` and ``values`` (column -> ``seeds``, a value per seed).
    Returns:
        Column -> ``error`` (standard deviation of one run, the common effect of its seed taken away), ``degrees``, ``threshold`` (smallest
        difference beyond chance), and ``variants``, name -> ``difference``, ``beyond_chance``. Columns with fewer than two seeds of the first
        variant, or that no other variant has, are left out.
    """
    first, *others = variants
    found = {}
    for column in variants[first]["values"]:
        wanted = _by_seed(variants[first], column)
        rows = {name: _by_seed(variants[name], column) for name in others}
        complete = [name for name, row in rows.items() if set(wanted) <= set(row)]
        if len(wanted) >= 2 and complete:
            found[column] = _column(complete, np.array([[row[seed] for seed in wanted] for row in (wanted, *(rows[name] for name in complete))]))
    return found


def _by_seed(variant: Mapping[str, Any], column: str) -> dict[int, float]:
    values: Sequence[float] = variant["values"][column]["seeds"] if column in variant["values"] else ()
    return dict(zip(variant["seeds"], values))


def _column(names: Sequence[str], values: Any) -> dict[str, Any]:
    """Of (1 + V, S) values, the first variant's in the first row."""
    means = values.mean(axis=1, keepdims=True)
    left = values - means - values.mean(axis=0) + values.mean()
    degrees = (values.shape[0] - 1) * (values.shape[1] - 1)
    error = float(np.sqrt((left**2).sum() / degrees))
    threshold = float(student_t.isf(LEVEL / 2 / len(names), degrees)) * error * (2 / values.shape[1]) ** 0.5
    changes = [float(mean - means[0, 0]) for mean in means[1:, 0]]
    rows = {name: {"difference": change, "beyond_chance": abs(change) > threshold} for name, change in zip(names, changes)}
    return {"error": error, "degrees": degrees, "threshold": threshold, "variants": rows}


def markdown_differences(found: Mapping[str, Mapping[str, Any]], first: str) -> str:
    """A table of differences, a row per variant, a column per value, those beyond chance in bold; empty where there is none."""
    if not found:
        return ""
    names = list(dict.fromkeys(name for column in found.values() for name in column["variants"]))
    lines = [
        f"Difference from `{first}` on the same seeds; **bold** where it is beyond chance (the last row; Student's t, seeds as blocks, one error",
        f"for all variants, level {LEVEL} over a column).",
        "",
        "| " + " | ".join(["variant", *found]) + " |",
        "| " + " | ".join(["---"] * (1 + len(found))) + " |",
    ]
    for name in names:
        lines.append("| " + " | ".join([name, *(_cell(column["variants"].get(name)) for column in found.values())]) + " |")
    lines.append("| " + " | ".join(["beyond chance from", *(f"± {column['threshold']:.4f}" for column in found.values())]) + " |")
    return "\n".join(lines) + "\n"


def _cell(row: Mapping[str, Any] | None) -> str:
    if row is None:
        return ""
    return f"**{row['difference']:+.4f}**" if row["beyond_chance"] else f"{row['difference']:+.4f}"
