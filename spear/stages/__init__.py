"""The stages of a run, in order; each is one file with ``run(run)``."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from spear.recipe import Run

STAGES = ("manifests", "features", "quantizers", "tokens", "shards", "pretrain", "export", "evaluate")


def run_stage(name: str, run: Run, **options: Any) -> None:
    """Run one stage of a run.

    Args:
        options: of that stage alone, e.g. which share of ``tokens`` this process makes.
    Raises:
        SpearError: whatever the user can fix; one line.
    """
    importlib.import_module(f"spear.stages.{name}").run(run, **options)
