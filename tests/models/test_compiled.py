"""Compiled layers give what plain ones give, with the regularisers on and off."""

from __future__ import annotations

import copy
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from spear.errors import ConfigError
from spear.models.transformer import TransformerConfig
from spear.models.zipformer import chance
from spear.models.zipformer.compiled import compile_layers
from spear.models.zipformer.layer import ZipformerLayer
from spear.models.zipformer.scheduled_float import set_batch_count
from spear.stages.pretrain import FREE
from spear.training.config import TrainingConfig
from tests.models.parity import layer_config


@pytest.fixture(autouse=True)
def _fresh() -> None:
    torch._dynamo.reset()


def never(monkeypatch: pytest.MonkeyPatch) -> None:
    """No regulariser is drawn, no mask drops anything."""
    monkeypatch.setattr(chance, "torch", SimpleNamespace(rand=lambda shape: torch.full(shape, 0.999)))


def always(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every regulariser is drawn; masks drop nothing."""
    monkeypatch.setattr(chance, "torch", SimpleNamespace(rand=lambda shape: torch.full(shape, 0.999 if shape else 0.0)))


def layers(backend: str) -> list[ZipformerLayer]:
    """One layer twice, the second to be compiled."""
    torch.manual_seed(0)
    layer = ZipformerLayer(layer_config(dropout=0.1))
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.05)
    found = [layer, copy.deepcopy(layer)]
    for one in found:
        set_batch_count(one, 20_000.0)
    compile_layers(found[1], backend)
    return found


def outcome(layer: nn.Module, frames: int, items: int) -> list[Tensor]:
    """Output and gradients of the input and of all parameters."""
    generator = torch.Generator().manual_seed(frames)
    x = (2 * torch.randn(items, frames, 64, generator=generator)).requires_grad_()
    positions = torch.randn(2 * frames - 1, 48, generator=generator)
    padding = torch.arange(frames) >= torch.tensor([frames, frames - 3, frames][:items])[:, None]
    out = layer(x, positions, padding[:, None, None], padding, -1)
    learned = [parameter for name, parameter in layer.named_parameters() if name != "bypass_scale"]  # kept for its name, used nowhere
    grad = torch.randn(out.shape, generator=generator)
    return [out, *torch.autograd.grad(out, [x, *learned], grad, allow_unused=True)]


@pytest.mark.slow
@pytest.mark.parametrize("low", [False, True], ids=["fp32", "bf16"])
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiled_layer_equals_the_plain_one(monkeypatch: pytest.MonkeyPatch, backend: str, low: bool) -> None:
    plain, compiled = layers(backend)
    assert list(plain.state_dict()) == list(compiled.state_dict())
    for draws in (never, always):
        draws(monkeypatch)
        for frames, items in ((40, 2), (53, 3)):
            with torch.autocast("cpu", torch.bfloat16, enabled=low):
                wanted, found = outcome(plain, frames, items), outcome(compiled, frames, items)
            for a, b in zip(found, wanted):
                torch.testing.assert_close(a, b, rtol=0, atol=float(b.detach().abs().max()) * (0.06 if low else 1e-4) + 1e-7)
    plain.eval(), compiled.eval()
    with torch.no_grad():
        x, positions = torch.randn(1, 31, 64), torch.randn(61, 48)
        torch.testing.assert_close(compiled(x, positions, None, None, -1), plain(x, positions, None, None, -1), rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_compiled_layer_follows_schedules_and_draws_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    torch._dynamo.utils.counters.clear()
    compiled = layers("aot_eager")[1]
    never(monkeypatch)
    still = outcome(compiled, 40, 2)
    torch.testing.assert_close(outcome(compiled, 40, 2), still)
    always(monkeypatch)
    torch.testing.assert_close(outcome(compiled, 40, 2)[0], still[0])
    assert not torch.allclose(outcome(compiled, 40, 2)[1], still[1])

    def masks(shape: tuple[int, ...]) -> Tensor:
        """What keeps everything at the rates of late training, and drops attention at those of its start."""
        return torch.full(shape, 0.15 if shape else 0.999)

    monkeypatch.setattr(chance, "torch", SimpleNamespace(rand=masks))
    torch.testing.assert_close(outcome(compiled, 40, 2)[0], still[0])
    set_batch_count(compiled, 0.0)
    assert not torch.allclose(outcome(compiled, 40, 2)[0], still[0], atol=1e-2)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 2


@pytest.mark.slow
def test_compiled_transformer_equals_the_plain_one() -> None:
    torch.manual_seed(0)
    plain = TransformerConfig(num_layers=2, dim=32, num_heads=2, feedforward_dim=64, dropout=0.0).build()
    compiled = copy.deepcopy(plain)
    compile_layers(compiled, "aot_eager")
    x, lens = torch.randn(2, 80, 128), torch.tensor([80, 61])
    outputs = []
    for encoder in (plain, compiled):
        out = encoder(x, lens).features
        out.square().sum().backward()
        outputs += [out, next(encoder.parameters()).grad]
    torch.testing.assert_close(outputs[2:], outputs[:2], rtol=1e-4, atol=1e-4)
    assert list(plain.state_dict()) == list(compiled.state_dict())


def test_compiling_is_no_part_of_a_run() -> None:
    assert "compile" in FREE["training"]


@pytest.mark.parametrize("other", [{"recompute": True}, {"parallel": "fsdp"}])
def test_compiling_is_refused_with_what_it_does_not_go_with(other: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match="`compile` must be false with"):
        TrainingConfig(compile=True, **other)  # type: ignore[arg-type]
