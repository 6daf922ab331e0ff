"""Teachers, disks and folders that users get wrong, each through the command line: exit code 1 and one line that names file, value or rule."""

from __future__ import annotations

import os
import re
import shutil
from contextlib import suppress
from pathlib import Path

import pytest

from tests.bad_input import make_good_audio, make_mel_road, stage, with_cuts
from tests.data.cuts import cut_of
from tests.road import RECIPE, STAGES, Road, make_read_only, mounted, save_teacher


@pytest.fixture(scope="module")
def good_audio(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    return make_good_audio(tmp_path_factory.mktemp("good"))


@pytest.fixture
def road(tmp_path: Path) -> Road:
    return make_mel_road(tmp_path)


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
