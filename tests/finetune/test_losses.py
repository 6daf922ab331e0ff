"""Losses and answers of the heads against values computed by hand, and the size of an adapter's product."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from spear.finetune.batch import LabelledBatch
from spear.finetune.layers import LayerMix
from spear.finetune.lora import LoRAConfig, add_adapters
from spear.finetune.tasks.classification import ClassificationConfig
from spear.finetune.tasks.tagging import TaggingConfig
from spear.finetune.tasks.verification import SpeakerConfig, SpeakerHead

CLASSES = {"classes": ["a", "b", "c"]}
LOGITS = ((1.0, -2.0, 0.5), (0.0, 3.0, -1.0))


def batch(labels: Tensor) -> LabelledBatch:
    n = len(labels)
    ones = torch.ones(n, dtype=torch.int64)
    return LabelledBatch([str(i) for i in range(n)], [""] * n, torch.zeros(n, 1, 2), ones, 1.0, labels=labels, label_lens=ones)


def of_logits(head: Any) -> Any:
    """The head whose scores of a frame are the frame."""
    with torch.no_grad():
        head.output.weight.copy_(torch.eye(3))
        head.output.bias.zero_()
    return head


def frames() -> tuple[Tensor, Tensor]:
    return torch.tensor(LOGITS)[:, None], torch.ones(2, dtype=torch.int64)


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


@pytest.mark.parametrize(("training", "margin"), [(True, 0.2), (False, 0.0)])
def test_speaker_loss_has_its_margin_in_training_only_and_leaves_out_unknown_speakers(
    monkeypatch: pytest.MonkeyPatch, training: bool, margin: float
) -> None:
    task = SpeakerConfig(dim=2, margin=0.2, scale=5.0)
    head = task.build(2, LayerMix(2, [2], "last"), {"classes": ["a", "b"]}).train(training)
    angles = (0.4, 1.1, 0.9)  # from speaker 0, whose direction is (1, 0); that of speaker 1 is (0, 1)
    vectors = torch.tensor([[math.cos(angle), math.sin(angle)] for angle in angles])
    monkeypatch.setattr(SpeakerHead, "vectors", lambda self, frames, lens: vectors)
    with torch.no_grad():
        head.speakers.copy_(torch.tensor([[3.0, 0.0], [0.0, 0.5]]))
    out = head.loss(*frames(), batch(torch.tensor([0, 0, -1])))
    wanted = 0.0
    for angle in angles[:2]:
        right, wrong = 5 * math.cos(angle + margin), 5 * math.cos(math.pi / 2 - angle)
        wanted += math.log(math.exp(right) + math.exp(wrong)) - right
    assert out.loss.item() == pytest.approx(wanted, rel=1e-5)
    assert int(out.count) == 2
    assert out.metrics["accuracy"].tolist() == [1.0, 2.0]


@pytest.mark.parametrize("smoothing", [0.0, 0.3])
def test_classification_loss_is_the_cross_entropy_with_smoothed_targets(smoothing: float) -> None:
    head = of_logits(ClassificationConfig(dropout=0.0, smoothing=smoothing).build(3, LayerMix(3, [3], "last"), CLASSES))
    out = head.loss(*frames(), batch(torch.tensor([0, 2])))
    wanted = 0.0
    for logits, label in zip(LOGITS, (0, 2)):
        total = math.log(sum(map(math.exp, logits)))
        wanted += sum(((1 - smoothing) * (k == label) + smoothing / 3) * (total - logit) for k, logit in enumerate(logits))
    assert out.loss.item() == pytest.approx(wanted, rel=1e-5)
    assert int(out.count) == 2
    assert out.metrics["accuracy"].tolist() == [1.0, 2.0]


def test_classification_prediction_is_the_softmax_of_the_scores() -> None:
    head = of_logits(ClassificationConfig().build(3, LayerMix(3, [3], "last"), CLASSES)).eval()
    with torch.no_grad():
        found = head.predict(*frames())
    for logits, value in zip(LOGITS, found):
        assert value.tolist() == pytest.approx([math.exp(x) / sum(map(math.exp, logits)) for x in logits], rel=1e-5)


def test_tagging_loss_is_the_mean_over_tags_and_the_sum_over_items() -> None:
    head = of_logits(TaggingConfig(dropout=0.0).build(3, LayerMix(3, [3], "last"), CLASSES))
    labels = ((1.0, 0.0, 0.5), (0.0, 0.0, 1.0))
    out = head.loss(*frames(), batch(torch.tensor(labels)))
    pairs = [pair for row in zip(LOGITS, labels) for pair in zip(*row)]
    wanted = -sum(y * math.log(sigmoid(x)) + (1 - y) * math.log(1 - sigmoid(x)) for x, y in pairs) / 3
    assert out.loss.item() == pytest.approx(wanted, rel=1e-5)
    assert int(out.count) == 2


def test_tagging_prediction_is_one_sigmoid_per_tag() -> None:
    head = of_logits(TaggingConfig().build(3, LayerMix(3, [3], "last"), CLASSES)).eval()
    with torch.no_grad():
        found = head.predict(*frames())
    for logits, value in zip(LOGITS, found):
        assert value.tolist() == pytest.approx([sigmoid(x) for x in logits], rel=1e-5)


def test_adapter_adds_the_product_times_alpha_over_rank() -> None:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(5, 6))
    before = network[0].weight.detach().clone()
    add_adapters(network, LoRAConfig(rank=8, alpha=4.0))
    found = dict(network.named_parameters())
    a, b = (next(p for name, p in found.items() if name.endswith(end)) for end in (".a", ".b"))
    with torch.no_grad():
        b.normal_()
    torch.testing.assert_close(network[0].weight, before + 0.5 * b @ a)
