"""``spear report``: one self-contained page for one run or several side by side."""

from __future__ import annotations

from pathlib import Path

from spear.evaluation.report import write_report as _write


def write_report(exps: list[Path], out: Path | None = None) -> Path:
    """Write the report; returns its path (see `spear.evaluation.report.write_report`)."""
    return _write(exps, out)
