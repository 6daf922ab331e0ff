"""Speaker tasks without training: lists of trials, normalised scores, profiling, counting."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from spear.errors import ConfigError, DataError
from spear.evaluation.metrics import equal_error_rate
from spear.evaluation.tasks.base import Features, Settings, Split
from spear.evaluation.tasks.profiling import ProfilingConfig, band, by_neighbours
from spear.evaluation.tasks.speaker_count import SpeakerCountConfig, count_clusters, windows
from spear.evaluation.tasks.verification import VerificationConfig, cosines, directions, normalised
from spear.evaluation.trials import Trials, cut_id, find_trials, read_trials
from tests.evaluation.cuts import make_cut

SETTINGS = Settings(seeds=(0, 1), resamples=50)
SPLITS: tuple[Split, ...] = ("train", "valid", "test")


def voices(rng: np.random.Generator, names: list[str], items: int = 6, noise: float = 0.1, prefix: str = "") -> Features:
    """A layer of noise, and one of a direction per name with noise around it, all off centre."""
    centres = {name: rng.normal(size=16) for name in names}
    labels = [name for name in names for _ in range(items)]
    good = np.stack([centres[name] + noise * rng.normal(size=16) + 50 for name in labels]).astype(np.float32)
    groups = [f"{prefix}{name}-{i}" for i, name in enumerate(labels)]
    return Features(labels, groups, [rng.normal(size=good.shape).astype(np.float32), good])


def three_splits(noise: float = 0.1) -> dict[Split, Features]:
    rng = np.random.default_rng(4)
    return {split: voices(rng, [f"{split}{i}" for i in range(12)], noise=noise) for split in SPLITS}


# ---- equal error rate ----


@pytest.mark.parametrize("distance", [0.3, 1.0, 3.0])
def test_equal_error_rate_is_that_of_scikit_learns_roc(distance: float) -> None:
    from sklearn.metrics import roc_curve

    rng = np.random.default_rng(int(10 * distance))
    same = rng.random(3000) < 0.3
    scores = np.round(rng.normal(size=3000) + distance * same, 2)  # rounded: many scores are equal
    false_alarms, hits, _ = roc_curve(same, scores, drop_intermediate=False)
    # on the straight line between the two points around it, the share of misses equals that of false alarms
    share = np.interp(0.0, false_alarms - (1 - hits), np.arange(len(hits)))
    expected = np.interp(share, np.arange(len(hits)), false_alarms)
    assert equal_error_rate(scores, same) == pytest.approx(expected, abs=1e-12)


# ---- lists of trials ----


@pytest.mark.parametrize(
    ("name", "expected"), [("id10270/x6uYqmx31kE/00001.wav", "id10270-x6uYqmx31kE-00001"), ("audio/abc.flac", "audio-abc"), ("cut-1", "cut-1")]
)
def test_cut_id_joins_the_path_without_its_suffix(name: str, expected: str) -> None:
    assert cut_id(name) == expected


@pytest.mark.parametrize("mark", ["", "\ufeff"])
def test_read_trials_reads_labels_and_pairs_and_find_trials_their_numbers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mark: str) -> None:
    path = tmp_path / "list.txt"
    path.write_text(f"{mark}1 a/1.wav a/2.wav\n\n0 a/1.wav b.c\ntarget b.c a/2.wav\n", encoding="utf-8")
    monkeypatch.setenv("LISTS", str(tmp_path))
    listed = read_trials("$LISTS/list.txt")
    assert listed.same == [True, False, True]
    # a name that is an id as it stands is taken so: b.c keeps what looks like a suffix
    trials = find_trials(listed, ["b.c", "a-2", "a-1"])
    assert trials.pairs.tolist() == [[2, 1], [2, 0], [0, 1]]
    assert trials.same.tolist() == [True, False, True]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("1 a b\n2 a c\n", "line 2 of `trials` .* must be 0 or 1 and two files, but is '2 a c'"),
        ("1 a\n", "line 1 of `trials`"),
        ("1 a b\n1 a c\n", "must have trials of the same and of another speaker, but has 2 of one kind"),
    ],
)
def test_read_trials_raises_data_error_when_the_file_is_wrong(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "list.txt").write_text(text)
    with pytest.raises(DataError, match=message):
        read_trials(str(tmp_path / "list.txt"))


def test_read_trials_raises_data_error_when_there_is_no_file(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"`trials` .*none\.txt cannot be read"):
        read_trials(str(tmp_path / "none.txt"))


def listed_task(tmp_path: Path, text: str, **settings: object) -> tuple[VerificationConfig, dict[Split, list[object]]]:
    (tmp_path / "list.txt").write_text(text)
    cuts: dict[Split, list[object]] = {
        split: [make_cut(f"{split}-{name}-{i}", speaker=f"{split}-{name}") for name in "abc" for i in range(3)] for split in SPLITS
    }
    return VerificationConfig(trials=str(tmp_path / "list.txt"), **settings), cuts  # type: ignore[arg-type]


def test_verification_takes_exactly_the_listed_cuts_whatever_max_cuts_says(tmp_path: Path) -> None:
    config, cuts = listed_task(tmp_path, "1 test/a/0.wav test/a/1.wav\n0 test/a/0.wav test-b-2\n", max_cuts=2)
    chosen = config.build("vox", SETTINGS).select(cuts)
    assert {cut.id for cut in chosen["test"]} == {"test-a-0", "test-a-1", "test-b-2"}
    assert (len(chosen["train"]), len(chosen["valid"])) == (2, 2)


def test_verification_raises_data_error_when_a_listed_cut_is_missing(tmp_path: Path) -> None:
    config, cuts = listed_task(tmp_path, "1 test/a/0.wav test/a/9.wav\n0 test/a/0.wav test-b-2\n")
    with pytest.raises(DataError, match=r"task `vox`: the listed trials name 1 cuts that the test split lacks, such as test/a/9\.wav"):
        config.build("vox", SETTINGS).select(cuts)


def test_verification_raises_data_error_when_a_listed_speaker_is_in_train(tmp_path: Path) -> None:
    text = "1 test/a/0.wav test/a/1.wav\n0 test/a/0.wav test-b-2\n"
    config, cuts = listed_task(tmp_path, text)
    cuts["train"].append(make_cut("again", speaker="test-b"))
    with pytest.raises(DataError, match="speaker 'test-b' of the listed trials is in the train split, too"):
        config.build("vox", SETTINGS).select(cuts)
    config, _ = listed_task(tmp_path, text, held_out=False)
    assert len(config.build("vox", SETTINGS).select(cuts)["test"]) == 3


def test_verification_scores_the_listed_trials(tmp_path: Path) -> None:
    features = three_splits()
    test = features["test"]
    same = [(a, b) for a in range(72) for b in range(a) if test.labels[a] == test.labels[b]]
    # every trial is labelled the wrong way round but a tenth: an error of nine tenths, which drawn trials could never have
    lines = [f"{int(k % 10 == 0)} {test.groups[a]} {test.groups[b]}" for k, (a, b) in enumerate(same)]
    lines += [f"{int(k % 10 != 0)} {test.groups[k]} {test.groups[(k + 30) % 72]}" for k in range(72)]
    (tmp_path / "list.txt").write_text("\n".join(lines))
    score = VerificationConfig(trials=str(tmp_path / "list.txt")).build("vox", SETTINGS).score(features, ["noise", "voice"])
    assert score.details["items"] == len(lines)
    assert score.layer == "voice"
    assert score.value > 0.5
    assert score.std == 0.0


# ---- normalised scores ----


def test_normalised_scores_follow_the_formula() -> None:
    rng = np.random.default_rng(1)
    unit, cohort = directions(rng.normal(size=(5, 8))), directions(rng.normal(size=(7, 8)))
    trials = Trials(np.array([[0, 1], [2, 4]]), np.array([True, False]))
    scores = cosines(unit, trials)
    for top in (None, 3, 99):
        found = normalised(scores, trials, unit, cohort, top)
        for k, (a, b) in enumerate(trials.pairs):
            sides = [np.sort(cohort.astype(float) @ unit[i].astype(float))[-(top or 7) :] for i in (a, b)]
            expected = np.mean([(scores[k] - side.mean()) / side.std() for side in sides])
            assert found[k] == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("kind", ["s", "as"])
def test_verification_normalisation_removes_a_shift_that_some_cuts_share(kind: str) -> None:
    """Half of the voices lie close together and hardly vary: one threshold fits both halves only once scores are relative to a cohort."""
    rng = np.random.default_rng(3)

    def crowd(split: str) -> Features:
        centres = [rng.normal(size=32) * (0.25 if i % 2 else 1.0) + 2 * np.eye(32)[0] * (i % 2) for i in range(24)]
        rows = [centres[i] + (0.1 if i % 2 else 0.7) * rng.normal(size=32) for i in range(24) for _ in range(6)]
        labels = [f"{split}{i}" for i in range(24) for _ in range(6)]
        return Features(labels, [f"{name}-{i}" for i, name in enumerate(labels)], [np.stack(rows).astype(np.float32)])

    features: dict[Split, Features] = {split: crowd(split) for split in SPLITS}
    plain = VerificationConfig().build("speakers", SETTINGS).score(features, ["voice"])
    better = VerificationConfig(normalization=kind, top=8).build("speakers", SETTINGS).score(features, ["voice"])  # type: ignore[arg-type]
    assert plain.value > 0.02
    assert better.value < 0.8 * plain.value
    assert better.details["normalization"] == kind


# ---- profiling ----


def profiled(noise: float) -> dict[Split, Features]:
    """Three classes whose directions are the same in every split."""
    found = {}
    for split in SPLITS:
        rng = np.random.default_rng(len(split))
        rows = [10 + np.eye(6)[k % 3] + noise * rng.normal(size=6) for k in range(60)]
        found[split] = Features([f"c{k % 3}" for k in range(60)], [f"u{k}" for k in range(60)], [np.stack(rows).astype(np.float32)])
    return found


@pytest.mark.parametrize("rule", ["centroid", "knn"])
def test_profiling_finds_classes_by_either_rule_and_chance_without_them(rule: str) -> None:
    task = ProfilingConfig(rule=rule).build("gender", SETTINGS)  # type: ignore[arg-type]
    assert task.score(profiled(0.1), ["voice"]).value == 1.0
    lost = task.score(profiled(30.0), ["voice"])
    assert lost.value == pytest.approx(1 / 3, abs=0.2)
    assert lost.details["chance"] == pytest.approx(1 / 3)


def test_by_neighbours_counts_votes_before_cosines() -> None:
    train = directions(np.array([[1, 0], [1, 0.3], [1, 0.4], [0, 1]], float))
    labels = np.array(["a", "b", "b", "c"])
    assert by_neighbours(train, labels, ProfilingConfig(neighbours=3))(directions(np.array([[1.0, 0.0]])))[0] == "b"
    assert by_neighbours(train, labels, ProfilingConfig(neighbours=2))(directions(np.array([[1.0, 0.0]])))[0] == "a"


@pytest.mark.parametrize(("value", "expected"), [(29.9, "below 30"), (30, "30 to 50"), (50, "50 and above"), (81, "50 and above")])
def test_band_has_its_lower_edge(value: float, expected: str) -> None:
    assert band(value, [30, 50]) == expected


def test_profiling_leaves_out_speakers_of_train_and_reads_bands() -> None:
    cuts = {split: [make_cut(f"{split}{i}", speaker=f"s{i}", label=str(10 * i)) for i in range(3, 7)] for split in SPLITS}
    cuts["test"].append(make_cut("new", speaker="new", label="35"))
    cuts["valid"].append(make_cut("newer", speaker="newer", label="70"))
    task = ProfilingConfig(label="label", bands=[40]).build("age", SETTINGS)
    chosen = task.select(cuts)
    assert [cut.id for cut in chosen["test"]] == ["new"]
    assert [cut.id for cut in chosen["valid"]] == ["newer"]
    assert task.rows(chosen["test"][0], "test", np.arange(2) / 50, [np.ones((2, 3), np.float32)]).labels == ["below 40"]
    with pytest.raises(DataError, match="`label` of cut x must be a number for `bands`, but is 'old'"):
        task.rows(make_cut("x", label="old"), "test", np.arange(2) / 50, [np.ones((2, 3), np.float32)])


def test_profiling_reads_the_supervisions_gender() -> None:
    cut = make_cut("x", speaker="s")
    cut.supervisions[0].gender = "female"
    assert ProfilingConfig().build("gender", SETTINGS).rows(cut, "test", np.arange(2) / 50, [np.ones((2, 3), np.float32)]).labels == ["female"]


def test_profiling_names_held_out_where_it_leaves_nothing() -> None:
    cuts: dict[Split, list[object]] = {split: [make_cut(f"{split}{i}", speaker=f"s{i % 2}", label="a") for i in range(4)] for split in SPLITS}
    with pytest.raises(DataError, match=r"every labelled speaker of the valid split is in the train split, too \(`held_out` is true"):
        ProfilingConfig(label="label").build("age", SETTINGS).select(cuts)


def test_profiling_interval_draws_speakers() -> None:
    features = profiled(0.1)
    features["test"].labels[20:40] = [f"c{(k + 1) % 3}" for k in range(20, 40)]  # one speaker of three is always wrong
    task = ProfilingConfig(label="label", held_out=False).build("age", SETTINGS)
    alone = task.score(features, ["voice"]).ci
    cuts: dict[Split, list[object]] = {split: [make_cut(f"u{k}", speaker=f"s{k // 20}", label="a") for k in range(60)] for split in SPLITS}
    task.select(cuts)
    together = task.score(features, ["voice"]).ci
    assert together[1] - together[0] > 2 * (alone[1] - alone[0])


@pytest.mark.parametrize("config", [VerificationConfig(max_cuts=4), SpeakerCountConfig(max_cuts=4, max_speakers=2)])
def test_speakers_of_train_are_held_out_whatever_max_cuts_says(config: VerificationConfig | SpeakerCountConfig) -> None:
    cuts: dict[Split, list[object]] = {split: [make_cut(f"{split}{i}", speaker=f"s{i // 2}") for i in range(40)] for split in SPLITS}
    task = config.build("voices", SETTINGS)
    chosen = task.select(cuts)
    rng = np.random.default_rng(0)
    rows = {split: [str(cut.supervisions[0].speaker) for cut in found] for split, found in chosen.items()}  # type: ignore[attr-defined]
    features = {
        split: Features(labels, [f"{split}{i}" for i in range(len(labels))], [rng.normal(size=(len(labels), 4)).astype(np.float32)])
        for split, labels in rows.items()
    }
    with pytest.raises(DataError, match=r"(0 speakers are left|but has 0)"):
        task.score(features, ["voice"])


# ---- counting ----


def test_windows_lie_within_the_frames_or_are_all_of_them() -> None:
    times = 0.01 + np.arange(100) / 50  # 2 s
    assert windows(times, 1.0, 0.5) == [(0, 50), (25, 75)]
    assert windows(times, 3.0, 0.5) == [(0, 100)]
    assert windows(times[:1], 1.0, 0.5) == [(0, 1)]


def test_count_clusters_counts_those_of_enough_rows() -> None:
    unit = directions(np.repeat(np.eye(4), [5, 4, 1, 1], axis=0) + 0.01)
    assert count_clusters(unit, np.array([0.001, 0.2, 1.3]), "average", 1).tolist() == [4, 4, 1]
    assert count_clusters(unit, np.array([0.001, 0.2, 1.3]), "average", 2).tolist() == [2, 2, 1]
    assert count_clusters(unit[-2:], np.array([0.2]), "average", 2).tolist() == [2]
    assert count_clusters(unit[:1], np.array([0.2]), "average", 2).tolist() == [1]


def test_speaker_count_is_right_for_clear_voices_and_chance_for_noise() -> None:
    score = SpeakerCountConfig(num_conversations=40).build("count", SETTINGS).score(three_splits(), ["noise", "voice"])
    assert score.layer == "voice"
    assert score.value > 0.95
    assert score.details["chance"] == 0.25
    assert score.details["mean_absolute_error"] == pytest.approx(1 - score.value, abs=0.05)
    lost = SpeakerCountConfig(num_conversations=40).build("count", SETTINGS).score(three_splits(noise=30.0), ["noise", "voice"])
    assert lost.value < 0.6


def test_speaker_count_raises_data_error_when_there_are_too_few_speakers() -> None:
    with pytest.raises(DataError, match=r"needs at least `max_speakers` 30 speakers that train lacks in the valid split, but has 12"):
        SpeakerCountConfig(max_speakers=30).build("count", SETTINGS).score(three_splits(), ["noise", "voice"])


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: VerificationConfig(trials=""), "`trials` must be null or a file, but is empty"),
        (lambda: VerificationConfig(cohort=1), "`cohort` must be at least 2, but is 1"),
        (lambda: ProfilingConfig(bands=[3, 2]), "`bands` must rise"),
        (lambda: ProfilingConfig(label=""), "`label` must name a field"),
        (lambda: SpeakerCountConfig(max_speakers=1), "`max_speakers` must be at least 2, but is 1"),
        (lambda: SpeakerCountConfig(hop_s=0), "`hop_s` must be above 0|`hop_s` must be more than 0|`hop_s`"),
    ],
)
def test_configs_raise_config_error_when_out_of_range(make: object, match: str) -> None:
    with pytest.raises(ConfigError, match=match):
        make()  # type: ignore[operator]
