"""Optimisers and learning-rate schedules, each a config behind a table entry."""

from spear.training.optim.base import OptimizerConfig, Schedule, ScheduleConfig, parameter_groups

__all__ = ["OptimizerConfig", "Schedule", "ScheduleConfig", "parameter_groups"]
