"""Layer-to-layer distillation: the formula, which layer predicts which, who is heard, and its config's bounds."""

from __future__ import annotations

import math
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from spear.errors import ConfigError
from spear.objectives.layer_distillation import LayerDistillation, LayerDistillationConfig, pairs
from spear.types import Batch, FrameSpec, StudentOutput
from tests.objectives.test_masked_prediction import Counting

WEIGHTS = {"speech": {"a": 1.0}, "audio": {"a": 0.5, "b": 2.0}}
SPECS = {"a": FrameSpec(dim=12, num_parts=2, frame_rate_hz=50.0, first_frame_s=0.0125), "b": FrameSpec(4, 2, 25.0, 0.015)}


def encoder(rate: float = 50.0) -> Any:
    return SimpleNamespace(frame_rate_hz=rate, first_frame_s=0.045, num_layers=3, layer_dims=[8, 8, 8], dim=8)


def build(**settings: Any) -> LayerDistillation:
    torch.manual_seed(0)
    config = LayerDistillationConfig(**{"layers": [1, 3], "weights": WEIGHTS, **settings})
    built = config.build_on(encoder(), {}, SPECS)
    assert isinstance(built, LayerDistillation)
    return built


def data(seed: int = 0) -> tuple[StudentOutput, Batch]:
    """A speech and an audio cut of 6 and 4 student frames."""
    g = torch.Generator().manual_seed(seed)
    states = tuple(torch.randn(2, 6, 8, generator=g, requires_grad=True) for _ in range(3))
    lens = torch.tensor([6, 4])
    output = StudentOutput(states[-1], lens, states, torch.zeros(2, 6))
    batch = Batch(
        ids=["x", "y"],
        domains=["speech", "audio"],
        features=torch.zeros(2, 12, 4),
        feature_lens=lens * 2,
        seconds=0.2,
        targets={"a": torch.randn(2, 7, 12, generator=g), "b": torch.randn(2, 3, 4, generator=g)},
        target_lens={"a": torch.tensor([5, 7]), "b": torch.tensor([0, 2])},
    )
    return output, batch


def expected_loss(objective: LayerDistillation, output: StudentOutput, batch: Batch) -> tuple[float, int]:
    """The docstring's formula, frame by frame."""
    total, covered = 0.0, set()
    output = output._replace(hidden_states=tuple(state.detach() for state in output.hidden_states))
    for name, heads in objective.heads.items():
        for n, domain in enumerate(batch.domains):
            weight = WEIGHTS[domain].get(name, 0.0)
            for t in range(int(output.lens[n])):
                place = t if name == "a" else t // 2
                if weight == 0 or place >= int(batch.target_lens[name][n]):
                    continue
                covered.add((n, t))
                width = SPECS[name].dim // 2
                for part, layer in enumerate((0, 2)):
                    p = heads[part](output.hidden_states[layer][n, t]).detach()  # type: ignore[index]
                    z = batch.targets[name][n, place, part * width : (part + 1) * width]
                    cosine = float(p @ z / (p.norm() * z.norm()))
                    total += weight / 2 * (float((p - z).abs().mean()) + math.log1p(math.exp(-cosine)))
    return total, len(covered)


def test_layer_distillation_is_mean_l1_minus_log_sigmoid_of_the_cosine() -> None:
    objective = build()
    output, batch = data()
    found = objective(output, batch)
    total, covered = expected_loss(objective, output, batch)
    assert found.loss.item() == pytest.approx(total, rel=1e-5)
    assert int(found.count) == covered == 9  # 5 frames of the speech cut (its teacher frames), 4 of the other
    assert found.metrics["loss/a/speech"][1] == 5
    assert found.metrics["l1/b/audio"][1] == 4
    assert set(found.metrics) == {
        "masked_share",
        *(f"{key}/{name}" for key in ("loss", "l1", "cosine") for name in ("a/speech", "a/audio", "b/audio")),
    }


def test_layer_distillation_weighs_l1_and_cosine_by_their_keys() -> None:
    objective = build(weights={"speech": {"a": 1.0}}, l1=2.0, cosine=0.5)
    output, batch = data()
    batch.domains[1] = "speech"
    for head in objective.heads["a"]:  # type: ignore[union-attr]
        head.weight.data.zero_()
        head.bias.data.fill_(1.0)
    batch.targets["a"].copy_(torch.tensor([3.0, 3.0, 3.0, 0.0, 0.0, 0.0]).repeat(2))
    found = objective(output, batch)
    l1, cosine = (3 * 2 + 3 * 1) / 6, 9 / (6 * 27) ** 0.5
    assert int(found.count) == 9
    assert found.loss.item() / 9 == pytest.approx(2 * l1 + 0.5 * math.log1p(math.exp(-cosine)), rel=1e-6)
    assert [float(found.metrics[f"{key}/a/speech"][0]) / 9 for key in ("l1", "cosine")] == pytest.approx([l1, cosine], rel=1e-6)


def test_layer_distillation_reaches_its_lowest_value_where_prediction_is_target() -> None:
    objective = build(weights={"speech": {"a": 1.0}}, hidden_dim=5)
    output, batch = data()
    for head in objective.heads["a"]:  # type: ignore[union-attr]
        head[2].weight.data.zero_()
        head[2].bias.data.fill_(2.0)
    batch.targets["a"].fill_(2.0)
    found = objective(output, batch)
    assert found.loss.item() / int(found.count) == pytest.approx(math.log1p(math.exp(-1)), rel=1e-6)


def test_layer_distillation_gives_every_head_a_gradient_and_none_to_layers_it_does_not_read() -> None:
    objective = build()
    output, batch = data()
    batch.domains[1] = "speech"  # nobody hears teacher b
    objective(output, batch).loss.backward()
    assert all(parameter.grad is not None for parameter in objective.parameters())
    assert all(not parameter.grad.any() for parameter in objective.heads["b"].parameters())
    assert output.hidden_states[0].grad is not None
    assert output.hidden_states[0].grad.any()
    assert output.hidden_states[1].grad is None


def test_layer_distillation_does_not_read_padding_of_either_side() -> None:
    objective = build()
    output, batch = data()
    before = objective(output, batch).loss.item()
    batch.targets["a"][0, 5:] = 1e6
    output.hidden_states[0].data[1, 4:] = 1e6
    assert objective(output, batch).loss.item() == before


def test_layer_distillation_with_frame_normalisation_ignores_scale_and_offset_of_targets() -> None:
    objective = build(normalize="frame")
    output, batch = data()
    before = objective(output, batch).loss.item()
    batch.targets = {name: 3 * value + 7 for name, value in batch.targets.items()}
    assert objective(output, batch).loss.item() == pytest.approx(before, rel=1e-3)


def test_pairs_follow_the_order_of_layers_and_one_layer_predicts_all() -> None:
    assert pairs("a", [3, 6], 2) == [(2, 0), (5, 1)]
    assert pairs("a", [2], 3) == [(1, 0), (1, 1), (1, 2)]
    with pytest.raises(ConfigError, match="has 2 student layers, so that teacher 'a' must have as many"):
        pairs("a", [3, 6], 3)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"layers": [0, 3]}, r"`layers` must be one or more different numbers from 1 on, but is \[0, 3\]"),
        ({"layers": [2, 2]}, "`layers` must be one or more different numbers"),
        ({"weights": {"speech": {"a": -1.0}}}, r"`weights\.speech\.a` must be 0 or more, but is -1\.0"),
        ({"weights": {"speech": {"a": 0.0}}}, "at least one teacher a weight above 0"),
        ({"l1": 0.0, "cosine": 0.0}, "`l1` or `cosine` must be more than 0"),
        ({"hidden_dim": -1}, "`hidden_dim` must be at least 0, but is -1"),
        ({"normalize": "batch"}, "`normalize` must be none or frame, but is 'batch'"),
    ],
)
def test_layer_distillation_config_raises_config_error_when_out_of_bounds(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        LayerDistillationConfig(**settings)


def test_layer_distillation_raises_config_error_when_the_student_does_not_fit() -> None:
    config = LayerDistillationConfig(layers=[1, 4], weights=WEIGHTS)
    with pytest.raises(ConfigError, match=r"`objective\.layers` must be at most 3, the student's layers, but has 4"):
        config.build_on(encoder(), {}, SPECS)
    with pytest.raises(ConfigError, match="needs a student at 50 Hz, but it has 25 Hz"):
        config.build_on(encoder(25.0), {}, SPECS)
    with pytest.raises(ConfigError, match="names teacher 'a', which does not run beside the student"):
        config.build(encoder(), {})


def test_layer_distillation_reads_frames_and_no_tokens() -> None:
    config = LayerDistillationConfig(weights=WEIGHTS)
    assert (config.teachers(), config.frame_teachers(), config.domains()) == ([], ["a", "b"], ["audio", "speech"])
    assert (config.labels("audio"), config.frames("audio"), config.frames("speech")) == ([], ["a", "b"], ["a"])
    with pytest.raises(ConfigError, match="domain 'noise' is not in the recipe's"):
        config.labels("noise")


def test_layer_distillation_by_interpolation_predicts_points_on_the_line_between_two_frames() -> None:
    """32.5 ms after the teacher's: student frame t lies between frames t + 1 and t + 2 of the teacher at 50 Hz, 5/8 of the way."""
    weights = {"speech": {"a": 1.0}, "audio": {"a": 0.5}}
    output, batch = data()
    found = build(weights=weights, align="interpolate")(output, batch)
    frames = batch.targets["a"]
    points = 0.375 * frames[:, 1:-1] + 0.625 * frames[:, 2:]
    moved = replace(batch, targets={**batch.targets, "a": points}, target_lens={**batch.target_lens, "a": batch.target_lens["a"] - 2})
    expected = build(weights=weights)(output, moved)
    torch.testing.assert_close(found.loss, expected.loss)
    assert found.count == expected.count == 3 + 4


@pytest.mark.parametrize("align", ["index", "interpolate"])
def test_loss_waits_for_a_gpu_once_a_teacher(align: str) -> None:
    objective = build(align=align)
    with Counting() as counting:
        objective(*data())
    assert counting.waits == len(objective.specs)
