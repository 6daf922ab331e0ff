"""CTC on frozen features: reading, beam search against all labellings, and the task on features that spell their text."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from spear.errors import ConfigError
from spear.evaluation.ctc import beam_search, greedy
from spear.evaluation.metrics import ratio_interval
from spear.evaluation.tasks.base import Features, Rows, Settings, Split
from spear.evaluation.tasks.ctc import CtcConfig, distances, word_error_rate
from tests.evaluation.cuts import make_cut

SPLITS: tuple[Split, ...] = ("train", "valid", "test")


def test_greedy_merges_repeats_and_drops_blanks() -> None:
    scores = np.log(np.eye(3)[[0, 1, 1, 0, 1, 2, 2, 0]] + 1e-6)
    assert greedy(scores).tolist() == [1, 1, 2]


def test_beam_search_finds_the_likeliest_labelling() -> None:
    rng = np.random.default_rng(0)
    for _ in range(5):
        shares = rng.dirichlet(np.ones(3), size=5)
        totals: dict[tuple[int, ...], float] = {}
        for path in itertools.product(range(3), repeat=5):
            label = tuple(symbol for i, symbol in enumerate(path) if symbol != 0 and (i == 0 or path[i - 1] != symbol))
            totals[label] = totals.get(label, 0) + float(np.prod(shares[range(5), path]))
        assert tuple(beam_search(np.log(shares), beam=200)) == max(totals, key=lambda label: totals[label])


def test_error_rates_count_edits_over_lengths() -> None:
    heard, texts = [list("the cat"), list("a")], [list("the bat sat"), list("a")]
    assert distances(heard, texts).tolist() == [5, 0]
    assert word_error_rate(heard, texts) == 2 / 4


def test_ratio_interval_holds_the_ratio_and_is_a_point_for_equal_items() -> None:
    assert ratio_interval(np.full(9, 2.0), np.full(9, 8.0), resamples=20, seed=0) == (0.25, 0.25)
    rng = np.random.default_rng(0)
    errors, sizes = rng.integers(0, 5, 80).astype(float), np.full(80, 10.0)
    low, high = ratio_interval(errors, sizes, resamples=200, seed=0)
    assert low < errors.sum() / sizes.sum() < high


def cut_of(split: str, i: int) -> tuple[object, np.ndarray]:
    """A cut whose frames show its letters, three frames each with one of silence between, in noise."""
    rng = np.random.default_rng(100 * SPLITS.index(split) + i)  # type: ignore[arg-type]
    text = "".join(rng.choice(list("ab c"), 6)).strip() or "a"
    text = " ".join(text.split())
    cut = make_cut(f"{split}{i}", tiers={"phone": [(letter, 0.1 * j, 0.1) for j, letter in enumerate(text)]})
    cut.supervisions[0].text = text
    shown = [place for letter in text for place in [*["ab c".index(letter)] * 3, 4]]
    return cut, (3 * np.eye(5)[shown] + 0.6 * rng.normal(size=(len(shown), 5))).astype(np.float32)


@pytest.mark.parametrize(("network", "tier", "metric"), [("linear", "phone", "PER"), ("blstm", None, "CER")])
def test_ctc_task_learns_to_spell(network: str, tier: str | None, metric: str) -> None:
    config = CtcConfig(network=network, tier=tier, steps=150, batch_cuts=8, hidden=16, learning_rates=[0.03], beam=4)  # type: ignore[arg-type]
    task = config.build("spelling", Settings(seeds=(0, 1), resamples=30))
    features = {}
    for split in SPLITS:
        parts: dict[str, Rows] = {}
        for i in range(24):
            cut, frames = cut_of(split, i)
            noise = np.random.default_rng(i).normal(size=frames.shape).astype(np.float32)
            parts[cut.id] = task.rows(cut, split, np.arange(len(frames)) / 50, [noise, frames])  # type: ignore[attr-defined]
        features[split] = Features.join(parts)
    score = task.score(features, ["noise", "letters"])
    assert (score.metric, score.layer, score.higher_is_better) == (metric, "weighted sum", False)
    assert score.value < 0.15
    assert score.ci[0] <= score.by_layer["weighted sum"]["test"] <= score.ci[1]
    assert score.details["beam"] < 0.15
    assert score.details["layer_weights"]["letters"] > 0.5
    assert ("word_error_rate" in score.details) == (tier is None)


def test_ctc_reads_the_texts_of_all_supervisions_in_their_order() -> None:
    first, second = (make_cut("x").supervisions[0] for _ in range(2))
    first.text, first.start, second.text, second.start = "how are  you", 1.0, "good morning", 0.0
    cut = make_cut("x")
    cut.supervisions = [first, second]
    task = CtcConfig(tier=None).build("text", Settings(seeds=(0,)))
    assert "".join(task.transcript(cut)) == "good morning how are you"
    second.text = None
    assert not task.wants(cut)


def test_ctc_config_raises_config_error_without_learning_rates() -> None:
    with pytest.raises(ConfigError, match="`learning_rates` must be at least one and all positive"):
        CtcConfig(learning_rates=[])
