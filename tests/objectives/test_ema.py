"""The mean of the student as teacher: schedules, what follows how, freezing, normalisation."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn import functional as F

from spear.errors import ConfigError
from spear.models.base import StudentConfig
from spear.objectives.ema import ExponentialDecay, Frames, LinearDecay, choose_frames, normalised
from spear.objectives.self_distillation import SelfDistillation, SelfDistillationConfig
from spear.types import StudentOutput
from tests.objectives.students import conv_transformer, generator, make_batch, make_module, transformer, zipformer


@pytest.mark.parametrize(("step", "missing"), [(0, 1e-3), (10_000, 6.07e-4), (20_000, 3.68e-4), (40_000, 1.35e-4), (100_000, 6.74e-6)])
def test_exponential_decay_is_that_of_spidr(step: int, missing: float) -> None:
    assert math.isclose(1 - ExponentialDecay().at(step), missing, rel_tol=5e-3)


def test_exponential_decay_ends_at_1() -> None:
    assert ExponentialDecay().at(184_000) < 1.0
    assert ExponentialDecay().at(184_300) == 1.0


def test_linear_decay_is_that_of_dinosr() -> None:
    decay = LinearDecay()
    assert [decay.at(step) for step in (0, 15_000, 30_000, 200_000)] == pytest.approx([0.999, 0.99945, 0.9999, 0.9999])


def test_decay_raises_config_error_when_out_of_bounds() -> None:
    with pytest.raises(ConfigError, match="`start`"):
        ExponentialDecay(start=1.5)
    with pytest.raises(ConfigError, match="`steps`"):
        LinearDecay(steps=0)


@pytest.mark.parametrize(
    ("student", "at_once"), [(transformer(), ("encoder_embed.",)), (conv_transformer(), ("conv_front_end.", "positions."))], ids=["fbank", "samples"]
)
def test_teacher_follows_layers_slowly_and_front_end_and_positions_at_once(student: StudentConfig, at_once: tuple[str, ...]) -> None:
    module = make_module(SelfDistillationConfig(top_layers=2, decay=LinearDecay(start=0.75, end=0.75)), student)
    objective = module.objective
    assert isinstance(objective, SelfDistillation)
    before = {name: value.clone() for name, value in objective.teacher.encoder.named_parameters()}
    with torch.no_grad():
        for parameter in module.student.encoder.parameters():
            parameter.add_(torch.randn_like(parameter))
    module.after_step(1)
    theirs = dict(module.student.encoder.named_parameters())
    seen = set()
    for name, own in objective.teacher.encoder.named_parameters():
        shared = name.startswith(at_once)
        seen.add(shared)
        wanted = theirs[name] if shared else 0.75 * before[name] + 0.25 * theirs[name]
        torch.testing.assert_close(own, wanted.detach())
        assert not own.requires_grad
    assert seen == {True, False}


def test_teacher_follows_by_the_decay_of_each_step() -> None:
    module = make_module(SelfDistillationConfig(top_layers=2, decay=LinearDecay(start=0.0, end=1.0, steps=10)))
    objective, weight = module.objective, module.student.encoder.layers[0].in_proj.weight
    assert isinstance(objective, SelfDistillation)
    before, found = weight.detach().clone(), []
    for step in range(1, 6):
        with torch.no_grad():
            weight.copy_(before + step)
        module.after_step(step)
        found.append(float((objective.teacher.encoder.layers[0].in_proj.weight - before).mean()))
    assert found == pytest.approx([0.9, 1.78, 2.634, 3.4536, 4.2268], abs=1e-5)  # s / 10 of the last, 1 - s / 10 of s


def test_teacher_and_front_end_freeze_at_their_steps_and_after_a_resume() -> None:
    config = SelfDistillationConfig(top_layers=2, decay=LinearDecay(start=0.5, end=0.5), teacher_frozen_from=2, front_end_frozen_from=3)
    module = make_module(config)
    objective, encoder = module.objective, module.student.encoder
    assert isinstance(objective, SelfDistillation)

    def moves(step: int) -> bool:
        before = objective.teacher.encoder.layers[0].in_proj.weight.clone()
        with torch.no_grad():
            encoder.layers[0].in_proj.weight.add_(1.0)
        module.after_step(step)
        return not torch.equal(before, objective.teacher.encoder.layers[0].in_proj.weight)

    assert [moves(step) for step in (1, 2, 3)] == [True, False, False]
    frozen = {name for name, parameter in encoder.named_parameters() if not parameter.requires_grad}
    assert frozen == {name for name, _ in encoder.named_parameters() if name.startswith("encoder_embed.")}
    again = make_module(config)
    again.load_training_state(module.training_state())
    assert {name for name, parameter in again.student.encoder.named_parameters() if not parameter.requires_grad} == frozen
    before = {name: parameter.grad for name, parameter in again.student.encoder.named_parameters()}
    again(make_batch(0), generator(0)).loss.backward()
    assert all(parameter.grad is None for name, parameter in again.student.encoder.named_parameters() if name in frozen)
    assert before.keys() > frozen
    assert again.student.encoder.layers[0].in_proj.weight.grad is not None


def test_teacher_stays_in_eval_mode_and_hears_the_unmasked_input() -> None:
    module = make_module(SelfDistillationConfig(top_layers=2), transformer(dropout=0.5))
    objective = module.objective
    assert isinstance(objective, SelfDistillation)
    assert module.training
    assert not any(part.training for part in objective.teacher.modules())
    batch = make_batch(0)
    heard = objective.teacher(batch.features, batch.feature_lens).hidden_states[-1]
    again = make_batch(0, lens=(90, 61, 75))
    torch.testing.assert_close(heard, objective.teacher(again.features, again.feature_lens).hidden_states[-1])
    assert not heard.requires_grad


def test_normalised_frames_are_instance_norm_without_padding() -> None:
    x = torch.randn(2, 12, 5) * 3 + 7
    lens = torch.tensor([12, 8])
    output = StudentOutput(x, lens, (x,), torch.ones(2, 12))
    frames = choose_frames(output, masked_only=True)
    found = normalised(x, frames)
    wanted = [F.instance_norm(x[i, : lens[i]].T[None])[0].T for i in range(2)]
    torch.testing.assert_close(found, torch.cat(wanted), rtol=1e-4, atol=1e-5)
    everything = Frames(None, torch.ones(24), frames.valid)
    torch.testing.assert_close(normalised(x, everything)[:20], found)
    torch.testing.assert_close(normalised(1e-4 * x, frames), found)  # whatever the scale
    assert (normalised(0 * x, frames) == 0).all()
    poisoned = torch.where(frames.valid[:, :, None], x, float("nan"))
    torch.testing.assert_close(normalised(poisoned, frames), found)


def test_tap_raises_config_error_for_a_zipformer_without_it() -> None:
    with pytest.raises(ConfigError, match="`tap` must be one of block_output for a ZipformerEncoder, but is 'ffn_pre_residual'"):
        make_module(SelfDistillationConfig(top_layers=2), zipformer())


def test_top_layers_raises_config_error_when_the_student_has_fewer() -> None:
    with pytest.raises(ConfigError, match="`top_layers` must be at most the student's 4 layers, but is 8"):
        make_module(SelfDistillationConfig())
