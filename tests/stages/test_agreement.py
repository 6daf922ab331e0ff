"""What is made already is compared with the teachers, quantizers and domains of today's recipe and corpora."""

from __future__ import annotations

import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from spear.commands.preflight import preflight
from spear.config import to_json
from spear.errors import ArtifactError
from spear.files import read_json, sha256_json, write_json
from spear.quantizers.fsq import FSQConfig
from spear.quantizers.kmeans import KMeansConfig
from spear.recipe import Run
from spear.stages import features, manifests, pretrain, quantizers, shards, tokens
from spear.stages.agreement import check_quantizer
from spear.stages.artifact import DONE, Artifact, read_artifact
from spear.stages.tokens import load_tokenizer
from spear.teachers import Teacher
from spear.teachers.extraction import TokensConfig
from spear.teachers.logmel import LogMelConfig
from tests.stages.test_online import corpora, recipe_of

STAGES: tuple[Any, ...] = (features, quantizers, tokens, shards, pretrain)


@dataclass(frozen=True, kw_only=True, slots=True)
class PlacedConfig(LogMelConfig):
    """A teacher whose weights lie somewhere; those at `elsewhere` are the same, at `others` not."""

    model: str = "here"

    def build(self, folder: Path | None = None) -> Teacher:
        """See TeacherConfig.build."""
        return LogMelConfig(num_mel_bins=self.num_mel_bins - (self.model == "others"), stack=self.stack).build(folder)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run whose stages are finished up to the shards."""
    root = tmp_path_factory.mktemp("whole")
    teachers = {"mel": PlacedConfig(num_mel_bins=16), "wide": LogMelConfig(num_mel_bins=16, stack=2)}
    run = Run(recipe_of(teachers=teachers), corpora(root), root / "data", root / "exp")
    manifests.run(run)
    for stage in STAGES[:-1]:
        stage.run(run)
    return run


@pytest.fixture
def made(whole: Run, tmp_path: Path) -> Run:
    """A copy of it."""
    shutil.copytree(whole.data, tmp_path / "data")
    return replace(whole, data=tmp_path / "data", exp=tmp_path / "exp")


def changed(run: Run, **settings: Any) -> Run:
    return replace(run, recipe=replace(run.recipe, **settings))


def placed(run: Run, model: str) -> Run:
    return changed(run, teachers={**run.recipe.teachers, "mel": replace(run.recipe.teachers["mel"], model=model)})  # type: ignore[call-arg]


@pytest.mark.parametrize("stage", [tokens, shards, pretrain], ids=lambda stage: stage.__name__)
def test_stages_raise_artifact_error_when_the_recipes_quantizer_is_another(made: Run, stage: Any) -> None:
    other = changed(made, quantizers={**made.recipe.quantizers, "mel": KMeansConfig(codebook_size=16)})
    with pytest.raises(ArtifactError, match=r"mel was fitted with other settings: `quantizers\.mel\.codebook_size` was 8, is 16; set that back"):
        stage.run(other)
    online = changed(other, tokens=TokensConfig(source="online"))
    with pytest.raises(ArtifactError, match=r"`quantizers\.mel\.codebook_size` was 8, is 16"):
        load_tokenizer(online, "mel", torch.device("cpu"))


def test_preflight_names_a_quantizer_with_other_settings(made: Run) -> None:
    lines: list[str] = []
    assert preflight(changed(made, quantizers={**made.recipe.quantizers, "mel": KMeansConfig(codebook_size=16)}), lines.append) == 1
    assert any("PROBLEM quantizer mel" in line and "`quantizers.mel.codebook_size` was 8, is 16" in line for line in lines), lines


def test_pretrain_raises_artifact_error_when_the_quantizer_was_fitted_anew(made: Run) -> None:
    shutil.rmtree(made.data / "quantizers")
    quantizers.run(changed(made, seed=5))
    for stage in (shards, pretrain):
        with pytest.raises(ArtifactError, match=r"the tokens of mel were made with another quantizer than .*quantizers/mel: remove"):
            stage.run(made)
    shutil.rmtree(made.data / "quantizers")
    pretrain.run(made)  # nothing to compare with


def test_pretrain_that_is_finished_says_so_whatever_became_of_the_quantizer(made: Run) -> None:
    pretrain.run(made)
    before = (made.exp / DONE).read_bytes()
    shutil.rmtree(made.data / "quantizers")
    quantizers.run(changed(made, seed=5))
    pretrain.run(made)
    assert (made.exp / DONE).read_bytes() == before


def test_check_quantizer_knows_settings_of_every_kind_again(tmp_path: Path) -> None:
    """Tuples and nested settings come back from a record as lists."""
    run = Run(recipe_of(quantizers={"mel": FSQConfig(num_codebooks=2, levels=[4, 3]), "wide": KMeansConfig(codebook_size=8)}), [], tmp_path, tmp_path)
    config = {"quantizer": to_json(run.recipe.quantizers["mel"])}
    with Artifact(tmp_path / "quantizers" / "mel", kind="quantizers", config=config, inputs={}).making():
        pass
    check_quantizer(run, "mel")
    check_quantizer(run, "wide")  # not fitted yet
    check_quantizer(run, "frames only")


def test_stages_have_nothing_to_do_when_a_teacher_lies_elsewhere(made: Run) -> None:
    pretrain.run(made)
    before = {path: path.read_bytes() for path in [*made.data.rglob(DONE), made.exp / DONE]}
    for stage in STAGES:
        stage.run(placed(made, "elsewhere"))
    assert {path: path.read_bytes() for path in before} == before


def test_stages_raise_artifact_error_when_a_teacher_of_like_settings_has_other_weights(made: Run) -> None:
    for stage in (shards, pretrain):
        with pytest.raises(ArtifactError, match=r"made by another teacher mel: `teachers\.mel\.model` was here, is others"):
            stage.run(placed(made, "others"))


def test_an_artifact_may_differ_in_what_does_not_count_only(tmp_path: Path) -> None:
    def artifact(place: str, layer: int) -> Artifact:
        config = {"place": place, "layer": layer}
        return Artifact(tmp_path, kind="tokens", config=config, inputs={}, counted=lambda config: {"layer": config.get("layer")})

    with artifact("a", 1).making():
        pass
    assert artifact("b", 1).is_done()
    with pytest.raises(ArtifactError, match=r"other inputs: `config\.layer` was 1, is 2; remove"):
        artifact("b", 2).is_done()
    record = read_json(tmp_path / DONE)
    assert record["fingerprint"] == sha256_json({key: record[key] for key in ("kind", "version", "config", "inputs")})
    write_json(tmp_path / DONE, {**record, "fingerprint": "of something else"})
    with pytest.raises(ArtifactError, match="its fingerprint differs"):
        artifact("b", 1).is_done()


def test_pretrain_raises_artifact_error_when_the_domain_of_a_corpus_changed(made: Run) -> None:
    other = replace(made, corpora=[replace(made.corpora[0], domain="audio"), made.corpora[1]])
    with pytest.raises(ArtifactError, match=r"shards/talk was made of a corpus whose `domain` was speech, is audio: set that back"):
        pretrain.run(other)
    assert read_artifact(made.data / "shards" / "talk")["config"]["domain"] == "speech"
