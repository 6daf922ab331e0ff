"""Tasks: which frames get which label, how items are pooled, how trials are drawn, and whole scores on synthetic features."""

from __future__ import annotations

import numpy as np
import pytest

from spear.errors import ConfigError, DataError
from spear.evaluation.config import EvaluationConfig
from spear.evaluation.tasks.base import Features, Rows, Settings, Split
from spear.evaluation.tasks.frames import FramesConfig, label_frames
from spear.evaluation.tasks.segments import SegmentsConfig, frames_of
from spear.evaluation.tasks.utterances import UtterancesConfig, pool
from spear.evaluation.tasks.verification import VerificationConfig, draw_trials
from tests.evaluation.cuts import make_cut

SETTINGS = Settings(seeds=(0, 1), steps=120, batch_size=256, resamples=100, learning_rates=(0.03,))
SPLITS: tuple[Split, ...] = ("train", "valid", "test")


def test_label_frames_takes_the_segment_that_holds_the_centre() -> None:
    segments = [(0.0, 0.05, "a"), (0.05, 0.1, "b"), (0.12, 0.2, "c")]
    # at 50 Hz from 45 ms: 45 ms is the last of a, 65 and 85 ms are b, 105 ms is outside, 125 ms is c
    times = 0.045 + np.arange(5) / 50
    assert label_frames(times, segments) == ["a", "b", "b", None, "c"]


@pytest.mark.parametrize(("first_frame_s", "expected"), [(0.03, ["a", "b"]), (0.049, ["a", "b"]), (0.05, ["b", "b"]), (0.01, ["a", "a"])])
def test_label_frames_changes_exactly_at_the_boundary(first_frame_s: float, expected: list[str]) -> None:
    times = first_frame_s + np.arange(2) / 50
    assert label_frames(times, [(0.0, 0.05, "a"), (0.05, 0.2, "b")]) == expected


def test_label_frames_comes_back_to_the_longer_segment() -> None:
    segments = [(0.0, 10.0, "music"), (2.0, 3.0, "dog"), (2.5, 2.75, "bell")]
    assert label_frames(np.array([1.0, 2.25, 2.6, 2.9, 5.0, 11.0]), segments) == ["music", "dog", "bell", "dog", "music", None]


def test_label_frames_before_the_first_and_after_the_last_segment_is_none() -> None:
    assert label_frames(np.array([0.05, 0.35]), [(0.1, 0.3, "a")]) == [None, None]


def test_frames_rows_keep_labelled_frames_of_every_layer() -> None:
    task = FramesConfig().build("phones", SETTINGS)
    cut = make_cut("x", tiers={"phone": [("a", 0.1, 0.1), ("b", 0.2, 0.1)]})
    times = np.arange(10) / 20  # 0, .05, ...
    found = task.rows(cut, "train", times, [np.arange(10, dtype=np.float32)[:, None], np.zeros((10, 3), np.float32)])
    assert found.labels == ["a", "a", "b", "b"]
    assert found.layers[0][:, 0].tolist() == [2, 3, 4, 5]
    assert found.layers[1].shape == (4, 3)


def test_frames_rows_are_thinned_to_the_limit_and_the_same_each_time() -> None:
    settings = Settings(max_train_frames=100)
    cuts = {split: [make_cut(f"{split}{i}", tiers={"phone": [("a", 0.0, 1.0)]}) for i in range(20)] for split in SPLITS}
    task = FramesConfig().build("phones", settings)
    task.prepare(cuts)
    times, layer = 0.01 + np.arange(50) / 50, np.arange(50, dtype=np.float32)[:, None]
    kept = [task.rows(cut, "train", times, [layer]) for cut in cuts["train"]]
    again = [task.rows(cut, "train", times, [layer]) for cut in cuts["train"]]
    assert all(np.array_equal(a.layers[0], b.layers[0]) for a, b in zip(kept, again))
    # 1000 frames, each kept with a chance of 100 / 1000: four deviations of the count
    assert abs(sum(len(rows.labels) for rows in kept) - 100) < 4 * (1000 * 0.1 * 0.9) ** 0.5
    assert sum(len(task.rows(cut, "test", times, [layer]).labels) for cut in cuts["test"]) == 1000


def test_frames_of_gives_frames_inside_or_the_nearest() -> None:
    times = 0.045 + np.arange(5) / 50  # 45 65 85 105 125 ms
    assert frames_of(times, 0.065, 0.105) == (1, 3)
    assert frames_of(times, 0.068, 0.078) == (1, 2)
    assert frames_of(times, 0.9, 1.0) == (4, 5)


def test_segments_rows_average_frames_of_each_word() -> None:
    task = SegmentsConfig().build("words", SETTINGS)
    cut = make_cut("x", tiers={"word": [("one", 0.0, 0.1), ("two", 0.1, 0.2)]})
    found = task.rows(cut, "test", np.arange(6) / 20, [np.arange(6, dtype=np.float32)[:, None]])
    assert found.labels == ["one", "two"]
    assert found.layers[0][:, 0].tolist() == [0.5, 3.5]


def test_pool_appends_the_deviation() -> None:
    frames = np.array([[1.0, 0.0], [3.0, 0.0]], np.float32)
    assert pool(frames, "mean").tolist() == [2.0, 0.0]
    assert pool(frames, "mean_std").tolist() == [2.0, 0.0, 1.0, 0.0]


def features(rng: np.random.Generator, num: int, good: bool, classes: int = 3) -> Features:
    labels = rng.integers(0, classes, num)
    noise = rng.normal(size=(num, 8))
    signal = np.eye(8)[labels] * 6 if good else 0
    layers = [noise.astype(np.float32), (noise + signal).astype(np.float32)]
    return Features([f"c{i}" for i in labels], [f"cut{i}" for i in range(num)], layers)


def test_utterances_score_chooses_the_informative_layer() -> None:
    rng = np.random.default_rng(0)
    task = UtterancesConfig().build("events", SETTINGS)
    score = task.score(
        {"train": features(rng, 300, True), "valid": features(rng, 100, True), "test": features(rng, 100, True)}, ["layer 1", "output"]
    )
    assert score.layer in {"output", "weighted sum"}
    assert score.value > 0.95
    assert score.by_layer["layer 1"]["test"] < 0.6
    assert set(score.by_layer) == {"layer 1", "output", "weighted sum"}
    assert score.ci[0] <= score.value <= score.ci[1]
    assert score.details["items"] == 100


def test_utterances_score_is_at_chance_on_noise() -> None:
    rng = np.random.default_rng(1)
    task = UtterancesConfig().build("events", SETTINGS)
    score = task.score({"train": features(rng, 300, False), "valid": features(rng, 300, False), "test": features(rng, 600, False)}, ["a", "b"])
    assert score.value == pytest.approx(1 / 3, abs=4 * (2 / 9 / 600) ** 0.5)


def test_utterances_score_never_looks_at_test_when_choosing() -> None:
    rng = np.random.default_rng(2)
    train, valid, test = features(rng, 300, True), features(rng, 100, True), features(rng, 100, True)
    task = UtterancesConfig().build("events", SETTINGS)
    first = task.score({"train": train, "valid": valid, "test": test}, ["a", "b"])
    shuffled = Features(test.labels[::-1], test.groups, test.layers)
    second = task.score({"train": train, "valid": valid, "test": shuffled}, ["a", "b"])
    assert (first.layer, first.details["learning_rate"]) == (second.layer, second.details["learning_rate"])
    assert {name: x["valid"] for name, x in first.by_layer.items()} == {name: x["valid"] for name, x in second.by_layer.items()}
    assert first.value > 0.9 > second.value


def test_utterances_score_of_several_labels_is_mean_average_precision() -> None:
    rng = np.random.default_rng(3)

    def split(num: int) -> Features:
        x = rng.normal(size=(num, 6)).astype(np.float32)
        labels = [";".join(name for name, value in zip("abc", row) if value > 0) for row in x]
        kept = [i for i, label in enumerate(labels) if label]
        return Features([labels[i] for i in kept], [str(i) for i in kept], [x[kept]])

    score = UtterancesConfig(separator=";").build("tags", SETTINGS).score({name: split(300) for name in SPLITS}, ["layer"])
    assert score.metric == "mAP"
    assert score.value > 0.97


def test_classification_raises_data_error_when_train_has_one_class() -> None:
    one = Features(["a", "a"], ["1", "2"], [np.zeros((2, 2), np.float32)])
    with pytest.raises(DataError, match="task `words` needs at least two classes"):
        UtterancesConfig().build("words", SETTINGS).score({"train": one, "valid": one, "test": one}, ["layer"])


def test_classification_raises_data_error_when_test_has_only_unknown_classes() -> None:
    train = Features(["a", "b"], ["1", "2"], [np.zeros((2, 2), np.float32)])
    test = Features(["c"], ["3"], [np.zeros((1, 2), np.float32)])
    with pytest.raises(DataError, match="no label of the test split occurs in the train split"):
        UtterancesConfig().build("words", SETTINGS).score({"train": train, "valid": train, "test": test}, ["layer"])


def test_select_raises_data_error_when_no_cut_has_the_label() -> None:
    cuts = {split: [make_cut("x", speaker="s")] for split in SPLITS}
    with pytest.raises(DataError, match="task `events` finds no labelled cut in the train split \\(it needs the supervision field `label`\\)"):
        UtterancesConfig().build("events", SETTINGS).select(cuts)


def test_select_draws_the_same_cuts_whatever_their_order() -> None:
    cuts = [make_cut(f"c{i}", label="a") for i in range(30)]
    task = UtterancesConfig(max_cuts=7).build("events", SETTINGS)
    first = task.select(dict.fromkeys(SPLITS, cuts))
    second = task.select(dict.fromkeys(SPLITS, cuts[::-1]))
    assert [cut.id for cut in first["test"]] == [cut.id for cut in second["test"]]
    assert len(first["test"]) == 7


def test_draw_trials_is_deterministic_and_free_of_order_and_repeats() -> None:
    ids, speakers = [f"u{i}" for i in range(40)], [f"s{i % 8}" for i in range(40)]
    trials = draw_trials(ids, speakers, 30, seed=1)
    turned = draw_trials(ids[::-1], speakers[::-1], 30, seed=1)
    assert {frozenset(ids[i] for i in pair) for pair in trials.pairs} == {frozenset(ids[::-1][i] for i in pair) for pair in turned.pairs}
    assert len({tuple(pair) for pair in trials.pairs.tolist()}) == 60
    assert all((speakers[a] == speakers[b]) == same for (a, b), same in zip(trials.pairs, trials.same))
    assert trials.same.sum() == 30


def test_draw_trials_leaves_out_excluded_speakers() -> None:
    ids, speakers = [f"u{i}" for i in range(40)], [f"s{i % 8}" for i in range(40)]
    trials = draw_trials(ids, speakers, 30, seed=1, exclude={"s0", "s1"})
    assert not {"s0", "s1"} & {speakers[i] for i in trials.pairs.ravel()}


def voices(rng: np.random.Generator, names: list[str]) -> Features:
    centres = {name: rng.normal(size=16) for name in names}
    labels = [name for name in names for _ in range(6)]
    good = np.stack([centres[name] + 0.1 * rng.normal(size=16) + 50 for name in labels])
    return Features(
        labels, [f"{name}-{i}" for i, name in enumerate(labels)], [rng.normal(size=good.shape).astype(np.float32), good.astype(np.float32)]
    )


def test_verification_score_centres_on_train_and_chooses_the_layer_on_valid() -> None:
    rng = np.random.default_rng(4)
    found = {split: voices(rng, [f"{split}{i}" for i in range(20)]) for split in SPLITS}
    score = VerificationConfig(num_trials=200).build("speakers", SETTINGS).score(found, ["noise", "voice"])
    # the common offset of 50 hides the speakers unless it is taken away
    assert score.layer == "voice"
    assert score.value < 0.02
    assert score.by_layer["noise"]["test"] == pytest.approx(0.5, abs=0.12)
    assert not score.higher_is_better
    assert 0 <= score.details["min_dcf"]["0.05"] <= score.details["min_dcf"]["0.01"] <= 0.2


def test_verification_raises_data_error_when_no_speaker_is_held_out() -> None:
    rng = np.random.default_rng(4)
    found = {split: voices(rng, ["a", "b"]) for split in SPLITS}
    with pytest.raises(DataError, match="task `speakers`, valid split: trials need two speakers outside the train split"):
        VerificationConfig().build("speakers", SETTINGS).score(found, ["noise", "voice"])


def test_features_join_orders_by_cut_id() -> None:
    rows = {
        "b": Rows(["x"], [np.ones((1, 2), np.float32)]),
        "a": Rows(["y", "z"], [np.zeros((2, 2), np.float32)]),
        "c": Rows([], [np.zeros((0, 2), np.float32)]),
    }
    joined = Features.join(rows)
    assert (joined.labels, joined.groups) == (["y", "z", "x"], ["a", "a", "b"])
    assert joined.layers[0].tolist() == [[0, 0], [0, 0], [1, 1]]


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: EvaluationConfig(seeds=[]), "`seeds` must be at least one and all different, but is \\[\\]"),
        (lambda: EvaluationConfig(learning_rates=[0.0]), "`learning_rates` must be at least one and all positive"),
        (lambda: EvaluationConfig(steps=0), "`steps` must be at least 1, but is 0"),
        (lambda: EvaluationConfig(tasks={"a/b": FramesConfig()}), "`tasks` names must be letters"),
        (lambda: FramesConfig(tier=""), "`tier` must name an alignment tier"),
        (lambda: UtterancesConfig(separator=""), "`separator` must be null or at least one character"),
        (lambda: VerificationConfig(p_targets=[0.1, 1.0]), "`p_targets` must be at least one number, each between 0 and 1, but is \\[0.1, 1.0\\]"),
        (lambda: SegmentsConfig(max_cuts=0), "`max_cuts` must be at least 1 or null, but is 0"),
    ],
)
def test_configs_raise_config_error_when_out_of_range(make: object, match: str) -> None:
    with pytest.raises(ConfigError, match=match):
        make()  # type: ignore[operator]
