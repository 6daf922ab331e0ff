"""Weights spread over two processes (FSDP2), and layers that are recomputed: the same training as without."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import pytest
import torch
import torch.multiprocessing as mp
from torch import Tensor, nn

from spear.errors import StopRequested
from spear.files import read_tensors, write_json
from spear.models.conv_transformer import ConvTransformerConfig
from spear.models.masking import MaskConfig
from spear.models.student import Student
from spear.models.transformer import TransformerConfig
from spear.models.zipformer.config import ZipformerConfig
from spear.objectives import PretrainModule
from spear.objectives.masked_prediction import MaskedPredictionConfig
from spear.training import Trainer, World, process_group
from spear.training.checkpoint import averaged_weights, find_checkpoints
from spear.training.optim.adamw import AdamWConfig
from spear.training.parallel import recompute, units
from spear.training.tracking import Tracker
from spear.types import Batch, TokenSpec
from tests.training.test_distributed import free_port
from tests.training.toy import ToySource, read_outcome, toy_config

SPECS = {"speech": TokenSpec(num_codebooks=2, codebook_size=8, frame_rate_hz=50.0, first_frame_s=0.0125)}
ADAMW = AdamWConfig(lr=0.01)


def student_module(kind: str = "zipformer") -> PretrainModule:
    torch.manual_seed(3)
    sizes = {"encoder_dim": [32, 48], "encoder_unmasked_dim": [16, 24], "feedforward_dim": 48, "num_heads": 2, "cnn_module_kernel": [7, 5]}
    narrow = {"query_head_dim": 8, "value_head_dim": 6, "downsampling_factor": [1, 2], "num_encoder_layers": [1, 2], "num_mel_bins": 80}
    layers = {"dim": 32, "num_layers": 2, "num_heads": 2, "feedforward_dim": 48}
    configs = {
        "zipformer": lambda: ZipformerConfig(**sizes, **narrow, conv_channels=[4, 8, 8]),  # type: ignore[arg-type]
        "transformer": lambda: TransformerConfig(num_mel_bins=80, conv_channels=(4, 8, 8), **layers),  # type: ignore[arg-type]
        "conv_transformer": lambda: ConvTransformerConfig(**layers, conv_dim=8, position_layers=1, position_groups=2),  # type: ignore[arg-type]
        "dropping": lambda: ConvTransformerConfig(  # type: ignore[arg-type]
            **{**layers, "num_layers": 4}, conv_dim=8, position_layers=1, position_groups=2, layer_drop=0.5
        ),
    }
    encoder = configs[kind]().build()
    return PretrainModule(Student(encoder, MaskConfig()), MaskedPredictionConfig(weights={"speech": {"speech": 1.0}}).build(encoder, SPECS))


def speech_batch(g: int, width: int = 80) -> Batch:
    generator = torch.Generator().manual_seed(g)
    lens = torch.tensor([60, 48])
    return Batch(
        ids=[f"cut-{g}-{i}" for i in range(2)],
        domains=["speech"] * 2,
        features=torch.randn(2, 60, width, generator=generator),
        feature_lens=lens,
        seconds=float(lens.sum()) / 100,
        tokens={"speech": torch.randint(8, (2, 30, 2), generator=generator)},
        token_lens={"speech": lens // 2},
    )


def samples_batch(g: int) -> Batch:
    return speech_batch(g, 160)


def trainer_of(folder: Path, source: ToySource | None = None, *, world: World | None = None, kind: str = "zipformer", **changes: object) -> Trainer:
    config = toy_config(accumulation=2 if world is None else 1, reference_s=1e-3, **changes)  # late in all schedules but one
    tracker = Tracker(folder, ())
    return Trainer(config, student_module(kind), source or ToySource(make=speech_batch), None, folder, 7, "run", world=world, tracker=tracker)


def in_two_processes(rank: int, port: int, folder: Path) -> None:
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))

    def stop(g: int) -> None:
        if g == 21:
            os.kill(os.getpid(), signal.SIGTERM)

    with process_group("cpu") as world:
        for name, changes in {"scaled": {}, "adamw": {"optimizer": ADAMW}}.items():
            trainer_of(folder / f"ddp-{name}", world=world, **changes).run()
            trainer = trainer_of(folder / f"fsdp-{name}", world=world, parallel="fsdp", **changes)
            held = sum(p.to_local().numel() if hasattr(p, "to_local") else p.numel() for p in trainer.module.parameters())
            trainer.run()
        for parallel in ("ddp", "fsdp"):
            skipping, source = {"kind": "dropping", "parallel": parallel, "max_steps": 8}, ToySource(make=samples_batch)
            trainer_of(folder / f"{parallel}-dropping", source, world=world, **skipping).run()
        trainer_of(folder / "recomputed", world=world, parallel="fsdp", recompute=True).run()
        stopped = folder / "stopped"
        try:
            trainer_of(stopped, ToySource(stop, speech_batch), world=world, parallel="fsdp").run()
        except StopRequested:
            trainer_of(stopped, world=world, parallel="fsdp").run()
        told = world.gather({"held": held, "all": sum(p.numel() for p in student_module().parameters())})
    if rank == 0:
        write_json(folder / "told.json", told)


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("two")
    mp.spawn(in_two_processes, args=(free_port(), folder), nprocs=2)
    return folder


def last(folder: Path) -> Path:
    return find_checkpoints(folder)[-1][1]


@pytest.mark.parametrize("name", ["scaled", "adamw"])
@pytest.mark.parametrize("file", ["model.safetensors", "average.safetensors", "optimizer.safetensors"])
def test_sharded_training_is_the_replicated_one(two_processes: Path, name: str, file: str) -> None:
    ours, theirs = (read_tensors(last(two_processes / f"{kind}-{name}") / file) for kind in ("fsdp", "ddp"))
    assert {key: value.shape for key, value in ours.items()} == {key: value.shape for key, value in theirs.items()}
    for key, value in ours.items():
        torch.testing.assert_close(value, theirs[key], atol=2e-4, rtol=2e-3, msg=lambda text, key=key: f"{key}: {text}")
    records = [[json.loads(line) for line in (two_processes / f"{kind}-{name}/metrics.jsonl").read_text().splitlines()] for kind in ("fsdp", "ddp")]
    for one, two in zip(*records):
        assert one.pop("split") == two.pop("split")
        assert one == pytest.approx(two, rel=2e-3, abs=1e-6)
        assert {"grad_norm", "param_norm", "update_norm"} <= set(one)


@pytest.mark.parametrize("file", ["model.safetensors", "optimizer.safetensors"])
def test_sharded_training_with_skipped_layers_is_the_replicated_one(two_processes: Path, file: str) -> None:
    """Each process skips layers of its own; dropout behind a skipped layer draws what it would without it."""
    ours, theirs = (read_tensors(last(two_processes / f"{kind}-dropping") / file) for kind in ("fsdp", "ddp"))
    for key, value in ours.items():
        torch.testing.assert_close(value, theirs[key], atol=2e-4, rtol=2e-3, msg=lambda text, key=key: f"{key}: {text}")


def test_sharded_processes_hold_about_half(two_processes: Path) -> None:
    for entry in json.loads((two_processes / "told.json").read_text()):
        assert 0.4 < entry["held"] / entry["all"] < 0.6


def test_sharded_training_ends_in_the_same_bytes_after_a_signal(two_processes: Path) -> None:
    assert read_outcome(two_processes / "stopped") == read_outcome(two_processes / "fsdp-scaled")


def test_sharded_and_recomputed_training_is_the_sharded_one(two_processes: Path) -> None:
    ours, theirs = (read_tensors(last(two_processes / name) / "model.safetensors") for name in ("recomputed", "fsdp-scaled"))
    assert all(torch.equal(value, theirs[key]) for key, value in ours.items())


def test_sharded_checkpoints_continue_on_one_process_and_export(two_processes: Path, tmp_path: Path) -> None:
    module = student_module()
    found = find_checkpoints(two_processes / "fsdp-scaled")
    module.load_state_dict(averaged_weights(found[-1][1], found[0][1]))
    step, path = found[0]
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / path.name).symlink_to(path)
    assert step < trainer_of(tmp_path).run().steps == 20


def gradients(module: PretrainModule, kind: str, batches: int = 3) -> tuple[list[float], dict[str, Tensor], dict[str, Tensor]]:
    """Losses of some batches, the gradients of all of them together, and the state of the random generator after each."""
    losses, states = [], {}
    module.train()
    module.set_batch_count(2000.0)
    for g in range(batches):
        torch.manual_seed(g)
        output = module(samples_batch(g) if kind == "conv_transformer" else speech_batch(g), torch.Generator().manual_seed(g))
        output.loss.backward()
        losses.append(float(output.loss.detach()))
        states[str(g)] = torch.get_rng_state()
    return losses, {name: p.grad for name, p in module.named_parameters() if p.grad is not None}, states


@pytest.mark.parametrize("kind", ["zipformer", "transformer", "conv_transformer"])
def test_recompute_changes_neither_losses_nor_gradients_nor_draws(kind: str) -> None:
    plain, ours = student_module(kind), student_module(kind)
    recompute(ours)
    assert len(units(ours)) == (3 if kind == "zipformer" else 2)
    (losses, grads, states), (theirs, their_grads, their_states) = gradients(ours, kind), gradients(plain, kind)
    assert losses == theirs
    assert set(grads) == set(their_grads)
    for name, grad in grads.items():
        assert torch.equal(grad, their_grads[name]), name
    assert all(torch.equal(state, their_states[g]) for g, state in states.items())
    assert list(ours.state_dict()) == list(plain.state_dict())


def test_recompute_runs_every_layer_twice_in_training_and_once_in_evaluation() -> None:
    module, calls = student_module("transformer"), []
    first = next(part for part in units(module)[0].modules() if isinstance(part, nn.Linear))
    first.register_forward_pre_hook(lambda *_: calls.append(1))
    recompute(module)
    module.train()(speech_batch(0), torch.Generator().manual_seed(0)).loss.backward()
    assert len(calls) == 2
    module.eval()(speech_batch(0), None)
    assert len(calls) == 3


@pytest.mark.parametrize("kind", ["zipformer", "transformer", "conv_transformer"])
def test_module_that_says_so_gives_all_parameters_a_gradient(kind: str) -> None:
    """In batches with many draws of all regularisers, in one where no teacher counts, too."""
    module = student_module(kind).train()
    assert module.uses_all
    assert not student_module("dropping").uses_all
    make = samples_batch if kind == "conv_transformer" else speech_batch
    for g in range(6):
        module.set_batch_count(0.0)
        module.zero_grad()
        torch.manual_seed(g)
        batch = make(g)
        if g == 5:
            batch.tokens["speech"].fill_(-100)
        module(batch, torch.Generator().manual_seed(g)).loss.backward()
        assert [name for name, p in module.named_parameters() if p.requires_grad and p.grad is None] == []
