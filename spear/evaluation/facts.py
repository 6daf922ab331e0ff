"""What a report is made of: scores, training curves, costs, codebook cards and examples of one run; anything may be missing."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from spear.errors import ArtifactError
from spear.evaluation.examples import read_examples
from spear.evaluation.scoring import SPEED, Scores, ordered
from spear.files import read_json, write_json

FOLDER = "evaluate"
"""Of a run's own evaluation; suites have `FOLDER`_suite."""
CARDS, COSTS, ANALYSIS, SIZES = "cards.json", "costs.json", "analysis.json", "models.json"
STAGES = ("manifests", "features", "quantizers", "tokens", "shards", "pretrain", "export", "evaluate")


@dataclass(slots=True)
class RunFacts:
    """Everything the report says about one run.

    scores: see `Scores`. metrics: lines of metrics.jsonl. costs: one row per stage. cards: teacher -> quantizer card.
    examples: (description, arrays), see `spear.evaluation.examples`. analysis: domain -> see `spear.evaluation.analysis`.
    models: {name, label, kind, parameters, audio_s, wall_s} of each.
    """

    name: str
    scores: Scores = field(default_factory=dict)
    metrics: list[dict[str, Any]] = field(default_factory=list)
    costs: list[dict[str, Any]] = field(default_factory=list)
    cards: dict[str, dict[str, Any]] = field(default_factory=dict)
    examples: list[tuple[dict[str, Any], dict[str, NDArray[Any]]]] = field(default_factory=list)
    analysis: dict[str, Any] = field(default_factory=dict)
    models: list[dict[str, Any]] = field(default_factory=list)


def keep_data_facts(data: Path, evaluate: Path) -> None:
    """Copy what a report needs of the data folder into the evaluation's folder, so that a run can be reported on its own."""
    cards = {path.parent.name: read_json(path) for path in sorted((data / "quantizers").glob("*/card.json"))}
    write_json(evaluate / CARDS, cards)
    write_json(evaluate / COSTS, [cost_of(stage, sorted((data / stage).rglob("artifact.json"))) for stage in STAGES[:5]])


def cost_of(stage: str, artifacts: list[Path]) -> dict[str, Any]:
    """Cost of a stage over its finished folders: sums of time and audio, the largest memory.

    Returns:
        {stage, folders, audio_s, wall_s, peak_memory_mb, gpu_hours}; `folders` is 0 where none is finished.
    """
    records = [read_json(path) for path in artifacts]
    measured = [record.get("measured", {}) for record in records]
    return {
        "stage": stage,
        "folders": len(records),
        "audio_s": round(sum(record.get("audio_s", 0.0) for record in records), 3),
        "wall_s": round(sum(found.get("wall_s", 0.0) for found in measured), 3),
        "peak_memory_mb": max((found.get("peak_memory_mb", 0.0) for found in measured), default=0.0),
        "gpu_hours": round(sum(found.get("gpu_hours", 0.0) for found in measured), 4),
    }


def gather(exp: Path, name: str | None = None, folder: str = FOLDER) -> RunFacts:
    """Read what is there of a run; `folder` is that of the evaluation in it.

    Raises:
        ArtifactError: the folder does not exist, or a file in it is damaged.
    """
    if not exp.is_dir():
        raise ArtifactError(f"{exp} is not a run's folder: it does not exist")
    evaluate = exp / folder
    costs = _optional(evaluate / COSTS, [])
    for stage, made in (("pretrain", exp), ("export", exp / "export"), ("evaluate", evaluate)):
        costs.append(cost_of(stage, [path for path in [made / "artifact.json"] if path.exists()]))
    return RunFacts(
        name=name or exp.resolve().name,
        scores=ordered(_optional(evaluate / "scores.json", {})),
        metrics=read_lines(exp / "metrics.jsonl"),
        costs=[row for row in costs if row["folders"]],
        cards=_optional(evaluate / CARDS, {}),
        examples=read_examples(evaluate),
        analysis=_optional(evaluate / ANALYSIS, {}),
        models=[
            {**found, **_optional(evaluate / SPEED / f"{found['name']}.json", {"audio_s": 0.0, "wall_s": 0.0})}
            for found in _optional(evaluate / SIZES, [])
        ],
    )


def read_lines(path: Path) -> list[dict[str, Any]]:
    """JSON objects of a file with one per line; a last line cut short by a killed writer is left out.

    Raises:
        ArtifactError: any other line is not a JSON object.
    """
    if not path.exists():
        return []
    found = []
    lines = path.read_text().splitlines()
    for number, line in enumerate(lines, start=1):
        try:
            value = json.loads(line)
        except json.JSONDecodeError as error:
            if number == len(lines):
                break
            raise ArtifactError(f"{path} line {number} is not valid JSON: {error}") from error
        if not isinstance(value, dict):
            raise ArtifactError(f"{path} line {number} must be a JSON object, but is {type(value).__name__}")
        found.append(value)
    return found


def _optional(path: Path, missing: Any) -> Any:
    return read_json(path) if path.exists() else missing
