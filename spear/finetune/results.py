"""Scores of a fine-tuned model on test cuts, and the page that shows them."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from spear.errors import DataError
from spear.files import write_json, write_text
from spear.finetune.tasks.base import Head, Prediction

logger = logging.getLogger(__name__)

SCORES, REPORT, PREDICTIONS = "scores.json", "report.md", "predictions.jsonl"
LINES = 50


def write_results(
    folder: Path, head: Head, found: Mapping[str, tuple[Sequence[Prediction], dict[str, str]]], facts: dict[str, Any]
) -> dict[str, Any]:
    """Score and write ``scores.json``, ``report.md`` and, for texts, ``predictions.jsonl``.

    Args:
        found: corpus -> predictions on its test cuts and their labels. facts: what the model was trained on, for the reader.
    Returns:
        the content of ``scores.json``: the score over all corpora, ``by_corpus`` where there are several (why not, for a corpus whose
        labels allow no score of its own), and `facts`.
    Raises:
        DataError: the labels allow no score.
    """
    predictions = [item for items, _ in found.values() for item in items]
    labels = {name: label for _, known in found.values() for name, label in known.items()}
    scores: dict[str, Any] = {"metric": head.metric, "higher_is_better": head.higher_is_better, **head.score(predictions, labels), **facts}
    if len(found) > 1:
        scores["by_corpus"] = {name: _corpus_score(head, name, items, known) for name, (items, known) in found.items()}
    scores = dict(_rounded(scores))
    write_json(folder / SCORES, scores)
    texts = [{"id": item.id, "text": item.value, "reference": labels[item.id]} for item in predictions if isinstance(item.value, str)]
    if texts:
        write_text(folder / PREDICTIONS, "".join(json.dumps(text, ensure_ascii=False) + "\n" for text in sorted(texts, key=lambda text: text["id"])))
    write_text(folder / REPORT, report(scores, head.lines(predictions, labels)))
    return scores


def _corpus_score(head: Head, name: str, predictions: Sequence[Prediction], labels: dict[str, str]) -> dict[str, Any]:
    try:
        return head.score(predictions, labels)
    except DataError as error:
        logger.warning("finetune: corpus %s alone has no score: %s", name, error)
        return {"no_score": str(error)}


def report(scores: Mapping[str, Any], lines: Sequence[str]) -> str:
    """A Markdown page: the score, its parts, and what is worth reading about single cuts."""
    arrow = "higher is better" if scores["higher_is_better"] else "lower is better"
    page = [f"# {scores['metric']} {scores['value']:.4f}", "", f"On {scores['split']} cuts; {arrow}.", "", "| | |", "| --- | --- |"]
    page += [f"| {key} | {_cell(value)} |" for key, value in scores.items() if key not in ("metric", "value", "higher_is_better", "split")]
    if lines:
        shown = f"the first {LINES} of {len(lines)}" if len(lines) > LINES else f"{len(lines)}"
        page += ["", f"## Single cuts and classes ({shown})", "", *(f"- {line}" for line in lines[:LINES])]
    return "\n".join(page) + "\n"


def _cell(value: Any) -> str:
    text = ", ".join(f"{key}: {_cell(item)}" for key, item in value.items()) if isinstance(value, Mapping) else str(value)
    return text.replace("|", "\\|")


def _rounded(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _rounded(item) for key, item in value.items()}
    if isinstance(value, (float, np.floating)):
        return round(float(value), 6)
    return value
