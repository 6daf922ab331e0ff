"""ABX: cells, error rates against the plain definition, and the figures of another implementation on the same items."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from spear.errors import ConfigError, DataError
from spear.evaluation.abx import Item, Limits, Mode, cell_errors, items_of, make_cells, pair_errors, used_items
from spear.evaluation.dtw import Metric, dtw_distances
from spear.evaluation.tasks.abx import AbxConfig
from spear.evaluation.tasks.base import Features, Rows, Settings, Split
from tests.evaluation.cuts import make_cut

ALL = Limits(10**9, 10**9, 10**9)
FASTABX = {
    ("within", "within", "angular"): 0.15934850694611669,
    ("within", "any", "angular"): 0.15483098570257425,
    ("across", "within", "angular"): 0.2384956417605281,
    ("across", "any", "angular"): 0.23026977628469467,
    ("within", "within", "mismatch"): 0.3784778967499733,
    ("across", "within", "mismatch"): 0.41501093953847884,
}
"""(speakers, context, distance) -> `zerospeech_abx` of fastabx 0.9.0 on the items of `synthetic`, distance "identical" for codes."""


def synthetic() -> tuple[np.ndarray, np.ndarray, np.ndarray, list[tuple[str, str, str]]]:
    """160 items of five phones, three speakers and two contexts: frames, starts, lens, (phone, context, speaker)."""
    rng = np.random.default_rng(0)
    phones, speakers, contexts = list("abcde"), ["s1", "s2", "s3"], [("p", "q"), ("q", "p")]
    centres = {phone: rng.normal(size=8) for phone in phones}
    voices = {speaker: rng.normal(size=8) * 0.8 for speaker in speakers}
    frames, lens, labels = [], [], []
    for _ in range(160):
        phone, speaker, context = phones[rng.integers(5)], speakers[rng.integers(3)], contexts[rng.integers(2)]
        length = int(rng.integers(2, 9))
        frames.append(centres[phone] + voices[speaker] + rng.normal(size=(length, 8)) * 1.3)
        lens.append(length)
        labels.append((phone, "\t".join(context), speaker))
    return np.concatenate(frames).astype(np.float32), np.concatenate([[0], np.cumsum(lens)[:-1]]), np.array(lens), labels


@pytest.mark.parametrize(("speakers", "context", "metric"), FASTABX)
def test_abx_gives_the_error_rates_of_fastabx(speakers: Mode, context: str, metric: Metric) -> None:
    frames, starts, lens, labels = synthetic()
    if metric == "mismatch":
        frames = (frames[:, :3] > 0) @ np.array([[1.0], [2.0], [4.0]], np.float32)
    items = [Item(f"u{i}", 0, 1, phone, name if context == "within" else "", speaker) for i, (phone, name, speaker) in enumerate(labels)]
    cells = make_cells(items, speakers, ALL, 0)
    found = np.mean(list(pair_errors(cells, cell_errors(cells, frames, starts, lens, metric)).values()))
    assert found == pytest.approx(FASTABX[speakers, context, metric], abs=1e-6)


def test_cell_errors_count_the_triples_one_by_one() -> None:
    frames, starts, lens, labels = synthetic()
    items = [Item(f"u{i}", 0, 1, *label) for i, label in enumerate(labels)]
    cells = make_cells(items, "within", ALL, 0)[:5]

    def distance(i: int, j: int) -> float:
        return float(dtw_distances(frames, starts, lens, np.array([[i, j]]), "angular")[0])

    for cell, found in zip(cells, cell_errors(cells, frames, starts, lens, "angular")):
        triples = [(a, b, x) for a, b, x in itertools.product(cell.a, cell.b, cell.x) if a != x]
        assert found == pytest.approx(np.mean([distance(x, a) > distance(x, b) for a, b, x in triples]))


def test_items_of_span_the_phone_or_its_neighbours() -> None:
    segments = [(0.0, 0.1, "a"), (0.1, 0.2, "b"), (0.2, 0.4, "c")]
    assert items_of("u", segments, "s", span="phone", context="any") == [Item("u", 0.1, 0.2, "b", "", "s")]
    assert items_of("u", segments, "s", span="triphone", context="within") == [Item("u", 0.0, 0.4, "b", "a\tc", "s")]


def test_make_cells_keeps_to_the_limits_whatever_the_order_of_the_items() -> None:
    items = [Item(f"u{i}", 0.0, 1.0, "ab"[i % 2], "", "st"[i // 2 % 2]) for i in range(40)]
    limits = Limits(items=3, across=1, cells=3)
    cells = make_cells(items, "across", limits, 0)
    assert len(cells) == 3
    assert max(len(side) for cell in cells for side in (cell.a, cell.b, cell.x)) == 3
    turned = items[::-1]
    again = make_cells(turned, "across", limits, 0)
    assert [[turned[i].cut for i in cell.a] for cell in again] == [[items[i].cut for i in cell.a] for cell in cells]
    assert used_items(cells) == sorted({i for cell in cells for i in cell.a + cell.b + cell.x})


SPLITS: tuple[Split, ...] = ("train", "valid", "test")


def cuts_of(split: str) -> list[object]:
    """Three speakers say x, then one of three vowels, then y, four times each."""
    return [
        make_cut(f"{split}{s}{v}{n}", duration=0.6, speaker=s, tiers={"phone": [("x", 0, 0.2), (v, 0.2, 0.2), ("y", 0.4, 0.2)]})
        for s in "pqr"
        for v in "aei"
        for n in range(4)
    ]


@pytest.mark.parametrize("num_units", [None, 12])
def test_abx_task_tells_a_good_layer_from_noise(num_units: int | None) -> None:
    task = AbxConfig(num_units=num_units).build("abx", Settings(resamples=50))
    selected = task.select({split: cuts_of(split) for split in SPLITS})
    task.prepare(selected)
    rng = np.random.default_rng(1)
    times = 0.01 + np.arange(30) / 50
    features = {}
    for split, cuts in selected.items():
        parts: dict[str, Rows] = {}
        for cut in cuts:
            good = np.repeat(np.eye(5)["xaeiy".index(cut.id[len(split) + 1])][None], 30, axis=0) + 0.1 * rng.normal(size=(30, 5))
            parts[cut.id] = task.rows(cut, split, times, [rng.normal(size=(30, 5)).astype(np.float32), good.astype(np.float32)])
        features[split] = Features.join(parts)
    score = task.score(features, ["noise", "vowels"])
    assert (score.metric, score.layer, score.higher_is_better) == ("ABX across", "vowels", False)
    assert score.value == pytest.approx(0, abs=0.02)
    assert score.by_layer["noise"]["test"] == pytest.approx(0.5, abs=0.15)
    assert score.details["phone_pairs"] == 6
    assert score.details["within"] == pytest.approx(0, abs=0.02)


def test_abx_task_raises_data_error_where_there_is_nothing_to_compare() -> None:
    one = {split: [cut for cut in cuts_of(split) if cut.supervisions[0].speaker == "p"] for split in SPLITS}  # type: ignore[attr-defined]
    task = AbxConfig().build("abx", Settings())
    with pytest.raises(DataError, match="task `abx` finds nothing to compare across speakers in the valid split"):
        task.prepare(task.select(one))


def test_abx_config_raises_config_error_when_triphones_are_compared_in_any_context() -> None:
    with pytest.raises(ConfigError, match="`context` must be within where `span` is triphone"):
        AbxConfig(context="any")
