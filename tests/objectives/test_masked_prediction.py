"""Masked prediction: which frames count, how much, for which teacher and domain."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from spear.errors import ConfigError
from spear.models.base import Encoder
from spear.models.masking import MaskConfig
from spear.models.student import Student
from spear.objectives import PretrainModule
from spear.objectives.masked_prediction import MaskedPrediction, MaskedPredictionConfig
from spear.types import IGNORE, Batch, EncoderOutput, StudentOutput, TokenSpec

SPECS = {
    "speech": TokenSpec(num_codebooks=3, codebook_size=8, frame_rate_hz=50.0, first_frame_s=0.0125),
    "audio": TokenSpec(num_codebooks=2, codebook_size=8, frame_rate_hz=25.0, first_frame_s=0.02),
}


class Halve(Encoder):
    """Two log-mel frames to one output frame, by a linear layer."""

    num_mel_bins, sample_rate, frame_rate_hz, first_frame_s = 4, 16000, 50.0, 0.01
    dim, num_layers, layer_dims, min_fbank_frames = 6, 1, [6], 2

    def __init__(self) -> None:
        super().__init__()
        self.mask_emb = nn.Parameter(torch.randn(4))
        self.linear = nn.Linear(8, 6)

    def forward(self, features: Tensor, lens: Tensor) -> EncoderOutput:
        even = features[:, : features.shape[1] // 2 * 2]
        out = self.linear(even.reshape(len(even), -1, 8))
        return EncoderOutput(out, lens // 2, (out,))


def output(n: int = 2, t: int = 10, masked: float = 0.0, lens: list[int] | None = None) -> StudentOutput:
    features = torch.randn(n, t, 6, generator=torch.Generator().manual_seed(1))
    return StudentOutput(features, torch.tensor(lens or [t] * n), (features,), torch.full((n, t), masked))


def batch(domains: list[str], t: int = 10) -> Batch:
    n, g = len(domains), torch.Generator().manual_seed(2)
    lens = torch.full((n,), t)
    return Batch(
        ids=[f"cut{i}" for i in range(n)],
        domains=domains,
        features=torch.randn(n, 2 * t, 4, generator=g),
        feature_lens=2 * lens,
        seconds=n * t / 50,
        tokens={
            "speech": torch.randint(8, (n, t, 3), generator=g),
            "audio": torch.randint(8, (n, t // 2, 2), generator=g),
        },
        token_lens={"speech": lens, "audio": lens // 2},
    )


def objective(**settings: object) -> MaskedPrediction:
    torch.manual_seed(0)
    return MaskedPredictionConfig(**settings).build(Halve(), SPECS)  # type: ignore[arg-type]


def test_loss_is_the_weighted_sum_of_cross_entropies() -> None:
    module, data, out = objective(), batch(["speech", "audio"]), output()
    step = module(out, data)
    speech = nn.functional.cross_entropy(module.heads["speech"](out.features).flatten(0, 2), data.tokens["speech"].flatten(), reduction="sum") / 3
    repeated = data.tokens["audio"][1].repeat_interleave(2, dim=0)
    audio = nn.functional.cross_entropy(module.heads["audio"](out.features[1:])[0].flatten(0, 1), repeated.flatten(), reduction="sum") / 2
    torch.testing.assert_close(step.loss, speech + 0.1 * audio)
    assert step.count == 20
    torch.testing.assert_close(step.metrics["loss/audio/audio"], torch.tensor([audio.item(), 10.0]))
    assert step.metrics["loss/speech/speech"][1] == 10


@pytest.mark.parametrize(
    ("weights", "labels"),
    [
        ({"speech": {"speech": 1.0}, "audio": {"audio": 1.0}}, {"speech": ["speech"], "audio": ["audio"]}),
        (
            {"speech": {"speech": 1.0, "audio": 0.5}, "audio": {"speech": 1.0, "audio": 0.5}},
            {"speech": ["audio", "speech"], "audio": ["audio", "speech"]},
        ),
        ({"speech": {"speech": 1.0, "audio": 0.0}, "audio": {"speech": 1.0, "audio": 0.1}}, {"speech": ["speech"], "audio": ["audio", "speech"]}),
    ],
    ids=["disjoint", "joint", "asymmetric"],
)
def test_weights_are_the_strategies(weights: dict[str, dict[str, float]], labels: dict[str, list[str]]) -> None:
    config = MaskedPredictionConfig(weights=weights)
    assert {domain: config.labels(domain) for domain in weights} == labels
    module = objective(weights=weights)
    step = module(output(), batch(["speech", "audio"]))
    seen = {name for name in step.metrics if name.startswith("loss/")}
    assert seen == {f"loss/{teacher}/{domain}" for domain, teachers in labels.items() for teacher in teachers}


def test_batch_of_one_domain_gives_the_other_head_a_zero_gradient() -> None:
    module = objective()
    module(output(), batch(["speech", "speech"])).loss.backward()
    grads = [p.grad for p in module.heads["audio"].parameters()]
    assert all(grad is not None and not grad.any() for grad in grads)
    assert all(p.grad.any() for p in module.heads["speech"].parameters())


@pytest.mark.parametrize(
    ("alpha", "masked", "factor"), [(0.5, 0.0, 1.0), (0.5, 1.0, 1.0), (1.0, 1.0, 2.0), (1.0, 0.0, 0.0), (0.25, 1.0, 0.5), (0.25, 0.0, 1.5)]
)
def test_alpha_weighs_masked_against_unmasked_frames(alpha: float, masked: float, factor: float) -> None:
    plain = objective()(output(), batch(["speech"] * 2)).loss
    weighed = objective(alpha=alpha)(output(masked=masked), batch(["speech"] * 2)).loss
    torch.testing.assert_close(weighed, factor * plain)


def test_evaluation_weighs_all_frames_alike_since_nothing_is_masked() -> None:
    plain, masked_only = objective().eval(), objective(alpha=1.0).eval()
    torch.testing.assert_close(masked_only(output(), batch(["speech"] * 2)).loss, plain(output(), batch(["speech"] * 2)).loss)


def test_frames_beyond_the_students_length_do_not_count() -> None:
    module, data = objective(), batch(["speech", "speech"])
    step = module(output(lens=[10, 4]), data)
    assert step.count == 14
    data.tokens["speech"][1, 4:] = 7 - data.tokens["speech"][1, 4:]
    torch.testing.assert_close(module(output(lens=[10, 4]), data).loss, step.loss)


def test_missing_tokens_are_ignored_without_a_loss() -> None:
    data = batch(["speech", "speech"])
    data.tokens["speech"][1] = IGNORE
    data.token_lens["speech"][1] = 0
    step = objective()(output(), data)
    assert step.count == 10
    assert math.isfinite(step.loss.item())


def test_loss_does_not_depend_on_the_order_of_the_cuts() -> None:
    module, data, out = objective(), batch(["speech", "audio", "speech"]), output(n=3)
    order = torch.tensor([2, 0, 1])
    turned = Batch(
        ids=[data.ids[i] for i in order],
        domains=[data.domains[i] for i in order],
        features=data.features[order],
        feature_lens=data.feature_lens[order],
        seconds=data.seconds,
        tokens={k: v[order] for k, v in data.tokens.items()},
        token_lens={k: v[order] for k, v in data.token_lens.items()},
    )
    moved = StudentOutput(out.features[order], out.lens[order], (out.features[order],), out.masked_share[order])
    torch.testing.assert_close(module(out, data).loss, module(moved, turned).loss)


def test_delay_lets_the_student_look_ahead() -> None:
    data, out = batch(["speech"] * 2), output()
    late = objective(delay_frames=2)(out, data)
    shifted = StudentOutput(out.features[:, 2:], out.lens - 2, (), out.masked_share[:, 2:])
    torch.testing.assert_close(late.loss, objective()(shifted, data).loss)
    assert late.count == 16


def test_perfect_logits_give_full_accuracy() -> None:
    module, data = objective(), batch(["speech"])
    data.tokens["speech"][:] = 3
    for name, parameter in module.heads["speech"].named_parameters():
        nn.init.zeros_(parameter)
        if "bias" in name:
            with torch.no_grad():
                parameter.view(3, 8)[:, 3] = 50.0
    step = module(output(n=1), data)
    assert (step.metrics["accuracy/speech/speech"] == torch.tensor([10.0, 10.0])).all()
    assert step.loss.item() < 1e-6


def test_module_masks_in_training_only() -> None:
    encoder = Halve()
    module = PretrainModule(Student(encoder, MaskConfig(time_prob=0.8, time_length=4)), MaskedPredictionConfig().build(encoder, SPECS))
    data = batch(["speech", "audio"], t=40)
    share = [module(data, torch.Generator().manual_seed(3)).metrics["masked_share"] for _ in range(2)]
    assert 0.2 < share[0][0] / share[0][1] < 0.9
    assert (share[0] == share[1]).all()
    module.eval()
    assert module(data, torch.Generator().manual_seed(3)).metrics["masked_share"][0] == 0


def test_soft_targets_are_the_mean_over_all_draws() -> None:
    """Cell by cell (1 - b) CE(first) + b CE(second), so the mean over draws nears it, at the spread of a mean."""
    module, data, out = objective(), batch(["speech", "speech"]), output()
    data.second = {"speech": (data.tokens["speech"] + 1) % 8}
    data.second["speech"][1, 5:] = IGNORE
    data.second_share = torch.tensor([0.3, 0.8])
    soft = module(out, data)
    logits = module.heads["speech"](out.features).log_softmax(-1)
    first, second = (-logits.gather(-1, tokens.clamp(min=0)[..., None])[..., 0] for tokens in (data.tokens["speech"], data.second["speech"]))
    share = torch.where(data.second["speech"] == IGNORE, 0.0, data.second_share[:, None, None])
    torch.testing.assert_close(soft.loss, ((1 - share) * first + share * second).sum() / 3)
    assert soft.count == 20
    g, draws = torch.Generator().manual_seed(0), []
    for _ in range(300):
        hard = batch(["speech", "speech"])
        taken = torch.rand(share.shape, generator=g) < share
        hard.tokens["speech"] = torch.where(taken, data.second["speech"], hard.tokens["speech"])
        draws.append([x.item() for x in (lambda step: (step.loss, step.metrics["accuracy/speech/speech"][0]))(module(out, hard))])
    drawn = torch.tensor(draws)
    spread = drawn.std(dim=0) / 300**0.5
    assert (drawn.mean(dim=0) - torch.stack([soft.loss.detach(), soft.metrics["accuracy/speech/speech"][0]])).abs().le(4 * spread).all()


def test_soft_targets_without_a_second_token_are_the_plain_ones() -> None:
    module, data, out = objective(), batch(["speech", "audio"]), output()
    plain = module(out, data)
    data.second = {name: torch.full_like(tokens, IGNORE) for name, tokens in data.tokens.items()}
    data.second_share = torch.tensor([0.3, 0.8])
    soft = module(out, data)
    torch.testing.assert_close(soft.loss, plain.loss)
    for name, value in plain.metrics.items():
        torch.testing.assert_close(soft.metrics[name], value)


def test_teacher_of_an_inner_layer_reads_it_and_leaves_the_output_alone() -> None:
    module, data, plain = objective(layers={"audio": 1}), batch(["audio", "audio"]), output()
    hidden, features = torch.randn(2, 10, 6).requires_grad_(), plain.features.requires_grad_()
    step = module(plain._replace(features=features, hidden_states=(hidden,)), data)
    repeated = data.tokens["audio"].repeat_interleave(2, dim=1)
    audio = nn.functional.cross_entropy(module.heads["audio"](hidden).flatten(0, 2), repeated.flatten(), reduction="sum") / 2
    torch.testing.assert_close(step.metrics["loss/audio/audio"][0], audio.detach())
    step.loss.backward()
    assert hidden.grad is not None
    assert features.grad is not None
    torch.testing.assert_close(hidden.grad, 0.1 * torch.autograd.grad(audio, hidden)[0])
    speech = nn.functional.cross_entropy(module.heads["speech"](features).flatten(0, 2), data.tokens["speech"].flatten(), reduction="sum") / 3
    torch.testing.assert_close(features.grad, torch.autograd.grad(speech, features)[0])


def test_inner_layer_sees_the_delay_too() -> None:
    data, out = batch(["audio"]), output(n=1)
    both = [objective(layers=layers, delay_frames=2)(out, data) for layers in ({}, {"audio": 1})]
    assert torch.equal(both[0].loss, both[1].loss)  # the only layer of `Halve` is its output


def test_match_is_told_apart_by_duration_and_codebook() -> None:
    module, data, out = objective().eval(), batch(["speech", "speech", "audio"]), output(n=3)
    data.feature_lens = torch.tensor([199, 200, 2000])  # just below 2 s, 2 s, 20 s
    step = module(out, data)
    guess = module.heads["speech"](out.features).argmax(-1)
    right = (guess == data.tokens["speech"]).float()
    for row, domain, label in ((0, "speech", "0-2s"), (1, "speech", "2-5s"), (2, "audio", "20s-")):
        torch.testing.assert_close(step.metrics[f"match/speech/{domain}/{label}"], torch.stack([right[row].mean(-1).sum(), torch.tensor(10.0)]))
    assert step.metrics["match/speech/speech/10-20s"].tolist() == [0.0, 0.0]
    for c in range(3):
        torch.testing.assert_close(step.metrics[f"codebook/speech/{c}"], torch.stack([right[..., c].sum(), torch.tensor(30.0)]))
    total = sum(step.metrics[f"codebook/speech/{c}"][0] for c in range(3)) / 3
    torch.testing.assert_close(total, step.metrics["accuracy/speech/speech"][0] + step.metrics["accuracy/speech/audio"][0])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"alpha": 1.5}, "`alpha` must be between 0 and 1, but is 1.5"),
        ({"delay_frames": -1}, "`delay_frames` must not be negative"),
        ({"weights": {}}, "must name at least one domain"),
        ({"weights": {"speech": {"speech": 0.0}}}, "`weights.speech` must give at least one teacher"),
        ({"weights": {"speech": {"speech": -1.0}}}, "`weights.speech.speech` must not be negative"),
        ({"layers": {"audio": 0}}, "`layers.audio` must be 1 or more, but is 0"),
        ({"layers": {"voice": 1}}, "`layers` names teacher 'voice', which has no weight above 0"),
        ({"layers": {"audio": 1, "speech": 2}}, "`layers` must leave out at least one teacher"),
    ],
)
def test_config_raises_config_error_when_out_of_range(settings: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        MaskedPredictionConfig(**settings)  # type: ignore[arg-type]


def test_labels_raises_config_error_when_the_domain_is_unknown() -> None:
    with pytest.raises(ConfigError, match="domain 'music' is not in the recipe's `objective.weights`, which knows audio, speech"):
        MaskedPredictionConfig().labels("music")


def test_build_raises_config_error_when_a_teacher_has_no_tokens() -> None:
    with pytest.raises(ConfigError, match="teacher 'audio', for which there are no tokens"):
        MaskedPredictionConfig().build(Halve(), {"speech": SPECS["speech"]})


@pytest.mark.parametrize(
    ("rate_hz", "layer", "message"),
    [
        (50.0, 2, "`objective.layers.audio` must be at most 1, the student's layers, but is 2"),
        (25.0, 1, "`objective.layers` needs a student at 50 Hz"),
    ],
)
def test_build_raises_config_error_when_an_inner_layer_cannot_be_read(rate_hz: float, layer: int, message: str) -> None:
    encoder = Halve()
    encoder.frame_rate_hz = rate_hz
    with pytest.raises(ConfigError, match=message):
        MaskedPredictionConfig(layers={"audio": layer}).build(encoder, SPECS)


def neighbours(tokens: Tensor, share: float) -> tuple[Tensor, Tensor, Tensor]:
    """Of tokens (N, T, C): those before and after the points between frames t - 1 and t, and how much each code counts, (N, T - 1, C, 8)."""
    before, after = tokens[:, :-1], tokens[:, 1:]
    spread = (1 - share) * nn.functional.one_hot(before.clamp(min=0), 8) + share * nn.functional.one_hot(after.clamp(min=0), 8)
    return before, after, spread


def test_interpolated_targets_are_the_two_frames_around_a_centre_by_their_distances() -> None:
    """Student frame t is centred at 10 + 20 t ms: an eighth of a frame before frame t of the speech teacher (12.5 ms), so the frame before
    counts 1/8 and that one 7/8; the first student frame lies before the first teacher frame and has no target."""
    module, data, out = objective(align="interpolate", weights={"speech": {"speech": 1.0}}), batch(["speech", "speech"]), output()
    features = out.features.requires_grad_()
    step = module(out, data)
    spread = neighbours(data.tokens["speech"], 0.875)[2]
    logits = module.heads["speech"](features)[:, 1:]
    expected = -(spread * logits.log_softmax(-1)).sum() / 3
    torch.testing.assert_close(step.loss, expected)
    assert step.count == 18
    guess = logits.argmax(-1)
    torch.testing.assert_close(
        step.metrics["accuracy/speech/speech"], torch.stack([spread.gather(-1, guess[..., None]).sum() / 3, torch.tensor(18.0)])
    )
    wanted = torch.autograd.grad(expected, features)[0]
    torch.testing.assert_close(torch.autograd.grad(step.loss, features)[0], wanted)
    assert not wanted[:, 0].any()


def test_interpolated_targets_of_a_slower_teacher_repeat_at_weights_of_their_own() -> None:
    """Audio at 25 Hz from 20 ms on: student frame t lies at teacher frame t / 2 - 1/4, so weights are 3/4 (t even) and 1/4 (t odd)."""
    module, data, out = objective(align="interpolate", weights={"audio": {"audio": 1.0}}), batch(["audio"]), output(n=1)
    step = module(out, data)
    minus = -module.heads["audio"](out.features).log_softmax(-1)[0]
    total = torch.zeros(())
    for t in range(1, 9):  # frame 0 has nothing before it; the fifth and last teacher frame is the later one of student frame 8
        before, share = ((t // 2 - 1, 0.75), (t // 2, 0.25))[t % 2]
        for frame, weight in ((before, 1 - share), (before + 1, share)):
            total = total + weight * minus[t].gather(-1, data.tokens["audio"][0, frame][:, None]).mean()
    torch.testing.assert_close(step.loss, total)
    assert step.count == 8


def test_interpolated_targets_on_the_centres_of_frames_are_those_by_time() -> None:
    specs = {name: TokenSpec(spec.num_codebooks, 8, spec.frame_rate_hz, 0.01) for name, spec in SPECS.items()}
    found = []
    for align in ("time", "interpolate"):
        torch.manual_seed(0)
        module = MaskedPredictionConfig(align=align, weights={"speech": {"speech": 1.0}}).build(Halve(), specs)  # type: ignore[arg-type]
        found.append(module(output(lens=[10, 6]), batch(["speech"] * 2)))
    torch.testing.assert_close(found[1].loss, found[0].loss)
    assert found[1].count == found[0].count == 16


def test_interpolated_targets_are_mixed_with_second_tokens_frame_by_frame() -> None:
    module, data, out = objective(align="interpolate", weights={"speech": {"speech": 1.0}}), batch(["speech", "speech"]), output()
    data.second = {"speech": (data.tokens["speech"] + 3) % 8}
    data.second["speech"][1, 4:] = IGNORE
    data.second_share = torch.tensor([0.3, 0.6])
    heard = torch.where(data.second["speech"] == IGNORE, 0.0, data.second_share[:, None, None])[..., None]  # (N, T, C, 1)
    codes = (1 - heard) * nn.functional.one_hot(data.tokens["speech"], 8) + heard * nn.functional.one_hot(data.second["speech"].clamp(min=0), 8)
    spread = 0.125 * codes[:, :-1] + 0.875 * codes[:, 1:]
    expected = -(spread * module.heads["speech"](out.features)[:, 1:].log_softmax(-1)).sum() / 3
    torch.testing.assert_close(module(out, data).loss, expected)


def test_interpolated_targets_need_both_frames() -> None:
    module, data, out = objective(align="interpolate", weights={"speech": {"speech": 1.0}}), batch(["speech", "speech"]), output(lens=[10, 7])
    data.token_lens["speech"] = torch.tensor([6, 10])
    step = module(out, data)
    assert step.count == 5 + 6  # student frames 1 to 5, and 1 to 6
    data.tokens["speech"][0, 6:] = 7 - data.tokens["speech"][0, 6:]
    torch.testing.assert_close(module(out, data).loss, step.loss)


class Counting(TorchDispatchMode):
    """Counts what makes the host wait for a GPU: where a mask is true, which a mask as an index asks for, too, and values that are read."""

    def __init__(self) -> None:
        super().__init__()
        self.waits = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        indexed = name in ("index", "index_put", "index_put_") and any(x is not None and x.dtype == torch.bool for x in args[1])
        self.waits += name in ("nonzero", "_local_scalar_dense") or indexed
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("settings", [{}, {"align": "interpolate"}, {"delay_frames": 1}], ids=str)
def test_loss_waits_for_a_gpu_once_a_teacher(settings: dict[str, Any]) -> None:
    module, data = objective(**settings), batch(["speech", "audio"])
    for module.training in (True, False):
        with Counting() as counting:
            module(output(), data)
        assert counting.waits == len(module.heads)
