"""Heads and their parts: margins, pooling, mixing of layers and labels, learning rates, the frozen start."""

from __future__ import annotations

import itertools
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from spear.data.sampler import SamplingConfig
from spear.errors import ConfigError, DataError
from spear.finetune import batch as batches_module
from spear.finetune.batch import Example, LabelledBatch, LabelledSource, Mixup, Places, Reads, mix_pairs
from spear.finetune.config import StartConfig
from spear.finetune.layers import AttentiveStatistics, LayerMix, layers_of, set_rates
from spear.finetune.model import make_module, starting_encoder, starting_source
from spear.finetune.results import write_results
from spear.finetune.tasks.base import Prediction, inverse_frequency, masked_mean
from spear.finetune.tasks.classification import ClassificationConfig
from spear.finetune.tasks.ctc import CTCConfig
from spear.finetune.tasks.tagging import TaggingConfig
from spear.finetune.tasks.verification import SpeakerConfig, aam_logits
from spear.models.conv_transformer import ConvTransformerConfig
from spear.models.masking import MaskConfig
from spear.training.optim.base import parameter_groups
from spear.types import EncoderOutput
from tests.export.tiny import tiny_config

MASKING = MaskConfig(time_prob=0.0, channel_prob=0.0, min_time_masks=0)


def batch(labels: torch.Tensor, label_lens: torch.Tensor | None = None, frames: int = 60) -> LabelledBatch:
    n = len(labels)
    torch.manual_seed(0)
    lens = torch.full((n,), frames)
    found = label_lens if label_lens is not None else torch.ones(n, dtype=torch.int64)
    return LabelledBatch([str(i) for i in range(n)], [""] * n, torch.randn(n, frames, 128), lens, 1.0, labels=labels, label_lens=found)


def module(task: Any, inventory: dict[str, Any], **changes: Any) -> Any:
    start = StartConfig(student=tiny_config(), **changes)
    encoder, _ = starting_encoder(start, None, 0)
    return make_module(start, encoder, MASKING, task, inventory, 0)


def test_aam_logits_add_the_margin_to_the_angle_of_the_wanted_class() -> None:
    angles = torch.tensor([[0.5, 1.2], [2.0, 0.3]])
    logits = aam_logits(angles.cos(), torch.tensor([0, 1]), margin=0.2, scale=30.0)
    expected = 30 * torch.tensor([[math.cos(0.7), math.cos(1.2)], [math.cos(2.0), math.cos(0.5)]])
    torch.testing.assert_close(logits, expected, atol=1e-4, rtol=0)


def test_aam_logits_keep_falling_past_the_half_turn() -> None:
    cosines = torch.linspace(-1, 1, 201)[:, None].expand(-1, 2)
    logits = aam_logits(cosines, torch.zeros(201, dtype=torch.int64), margin=0.5, scale=1.0)[:, 0]
    assert bool((logits[1:] > logits[:-1]).all())


def test_attentive_statistics_ignore_padding_and_start_from_the_moments() -> None:
    torch.manual_seed(0)
    pool = AttentiveStatistics(4, 8)
    frames, lens = torch.randn(2, 9, 4), torch.tensor([9, 5])
    found = pool(frames, lens)
    changed = frames.clone()
    changed[1, 5:] = 100.0
    torch.testing.assert_close(pool(changed, lens), found)
    with torch.no_grad():
        pool.outer.weight.zero_()
        pool.outer.bias.zero_()
    mean, deviation = pool(frames, lens)[1].chunk(2)
    torch.testing.assert_close(mean, frames[1, :5].mean(0))
    torch.testing.assert_close(deviation, frames[1, :5].std(0, unbiased=False))


def test_masked_mean_is_that_of_the_valid_frames() -> None:
    frames = torch.randn(2, 6, 3)
    torch.testing.assert_close(masked_mean(frames, torch.tensor([6, 2]))[1], frames[1, :2].mean(0))


def test_layer_mix_weighs_standardised_layers_and_joins_rates() -> None:
    mix = LayerMix(4, [2, 4], "weighted")
    narrow, wide = torch.randn(1, 5, 2), torch.randn(1, 5, 4)
    frames, _ = mix(EncoderOutput(torch.zeros(1, 5, 4), torch.tensor([5]), (narrow, wide)))
    wanted = torch.nn.functional.layer_norm(wide, (4,)) / 2
    wanted[..., :2] += torch.nn.functional.layer_norm(narrow, (2,)) / 2
    torch.testing.assert_close(frames, wanted)
    fast = torch.randn(1, 5, 4)
    last = torch.cat([fast, fast[:, -1:]], dim=1).unflatten(1, (3, 2)).mean(2)
    frames, _ = LayerMix(4, [4], "weighted")(EncoderOutput(torch.zeros(1, 3, 4), torch.tensor([3]), (fast,)))
    torch.testing.assert_close(frames, torch.nn.functional.layer_norm(last, (4,)))


def test_set_rates_decay_from_the_last_layer_to_the_front_end() -> None:
    encoder = tiny_config().build()
    set_rates(encoder, 0.5, 0.8)
    first, second = layers_of(encoder)
    rates = {id(p): group["lr"] for group in parameter_groups(encoder, 1.0) for p in group["params"]}
    assert rates[id(second.norm.bias)] == pytest.approx(0.5)
    assert rates[id(first.norm.bias)] == pytest.approx(0.4)
    assert rates[id(encoder.encoder_embed.out.bias)] == pytest.approx(0.32)
    assert rates[id(encoder.mask_emb)] == pytest.approx(0.5)


def test_set_rates_reach_the_front_end_of_a_student_that_reads_samples() -> None:
    encoder = ConvTransformerConfig(conv_dim=8, num_layers=3, dim=16, num_heads=2, feedforward_dim=16).build()
    set_rates(encoder, 1.0, 0.5)
    rates = {id(p): group["lr"] for group in parameter_groups(encoder, 1.0) for p in group["params"]}
    assert {rates[id(p)] for p in encoder.conv_front_end.parameters()} == {0.125}


def test_set_rates_of_zero_freeze_the_encoder() -> None:
    network = module(ClassificationConfig(), {"classes": ["a", "b"]}, lr_scale=0.0)
    assert not any(p.requires_grad for p in network.student.parameters())
    assert all(p.requires_grad for p in network.objective.parameters())


def test_frozen_start_gives_the_encoder_no_gradient_until_it_ends() -> None:
    network = module(ClassificationConfig(), {"classes": ["a", "b"]}, frozen_steps=2)
    labels = batch(torch.tensor([0, 1]))
    network.after_step(1)
    network(labels, None).loss.backward()
    assert all(p.grad is None for p in network.student.parameters())
    assert network.objective.output.weight.grad is not None
    other = module(ClassificationConfig(), {"classes": ["a", "b"]}, frozen_steps=2)
    other.load_training_state(network.training_state())
    assert other.step == 1
    network.after_step(2)
    network(labels, None).loss.backward()
    assert network.student.encoder.encoder_embed.out.weight.grad is not None


def test_ctc_loss_leaves_out_texts_that_are_too_long() -> None:
    task = CTCConfig(dropout=0.0)
    network = module(task, task.inventory(["ab"]))
    symbols = torch.ones(2, 40, dtype=torch.int64)
    out = network(batch(symbols, torch.tensor([2, 40])), None)
    assert int(out.count) == 2
    assert out.metrics["too_long"].tolist() == [1.0, 2.0]
    assert math.isfinite(out.loss.item())
    out.loss.backward()
    assert all(p.grad.isfinite().all() for p in network.parameters() if p.grad is not None)


@pytest.mark.parametrize("text", [[1, 1, 1], [1, 2, 1], [1, 1, 2, 2], [1]])
def test_ctc_loss_counts_the_blanks_between_repeated_symbols(text: list[int]) -> None:
    task = CTCConfig(dropout=0.0)
    head = task.build(8, LayerMix(8, [8], "last"), task.inventory(["ab"]))
    needed = len(text) + sum(a == b for a, b in itertools.pairwise(text))
    for frames in (needed - 1, needed):
        out = head.loss(torch.randn(1, 6, 8), torch.tensor([frames]), batch(torch.tensor([text]), torch.tensor([len(text)])))
        assert out.metrics["too_long"][0] == float(frames < needed)
        assert bool(out.loss > 0) == (frames >= needed)


def test_ctc_score_counts_words_and_characters() -> None:
    task = CTCConfig()
    head = task.build(8, LayerMix(8, [8], "last"), task.inventory(["ab c"]))
    found = head.score([Prediction("x", "ab c"), Prediction("y", "ab")], {"x": "ab c", "y": "ab c"})
    assert (found["value"], found["deletions"], found["texts_right"]) == (0.25, 1, 0.5)
    assert found["cer"] == pytest.approx(2 / 8)


def test_tagging_score_is_mean_average_precision() -> None:
    task = TaggingConfig()
    head = task.build(8, LayerMix(8, [8], "last"), {"classes": ["a", "b"]})
    scores = {"x": [0.9, 0.1], "y": [0.8, 0.7], "z": [0.1, 0.9]}
    found = head.score([Prediction(name, np.array(value)) for name, value in scores.items()], {"x": "a", "y": "b", "z": "a;b"})
    assert found["value"] == pytest.approx(((1 + 2 / 3) / 2 + 1) / 2)  # a: ranks 1 and 3 of x y z; b: ranks 1 and 2


@pytest.mark.parametrize("num_trials", [1000, 20])
def test_verification_trials_are_all_pairs_or_a_seeded_part_of_them(num_trials: int) -> None:
    speakers = [f"s{i}" for i in np.random.default_rng(0).integers(4, size=30)]
    head: Any = SpeakerConfig(num_trials=num_trials).build(8, LayerMix(8, [8], "last"), {"classes": ["x"]})
    for alike in (True, False):
        every = [(a, b) for a, b in itertools.combinations(range(30), 2) if (speakers[a] == speakers[b]) == alike]
        found = [tuple(pair) for pair in head._drawn(speakers, alike=alike).tolist()]
        assert found == (every if len(every) <= num_trials else sorted(found))
        assert set(found) <= set(every)
        assert len(set(found)) == min(num_trials, len(every))


def test_verification_loss_takes_cosines_in_full_precision_under_autocast(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    head: Any = SpeakerConfig(dim=16).build(8, LayerMix(8, [8], "last"), {"classes": list("abcd")})
    vectors = torch.nn.functional.normalize(torch.randn(3, 16), dim=1)
    monkeypatch.setattr(head, "vectors", lambda frames, lens: vectors)
    frames, lens, labelled = torch.zeros(3, 5, 8), torch.full((3,), 5), batch(torch.tensor([0, 2, 3]))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = head.loss(frames, lens, labelled).loss
    assert torch.equal(loss, head.loss(frames, lens, labelled).loss)


def test_tagging_score_raises_data_error_without_a_known_tag() -> None:
    head = TaggingConfig().build(8, LayerMix(8, [8], "last"), {"classes": ["a", "b"]})
    with pytest.raises(DataError, match="a tag that training has"):
        head.score([Prediction("x", np.array([0.1, 0.2]))], {"x": "c"})


def test_corpus_without_a_score_of_its_own_does_not_lose_the_others(tmp_path: Path) -> None:
    head = TaggingConfig().build(8, LayerMix(8, [8], "last"), {"classes": ["a", "b"]})
    known, strange = [Prediction("x", np.array([0.9, 0.2]))], [Prediction("y", np.array([0.1, 0.2]))]
    scores = write_results(tmp_path, head, {"one": (known, {"x": "a"}), "two": (strange, {"y": "c"})}, {"split": "test"})
    assert scores["value"] == scores["by_corpus"]["one"]["value"] == 1.0
    assert "a tag that training has" in scores["by_corpus"]["two"]["no_score"]
    assert "two" in (tmp_path / "report.md").read_text()


def test_verification_score_is_perfect_for_one_direction_per_speaker() -> None:
    head = SpeakerConfig(dim=2).build(8, LayerMix(8, [8], "last"), {"classes": ["a", "b"]})
    vectors = {"1": [1.0, 0.0], "2": [1.0, 0.0], "3": [0.0, 1.0], "4": [0.0, 1.0]}
    labels = {"1": "p", "2": "p", "3": "q", "4": "q"}
    predictions = [Prediction(name, np.array(value)) for name, value in vectors.items()]
    assert head.score(predictions, labels)["value"] == 0.0
    assert head.score(predictions, {"1": "p", "2": "q", "3": "p", "4": "q"})["value"] == pytest.approx(2 / 3)  # misses x meet false alarms 1 - x / 2
    with pytest.raises(DataError, match="pairs of one speaker and of two"):
        head.score(predictions, dict.fromkeys("1234", "p"))


def test_mixup_mixes_waveforms_and_targets_with_one_share() -> None:
    waves = [np.full(4, 1.0, np.float32), np.full(2, 3.0, np.float32)]
    targets = [np.array([1.0, 0.0], np.float32), np.array([0.0, 1.0], np.float32)]
    mixed, labels = mix_pairs(waves, targets, Mixup(1.0, 10.0), np.random.default_rng(0))
    for wave, label, own, other in zip(mixed, labels, (1.0, 3.0), (3.0, 1.0)):
        share = label[0 if own == 1.0 else 1]
        assert 0 < share < 1
        np.testing.assert_allclose(wave, share * own + (1 - share) * other, rtol=1e-6)
    same, _ = mix_pairs(waves, targets, Mixup(0.0, 10.0), np.random.default_rng(0))
    assert same[0] is waves[0]


def test_draws_follow_the_weights() -> None:
    weights = inverse_frequency([["a"]] * 6 + [["b"]] * 2)
    weights *= 8 / weights.sum()
    examples = [Example(SimpleNamespace(duration=1.0 + i % 3), np.asarray(i)) for i in range(8)]
    places = Places(examples, weights)
    assert len(places.samples) == 8
    points = (np.arange(1000) + 0.5) / 1000
    found = [[int(places.at(place, u).target) for u in points] for place in range(8)]
    np.testing.assert_allclose(np.bincount(np.concatenate(found), minlength=8) / 1000, weights, atol=0.01)  # all are heard, as often as they ought to
    for row, samples in zip(found, places.samples):
        assert max(examples[i].samples for i in row) == samples
    plain = Places(examples, None)
    assert [int(plain.at(place, 0.9).target) for place in range(8)] == list(range(8))


def test_weighted_draws_hear_every_example_and_keep_to_the_batch_length(monkeypatch: pytest.MonkeyPatch) -> None:
    examples = [Example(SimpleNamespace(duration=1.0 + i % 7), np.asarray(i), int(i >= 60)) for i in range(100)]
    monkeypatch.setattr(batches_module, "make_batch", lambda rows, *_: rows)
    draws = np.where(np.arange(100) % 10 == 0, 6.0, 0.4)
    source = LabelledSource(examples, [1.0, 1.0], SamplingConfig(max_batch_s=20.0), 0, reads=Reads("fbank", 8), draws=draws)
    batches: list[Any] = [source.batch(g) for g in range(30 * source.batches_per_epoch)]
    assert all(len(rows) * max(example.cut.duration for example in rows) <= 20 for rows in batches)
    times = np.bincount([int(example.target) for rows in batches for example in rows], minlength=100) / 30
    assert times.min() > 0
    assert times[::10].mean() == pytest.approx(6.25, rel=0.1)
    assert [int(example.target) for example in source.batch(3)] == [int(example.target) for example in batches[3]]


def test_labels_are_found_where_they_stand() -> None:
    part = SimpleNamespace(custom={"label": "dog"}, speaker="ann", text="b", start=1.0)
    first = SimpleNamespace(custom=None, speaker="ann", text="A", start=0.0)
    cut = SimpleNamespace(supervisions=[part, first], custom={"emotion": "calm"})
    assert CTCConfig().label(cut) == "a b"
    assert TaggingConfig().label(cut) == "dog"
    assert SpeakerConfig().label(cut) == "ann"
    assert ClassificationConfig(label_field="emotion").label(cut) == "calm"
    assert ClassificationConfig(label_field="age").label(cut) is None


def test_start_config_raises_config_error_when_two_networks_are_named() -> None:
    with pytest.raises(ConfigError, match="has both"):
        StartConfig(init_from="x", student=tiny_config())
    with pytest.raises(ConfigError, match="neither is there"):
        starting_source(StartConfig(), Path())
