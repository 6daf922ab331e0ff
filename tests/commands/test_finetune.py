"""`spear finetune` from labelled cuts to scores, stopped and continued, for every task."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.multiprocessing as mp

from spear.commands import finetune as command
from spear.commands.finetune import finetune
from spear.errors import ArtifactError, CheckpointError, DataError
from spear.export import load_encoder, save_encoder
from spear.files import read_json, read_tensors
from spear.finetune import load_finetuned
from tests.data.cuts import cut_of, save, tone, write_cuts
from tests.export.tiny import tiny_encoder
from tests.training.test_distributed import free_port

HZ = {"low": 300.0, "high": 2400.0}
TASKS = {
    "ctc": "{type: ctc, dropout: 0.0}",
    "rnnt": "{type: rnnt, predictor_dim: 16, joint_dim: 16, prune: 3, warmup_steps: 4, beam: 2}",
    "tagging": "{type: tagging, balance: true}",
    "classification": "{type: classification}",
    "verification": "{type: verification, dim: 8, hidden: 8}",
}
STOPPED: list[tuple[str, tuple[str, ...]]] = [("tagging", ("mixup.prob=0.5",)), ("rnnt", ()), ("classification", ("encoder.lora={rank: 2}",))]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tones of two pitches, by two speakers, with their names as text and label; an encoder to start from."""
    folder = tmp_path_factory.mktemp("finetune")
    manifests: dict[str, str] = {}
    for split, count in (("train", 8), ("valid", 4), ("test", 4)):
        cuts = []
        for i in range(count):
            name = ("low", "high")[i % 2]
            path = save(folder / split / f"{split}{i}.wav", tone(0.6 + 0.05 * i, hz=HZ[name]))
            cut = cut_of(path, speaker=name)
            cut.supervisions[0].text = name
            cut.supervisions[0].custom = {"label": name}
            cuts.append(cut)
        manifests[split] = write_cuts(folder / f"{split}.jsonl.gz", cuts)
    paths = ", ".join(f"{split}: {path}" for split, path in manifests.items())
    (folder / "corpora.yaml").write_text(f"corpora:\n  - {{name: tones, domain: audio, source: {{type: cuts, {paths}}}}}\n")
    encoder = tiny_encoder()
    save_encoder(folder / "encoder", encoder.encoder, encoder.student, {})
    return folder


def recipe(folder: Path, task: str, **changes: Any) -> Path:
    training = {"max_steps": 6, "log_every": 2, "validate_every": 3, "save_every": 3, "average_period": 1, "precision": "fp32", **changes}
    lines = "".join(f"  {key}: {value}\n" for key, value in training.items())
    text = f"task: {TASKS[task]}\nencoder: {{init_from: encoder, layers: weighted, frozen_steps: 2}}\nsampling: {{max_batch_s: 4}}\n"
    path = folder / f"{task}.yaml"
    path.write_text(f"{text}average_share: 0.5\ntraining:\n{lines}  optimizer: {{type: adamw, lr: 0.01}}\n  schedule: {{type: constant}}\n")
    return path


def run(place: Path, task: str, exp: Path, overrides: tuple[str, ...] = (), **changes: Any) -> dict[str, Any]:
    finetune(recipe(exp.parent, task, **changes), place / "corpora.yaml", place, exp, overrides)
    found: dict[str, Any] = read_json(exp / "scores.json")
    return found


@pytest.mark.parametrize("task", TASKS)
def test_finetune_trains_exports_and_scores(place: Path, tmp_path: Path, task: str) -> None:
    scores = run(place, task, tmp_path / "exp")
    assert scores["metric"] == {"ctc": "WER", "rnnt": "WER", "tagging": "mAP", "classification": "accuracy", "verification": "EER"}[task]
    assert (scores["split"], scores["train_cuts"], scores["updates"]) == ("test", 8, 6)
    assert 0 <= scores["value"] <= 2
    assert scores["metric"] in (tmp_path / "exp" / "report.md").read_text()
    assert read_json(tmp_path / "exp" / "artifact.json")["extra"]["value"] == scores["value"]
    model = load_finetuned(tmp_path / "exp" / "export")
    (answer,) = model(torch.from_numpy(tone(0.7, hz=300.0)))
    assert isinstance(answer, str) if task in ("ctc", "rnnt") else answer.shape == ((8,) if task == "verification" else (2,))
    assert load_encoder(tmp_path / "exp" / "export").dim == tiny_encoder().dim


def test_finetune_predicts_the_same_from_its_folder(place: Path, tmp_path: Path) -> None:
    run(place, "classification", tmp_path / "exp")
    model = load_finetuned(tmp_path / "exp" / "export")
    (probabilities,) = model(torch.from_numpy(tone(0.65, hz=2400.0)))
    assert model.inventory == {"classes": ["high", "low"]}
    assert probabilities.sum() == pytest.approx(1.0, abs=1e-5)
    head = read_tensors(tmp_path / "exp" / "export" / "head.safetensors")
    np.testing.assert_array_equal(model.head.output.weight.detach().numpy(), head["output.weight"].numpy())


def test_finetune_learns_to_tell_tones_apart(place: Path, tmp_path: Path) -> None:
    settings = ("encoder.frozen_steps=0", "encoder.lr_scale=1.0", "training.optimizer.lr=0.001")
    scores = run(place, "classification", tmp_path / "exp", settings, max_steps=40)
    assert scores["value"] == 1.0


@pytest.mark.parametrize(("task", "settings"), STOPPED, ids=lambda value: value if isinstance(value, str) else "")
def test_finetune_that_was_stopped_ends_in_the_same_weights(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, task: str, settings: tuple[str, ...]
) -> None:
    for kind in ("whole", "parts"):
        (tmp_path / kind).mkdir()
    run(place, task, tmp_path / "whole" / "exp", settings)

    with monkeypatch.context() as patch:
        save_checkpoint = command.Trainer._save

        def save_then_stop(self: Any) -> None:
            save_checkpoint(self)
            if self.state.step == 3:
                raise KeyboardInterrupt

        patch.setattr(command.Trainer, "_save", save_then_stop)
        with pytest.raises(KeyboardInterrupt):
            run(place, task, tmp_path / "parts" / "exp", settings)
    run(place, task, tmp_path / "parts" / "exp", settings)
    for name in ("model.safetensors", "head.safetensors"):
        whole, parts = (read_tensors(tmp_path / kind / "exp" / "export" / name) for kind in ("whole", "parts"))
        assert all(torch.equal(whole[key], parts[key]) for key in whole)


def test_finetune_with_adapters_exports_an_ordinary_encoder(place: Path, tmp_path: Path) -> None:
    run(place, "classification", tmp_path / "exp", ("encoder.lora={rank: 2}", "encoder.lr_scale=1.0"))
    trained, start = (read_tensors(folder / "model.safetensors") for folder in (tmp_path / "exp" / "export", place / "encoder"))
    assert trained.keys() == start.keys()
    changed = {key for key in trained if not torch.equal(trained[key], start[key])}
    assert any("feed_forward1.out_proj.weight" in key for key in changed)
    assert all(int(torch.linalg.matrix_rank((trained[key] - start[key]).double(), rtol=1e-3)) <= 2 for key in changed)
    (answer,) = load_finetuned(tmp_path / "exp" / "export")(torch.from_numpy(tone(0.7, hz=300.0)))
    assert answer.shape == (2,)


def in_two_processes(rank: int, port: int, parallel: str, place: Path, folder: Path) -> None:
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    settings = ("encoder.lora={rank: 2}", f"training.parallel={parallel}", "training.device=cpu")
    finetune(folder / "rnnt.yaml", place / "corpora.yaml", place, folder / parallel, settings)


@pytest.mark.slow
def test_finetune_in_two_processes_is_the_same_with_weights_spread_over_them(place: Path, tmp_path: Path) -> None:
    """Adapters and a transducer; one batch to validate on, so that one process has none."""
    recipe(tmp_path, "rnnt")
    for parallel in ("ddp", "fsdp"):
        mp.spawn(in_two_processes, args=(free_port(), parallel, place, tmp_path), nprocs=2)
    start = read_tensors(place / "encoder" / "model.safetensors")
    ddp, fsdp = (load_finetuned(tmp_path / name / "export") for name in ("ddp", "fsdp"))
    for key, value in fsdp.state_dict().items():
        torch.testing.assert_close(value, ddp.state_dict()[key], atol=1e-3, rtol=1e-2)
    changed = [key for key, value in read_tensors(tmp_path / "fsdp" / "export" / "model.safetensors").items() if not torch.equal(value, start[key])]
    assert changed
    assert all(key.endswith("weight") for key in changed)


def test_finetune_does_nothing_when_finished_and_refuses_other_settings(place: Path, tmp_path: Path) -> None:
    run(place, "classification", tmp_path / "exp")
    before = (tmp_path / "exp" / "artifact.json").read_bytes()
    run(place, "classification", tmp_path / "exp")
    assert (tmp_path / "exp" / "artifact.json").read_bytes() == before
    with pytest.raises(ArtifactError, match=r"seed` was 0, is 1"):
        run(place, "classification", tmp_path / "exp", ("seed=1",))


def test_finetune_from_random_weights_takes_the_network_alone(place: Path, tmp_path: Path) -> None:
    scores = run(place, "classification", tmp_path / "exp", ("encoder.random=true", "encoder.lr_scale=0", "encoder.frozen_steps=0"))
    assert scores["encoder"] == "random"
    trained, start = (read_tensors(folder / "model.safetensors") for folder in (tmp_path / "exp" / "export", place / "encoder"))
    assert trained.keys() == start.keys()
    name = next(key for key in trained if key.endswith("encoder_embed.out.weight"))
    assert not torch.equal(trained[name], start[name])


def test_finetune_trains_a_student_that_reads_samples(place: Path, tmp_path: Path) -> None:
    sizes = "conv_dim: 8, num_layers: 2, dim: 16, num_heads: 2, feedforward_dim: 16, position_layers: 1, position_groups: 2"
    student = ("encoder.init_from=null", "encoder.student={type: conv_transformer, " + sizes + "}")
    scores = run(place, "ctc", tmp_path / "exp", student)
    assert (scores["encoder"], scores["updates"]) == ("random", 6)
    (answer,) = load_finetuned(tmp_path / "exp" / "export")(torch.from_numpy(tone(0.7, hz=300.0)))
    assert isinstance(answer, str)


def test_finetune_max_train_cuts_hold_those_of_fewer(place: Path, tmp_path: Path) -> None:
    from spear.config import load_config
    from spear.data.corpora import CorporaConfig
    from spear.finetune.config import FinetuneRecipe

    run(place, "classification", tmp_path / "exp")
    corpora = list(load_config(CorporaConfig, place / "corpora.yaml").corpora)

    def chosen(count: int) -> set[str]:
        loaded = load_config(FinetuneRecipe, recipe(tmp_path, "verification"), [f"max_train_cuts={count}"])
        labelled = command.read_labelled(command.FinetuneRun(loaded, corpora, place, tmp_path))
        return {example.cut.id for example in labelled.train}

    assert len(chosen(4)) == 4
    assert chosen(4) < chosen(6)


def test_finetune_raises_data_error_when_nothing_is_labelled(place: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no train cut is labelled \(it needs the label `mood`\)"):
        run(place, "classification", tmp_path / "exp", ("task.label_field=mood",))


def test_finetune_raises_data_error_when_two_corpora_share_an_id(place: Path, tmp_path: Path) -> None:
    text = (place / "corpora.yaml").read_text()
    (tmp_path / "corpora.yaml").write_text(text + text.split("\n", 1)[1].replace("name: tones", "name: again"))
    with pytest.raises(DataError, match=r"must be unique among the test cuts, but tones and again have it"):
        finetune(
            recipe(tmp_path, "classification"), tmp_path / "corpora.yaml", tmp_path, tmp_path / "exp", (f"encoder.init_from={place / 'encoder'}",)
        )


def test_load_finetuned_raises_checkpoint_error_when_there_is_no_head(place: Path) -> None:
    with pytest.raises(CheckpointError, match="holds no fine-tuned head"):
        load_finetuned(place / "encoder")
