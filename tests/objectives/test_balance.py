"""Balances of several teachers: factors by formula, state that is saved, choices that follow the seed."""

from __future__ import annotations

import math

import pytest
import torch

from spear.errors import ConfigError
from spear.objectives.balance import Balance, BalanceConfig, DropConfig, FixedConfig, RunningConfig
from tests.objectives.test_masked_prediction import batch, objective, output

LOSSES = torch.tensor([[6.0, 2.0], [3.0, 0.0], [0.0, 8.0]])
COUNTS = torch.tensor([[3.0, 2.0], [3.0, 0.0], [0.0, 2.0]])


def heard(balance: Balance, losses: torch.Tensor, counts: torch.Tensor) -> list[float]:
    factors = balance(losses, counts)
    assert factors is not None
    balance.after_step()
    assert (factors == factors[:1]).all()
    return [float(x) for x in factors[0]]


def test_fixed_balance_changes_nothing() -> None:
    assert FixedConfig().build(["a", "b"])(LOSSES, COUNTS) is None
    assert not FixedConfig().build(["a"]).state_dict()


def test_running_balance_divides_by_the_mean_loss_of_the_updates_before() -> None:
    balance = RunningConfig(decay=0.5).build(["a", "b"])
    assert heard(balance, LOSSES, COUNTS) == [1.0, 1.0]
    first = [9 / 6, 10 / 4]
    assert heard(balance, 2 * LOSSES, COUNTS) == pytest.approx([1 / x for x in first])
    second = [(0.25 * x + 0.5 * 2 * x) / 0.75 for x in first]  # weights decay^1 (1 - decay), (1 - decay)
    assert heard(balance, LOSSES, COUNTS) == pytest.approx([1 / x for x in second])


def test_running_balance_adds_up_the_parts_of_an_update() -> None:
    whole, parts = (RunningConfig().build(["a", "b"]) for _ in range(2))
    whole(LOSSES, COUNTS)
    for i in range(3):
        parts(LOSSES[i : i + 1], COUNTS[i : i + 1])
    whole.after_step()
    parts.after_step()
    torch.testing.assert_close(whole.state_dict()["running"], parts.state_dict()["running"])


def test_running_balance_keeps_the_mean_of_a_teacher_that_is_silent_and_forgets_a_discarded_update() -> None:
    balance = RunningConfig(decay=0.5).build(["a", "b"])
    heard(balance, LOSSES, COUNTS)
    before = balance.state_dict()["running"].clone()
    balance(torch.tensor([[math.nan, 1.0]]), torch.ones(1, 2))
    balance.discard_step()
    balance.after_step()
    assert torch.equal(before, balance.state_dict()["running"])
    balance(LOSSES[1:2], COUNTS[1:2])
    balance.after_step()
    assert torch.equal(before[:, 1], balance.state_dict()["running"][:, 1])
    assert not torch.equal(before[:, 0], balance.state_dict()["running"][:, 0])


def test_running_balance_continues_from_its_state() -> None:
    one, two = (RunningConfig().build(["a", "b"]) for _ in range(2))
    heard(one, LOSSES, COUNTS)
    two.load_state_dict(one.state_dict())
    assert heard(one, LOSSES, COUNTS) == heard(two, LOSSES, COUNTS) != [1.0, 1.0]


@pytest.mark.parametrize("p", [0.0, 0.25, 0.5, 1.0])
def test_drop_balance_keeps_the_hardest_and_drops_the_others_as_often_as_it_says(p: float) -> None:
    balance = DropConfig(p=p).build(["a", "b"])
    torch.manual_seed(0)
    drawn = torch.stack([balance(LOSSES, COUNTS) for _ in range(400)])  # type: ignore[misc]
    assert set(drawn.unique().tolist()) <= {0.0, 1.0}
    assert (drawn[:, 0, 0] == 1).all()  # 2.0 per frame against 1.0
    assert (drawn[:, 1, 0] == 1).all()  # the only one
    assert (drawn[:, 2, 1] == 1).all()
    assert float(1 - drawn[:, 0, 1].mean()) == pytest.approx(p, abs=0.08)


def test_drop_balance_compares_losses_per_frame() -> None:
    factors = DropConfig(p=1.0).build(["a", "b"])(torch.tensor([[6.0, 5.0], [6.0, 5.0]]), torch.tensor([[6.0, 1.0], [6.0, 6.0]]))
    assert factors is not None
    assert factors.tolist() == [[0.0, 1.0], [1.0, 0.0]]  # 1 against 5, 1 against 5/6


def test_drop_balance_follows_the_global_generator() -> None:
    balance = DropConfig().build(["a", "b"])
    first, second = ([(torch.manual_seed(seed), balance(LOSSES, COUNTS))[1].tolist() for seed in range(8)] for _ in range(2))
    assert first == second
    assert len({str(x) for x in first}) > 1


@pytest.mark.parametrize("kind", sorted(BalanceConfig.TABLE))
def test_objective_weighs_by_its_balance_in_training_only(kind: str) -> None:
    settings = BalanceConfig.get_choice_class(kind)(**({"p": 1.0} if kind == "drop" else {}))
    plain, module = objective(weights=WEIGHTS), objective(weights=WEIGHTS, balance=settings)
    data, out = batch(["speech", "audio"]), output()
    torch.manual_seed(1)
    for _ in range(2):
        step = module(out, data)
        module.after_step(1, None)  # type: ignore[arg-type]
    sums = torch.stack([step.metrics[f"loss/{name}/{domain}"] for name in ("audio", "speech") for domain in ("audio", "speech")]).view(2, 2, 2)
    means = sums[:, :, 0].sum(1) / sums[:, :, 1].sum(1)
    if kind == "fixed":
        torch.testing.assert_close(step.loss.detach(), plain(out, data).loss.detach())
    elif kind == "running":
        torch.testing.assert_close(step.loss.detach(), (sums[:, :, 0].sum(1) / means).sum())
    else:
        hardest = torch.stack([sums[:, d, 0] for d in range(2)]).amax(dim=1)  # one cut of each domain, ten frames each
        torch.testing.assert_close(step.loss.detach(), hardest.sum())
    torch.testing.assert_close(module.eval()(out, data).loss, plain.eval()(out, data).loss)


WEIGHTS = {"speech": {"speech": 1.0, "audio": 1.0}, "audio": {"speech": 1.0, "audio": 1.0}}


@pytest.mark.parametrize(
    ("config", "message"),
    [(lambda: RunningConfig(decay=1.0), "`decay` must be between 0 and"), (lambda: DropConfig(p=2.0), "`p` must be between 0 and 1")],
)
def test_balance_configs_raise_config_error_when_out_of_range(config: object, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        config()  # type: ignore[operator]
