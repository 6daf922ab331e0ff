"""Judging a frozen encoder: probes beside teachers, log-mel and an untrained student, and the report.

Public: `EvaluationConfig`, the tasks of `spear.evaluation.tasks`, the embedders, `score_models` and `write_report`.
"""
