"""Probes of other kinds, and rows of stacked layers made as they are used."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from spear.errors import ConfigError
from spear.evaluation.heads import HEADS, HeadName, fit_knn, fit_mlp
from spear.evaluation.probe import LayerStack, ProbeRun, fit_probe, scale_of, stack_layers, standardise
from spear.evaluation.tasks import classification
from spear.evaluation.tasks.base import Features, Settings, Split
from spear.evaluation.tasks.utterances import UtterancesConfig

RUN = ProbeRun(learning_rate=0.01, weight_decay=0.0, seed=0, steps=300, batch_size=64)
SPLITS: tuple[Split, ...] = ("train", "valid", "test")


def ring(num: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Two classes that no line parts: inside and outside of a circle."""
    x = torch.randn(1, num, 2, generator=torch.Generator().manual_seed(seed))
    return x, (x[0].norm(dim=1) > 1.18).long()


@pytest.mark.parametrize(("head", "low", "high"), [("linear", 0.3, 0.7), ("mlp", 0.93, 1), ("knn", 0.9, 1)])
def test_heads_differ_on_a_ring_as_they_should(head: HeadName, low: float, high: float) -> None:
    (x, targets), (other, expected) = ring(600, 0), ring(300, 1)
    if head == "knn":  # cosines know no radius: lift the plane
        x, other = (torch.cat([part, part.norm(dim=2, keepdim=True) - 1.18], dim=2) for part in (x, other))
    accuracy = (HEADS[head].fit(x, targets, 2, RUN)(other).argmax(1) == expected).float().mean()
    assert low <= accuracy <= high


def test_fit_knn_counts_the_neighbours() -> None:
    x = torch.tensor([[[1.0, 0.0], [0.9, 0.1], [0.0, 1.0]]])
    scores = fit_knn(x, torch.tensor([1, 0, 0]), 2, ProbeRun(0.1, 0.0, 0, 1, 1, neighbours=1))(torch.tensor([[[2.0, 0.0], [0.0, 3.0]]]))
    assert scores.argmax(1).tolist() == [1, 0]
    scores = fit_knn(x, torch.tensor([1, 0, 0]), 2, ProbeRun(0.1, 0.0, 0, 1, 1, neighbours=2))(torch.tensor([[[2.0, 0.0]]]))
    assert scores[0].tolist() == pytest.approx([0.5, 0.5], abs=0.01)
    assert scores.argmax(1).tolist() == [1]  # one each: the nearer one's


def test_fit_mlp_is_the_same_each_time_and_another_with_another_seed() -> None:
    x, targets = ring(100, 0)
    first, second, other = (fit_mlp(x, targets, 2, ProbeRun(0.01, 0.0, seed, 20, 64))(x) for seed in (0, 0, 1))
    assert torch.equal(first, second)
    assert not torch.equal(first, other)


@pytest.mark.parametrize("batch_size", [16, 1000])
def test_layer_stack_gives_the_probe_of_the_whole_tensor(batch_size: int) -> None:
    rng = np.random.default_rng(0)
    layers = [rng.normal(3, 2, size=(90, dim)).astype(np.float32) for dim in (4, 6)]
    tensors = [torch.from_numpy(x) for x in layers]
    stack = LayerStack(layers, [scale_of(x) for x in tensors], torch.device("cpu"))
    whole = stack_layers([standardise(x, [])[0] for x in tensors])
    targets = torch.from_numpy(rng.integers(0, 3, 90))
    run = ProbeRun(0.05, 0.1, 0, 30, batch_size)
    expected, found = fit_probe(whole, targets, 3, run), fit_probe(stack, targets, 3, run)
    assert torch.equal(expected(whole), found(stack))
    assert len(stack) == 2
    assert stack.shape == whole.shape


def features(seed: int, num: int) -> Features:
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 4, num)
    good = 4 * np.eye(6)[labels] + rng.normal(size=(num, 6))
    return Features([f"c{i}" for i in labels], [f"u{i}" for i in range(num)], [rng.normal(size=(num, 6)).astype(np.float32), good.astype(np.float32)])


@pytest.mark.parametrize("head", list(HEADS))
def test_classification_takes_every_head(head: HeadName) -> None:
    settings = Settings(seeds=(0, 1, 2), steps=100, batch_size=64, resamples=20)
    score = UtterancesConfig(head=head).build("x", settings).score({split: features(i, 150) for i, split in enumerate(SPLITS)}, ["noise", "good"])
    assert score.value > 0.9
    assert score.details["head"] == head
    assert len(score.details["seed_values"]) == (1 if head == "knn" else 3)
    rows = [[int(x) for x in row.split()] for row in score.details["confusion"]["rows"]]
    assert np.sum(rows) == 150
    assert np.trace(rows) / 150 == pytest.approx(score.details["seed_values"][0], abs=1e-6)


def test_classification_of_large_stacks_gives_the_same_score(monkeypatch: pytest.MonkeyPatch) -> None:
    splits = {split: features(i, 150) for i, split in enumerate(SPLITS)}
    task = UtterancesConfig().build("x", Settings(seeds=(0,), steps=50, batch_size=32, resamples=20))
    expected = task.score(splits, ["a", "b"])
    monkeypatch.setattr(classification, "SMALL", 0)
    assert task.score(splits, ["a", "b"]) == expected


def test_seed_spread_is_the_interval_of_students_t() -> None:
    found = classification.seed_spread([0.8, 0.9, 1.0])
    assert found["seed_half_width"] == pytest.approx(4.3027 * 0.1 / 3**0.5, rel=1e-4)  # t of 0.975 with two degrees of freedom
    assert "seed_half_width" not in classification.seed_spread([0.8])


def test_utterances_config_raises_config_error_when_neighbours_vote_on_several_labels() -> None:
    with pytest.raises(ConfigError, match="`head` must be linear or mlp"):
        UtterancesConfig(head="knn", separator=";")
