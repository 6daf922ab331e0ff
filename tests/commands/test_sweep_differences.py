"""Differences within a sweep: against an analysis of variance by hand, chance, and what is left out."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from scipy.stats import ttest_rel

from spear.commands.sweep_differences import differences, markdown_differences


def table(**rows: list[float]) -> dict[str, Any]:
    return {name: {"seeds": list(range(len(row))), "values": {"phones": {"seeds": row}}} for name, row in rows.items()}


def test_differences_of_two_variants_agree_with_the_paired_t_test() -> None:
    rng = np.random.default_rng(0)
    for shift in (0.2, 1.0, 3.0):
        a, b = rng.normal(size=(2, 4)) + rng.normal(size=4)
        b = b + shift
        found = differences(table(a=a.tolist(), b=b.tolist()))["phones"]
        assert found["variants"]["b"]["difference"] == pytest.approx(float(np.mean(b - a)))
        assert found["variants"]["b"]["beyond_chance"] == bool(ttest_rel(a, b).pvalue < 0.05)
        statistic = abs(float(ttest_rel(a, b).statistic))
        assert abs(np.mean(b - a)) / (found["error"] * 0.5**0.5) == pytest.approx(statistic)


def test_differences_mark_about_one_table_of_twenty_by_chance() -> None:
    rng = np.random.default_rng(1)
    marked = 0
    for _ in range(400):
        values = rng.normal(size=(6, 3)) + 5 * rng.normal(size=3)  # a large effect of the seeds, none of the variants
        found = differences(table(**{f"v{i}": row.tolist() for i, row in enumerate(values)}))["phones"]
        marked += any(row["beyond_chance"] for row in found["variants"].values())
    assert 4 <= marked <= 30


def test_differences_leave_out_variants_without_the_seeds_and_columns_with_one() -> None:
    variants = table(a=[1.0, 2.0], b=[2.0, 2.5], c=[3.0])
    variants["b"]["values"]["words"] = {"seeds": [1.0, 2.0]}
    found = differences(variants)
    assert list(found) == ["phones"]
    assert list(found["phones"]["variants"]) == ["b"]
    assert differences(table(a=[1.0], b=[2.0])) == {}
    assert differences(table(a=[1.0, 2.0])) == {}


def test_markdown_differences_sets_in_bold_what_is_beyond_chance() -> None:
    text = markdown_differences(differences(table(a=[1.0, 2.0, 3.0], b=[1.1, 2.0, 3.1], c=[5.0, 6.1, 7.0])), "a")
    assert "Difference from `a`" in text
    assert "| b | +0.0667 |" in text
    assert "| c | **+4.0333** |" in text
    assert markdown_differences({}, "a") == ""
