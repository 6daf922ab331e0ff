"""One pass per model over shared batches, and scores that go on where they stopped."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from spear.errors import DataError
from spear.evaluation import scoring
from spear.evaluation.collect import AudioCache, Plan
from spear.evaluation.config import EvaluationConfig
from spear.evaluation.embedders import Audio, Embedder, Layers
from spear.evaluation.scoring import Model, ordered, score_models, side_by_side
from spear.evaluation.tasks.base import Split
from spear.evaluation.tasks.frames import FramesConfig
from spear.evaluation.tasks.utterances import UtterancesConfig
from spear.evaluation.tasks.verification import VerificationConfig
from spear.files import read_json, write_json
from tests.evaluation.cuts import make_cut

SPLITS: tuple[Split, ...] = ("train", "valid", "test")
CONFIG = EvaluationConfig(
    tasks={"phones": FramesConfig(), "events": UtterancesConfig(), "speakers": VerificationConfig(num_trials=50)},
    seeds=[0, 1],
    learning_rates=[0.03],
    weight_decays=[0.0],
    steps=60,
    resamples=20,
)
RATE = 50


def load(cut: Any, sample_rate: int) -> Audio:
    """One sample per 10 ms: the phone in the first and second half, plus what the speaker and the event add."""
    digits = [ord(cut.supervisions[0].speaker[-1]), int(cut.supervisions[0].custom["label"][-1])]
    rng = np.random.default_rng(sum(cut.id.encode()))
    phones = np.repeat([0.0, 1.0], int(cut.duration * RATE) // 2)
    return np.stack([phones, phones * 0 + digits[0], phones * 0 + digits[1]], axis=1).astype(np.float32) + rng.normal(
        0, 0.05, (len(phones), 3)
    ).astype(np.float32)


class Fake(Embedder):
    """Hands the samples on as frames and counts its calls."""

    kind = "student"
    frame_rate_hz, first_frame_s = float(RATE), 0.5 / RATE

    def __init__(self, name: str) -> None:
        self.name = self.label = name
        self.layer_names = ["layer"]
        self.batches: list[int] = []

    def embed_batch(self, audios: Sequence[Audio]) -> list[Layers]:
        self.batches.append(len(audios))
        return [[audio @ np.eye(3, dtype=np.float32)] for audio in audios]


def make_plan() -> Plan:
    cuts = {
        split: [
            make_cut(f"{split}-{i}", speaker=f"{split}{'abcdef'[i % 6]}", label=f"e{i // 6 % 2}", tiers={"phone": [("x", 0.0, 0.5), ("y", 0.5, 0.5)]})
            for i in range(24)
        ]
        for split in SPLITS
    }
    tasks = CONFIG.build(0)
    return Plan.make(tasks, dict.fromkeys(tasks, cuts), batch_s=10.0)


DOMAINS = {"phones": "speech", "events": "audio", "speakers": "speech"}


def test_score_models_scores_every_pair(tmp_path: Path) -> None:
    plan, model = make_plan(), Fake("student")
    scores = score_models([Model("student", lambda: model)], plan, DOMAINS, load, tmp_path)
    assert list(scores) == ["phones", "events", "speakers"]
    assert scores["phones"]["student"]["value"] == 1.0
    assert scores["events"]["student"]["value"] == 1.0
    assert scores["speakers"]["student"]["value"] <= 0.35
    assert scores["speakers"]["student"]["domain"] == "speech"
    # 3 splits of 24 cuts of one second, ten to a batch
    assert model.batches == [10, 10, 4] * 3


def test_score_models_resumes_and_ends_in_the_same_bytes(tmp_path: Path) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    models = [Model(name, lambda name=name: Fake(name)) for name in ("logmel", "student")]
    expected = score_models(models, make_plan(), DOMAINS, load, whole)
    score_models(models, make_plan(), DOMAINS, load, parts)
    (parts / "partial" / "student" / "events.json").unlink()
    again = Fake("student")

    def refuse() -> Embedder:
        raise AssertionError("a finished model is embedded again")

    found = score_models([Model("logmel", refuse), Model("student", lambda: again)], make_plan(), DOMAINS, load, parts)
    assert found == expected
    for path in sorted((whole / "partial").rglob("*.json")):
        assert path.read_bytes() == (parts / path.relative_to(whole)).read_bytes()


def test_score_models_knows_the_size_of_a_model_whose_scores_are_all_there_when_it_is_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    judge_all = scoring.side_by_side

    def killed(work: Any, names: Sequence[str]) -> None:
        judge_all(work, names)
        raise KeyboardInterrupt

    monkeypatch.setattr(scoring, "side_by_side", killed)
    with pytest.raises(KeyboardInterrupt):
        score_models([Model("student", lambda: Fake("student"))], make_plan(), DOMAINS, load, tmp_path)
    assert (tmp_path / "partial" / "student" / "model-size.json").exists()
    assert (tmp_path / "speed" / "student.json").exists()


def test_ordered_restores_the_order_that_sorted_json_loses(tmp_path: Path) -> None:
    scores = score_models([Model(name, lambda name=name: Fake(name)) for name in ("student", "logmel")], make_plan(), DOMAINS, load, tmp_path)
    write_json(tmp_path / "scores.json", scores)
    found = ordered(read_json(tmp_path / "scores.json"))
    assert list(found) == ["phones", "events", "speakers"]
    assert list(found["events"]) == ["student", "logmel"]


def test_plan_raises_data_error_when_cuts_of_two_splits_share_an_id() -> None:
    cuts: dict[Split, list[Any]] = {split: [make_cut(f"{split}{i}", label="ab"[i]) for i in range(2)] for split in SPLITS}
    cuts["test"].append(make_cut("train0", label="a"))
    with pytest.raises(DataError, match="two cuts, one of them of the test split, share the id 'train0'"):
        Plan.make({"events": UtterancesConfig().build("events", CONFIG.settings(0))}, {"events": cuts}, batch_s=10.0)


def test_plan_raises_data_error_when_two_cuts_share_an_id() -> None:
    cuts = {split: [make_cut("same", label="a"), make_cut("same", label="b")] for split in SPLITS}
    with pytest.raises(DataError, match="two cuts, one of them of the train split, share the id 'same'"):
        Plan.make({"events": UtterancesConfig().build("events", CONFIG.settings(0))}, {"events": cuts}, batch_s=10.0)


def test_audio_cache_keeps_what_fits() -> None:
    calls: list[str] = []

    def count(cut: Any, sample_rate: int) -> Audio:
        calls.append(cut.id)
        return np.zeros(sample_rate, np.float32)

    cache = AudioCache(count, limit_s=1.5)
    for _ in range(2):
        for name in ("a", "b"):
            cache(make_cut(name), 16000)
    assert calls == ["a", "b", "b"]


def test_score_models_gives_the_same_bytes_for_any_number_of_threads(tmp_path: Path) -> None:
    before = torch.get_num_threads()
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            score_models([Model("student", lambda: Fake("student"))], make_plan(), DOMAINS, load, tmp_path / str(threads))
            assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)
    written = [{path.name: path.read_bytes() for path in (tmp_path / name / "partial" / "student").glob("*.json")} for name in ("1", "3")]
    assert written[0] == written[1]
    assert set(written[0]) == {"phones.json", "events.json", "speakers.json", "model-size.json"}


@pytest.mark.parametrize("threads", [1, 2])
def test_side_by_side_raises_what_a_call_raises_and_begins_no_more(threads: int) -> None:
    called: list[str] = []

    def work(name: str) -> None:
        called.append(name)
        assert torch.get_num_threads() == 1
        if name == "bad":
            raise DataError("no labels")
        time.sleep(0.2)

    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        with pytest.raises(DataError, match="no labels"):
            side_by_side(work, ["bad", *(["good"] * (threads - 1)), "later", "later"])
    finally:
        torch.set_num_threads(before)
    assert "bad" in called
    assert called.count("later") < 2
