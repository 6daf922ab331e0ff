"""The transducer against k2 (stored by tools/golden_rnnt.py), against enumeration, and its searches against loops by hand."""

from __future__ import annotations

import itertools
import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

from spear.errors import ConfigError
from spear.files import read_tensors
from spear.finetune.batch import LabelledBatch
from spear.finetune.layers import LayerMix
from spear.finetune.tasks.rnnt import RNNTConfig, RNNTHead
from spear.finetune.text import Characters
from spear.finetune.transducer import Lattice, Lens, Paths, band, joint_lattice, simple_lattice, sum_paths, whole_range
from spear.finetune.transducer_search import beam_search, greedy_search

GOLDEN = read_tensors(Path(__file__).with_name("rnnt.safetensors"))
LABELS = GOLDEN["labels"].long()
LENS = Lens(GOLDEN["frames"].long(), GOLDEN["symbols"].long())
CONTEXT, LM_SCALE, AM_SCALE = 2, 0.25, 0.1


def inputs(name: str, *keys: str) -> list[Tensor]:
    return [GOLDEN[f"{name}.{key}"].clone().requires_grad_() for key in keys]


def check(name: str, lattice: Lattice, lens: Lens, **leaves: Tensor) -> None:
    """Loss and gradients are those of k2."""
    loss = -sum_paths(lattice, lens).total
    torch.testing.assert_close(loss.detach(), GOLDEN[f"{name}.loss"], rtol=1e-6, atol=1e-5)
    for key, grad in zip(leaves, torch.autograd.grad(loss.sum(), list(leaves.values()))):
        torch.testing.assert_close(grad, GOLDEN[f"{name}.{key}_grad"], rtol=1e-4, atol=2e-6)


def test_loss_over_the_whole_lattice_is_that_of_k2() -> None:
    (logits,) = inputs("full", "logits")
    check("full", joint_lattice(logits, LABELS, whole_range(LABELS, logits.shape[1])), LENS, logits=logits)


def test_simple_loss_is_that_of_k2() -> None:
    am, lm = inputs("simple", "am", "lm")
    check("simple", simple_lattice(am, lm, LABELS, LENS, lm_scale=0.0, am_scale=0.0), LENS, am=am, lm=lm)


def test_smoothed_loss_and_its_shares_of_paths_are_those_of_k2() -> None:
    am, lm = inputs("smoothed", "am", "lm")
    lattice = simple_lattice(am, lm, LABELS, LENS, lm_scale=LM_SCALE, am_scale=0.0)
    check("smoothed", lattice, LENS, am=am, lm=lm)
    paths = sum_paths(lattice, LENS)
    torch.testing.assert_close(paths.symbols[:, :-1], GOLDEN["smoothed.px_grad"][..., :-1], rtol=1e-4, atol=2e-6)
    torch.testing.assert_close(paths.blanks, GOLDEN["smoothed.py_grad"], rtol=1e-4, atol=2e-6)


def test_simple_loss_is_exact_under_autocast() -> None:
    am, lm = inputs("simple", "am", "lm")
    with torch.autocast("cpu", torch.bfloat16):
        lattice = simple_lattice(am, lm, LABELS, LENS, lm_scale=0.0, am_scale=0.0)
    check("simple", lattice, LENS, am=am, lm=lm)


def test_smoothed_loss_with_a_mean_over_the_batch_is_that_of_k2() -> None:
    am, lm = inputs("both_scales", "am", "lm")
    whole = Lens(torch.full((len(LABELS),), am.shape[1]), torch.full((len(LABELS),), LABELS.shape[1]))
    check("both_scales", simple_lattice(am, lm, LABELS, whole, lm_scale=LM_SCALE, am_scale=AM_SCALE), whole, am=am, lm=lm)


def test_band_and_pruned_loss_are_those_of_k2() -> None:
    am, lm = inputs("smoothed", "am", "lm")
    paths = sum_paths(simple_lattice(am, lm, LABELS, LENS, lm_scale=LM_SCALE, am_scale=0.0), LENS)
    ranges = band(paths, LENS, 3)
    assert torch.equal(ranges, GOLDEN["pruned.ranges"].long())
    (logits,) = inputs("pruned", "logits")
    check("pruned", joint_lattice(logits, LABELS, ranges), LENS, logits=logits)


@pytest.mark.parametrize("rows", [2, 3, 5])
def test_band_of_drawn_shares_is_that_of_k2(rows: int) -> None:
    """Shares of no lattice, so that every rule is needed."""
    lens = Lens(GOLDEN["drawn.frames"].long(), GOLDEN["drawn.symbols"].long())
    py = GOLDEN["drawn.py"]
    found = band(Paths(py.new_zeros(len(py)), torch.nn.functional.pad(GOLDEN["drawn.px"][..., :-1], (0, 0, 0, 1)), py), lens, rows)
    assert torch.equal(found, GOLDEN[f"drawn.ranges{rows}"].long())
    assert bool((found[:, 0, 0] == 0).all())


def enumerated(lattice: Lattice, frames: int, symbols: int) -> float:
    """Log of the sum over all orders of `symbols` symbols and `frames` blanks that end in a blank."""
    total = 0.0
    for said in itertools.combinations(range(frames + symbols - 1), symbols):
        s = t = 0
        score = 0.0
        for step in range(frames + symbols):
            score += float((lattice.symbols if step in said else lattice.blanks)[0, s, t])
            s, t = (s + 1, t) if step in said else (s, t + 1)
        total += math.exp(score)
    return math.log(total)


@pytest.mark.parametrize(("frames", "symbols"), [(1, 0), (1, 3), (4, 0), (4, 3)])
def test_sum_paths_is_the_sum_over_all_orders(frames: int, symbols: int) -> None:
    torch.manual_seed(0)
    lattice = Lattice(*(-torch.rand(2, 1, symbols + 1, frames, dtype=torch.float64)))
    found = sum_paths(lattice, Lens(torch.tensor([frames]), torch.tensor([symbols])))
    assert float(found.total) == pytest.approx(enumerated(lattice, frames, symbols), abs=1e-12)
    torch.testing.assert_close(found.symbols.sum((0, 2))[:symbols], torch.ones(symbols, dtype=torch.float64))  # every path says each symbol once
    torch.testing.assert_close(found.blanks.sum((0, 1)), torch.ones(frames, dtype=torch.float64))  # and ends each frame once


def test_sum_paths_has_the_gradient_of_finite_differences() -> None:
    torch.manual_seed(0)
    edges = [(-torch.rand(2, 4, 5, dtype=torch.float64)).requires_grad_() for _ in range(2)]
    lens = Lens(torch.tensor([5, 3]), torch.tensor([2, 3]))
    assert torch.autograd.gradcheck(lambda x, y: sum_paths(Lattice(x, y), lens).total, edges)


def test_sum_paths_stays_exact_over_a_long_lattice() -> None:
    frames, symbols = 600, 150
    half = torch.full((1, symbols + 1, frames), math.log(0.5))
    found = sum_paths(Lattice(half, half), Lens(torch.tensor([frames]), torch.tensor([symbols])))
    orders = math.lgamma(frames + symbols) - math.lgamma(symbols + 1) - math.lgamma(frames)
    assert float(found.total) == pytest.approx((frames + symbols) * math.log(0.5) + orders, rel=1e-6)


def test_a_band_of_all_rows_gives_the_whole_loss_and_a_band_no_more() -> None:
    (logits,) = inputs("full", "logits")
    am, lm = inputs("smoothed", "am", "lm")
    paths = sum_paths(simple_lattice(am, lm, LABELS, LENS, lm_scale=0.0, am_scale=0.0), LENS)
    assert torch.equal(band(paths, LENS, 99), whole_range(LABELS, logits.shape[1]))
    whole = sum_paths(joint_lattice(logits, LABELS, whole_range(LABELS, logits.shape[1])), LENS).total
    for rows in (2, 4):
        ranges = band(paths, LENS, rows)
        some = logits.gather(2, ranges[..., None].expand(-1, -1, -1, logits.shape[3]))
        found = sum_paths(joint_lattice(some, LABELS, ranges), LENS).total
        assert bool((found <= whole + 1e-5).all())
        assert bool(found.isfinite().all())
        assert bool((ranges[:, 1:, 0] - ranges[:, :-1, 0]).clamp(min=0).max() < rows)


def searcher() -> RNNTHead:
    """The head with the weights that the stored searches were made with."""
    config = RNNTConfig(context=CONTEXT, predictor_dim=8, joint_dim=12, prune=0)
    head = RNNTHead(config, 8, LayerMix(8, [8], "last"), Characters("abcde")).eval()
    weights = {"embed": head.predictor.embed, "conv": head.predictor.conv, "frame": head.frame_proj, "text": head.text_proj, "out": head.output}
    with torch.no_grad():
        for name, layer in weights.items():
            layer.weight.copy_(GOLDEN[f"search.{name}"])  # type: ignore[operator, union-attr]
            if getattr(layer, "bias", None) is not None:
                layer.bias.zero_()  # type: ignore[operator, union-attr]
    return head


def test_searches_say_what_the_loops_by_hand_say() -> None:
    head, lens = searcher(), GOLDEN["search.lens"].long()
    with torch.no_grad():
        frames = head.frame_proj(GOLDEN["search.features"])
        for name, most in (("greedy", 3), ("one", 1)):
            found = greedy_search(head._step, frames, lens, CONTEXT, most)
            assert found == [GOLDEN[f"search.{name}{i}"].tolist() for i in range(len(lens))]
        for i, length in enumerate(lens.tolist()):
            assert beam_search(head._step, frames[i, :length], CONTEXT, 4) == GOLDEN[f"search.beam{i}"].tolist()
        assert head.symbols(GOLDEN["search.features"], lens, 0)[1] == GOLDEN["search.greedy1"].tolist()


@pytest.mark.parametrize("prune", [0, 3])
def test_rnnt_head_learns_an_alignment(prune: int) -> None:
    """Frames that show their symbol for three frames each, silence between: greedy reads them after a hundred updates."""
    torch.manual_seed(0)
    tokenizer = Characters("abc")
    config = RNNTConfig(predictor_dim=16, joint_dim=32, prune=prune, warmup_steps=20, dropout=0.0)
    head = config.build(8, LayerMix(8, [8], "last"), {"tokenizer": tokenizer.to_json()})
    texts = ["abc", "ca", "bbac", "a"]
    labels, lens = torch.full((4, 4), -1), torch.tensor([6 * len(text) for text in texts])
    frames = 0.1 * torch.randn(4, 24, 8)
    for row, (text, target) in enumerate(zip(texts, labels)):
        target[: len(text)] = torch.tensor(tokenizer.encode(text))
        for i, symbol in enumerate(tokenizer.encode(text) or []):
            frames[row, 6 * i : 6 * i + 3, symbol] += 2.0
    batch = LabelledBatch(list("wxyz"), [""] * 4, frames, lens, 1.0, labels=labels, label_lens=torch.tensor([len(text) for text in texts]))
    optimizer = torch.optim.AdamW(head.parameters(), 0.02)
    for step in range(1, 101):
        out = head.loss(frames, lens, batch)
        (out.loss / out.count).backward()
        optimizer.step()
        optimizer.zero_grad()
        head.after_step(step, None)  # type: ignore[arg-type]
    head.eval()
    assert head.predict(frames, lens) == texts
    metrics = head.loss(frames, lens, batch).metrics
    assert metrics["wer"].tolist() == [0.0, 4.0]
    head.beam = 4
    assert head.predict(frames, lens) == texts


def test_rnnt_loss_of_an_item_does_not_depend_on_its_batch() -> None:
    torch.manual_seed(0)
    head = RNNTConfig(predictor_dim=8, joint_dim=8, prune=2).build(4, LayerMix(4, [4], "last"), {"tokenizer": Characters("ab").to_json()}).eval()
    frames, labels = torch.randn(2, 9, 4), torch.tensor([[1, 2, 2, 1], [2, -1, -1, -1]])
    lens, label_lens = torch.tensor([9, 5]), torch.tensor([4, 1])

    def loss(rows: slice, length: int, longest: int) -> float:
        part = frames[rows, :length]
        batch = LabelledBatch(["x"] * len(part), [""] * len(part), part, lens[rows], 1.0, labels=labels[rows, :longest], label_lens=label_lens[rows])
        return float(head.loss(part, lens[rows], batch).loss.detach())

    assert loss(slice(0, 2), 9, 4) == pytest.approx(loss(slice(0, 1), 9, 4) + loss(slice(1, 2), 5, 1), rel=1e-5)


def test_rnnt_loss_leaves_out_texts_that_no_band_can_reach() -> None:
    torch.manual_seed(0)
    head = RNNTConfig(predictor_dim=8, joint_dim=8, prune=2).build(4, LayerMix(4, [4], "last"), {"tokenizer": Characters("ab").to_json()})
    frames, labels, lens = torch.randn(2, 5, 4), torch.ones(2, 8, dtype=torch.int64), torch.tensor([5, 5])
    out = head.loss(frames, lens, LabelledBatch(["x", "y"], ["", ""], frames, lens, 1.0, labels=labels, label_lens=torch.tensor([3, 8])))
    out.loss.backward()
    assert int(out.count) == 3
    assert out.metrics["too_long"].tolist() == [1.0, 2.0]
    assert all(parameter.grad is not None and bool(parameter.grad.isfinite().all()) for parameter in head.parameters())


def test_rnnt_scales_move_over_the_warm_up() -> None:
    head = RNNTConfig(predictor_dim=8, joint_dim=8, warmup_steps=200).build(4, LayerMix(4, [4], "last"), {"tokenizer": Characters("a").to_json()})
    found = []
    for step in (0, 100, 200, 300):
        head.resume(step, None)  # type: ignore[arg-type]
        found.append((head.scales()["simple"], head.scales()["pruned"]))
    assert found == [pytest.approx(pair) for pair in ((1.0, 0.1), (0.75, 0.55), (0.5, 1.0), (0.5, 1.0))]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"prune": 1}, "`prune` must be 0 or at least 2, but is 1"),
        ({"predictor_dim": 30}, "`predictor_dim` must be a multiple of 4, but is 30"),
        ({"lm_scale": 0.7, "am_scale": 0.5}, "must be at most 1 together, but are 0.7 and 0.5"),
    ],
)
def test_rnnt_config_raises_config_error_when_values_are_out_of_bounds(settings: dict[str, float], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        RNNTConfig(**settings)  # type: ignore[arg-type]
