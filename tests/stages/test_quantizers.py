"""Stage `quantizers` on features written by hand."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

from spear.errors import ArtifactError, DataError
from spear.files import seed_from, write_tensors
from spear.quantizers import MVQ, KMeans, load_quantizer
from spear.quantizers.kmeans import KMeansConfig
from spear.quantizers.mvq_fit import MVQConfig
from spear.recipe import Run
from spear.stages import quantizers
from spear.stages.artifact import Artifact, fingerprint_of
from tests.quantizers.frames import clustered
from tests.teachers.runs import contents

SMALL = MVQConfig(num_codebooks=4, codebook_size=16, rounds=2, epochs=2, polish_rounds=1)


def write_features(data: Path, teacher: str, train: torch.Tensor, heldout: torch.Tensor, *, version: int = 1) -> Path:
    """A finished features folder of two blocks."""
    folder = data / "features" / teacher
    artifact = Artifact(folder, kind="features", config={"made": version}, inputs={"teacher": "t"})
    with artifact.making():
        half = len(train) // 2
        for index, block in enumerate((train[:half], train[half:])):
            write_tensors(folder / f"frames-{index:05d}.safetensors", {"frames": block})
        write_tensors(folder / "heldout.safetensors", {"frames": heldout})
    return folder


def make_run(root: Path, configs: dict[str, Any], *, seed: int = 0) -> Run:
    recipe = SimpleNamespace(seed=seed, teachers=dict.fromkeys(configs), quantizers=configs)
    return Run(cast(Any, recipe), [], root / "data", root / "exp")


def speech_run(root: Path, **settings: Any) -> Run:
    run = make_run(root, {"speech": SMALL}, **settings)
    if not (run.data / "features").exists():
        write_features(run.data, "speech", clustered(800, 8), clustered(100, 8, seed=1))
    return run


def test_quantizers_fits_every_teacher_and_writes_its_card(tmp_path: Path) -> None:
    run = make_run(tmp_path, {"speech": SMALL, "audio": KMeansConfig(codebook_size=20)})
    features = {
        "speech": write_features(run.data, "speech", clustered(800, 8), clustered(100, 8, seed=1)),
        "audio": write_features(run.data, "audio", clustered(300, 6), clustered(50, 6, seed=1)),
    }
    quantizers.run(run)
    expected = {"artifact.json", "card.json", "card.md", "config.json", "quantizer.safetensors", "usage.svg"}
    for name, kind, more in (("speech", MVQ, {"correlation.svg"}), ("audio", KMeans, set())):
        folder = run.data / "quantizers" / name
        assert {path.name for path in folder.iterdir()} == expected | more
        quantizer = load_quantizer(folder)
        assert isinstance(quantizer, kind)
        done = json.loads((folder / "artifact.json").read_text())
        assert done["inputs"] == {"features": fingerprint_of(features[name]), "teacher": "t"}
        assert done["config"]["seed"] == seed_from(0, "quantizer", name)
        assert done["extra"]["quantizer"] == quantizer.fingerprint()
        assert 0 < done["extra"]["relative_loss"] < 0.6
    assert json.loads((run.data / "quantizers" / "speech" / "artifact.json").read_text())["counts"] == {"frames": 800, "heldout_frames": 100}


def test_quantizers_is_a_function_of_features_and_seed(tmp_path: Path) -> None:
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        quantizers.run(speech_run(tmp_path / name, seed=seed))
    a, b, c = (contents(tmp_path / name / "data" / "quantizers" / "speech") for name in "abc")
    assert a == b
    assert a["quantizer.safetensors"] != c["quantizer.safetensors"]


def test_quantizers_does_nothing_when_finished_and_refuses_other_inputs(tmp_path: Path) -> None:
    run = speech_run(tmp_path)
    quantizers.run(run)
    path = run.data / "quantizers" / "speech" / "artifact.json"
    before = path.read_bytes()
    quantizers.run(run)
    assert path.read_bytes() == before
    with pytest.raises(ArtifactError, match=r"`config.quantizer.rounds` was 2, is 3"):
        quantizers.run(make_run(tmp_path, {"speech": MVQConfig(num_codebooks=4, codebook_size=16, rounds=3, epochs=2, polish_rounds=1)}))
    shutil.rmtree(run.data / "features" / "speech")
    write_features(run.data, "speech", clustered(800, 8), clustered(100, 8, seed=1), version=2)
    with pytest.raises(ArtifactError, match=r"`inputs.features` was"):
        quantizers.run(run)


def test_quantizers_resumes_a_killed_fit_to_the_same_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    quantizers.run(speech_run(tmp_path / "whole"))
    run = speech_run(tmp_path / "killed")

    def dies(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(quantizers, "write_card", dies)
        with pytest.raises(KeyboardInterrupt):
            quantizers.run(run)
    folder = run.data / "quantizers" / "speech"
    assert not (folder / "artifact.json").exists()
    assert (folder / quantizers.CHECKPOINT).exists()
    quantizers.run(run)
    assert contents(folder) == contents(tmp_path / "whole" / "data" / "quantizers" / "speech")


def test_quantizers_raises_data_error_when_features_do_not_serve(tmp_path: Path) -> None:
    good = clustered(100, 8)
    bad = good.clone()
    bad[7, 3] = float("nan")
    for name, train, heldout, message in (
        ("few", good[:10], good, "features/speech: MVQ needs at least `codebook_size` 16 frames, but has 10"),
        ("nan", bad, good, "features/speech: training frames have non-finite values"),
        ("heldout", good, bad, "features/speech: held-out frames have non-finite values"),
        ("none", good, good[:0], "features/speech: a quantizer needs held-out frames, but there are 0"),
    ):
        run = make_run(tmp_path / name, {"speech": SMALL})
        write_features(run.data, "speech", train, heldout)
        with pytest.raises(DataError, match=message) as caught:
            quantizers.run(run)
        assert "\n" not in str(caught.value)
        assert not (run.data / "quantizers" / "speech" / "artifact.json").exists()


def test_quantizers_raises_artifact_error_when_features_are_unfinished_or_damaged(tmp_path: Path) -> None:
    run = make_run(tmp_path, {"speech": SMALL})
    with pytest.raises(ArtifactError, match="does not exist: run `spear features` first"):
        quantizers.run(run)
    folder = write_features(run.data, "speech", clustered(100, 8), clustered(20, 8))
    write_tensors(folder / "heldout.safetensors", {"frames": clustered(20, 6)})
    with pytest.raises(ArtifactError, match="frames have several widths, 6, 8"):
        quantizers.run(run)
    write_tensors(folder / "heldout.safetensors", {"other": clustered(20, 8)})
    with pytest.raises(ArtifactError, match=r"heldout.safetensors must have a tensor `frames`.*none"):
        quantizers.run(run)
    (folder / "heldout.safetensors").unlink()
    with pytest.raises(ArtifactError, match="heldout.safetensors does not exist"):
        quantizers.run(run)
    for path in folder.glob("frames-*"):
        path.unlink()
    with pytest.raises(ArtifactError, match=r"has no frames-\*.safetensors"):
        quantizers.run(run)


def test_quantizers_says_so_when_a_recipe_has_none(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO"):
        quantizers.run(make_run(tmp_path, {}))
    assert "nothing to do" in caplog.text
    assert not (tmp_path / "data").exists()
