"""What users get wrong, each through the command line: exit code 1 and one line that names file, value or rule; or it just works and is counted."""

from __future__ import annotations

import gzip
import json
import os
import re
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
from lhotse import CutSet
from lhotse.cut import MonoCut

from spear.data.audio import load_audio
from tests.data.cuts import cut_of, save, tone, write_cuts
from tests.road import RECIPE, STAGES, Outcome, Road, command, make_read_only, mounted, save_teacher

GOOD = 9
MEL = """
teachers: {mel: {type: logmel, num_mel_bins: 16, stack: 2}}
quantizers: {mel: {type: kmeans, codebook_size: 8}}
features: {num_frames: 300}
objective: {type: masked_prediction, weights: {speech: {mel: 1.0}}}
student: {type: zipformer, downsampling_factor: [1, 2], num_encoder_layers: 1, encoder_dim: 32, encoder_unmasked_dim: 16, feedforward_dim: 48,
  num_heads: 2, cnn_module_kernel: 7, conv_channels: [4, 8, 8]}
"""


@pytest.fixture(scope="module")
def good_audio(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("good")
    return [save(folder / f"good{i}.flac", tone(0.7 + 0.05 * i, hz=200 + 40 * i)) for i in range(GOOD)]


@pytest.fixture
def road(tmp_path: Path) -> Road:
    """A run with one log-mel teacher and no corpora file yet."""
    made = Road(tmp_path, tmp_path / "data", tmp_path / "exp")
    made.recipe.write_text(MEL)
    return made


def with_cuts(road: Road, cuts: list[MonoCut], valid: list[MonoCut] | None = None, domain: str = "speech") -> Road:
    """Give the run one corpus, `talk`, of these cuts."""
    source = f"type: cuts, train: {write_cuts(road.root / 'train.jsonl.gz', cuts)}"
    if valid:
        source += f", valid: {write_cuts(road.root / 'valid.jsonl.gz', valid)}"
    road.corpora.write_text(f"corpora: [{{name: talk, domain: {domain}, source: {{{source}}}}}]\n")
    return road


def with_bad(road: Road, good_audio: list[Path], bad: Path | MonoCut) -> Road:
    """One bad cut among nine good ones; the bad one is the middle one."""
    cuts = [cut_of(path) for path in good_audio]
    return with_cuts(road, [*cuts[:5], cut_of(bad, "bad") if isinstance(bad, Path) else bad, *cuts[5:]])


def with_folder(road: Road, folder: Path) -> Road:
    """Give the run one corpus of a folder, all of it for training."""
    source = f"type: folder, path: {folder}, valid_share: 0.0, test_share: 0.0"
    road.corpora.write_text(f"corpora: [{{name: talk, domain: speech, source: {{{source}}}}}]\n")
    return road


def stage(road: Road, name: str, *overrides: str) -> Outcome:
    return command(*road.arguments(name, *(text for override in overrides for text in ("--set", override))))


def manifest(road: Road) -> list[MonoCut]:
    return list(CutSet.from_jsonl_lazy(road.data / "manifests" / "talk_cuts_train.jsonl.gz"))


def counts(road: Road) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((road.data / "manifests" / "artifact.json").read_text())["counts"]["talk"]["train"]
    return found


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


WAVLM = RECIPE[RECIPE.index("manifests:") : RECIPE.index("objective:")] + (
    """
teachers: {wav: {type: huggingface, model: teachers/speech, layer: 1}}
quantizers: {wav: {type: kmeans, codebook_size: 8}}
objective: {type: masked_prediction, weights: {speech: {wav: 1.0}}}
"""
)


@pytest.fixture
def wavlm(road: Road, good_audio: list[Path]) -> Road:
    """A run with a WavLM teacher, as far as manifests."""
    road.recipe.write_text(WAVLM)
    save_teacher(road.data / "teachers" / "speech")
    assert stage(with_cuts(road, [cut_of(path) for path in good_audio]), "manifests").code == 0
    return road


@pytest.mark.parametrize("name", ["features", "preflight"])
def test_a_teacher_folder_without_weights_exits_1(wavlm: Road, name: str) -> None:
    (wavlm.data / "teachers" / "speech" / "model.safetensors").unlink()
    message = "`model` teachers/speech must hold weights (model.safetensors), but does not"
    outcome = stage(wavlm, name)
    if name == "features":
        assert outcome.error() == message
    else:
        assert outcome.code == 1
        assert f"PROBLEM teacher wav: loads, and rate, width and layers are as declared: {message}" in outcome.out


def test_a_teacher_folder_that_does_not_exist_exits_1(wavlm: Road) -> None:
    error = stage(wavlm, "features", "teachers.wav.model=./teachers/absent").error()
    assert error == "`model` must be a folder or a Hugging Face id, but ./teachers/absent does not exist"


@pytest.mark.parametrize("layer", [3, 21, -4])
def test_a_layer_that_does_not_exist_exits_1(wavlm: Road, layer: int) -> None:
    error = stage(wavlm, "features", f"teachers.wav.layer={layer}").error()
    assert error == f"`layer` must be between 0 and 2, but is {layer} (teachers/speech; negative layers count from the end)"


def test_tokens_of_another_teacher_exit_1(wavlm: Road) -> None:
    """Whoever changes the teacher's folder behind the back of features, tokens or shards is told so."""
    for name in ("features", "quantizers", "tokens", "shards"):
        outcome = stage(wavlm, name)
        assert outcome.code == 0, outcome.err
    save_teacher(wavlm.data / "teachers" / "speech", seed=4)
    assert re.match(
        rf"{wavlm.data}/features/wav was made from other inputs: `inputs\.teacher` was \w+…, is \w+…; remove", stage(wavlm, "features").error()
    )
    assert re.match(rf"{wavlm.data}/quantizers/wav was fitted on another teacher than `teachers\.wav`: remove ", stage(wavlm, "tokens").error())
    for folder in ("features", "quantizers"):
        shutil.rmtree(wavlm.data / folder)
        assert stage(wavlm, folder).code == 0
    error = stage(wavlm, "tokens").error()
    assert re.match(rf"{wavlm.data}/tokens/wav/talk/train was made from other inputs: `inputs\.quantizer` was .*`inputs\.teacher` was ", error)
    shutil.rmtree(wavlm.data / "tokens")
    assert stage(wavlm, "tokens").code == 0
    error = stage(wavlm, "shards").error()
    assert re.match(rf"{wavlm.data}/shards/talk was made from other inputs: `inputs\.tokens/wav/train` was \w+…, is \w+…; remove", error)


def fill(path: Path) -> None:
    """Write until the disk is full."""
    with path.open("wb", buffering=0) as file, suppress(OSError):
        while file.write(bytes(4096)):
            pass


def test_every_data_stage_exits_1_on_a_full_disk(road: Road, good_audio: list[Path]) -> None:
    """The disk fills up in one stage after the other; with more room the road goes on where it was."""
    with_cuts(road, [cut_of(path) for path in good_audio])
    with mounted(road.data, "size=2m"):
        filler = road.data / "filler"
        for name in ("manifests", "features", "quantizers", "tokens", "shards"):
            fill(filler)
            assert re.match(rf"cannot (write|make the folder) {road.data}/\S+: no space left on the disk", stage(road, name).error())
            filler.unlink()
            outcome = stage(road, name)
            assert outcome.code == 0, outcome.err
    assert not any(road.data.iterdir())


def test_shards_exit_1_when_the_disk_fills_up_on_the_way(road: Road, good_audio: list[Path]) -> None:
    with_cuts(road, [cut_of(path) for path in good_audio])
    for name in ("manifests", "features", "quantizers", "tokens"):
        assert stage(road, name).code == 0
    with mounted(road.data / "shards", "size=64k"):
        error = stage(road, "shards").error()
        assert re.match(rf"cannot write {road.data}/shards/talk/train/recording\.000000\.tar: no space left on the disk", error)
        assert not list((road.data / "shards").rglob("*.tmp"))


def test_pretrain_exits_1_when_the_disk_fills_up_on_the_way(road: Road, good_audio: list[Path]) -> None:
    with_cuts(road, [cut_of(path) for path in good_audio])
    for name in ("manifests", "features", "quantizers", "tokens", "shards"):
        assert stage(road, name).code == 0
    keys = ["training.max_steps=2", "training.precision=fp32", "sampling.max_batch_s=3", "training.save_every=1"]
    with mounted(road.exp, "size=256k"):
        error = stage(road, "pretrain", *keys).error()
        assert re.match(rf"cannot write {road.exp}/checkpoints/\S+: ", error)
        assert "o space left" in error


def test_every_data_stage_exits_1_when_its_folder_is_read_only(road: Road, good_audio: list[Path]) -> None:
    with_cuts(road, [cut_of(path) for path in good_audio])
    with mounted(road.data, "size=8m"):
        make_read_only(road.data)
        error = stage(road, "manifests").error()
        assert error == f"cannot write {road.data}/manifests: the file system is read-only"
    names = ("manifests", "features", "quantizers", "tokens", "shards")
    for name in names:
        with mounted(road.data / name, "size=8m"):
            make_read_only(road.data / name)
            assert re.match(rf"cannot write {road.data}/{name}/\S+: the file system is read-only", stage(road, name).error())
        assert stage(road, name).code == 0


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write in any folder")
def test_manifests_exits_1_when_the_folder_is_not_writable(road: Road, good_audio: list[Path]) -> None:
    road.data.mkdir(mode=0o555)
    error = stage(with_cuts(road, [cut_of(path) for path in good_audio]), "manifests").error()
    assert error == f"cannot write {road.data}/manifests: the folder is not writable"


@pytest.mark.parametrize("name", ["manifests", "pretrain"])
def test_a_file_in_the_way_of_a_folder_exits_1(road: Road, good_audio: list[Path], name: str) -> None:
    with_cuts(road, [cut_of(path) for path in good_audio])
    if name == "manifests":
        road.data.write_text("a file")
        assert stage(road, name).error() == f"cannot make the folder {road.data}/manifests: a file is in the way"
        return
    for earlier in STAGES[:5]:
        assert stage(road, earlier).code == 0
    road.exp.write_text("a file")
    assert stage(road, name, "training.max_steps=1").error() == f"cannot make the folder {road.exp}: a file is in the way"
