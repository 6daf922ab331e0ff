"""Tasks a frozen encoder is judged by; one file each, listed in `TaskConfig.TABLE`."""

from __future__ import annotations

from spear.evaluation.tasks.base import SPLITS, Features, Rows, Score, Settings, Split, Task, TaskConfig

__all__ = ["SPLITS", "Features", "Rows", "Score", "Settings", "Split", "Task", "TaskConfig"]
