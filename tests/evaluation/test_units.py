"""Units against phones: formulas, bit rates, k-means and the task."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.metrics import mutual_info_score

from spear.evaluation.tasks.base import Features, Rows, Settings, Split
from spear.evaluation.tasks.units import UnitsConfig
from spear.evaluation.units import assign, contingency, entropy, fit_units, pnmi, pnmi_interval, purities, usage
from tests.evaluation.cuts import make_cut

SPLITS: tuple[Split, ...] = ("train", "valid", "test")


def test_pnmi_is_mutual_information_over_the_entropy_of_phones() -> None:
    rng = np.random.default_rng(0)
    phones = rng.integers(0, 7, 2000)
    units = (phones * 3 + rng.integers(0, 5, 2000)) % 20
    shares = np.bincount(phones) / 2000
    expected = mutual_info_score(phones, units) / -(shares * np.log(shares)).sum()
    assert pnmi(contingency(units, phones)) == pytest.approx(expected, abs=1e-12)
    assert 0.1 < expected < 0.99


def test_pnmi_is_one_for_units_that_are_the_phones_and_zero_for_one_unit() -> None:
    phones = np.array([0, 1, 2, 2])
    assert pnmi(contingency(phones + 4, phones)) == pytest.approx(1)
    assert pnmi(contingency(np.zeros(4, np.int64), phones)) == 0


def test_purities_are_shares_of_the_commonest_partner() -> None:
    units, phones = np.array([0, 0, 0, 1, 1, 2]), np.array([0, 0, 1, 1, 1, 1])
    # phones: unit 0 is mostly 0 (2), unit 1 is 1 (2), unit 2 is 1 (1); units: phone 0 in unit 0 (2), phone 1 mostly in unit 1 (2)
    assert purities(contingency(units, phones)) == (5 / 6, 4 / 6)


def test_usage_counts_bits_with_and_without_repeats() -> None:
    units, cuts = np.array([0, 0, 1, 1, 1, 0]), np.array([0, 0, 0, 0, 1, 1])
    found = usage(units, cuts, 50.0, 4)
    assert found["active"] == 2
    assert found["perplexity"] == pytest.approx(2)
    assert found["bits_per_s"] == pytest.approx(50)
    assert found["raw_bits_per_s"] == pytest.approx(100)
    # 0 1 | 1 0: four of six frames are left, still one bit each
    assert found["dedup_share"] == pytest.approx(4 / 6)
    assert found["dedup_bits_per_s"] == pytest.approx(50 * 4 / 6)


def test_pnmi_interval_holds_the_value_and_narrows_with_cuts() -> None:
    rng = np.random.default_rng(1)

    def interval(cuts: int) -> tuple[float, float, float]:
        phones = rng.integers(0, 5, cuts * 40)
        units = np.where(rng.random(cuts * 40) < 0.7, phones, rng.integers(0, 5, cuts * 40))
        value = pnmi(contingency(units, phones))
        return value, *pnmi_interval(units, phones, np.repeat(np.arange(cuts), 40), resamples=100, seed=0)

    few, many = interval(10), interval(100)
    assert few[1] < few[0] < few[2]
    assert many[2] - many[1] < few[2] - few[1]


def test_fit_units_finds_separate_groups_and_is_the_same_each_time() -> None:
    rng = np.random.default_rng(2)
    centres = 20 * np.eye(6)
    frames = torch.from_numpy((centres[rng.integers(0, 6, 600)] + rng.normal(size=(600, 6))).astype(np.float32))
    found = fit_units(frames, 6, seed=0)
    assert torch.equal(found, fit_units(frames, 6, seed=0))
    assert sorted(found.argmax(dim=1).tolist()) == list(range(6))
    units, distances = assign(frames, found)
    assert distances.mean() == pytest.approx(6, rel=0.1)  # six channels of variance one
    assert len(set(units.tolist())) == 6


def test_fit_units_moves_centres_that_lost_their_frames() -> None:
    frames = torch.tensor([[0.0], [0.0], [0.0], [10.0]])
    found = fit_units(frames, 2, seed=0)
    assert sorted(found[:, 0].tolist()) == [0, 10]


def features_of(task: object, split: Split, codebook: bool) -> Features:
    rng = np.random.default_rng(SPLITS.index(split))
    parts = {}
    for i in range(12):
        tier = [("abcd"[k], 0.1 + 0.2 * j, 0.2) for j, k in enumerate(rng.permutation(4))]
        cut = make_cut(f"{split}{i}", tiers={"phone": tier})
        times = 0.01 + np.arange(50) / 50
        known = np.array(["abcd".index(found) if found else 4 for found in task.rows(cut, split, times, []).labels])  # type: ignore[attr-defined]
        good = known[:, None].astype(np.float32) if codebook else (5 * np.eye(5)[known] + rng.normal(size=(50, 5))).astype(np.float32)
        noise = rng.integers(0, 8, (50, 1)).astype(np.float32) if codebook else rng.normal(size=(50, 5)).astype(np.float32)
        parts[cut.id] = task.rows(cut, split, times, [noise, good])  # type: ignore[attr-defined]
    found = Features.join(parts)
    found.frame_rate_hz, found.codebook_size = 50.0, 8 if codebook else 0
    return found


@pytest.mark.parametrize("codebook", [False, True])
def test_units_task_finds_the_layer_that_knows_the_phones(codebook: bool) -> None:
    task = UnitsConfig(num_units=8).build("units", Settings(seeds=(0, 1), resamples=50))
    score = task.score({split: features_of(task, split, codebook) for split in SPLITS}, ["noise", "good"])
    assert (score.metric, score.layer) == ("PNMI", "good")
    assert score.value > 0.9
    assert score.by_layer["noise"]["test"] < 0.2
    assert score.details["phone_purity"] > 0.9
    assert score.details["layers"]["noise"]["phone_purity"] < 0.5
    assert score.details["raw_bits_per_s"] == pytest.approx(150)
    assert len(score.by_layer) == 2


def test_units_task_takes_whole_cuts_up_to_its_seconds() -> None:
    cuts = {split: [make_cut(f"{split}{i}", duration=2.0, tiers={"phone": [("a", 0, 1)]}) for i in range(30)] for split in SPLITS}
    found = UnitsConfig(max_seconds=11).build("units", Settings()).select(cuts)
    assert {split: len(chosen) for split, chosen in found.items()} == dict.fromkeys(SPLITS, 5)


def test_entropy_of_four_equal_counts_is_two_bits() -> None:
    assert entropy(np.array([[3.0, 3.0], [3.0, 3.0]])) == pytest.approx(2)


def test_units_rows_label_frames_outside_any_phone_with_nothing() -> None:
    cut = make_cut("u", tiers={"phone": [("a", 0.1, 0.1)]})
    assert UnitsConfig().build("units", Settings()).rows(cut, "test", np.array([0.05, 0.15]), [np.zeros((2, 1), np.float32)]) == Rows(
        ["", "a"], [pytest.approx(np.zeros((2, 1)))]
    )
