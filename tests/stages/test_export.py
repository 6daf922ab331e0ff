"""From a run's checkpoints to a model folder: which weights, and what when they are not there."""

from __future__ import annotations

import logging
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from spear.errors import ArtifactError, CheckpointError, ConfigError
from spear.export import load_encoder
from spear.export.config import ExportConfig
from spear.files import read_json, read_tensors, write_json
from spear.models.transformer import TransformerConfig
from spear.stages.artifact import Artifact, read_artifact
from spear.stages.export import choose, encoder_weights, run
from spear.teachers.huggingface import HuggingFaceConfig
from spear.training.averaging import RunningAverage
from spear.training.checkpoint import TrainingState, find_checkpoints, prune_checkpoints, save_checkpoint
from tests.export.tiny import tiny_config, tiny_encoder, tone

PERIOD = 5


class Trained(nn.Module):
    """A module whose weights lie as in pre-training: the encoder below ``student``, heads beside it."""

    def __init__(self) -> None:
        super().__init__()
        self.student = nn.Module()
        self.student.encoder = tiny_encoder().encoder
        self.objective = nn.Linear(2, 2)


def weight_at(step: int) -> float:
    """Value of every entry of ``mask_emb`` at an update."""
    return step * step / 1000


def train(exp: Path, saved: tuple[int, ...], *, average: bool = True) -> None:
    """Write the checkpoints of a run whose ``mask_emb`` follows `weight_at`."""
    module = Trained()
    running = RunningAverage(module, PERIOD) if average else None
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    for step in range(1, max(saved) + 1):
        with torch.no_grad():
            module.student.encoder.mask_emb.fill_(weight_at(step))
        if running is not None:
            running.update(step)
        if step in saved:
            state = TrainingState(step=step, seconds=36.0 * step, average_period=PERIOD, fingerprint="f")
            save_checkpoint(exp, state, module, running, optimizer)


def mean_between(start: int, end: int) -> float:
    steps = range(start + PERIOD, end + 1, PERIOD)
    return sum(map(weight_at, steps)) / len(steps)


def make_run(tmp_path: Path, **export: Any) -> Any:
    recipe = SimpleNamespace(export=ExportConfig(**export), student=tiny_config(), teachers={"speech": HuggingFaceConfig(model="a/b", layer=3)})
    corpora = [SimpleNamespace(name="read", domain="speech"), SimpleNamespace(name="events", domain="audio")]
    return SimpleNamespace(recipe=recipe, corpora=corpora, data=tmp_path / "data", exp=tmp_path / "exp")


def exported(run: Any) -> float:
    value = read_tensors(run.exp / "export" / "model.safetensors")["model.mask_emb"]
    assert torch.equal(value, value[:1].expand_as(value))
    return float(value[0])


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, mean_between(30, 40)),
        ({"average_share": 0.5}, mean_between(20, 40)),
        ({"average_share": 1.0}, mean_between(0, 40)),
        ({"start_step": 10}, mean_between(10, 40)),
        ({"start_step": 0}, mean_between(0, 40)),
        ({"step": 30, "start_step": 10}, mean_between(10, 30)),
        ({"use": "last"}, weight_at(40)),
        ({"use": "last", "step": 20}, weight_at(20)),
    ],
)
def test_export_takes_the_weights_that_the_settings_name(tmp_path: Path, settings: dict[str, Any], expected: float) -> None:
    run_ = make_run(tmp_path, **settings)
    train(run_.exp, (10, 20, 30, 40))
    run(run_)
    assert exported(run_) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("settings", [{"average_share": 0.5}, {"average_share": 0.9}, {"start_step": 10}, {"step": 30, "average_share": 0.4}])
def test_export_averages_as_far_back_as_asked_for_however_few_checkpoints_are_kept(tmp_path: Path, settings: dict[str, Any]) -> None:
    few, all_ = tmp_path / "few", tmp_path / "all"
    config = ExportConfig(**settings)
    for exp in (few, all_):
        train(exp, (5, 10, 15, 20, 25, 30, 35, 40))
    for last in range(5, 41, 5):  # as training goes on
        hidden = [(path, path.with_name(f"x{path.name}")) for step, path in find_checkpoints(few) if step > last]
        for path, other in hidden:
            path.rename(other)
        prune_checkpoints(few, 1, config.milestones(40))
        for path, other in hidden:
            other.rename(path)
    assert len(find_checkpoints(few)) <= 3
    found, expected = choose(few, config), choose(all_, config)
    assert (found.averaged, found.step, found.start_step) == (True, expected.step, expected.start_step)


def test_export_says_when_the_mean_is_over_another_stretch_than_asked_for(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    train(tmp_path, (30, 40))
    assert choose(tmp_path, ExportConfig(average_share=0.3)).start_step == 30
    assert caplog.text == ""
    assert choose(tmp_path, ExportConfig(average_share=0.8)).start_step == 30
    assert "the mean is over the steps 30 to 40, 25 % of training, as no checkpoint is nearer to `export.average_share` 0.8" in caplog.text


def test_export_for_icefall_lies_beside_the_folder_with_the_same_weights(tmp_path: Path) -> None:
    run_ = make_run(tmp_path)
    train(run_.exp, (10, 20, 30, 40))
    run(run_)
    before = (run_.exp / "export" / "artifact.json").read_bytes()
    other = make_run(tmp_path, format="icefall")
    run(other)
    run(other)
    run(run_)  # both are finished and neither is stale
    assert (run_.exp / "export" / "artifact.json").read_bytes() == before
    folder, checkpoint = load_encoder(run_.exp / "export"), load_encoder(run_.exp / "export_icefall" / "pretrained.pt")
    theirs = checkpoint.encoder.state_dict()
    assert all(torch.equal(value, theirs[key]) for key, value in folder.encoder.state_dict().items())
    assert float(theirs["mask_emb"][0]) == pytest.approx(mean_between(30, 40), rel=1e-6)
    assert read_artifact(run_.exp / "export_icefall")["counts"]["weights"] == len(theirs)


def test_export_raises_checkpoint_error_when_the_format_has_no_such_student(tmp_path: Path) -> None:
    run_ = make_run(tmp_path, format="icefall")
    run_.recipe.student = TransformerConfig(num_layers=1, dim=8, num_heads=2, feedforward_dim=8)
    train(run_.exp, (10,))
    with pytest.raises(CheckpointError, match="must be of type zipformer for the format of icefall, but is TransformerConfig"):
        run(run_)
    assert not (run_.exp / "export_icefall").exists()


def test_export_is_an_encoder_with_the_trained_weights(tmp_path: Path) -> None:
    run_ = make_run(tmp_path)
    train(run_.exp, (10, 20))
    run(run_)
    with torch.no_grad():
        found, expected = load_encoder(run_.exp / "export")(tone(6000)), tiny_encoder()(tone(6000))
    torch.testing.assert_close(found.features, expected.features, atol=1e-5, rtol=1e-5)
    assert not [name for name in read_tensors(run_.exp / "export" / "model.safetensors") if "objective" in name]


@pytest.mark.parametrize(
    ("saved", "average", "settings", "reason"),
    [
        ((20,), False, {}, "it has no average.safetensors"),
        ((3,), True, {}, "the first snapshot of the running average would be taken at step 5"),
        ((20,), True, {}, "there is no earlier checkpoint"),
        ((31, 34), True, {"start_step": 31}, "no snapshot of the running average lies between step 31 and it"),
    ],
)
def test_export_falls_back_to_the_last_weights_and_says_why(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, saved: tuple[int, ...], average: bool, settings: dict[str, Any], reason: str
) -> None:
    run_ = make_run(tmp_path, **settings)
    train(run_.exp, saved, average=average)
    with caplog.at_level(logging.WARNING):
        run(run_)
    assert reason in caplog.text
    assert exported(run_) == pytest.approx(weight_at(max(saved)))
    assert read_artifact(run_.exp / "export")["extra"]["averaged"] is False


def test_export_card_says_what_the_artifacts_say(tmp_path: Path) -> None:
    run_ = make_run(tmp_path, licence="cc-by-4.0", name="My model")
    train(run_.exp, (10, 20))
    manifests = Artifact(run_.data / "manifests", kind="manifests", config={}, inputs={})
    with manifests.making() as record:
        record.counts["read"] = {"train": {"cuts": 12, "hours": 3.5}}
    with Artifact(run_.exp, kind="pretrain", config={}, inputs={}).making():
        pass
    run(run_)
    lines = (run_.exp / "export" / "README.md").read_text().splitlines()
    for line in ("# My model", "| speech | a/b | 3 |", "| read | speech | 3.50 | 12 |", "| events | audio |  |  |", "- hours of audio heard: 0.2"):
        assert line in lines
    assert any(line.startswith("- wall s: ") for line in lines)
    assert "compute" not in read_json(run_.exp / "export" / "config.json")["training"]


def test_export_runs_once_and_refuses_other_weights(tmp_path: Path) -> None:
    run_ = make_run(tmp_path)
    train(run_.exp, (10, 20))
    run(run_)
    weights = run_.exp / "export" / "model.safetensors"
    before = weights.stat().st_mtime_ns
    run(run_)
    assert weights.stat().st_mtime_ns == before
    shutil.rmtree(run_.exp / "checkpoints")
    train(run_.exp, (10, 20, 30))
    with pytest.raises(ArtifactError, match="was made from other inputs"):
        run(run_)


def test_export_killed_and_run_again_has_the_same_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, killed = make_run(tmp_path / "a", name="x"), make_run(tmp_path / "b", name="x")
    for run_ in (whole, killed):
        train(run_.exp, (10, 20))
    run(whole)

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("spear.export.huggingface.write_tensors", stop)
        with pytest.raises(KeyboardInterrupt):
            run(killed)
    with pytest.raises(ArtifactError, match="unfinished"):
        read_artifact(killed.exp / "export")
    run(killed)
    names = sorted(path.name for path in (whole.exp / "export").iterdir())
    assert names == sorted(path.name for path in (killed.exp / "export").iterdir())
    for name in names:
        if name != "artifact.json":  # it holds the wall time
            assert (whole.exp / "export" / name).read_bytes() == (killed.exp / "export" / name).read_bytes()


def test_export_raises_checkpoint_error_when_checkpoint_is_not_there(tmp_path: Path) -> None:
    run_ = make_run(tmp_path)
    with pytest.raises(CheckpointError, match="holds no finished checkpoint: run `spear pretrain` first"):
        run(run_)
    train(run_.exp, (10, 20))
    for settings, match in (
        ({"step": 15}, r"`export.step` must be a step with a checkpoint \(10, 20\), but is 15"),
        ({"start_step": 5}, r"`export.start_step` must be a step with a checkpoint \(10, 20\), but is 5"),
    ):
        with pytest.raises(CheckpointError, match=match):
            choose(run_.exp, ExportConfig(**settings))


def test_export_raises_checkpoint_error_when_weights_do_not_fit(tmp_path: Path) -> None:
    run_ = make_run(tmp_path)
    train(run_.exp, (10, 20))
    run_.recipe.student = tiny_config(encoder_dim=(32, 64))
    with pytest.raises(CheckpointError, match=r"step-00000020 does not fit the encoder; weights of another shape"):
        run(run_)
    path = run_.exp / "checkpoints" / "step-00000020"
    for name in ("model.safetensors", "average.safetensors"):
        (path / name).write_bytes(b"broken")
    with pytest.raises(CheckpointError, match="not a readable safetensors file"):
        encoder_weights(choose(run_.exp, ExportConfig()))
    with pytest.raises(CheckpointError, match="not a readable safetensors file"):
        encoder_weights(choose(run_.exp, ExportConfig(use="last")))


def test_encoder_weights_raise_checkpoint_error_when_there_is_no_encoder(tmp_path: Path) -> None:
    module = nn.Linear(2, 2)
    save_checkpoint(tmp_path, TrainingState(step=3, average_period=PERIOD), module, None, torch.optim.SGD(module.parameters(), lr=0.1))
    with pytest.raises(CheckpointError, match="holds no weights under `student.encoder.`"):
        encoder_weights(choose(tmp_path, ExportConfig(use="last")))


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"step": -1}, "`step` must be 0 or more, but is -1"),
        ({"start_step": 5, "use": "last"}, "`start_step` needs `use: average`, but `use` is last"),
        ({"start_step": 5, "step": 5}, "`start_step` must be smaller than `step`, but is 5"),
        ({"average_share": 0.0}, "`average_share` must be more than 0 and at most 1, but is 0.0"),
    ],
)
def test_export_config_raises_config_error_when_settings_contradict(settings: dict[str, Any], match: str) -> None:
    with pytest.raises(ConfigError, match=match):
        ExportConfig(**settings)


def test_export_reads_the_period_from_the_checkpoint(tmp_path: Path) -> None:
    train(tmp_path, (10, 20))
    path = tmp_path / "checkpoints" / "step-00000020" / "state.json"
    write_json(path, {**read_json(path), "average_period": 50})
    assert not choose(tmp_path, ExportConfig(start_step=0)).averaged


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"step": 30}, r"`export.step` must be a step with a checkpoint, a multiple of `training.save_every` 20 up to .*max_steps` 50, but is 30"),
        ({"start_step": 60}, "`export.start_step` must be a step with a checkpoint, .*, but is 60"),
    ],
)
def test_export_check_raises_config_error_when_a_step_will_have_no_checkpoint(settings: dict[str, Any], match: str) -> None:
    ExportConfig(step=50, start_step=40).check(50, 20)
    ExportConfig(start_step=0).check(50, 20)
    with pytest.raises(ConfigError, match=match):
        ExportConfig(**settings).check(50, 20)
