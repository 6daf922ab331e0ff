"""Self-distillation: the loss, its two kinds of heads, its metrics, and the same training whatever the processes and interruptions."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.multiprocessing as mp
from torch.nn import functional as F

from spear.errors import ConfigError
from spear.files import read_tensors
from spear.objectives.ema import LinearDecay
from spear.objectives.self_distillation import SelfDistillation, SelfDistillationConfig
from spear.training import Trainer, TrainingConfig
from spear.training.distributed import process_group
from spear.training.optim.adamw import AdamWConfig
from spear.training.optim.warmup import ConstantConfig
from spear.training.tracking import Tracker
from spear.types import Batch
from tests.objectives.students import generator, instance_norm, make_batch, make_module, transformer, zipformer

SPIDR = SelfDistillationConfig(top_layers=3, codebook_size=8, decay=LinearDecay(start=0.9, end=0.9))
DINOSR = SelfDistillationConfig(top_layers=3, codebook_size=8, heads="last", decay=LinearDecay(start=0.9, end=0.9))


def parts(config: SelfDistillationConfig) -> tuple[torch.nn.Module, SelfDistillation]:
    module = make_module(config)
    assert isinstance(module.objective, SelfDistillation)
    return module, module.objective


@pytest.mark.parametrize("config", [SPIDR, DINOSR], ids=["per_layer", "last"])
def test_loss_is_the_mean_over_layers_of_cross_entropies_on_masked_frames(config: SelfDistillationConfig) -> None:
    module, objective = parts(config)
    batch = make_batch(3)
    student = module.student(batch.features, batch.feature_lens, generator(5))
    step = objective(student, batch)
    heard = objective.teacher.encoder(batch.features, batch.feature_lens)
    total, count = 0.0, 0
    for n in range(3):
        length = int(student.lens[n])
        masked = (student.masked_share[n, :length] >= 0.5).nonzero()[:, 0]
        count += len(masked)
        for k, layer in enumerate([1, 2, 3]):
            z = instance_norm(heard.hidden_states[layer][n, :length])[masked]
            codes = torch.cdist(z, objective.codebooks.entries()[k]).argmin(dim=1)
            if config.heads == "per_layer":
                heads = objective.heads.heads
                logits = heads.projs[k](student.hidden_states[layer][n, masked])
            else:
                logits = objective.heads.heads(student.features[n, masked][None])[0][:, k]
            total += float(F.cross_entropy(logits.detach(), codes, reduction="sum")) / 3
    assert math.isclose(float(step.loss), total, rel_tol=1e-4)
    assert step.count == count
    assert 0.2 < float(step.metrics["masked_share"][0] / step.metrics["masked_share"][1]) < 0.8


def test_hidden_states_are_those_of_the_tap() -> None:
    encoder = transformer().build().eval()
    batch = make_batch(0)
    blocks = encoder(batch.features, batch.feature_lens).hidden_states
    encoder.read_at("ffn_pre_residual")
    branches = encoder(batch.features, batch.feature_lens)
    layer = encoder.layers[1]
    seen: list[torch.Tensor] = []
    layer.out_proj.register_forward_hook(lambda _, __, out: seen.append(out))
    torch.testing.assert_close(encoder(batch.features, batch.feature_lens).hidden_states[1], seen[0])
    torch.testing.assert_close(branches.features, encoder.norm(blocks[-1]))
    assert not torch.allclose(branches.hidden_states[1], blocks[1])


@pytest.mark.parametrize(("split_every", "wanted"), [(3, [3, 6, 9]), (1, list(range(1, 11))), (None, [])])
def test_codebooks_split_at_multiples_of_split_every(monkeypatch: pytest.MonkeyPatch, split_every: int | None, wanted: list[int]) -> None:
    module, objective = parts(replace(SPIDR, split_every=split_every))
    seen: list[int] = []
    for step in range(1, 11):
        monkeypatch.setattr(objective.codebooks, "split", lambda step=step: seen.append(step))
        objective.after_step(step, module.student)
    assert seen == wanted


def test_evaluation_counts_all_valid_frames_and_moves_nothing() -> None:
    module, objective = parts(SPIDR)
    module.eval()
    batch = make_batch(1)
    before = {name: value.clone() for name, value in objective.state_dict().items()}
    with torch.no_grad():
        step = module(batch, generator(0))
    module.after_step(1)
    assert step.count == module.student(batch.features, batch.feature_lens).lens.sum()
    assert step.metrics["masked_share"][0] == 0
    assert 1 <= float(step.metrics["target_perplexity"][0] / 3) <= 8
    for name, value in objective.codebooks.state_dict().items():
        torch.testing.assert_close(value, before[f"codebooks.{name}"] * (0.99 if name == "usage" else 1.0))


def test_metrics_have_the_same_names_at_every_step_and_count_after_the_first_update() -> None:
    module, _ = parts(SPIDR)
    first = module(make_batch(0), generator(0)).metrics
    module.after_step(1)
    second = module(make_batch(1), generator(1)).metrics
    assert first.keys() == second.keys()
    assert {"active_codes/layer2", "active_codes/layer3", "active_codes/layer4", "predicted_perplexity"} < second.keys()
    assert first["target_perplexity"].tolist() == [0.0, 0.0]
    assert second["target_perplexity"][1] == 3
    assert 1 <= float(second["active_codes/layer2"][0]) <= 8


def test_a_discarded_step_leaves_no_trace() -> None:
    module, objective = parts(SPIDR)
    module(make_batch(0), generator(0))
    module.discard_step()
    assert not objective.codebooks.pending.any()


def test_frames_with_weights_give_the_same_as_chosen_frames(monkeypatch: pytest.MonkeyPatch) -> None:
    import spear.objectives.self_distillation as place
    from spear.objectives.ema import Frames, choose_frames

    def all_frames(output: object, *, masked_only: bool) -> Frames:
        chosen = choose_frames(output, masked_only=masked_only)  # type: ignore[arg-type]
        weight = torch.zeros(chosen.valid.numel())
        weight[chosen.rows] = 1.0
        return Frames(None, weight, chosen.valid)

    results = []
    for choose in (choose_frames, all_frames):
        monkeypatch.setattr(place, "choose_frames", choose)
        module, objective = parts(SPIDR)
        step = module(make_batch(0), generator(0))
        step.loss.backward()
        module.after_step(1)
        results.append((step, objective.codebooks.state_dict(), module.student.encoder.layers[0].in_proj.weight.grad))
    # the branches of a fresh layer have means of up to 500 deviations, so that float32 leaves 1e-4 of the normalised frames open
    torch.testing.assert_close(results[0], results[1], atol=2e-4, rtol=1e-3)


@pytest.mark.parametrize("heads", ["per_layer", "last"])
def test_zipformers_with_several_widths_teach_themselves(heads: str) -> None:
    config = SelfDistillationConfig(top_layers=2, tap="block_output", heads=heads, codebook_size=8)  # type: ignore[arg-type]
    module = make_module(config, zipformer())
    step = module(make_batch(0), generator(0))
    step.loss.backward()
    assert torch.isfinite(step.loss)
    assert step.count > 0
    module.after_step(1)
    assert module.objective.codebooks.sums[0, :, 16:].abs().sum() > 0  # the wide layer uses all channels
    assert (module.objective.codebooks.entries()[1, module.objective.codebooks.counts[1] > 1, 16:].abs() < 1e3).all()


def test_layers_at_another_rate_than_the_output_raise_config_error() -> None:
    config = SelfDistillationConfig(top_layers=2, tap="block_output", codebook_size=8)
    module = make_module(config, zipformer(output_downsampling_factor=2))
    with pytest.raises(ConfigError, match="`student.output_downsampling_factor` 1"):
        module(make_batch(0), generator(0))


class Source:
    """Batches by number; their lengths differ."""

    batches_per_epoch = 5

    def iterate(self, start: int, stride: int) -> Iterator[Batch]:
        g = start
        while True:
            yield make_batch(g, (80 + g % 3, 50 + g % 7))
            g += stride


def train(folder: Path, steps: int, accumulation: int, **world: object) -> Trainer:
    config = TrainingConfig(
        max_steps=steps,
        accumulation=accumulation,
        precision="fp32",
        device="cpu",
        log_every=2,
        save_every=2,
        average_period=2,
        num_threads=1,
        optimizer=AdamWConfig(lr=1e-3),
        schedule=ConstantConfig(),
    )
    settings = SelfDistillationConfig(top_layers=3, codebook_size=8, decay=LinearDecay(start=0.9, end=0.9), front_end_frozen_from=3)
    module = make_module(settings)
    trainer = Trainer(config, module, Source(), None, folder, 7, "self", tracker=Tracker(folder, sinks=()), **world)  # type: ignore[arg-type]
    trainer.run()
    return trainer


def _work(rank: int, folder: Path) -> None:
    import os

    os.environ.update(RANK=str(rank), WORLD_SIZE="2", LOCAL_RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT=(folder / "port").read_text())
    torch.set_num_threads(1)
    with process_group("cpu") as world:
        trainer = train(folder, 4, 1, world=world)
        books = trainer.module.objective.codebooks
        torch.save(books.state_dict(), folder / f"books-{rank}.pt")


def test_two_processes_train_as_one_with_twice_the_batches(tmp_path: Path) -> None:
    from tests.training.test_distributed import free_port

    alone, together = tmp_path / "alone", tmp_path / "together"
    alone.mkdir()
    together.mkdir()
    (together / "port").write_text(str(free_port()))
    mp.spawn(functools.partial(_work), args=(together,), nprocs=2)
    train(alone, 4, 2)
    name = "checkpoints/step-00000004/model.safetensors"
    one, two = read_tensors(alone / name), read_tensors(together / name)
    assert one.keys() == two.keys()
    torch.testing.assert_close(two, one, atol=2e-5, rtol=1e-4)
    first, second = (torch.load(together / f"books-{rank}.pt", weights_only=True) for rank in range(2))
    assert all(torch.equal(first[key], second[key]) for key in first)


def test_a_run_that_is_continued_ends_in_the_same_bytes(tmp_path: Path) -> None:
    whole, parted = tmp_path / "whole", tmp_path / "parted"
    train(whole, 6, 1)
    train(parted, 4, 1)
    for step in ("00000004",):
        assert (parted / f"checkpoints/step-{step}").exists()
    train(parted, 6, 1)
    for name in ("model.safetensors", "average.safetensors", "optimizer.safetensors"):
        assert (whole / "checkpoints/step-00000006" / name).read_bytes() == (parted / "checkpoints/step-00000006" / name).read_bytes()
