"""The speaker in single phones: how cuts are divided, and the score with and without a speaker in the features."""

from __future__ import annotations

import numpy as np
import pytest

from spear.errors import DataError
from spear.evaluation.collect import Plan
from spear.evaluation.tasks.base import Features, Rows, Settings, Split
from spear.evaluation.tasks.leakage import LeakageConfig
from tests.evaluation.cuts import make_cut

SPLITS: tuple[Split, ...] = ("train", "valid", "test")
CUTS = {
    split: [make_cut(f"{split}{i}", speaker="xyz"[i % 3], tiers={"phone": [("a", 0.0, 0.5), ("b", 0.5, 0.5)]}) for i in range(30)] for split in SPLITS
}


def test_leakage_divides_the_cuts_of_one_split_per_speaker() -> None:
    chosen = LeakageConfig().build("leak", Settings()).select(CUTS)
    assert {split: len(found) for split, found in chosen.items()} == {"train": 18, "valid": 6, "test": 6}
    ids = [cut.id for found in chosen.values() for cut in found]
    assert len(set(ids)) == 30
    assert all(name.startswith("test") for name in ids)
    assert {cut.supervisions[0].speaker for cut in chosen["valid"]} == set("xyz")


def test_leakage_cuts_are_heard_once_in_the_split_they_come_from() -> None:
    task = LeakageConfig().build("leak", Settings())
    plan = Plan.make({"leak": task}, {"leak": CUTS}, batch_s=10.0)
    assert [sum(map(len, plan.batches[split])) for split in SPLITS] == [0, 0, 30]
    assert sorted({use for users in plan.users["test"].values() for _, use in users}) == sorted(SPLITS)


@pytest.mark.parametrize(("voice", "low", "high"), [(3.0, 0.95, 1), (0.0, 0.15, 0.55)])
def test_leakage_scores_the_speaker_in_the_features(voice: float, low: float, high: float) -> None:
    task = LeakageConfig().build("leak", Settings(steps=100, learning_rates=(0.03,), resamples=20))
    rng = np.random.default_rng(0)
    selected = task.select(CUTS)
    task.prepare(selected)
    features = {}
    for split, cuts in selected.items():
        parts: dict[str, Rows] = {}
        for cut in cuts:
            frames = rng.normal(size=(20, 4)) + voice * np.eye(4)["xyz".index(cut.supervisions[0].speaker)]
            parts[cut.id] = task.rows(cut, split, 0.025 + np.arange(20) / 20, [frames.astype(np.float32)])
        features[split] = Features.join(parts)
    score = task.score(features, ["layer"])
    assert low <= score.value <= high
    assert score.details["items"] == 12
    assert score.details["chance"] == pytest.approx(1 / 3)


def test_leakage_raises_data_error_without_a_speaker_of_three_cuts() -> None:
    few = {split: found[:2] for split, found in CUTS.items()}
    with pytest.raises(DataError, match="task `leak` finds no speaker with three labelled cuts in the test split"):
        LeakageConfig().build("leak", Settings()).select(few)
