"""Cuts in memory, without audio files, for tests of the evaluation."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lhotse import MonoCut, SupervisionSegment
from lhotse.supervision import AlignmentItem


def make_cut(
    name: str,
    *,
    duration: float = 1.0,
    speaker: str | None = None,
    label: str | None = None,
    tiers: dict[str, Sequence[tuple[str, float, float]]] | None = None,
) -> Any:
    """A MonoCut with one supervision; tiers: name -> (symbol, start, duration)."""
    alignment = {tier: [AlignmentItem(*item) for item in items] for tier, items in (tiers or {}).items()}
    supervision = SupervisionSegment(
        id=name,
        recording_id=name,
        start=0.0,
        duration=duration,
        speaker=speaker,
        custom={"label": label} if label is not None else None,
        alignment=alignment or None,
    )
    return MonoCut(id=name, start=0.0, duration=duration, channel=0, supervisions=[supervision])
