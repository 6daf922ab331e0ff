"""Audio and manifests that users get wrong, each through the command line: exit code 1 and one line that names file, value or rule; or it
just works and is counted.
"""

from __future__ import annotations

import gzip
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import soundfile
from lhotse.cut import MonoCut

from spear.data.audio import load_audio
from tests.bad_input import MEL, counts, make_good_audio, make_mel_road, manifest, stage, with_bad, with_cuts, with_folder
from tests.data.cuts import cut_of, save, tone
from tests.road import STAGES, Road


@pytest.fixture(scope="module")
def good_audio(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    return make_good_audio(tmp_path_factory.mktemp("good"))


@pytest.fixture
def road(tmp_path: Path) -> Road:
    return make_mel_road(tmp_path)


def missing(folder: Path) -> MonoCut:
    cut = cut_of(save(folder / "gone.flac", tone(1.0)), "bad")
    (folder / "gone.flac").unlink()
    return cut


def truncated(folder: Path) -> MonoCut:
    path = save(folder / "short.flac", np.random.default_rng(0).standard_normal(16000).astype(np.float32) * 0.1)
    cut = cut_of(path, "bad")
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    return cut


def emptied(folder: Path) -> MonoCut:
    cut = cut_of(save(folder / "empty.wav", tone(1.0)), "bad")
    soundfile.write(folder / "empty.wav", np.zeros(0, dtype=np.float32), 16000)
    return cut


def broken(folder: Path) -> MonoCut:
    audio = tone(1.0)
    audio[8000:8003] = np.nan
    return cut_of(save(folder / "nan.wav", audio, subtype="FLOAT"), "bad")


Make = Callable[[Path], MonoCut]


@pytest.mark.parametrize(
    ("make", "cause"),
    [(missing, "missing_file"), (truncated, "decode"), (emptied, "decode|length_mismatch|empty"), (broken, "not_finite")],
    ids=["missing_file", "truncated_flac", "zero_length", "nan_samples"],
)
def test_manifests_stops_at_a_bad_file_and_counts_it_below_the_limit(road: Road, good_audio: list[Path], make: Make, cause: str) -> None:
    bad = make(road.root)
    path = re.escape(bad.recording.sources[0].source)
    outcome = stage(with_bad(road, good_audio, bad), "manifests")
    expected = rf"corpus talk, split train: 1 of 10 cuts failed, a share of 0\.1, but `max_failed_share` is 0\.001; first: {path}: ({cause}) "
    assert re.match(expected, outcome.error())
    outcome = stage(road, "manifests", "manifests.max_failed_share=0.2")
    assert outcome.code == 0, outcome.err
    (failed,) = counts(road)["failed"].items()
    assert re.fullmatch(cause, failed[0])
    assert failed[1] == 1
    assert [cut.id for cut in manifest(road)] == [path.stem for path in good_audio]
    (failure,) = [json.loads(line) for line in (road.data / "manifests" / "failures.jsonl").read_text().splitlines()]
    assert failure["id"] == "bad"
    assert bad.recording.sources[0].source in failure["message"]


@pytest.mark.parametrize(
    ("name", "write", "cause"),
    [
        ("nothing.wav", lambda path: path.write_bytes(b""), "empty"),
        ("header.wav", lambda path: save(path, np.zeros(0, dtype=np.float32)), "empty"),
        ("text.flac", lambda path: path.write_text("not audio"), "decode"),
    ],
)
def test_manifests_names_a_bad_file_of_a_folder(road: Road, good_audio: list[Path], name: str, write: Callable[[Path], object], cause: str) -> None:
    folder = road.root / "audio"
    shutil.copytree(good_audio[0].parent, folder)
    write(folder / name)
    outcome = stage(with_folder(road, folder), "manifests")
    assert re.match(rf"corpus talk, split train: 1 of 10 cuts failed, .*first: {re.escape(str(folder / name))}: {cause} ", outcome.error())
    assert stage(road, "manifests", "manifests.max_failed_share=0.1").code == 0
    assert counts(road)["failed"] == {cause: 1}


def test_manifests_leaves_out_and_counts_10_ms_of_audio(road: Road, good_audio: list[Path]) -> None:
    outcome = stage(with_bad(road, good_audio, save(road.root / "click.wav", tone(0.01))), "manifests")
    assert outcome.code == 0
    assert "9 cuts, 0.00 h, 1 too_short" in outcome.err
    assert counts(road)["skipped"] == {"too_short": 1}
    assert len(manifest(road)) == 9


def test_manifests_exits_1_when_10_ms_is_all_there_is(road: Road) -> None:
    outcome = stage(with_cuts(road, [cut_of(save(road.root / "click.wav", tone(0.01)))]), "manifests")
    assert outcome.error() == "corpus talk, split train: no cut is left (0 cuts, 0.00 h, 1 too_short)"


def test_manifests_refuses_a_shortest_cut_of_10_ms(road: Road, good_audio: list[Path]) -> None:
    outcome = stage(with_bad(road, good_audio, save(road.root / "click.wav", tone(0.01))), "manifests", "manifests.min_duration_s=0.01")
    assert re.search(r"`min_duration_s` must be at least 0\.025, one window of features, but is 0\.01", outcome.error())


def test_tokens_counts_a_cut_too_short_for_the_teacher(road: Road, good_audio: list[Path]) -> None:
    """30 ms is enough for a log-mel but not for the first frame of a teacher with a longer window."""
    with_bad(road, good_audio, save(road.root / "click.wav", tone(0.03)))
    road.recipe.write_text(MEL.replace("stack: 2", "stack: 4"))
    keys = ["manifests.min_duration_s=0.03", "features.max_failed_share=0.2"]
    for name in ("manifests", "features", "quantizers"):
        assert stage(road, name, *keys).code == 0
    error = stage(road, "tokens", *keys).error()
    assert re.match(
        r"1 of 10 cuts failed \(too_short: 1\), more than `tokens\.max_failed_share` 0\.001 allows; first: the cut bad of 480 samples", error
    )
    assert stage(road, "tokens", *keys, "tokens.max_failed_share=0.1").code == 0
    found = json.loads((road.data / "tokens" / "mel" / "talk" / "train" / "artifact.json").read_text())["counts"]
    assert found["failed"] == {"too_short": 1}
    assert found["cuts"] == 9
    assert stage(road, "shards", *keys, "tokens.max_failed_share=0.1").code == 0


def test_manifests_averages_stereo(road: Road, good_audio: list[Path]) -> None:
    left, right = tone(1.0, hz=300), tone(1.0, hz=900, gain=0.1)
    folder = road.root / "audio"
    save(folder / "stereo.wav", np.stack([left, right], axis=1), subtype="FLOAT")
    shutil.copy(good_audio[0], folder)
    assert stage(with_folder(road, folder), "manifests").code == 0
    cut = next(cut for cut in manifest(road) if cut.id == "stereo")
    np.testing.assert_allclose(load_audio(cut), (left + right) / 2, atol=1e-6)
    for name in ("features", "quantizers", "tokens", "shards"):
        outcome = stage(road, name)
        assert outcome.code == 0, outcome.err


@pytest.mark.parametrize("rate", [8000, 44100])
def test_manifests_resamples(road: Road, good_audio: list[Path], rate: int) -> None:
    path = save(road.root / "other.wav", tone(1.0, rate=rate, hz=440), rate, subtype="FLOAT")
    assert stage(with_bad(road, good_audio, path), "manifests").code == 0
    cut = next(cut for cut in manifest(road) if cut.id == "bad")
    audio = load_audio(cut)
    assert (cut.sampling_rate, cut.num_samples, len(audio)) == (16000, 16000, 16000)
    spectrum = np.abs(np.fft.rfft(audio * np.hanning(16000)))
    assert spectrum.argmax() == 440
    for name in ("features", "quantizers", "tokens", "shards"):
        outcome = stage(road, name)
        assert outcome.code == 0, outcome.err


def test_manifests_keeps_and_counts_a_silent_clip(road: Road, good_audio: list[Path]) -> None:
    path = save(road.root / "silence.wav", np.zeros(16000, dtype=np.float32))
    outcome = stage(with_bad(road, good_audio, path), "manifests")
    assert outcome.code == 0
    assert "corpus talk, split train: 1 of 10 cuts are silent (10.0 %)" in outcome.err
    assert (counts(road)["silent"], counts(road)["cuts"]) == (1, 10)


def test_manifests_splits_a_clip_of_an_hour(road: Road) -> None:
    rng = np.random.default_rng(0)
    path = save(road.root / "hour.wav", np.tile(rng.integers(-3000, 3000, 8000, dtype=np.int16), 3600), 8000)
    assert stage(with_cuts(road, [cut_of(path)]), "manifests").code == 0
    cuts = manifest(road)
    assert [cut.id for cut in cuts] == [f"hour-w{i:04d}" for i in range(113)]
    assert max(cut.duration for cut in cuts) <= 32
    assert sum(cut.num_samples for cut in cuts) == 3600 * 16000
    assert (counts(road)["cuts"], counts(road)["hours"]) == (113, 1)


def test_manifests_exits_1_when_a_cut_id_is_there_twice(road: Road, good_audio: list[Path]) -> None:
    twice = [cut_of(good_audio[0], "twin"), cut_of(good_audio[1], "twin")]
    error = stage(with_cuts(road, twice), "manifests").error()
    first, second = (re.escape(str(path)) for path in good_audio[:2])
    assert re.fullmatch(rf"corpus talk: cut id 'twin' must be unique, but is there 2 times: {first} \(train\) and {second} \(train\)", error)


def test_manifests_exits_1_when_a_cut_id_is_in_two_splits(road: Road, good_audio: list[Path]) -> None:
    with_cuts(road, [cut_of(good_audio[0]), cut_of(good_audio[1])], valid=[cut_of(good_audio[1])])
    error = stage(road, "manifests").error()
    assert re.match(r"corpus talk: cut id 'good1' must be unique, but is there 2 times: .*\(train\) and .*\(valid\)", error)


def test_manifests_exits_1_when_the_manifest_is_missing(road: Road) -> None:
    road.corpora.write_text("corpora: [{name: talk, domain: speech, source: {type: cuts, train: nowhere/cuts.jsonl.gz}}]\n")
    assert stage(road, "manifests").error() == f"{road.root}/nowhere/cuts.jsonl.gz does not exist"


def test_manifests_exits_1_when_the_manifest_is_cut_short(road: Road, good_audio: list[Path]) -> None:
    with_cuts(road, [cut_of(path) for path in good_audio])
    path = road.root / "train.jsonl.gz"
    path.write_bytes(gzip.compress(gzip.decompress(path.read_bytes())[:-100]))
    assert re.match(rf"{re.escape(str(path))} is not a manifest of cuts: item 9: ", stage(road, "manifests").error())


@pytest.mark.parametrize("name", STAGES)
def test_every_stage_exits_1_when_the_domain_is_unknown_to_the_recipe(road: Road, good_audio: list[Path], name: str) -> None:
    with_cuts(road, [cut_of(path) for path in good_audio], domain="birds")
    assert stage(road, name).error() == "domain 'birds' is not in the recipe's `objective.weights`, which knows speech"
    assert not road.data.exists()


@pytest.mark.parametrize("name", [name for name in STAGES if name != "manifests"])
def test_every_stage_exits_1_when_the_one_before_it_has_not_run(road: Road, good_audio: list[Path], name: str) -> None:
    with_cuts(road, [cut_of(path) for path in good_audio])
    assert re.search(r"does not exist|no finished checkpoint", stage(road, name).error())
