"""Low-rank adapters: they start as nothing, they alone learn, and they merge."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from spear.errors import ConfigError
from spear.finetune.config import StartConfig
from spear.finetune.lora import LoRAConfig, add_adapters, merge_adapters
from spear.finetune.model import make_module, starting_encoder
from spear.finetune.tasks.classification import ClassificationConfig
from spear.models.base import Encoder
from spear.models.masking import MaskConfig
from spear.models.zipformer.compiled import compile_layers
from tests.export.tiny import tiny_config, tiny_encoder

LENS = torch.tensor([120, 90])


def features() -> Tensor:
    return torch.randn(2, 120, 128, generator=torch.Generator().manual_seed(0))


def adapted(**settings: object) -> Encoder:
    encoder = tiny_encoder().encoder
    add_adapters(encoder, LoRAConfig(**settings))  # type: ignore[arg-type]
    return encoder


def learners(encoder: nn.Module) -> dict[str, nn.Parameter]:
    return {name: parameter for name, parameter in encoder.named_parameters() if parameter.requires_grad}


def test_adapters_start_as_nothing() -> None:
    torch.testing.assert_close(adapted()(features(), LENS).features, tiny_encoder().encoder(features(), LENS).features, rtol=0, atol=0)


@pytest.mark.parametrize("autocast", [False, True])
def test_every_adapter_gets_a_gradient_and_nothing_else_does(autocast: bool) -> None:
    """Also those of weights that are read past their layer, which a layer around the layer would miss."""
    encoder = adapted(rank=2).train()
    encoder.set_batch_count(50_000.0)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        out = encoder(features(), LENS).features
    out.float().square().sum().backward()
    linear = sum(isinstance(module, nn.Linear) for module in encoder.modules())
    found = learners(encoder)
    assert len(found) == 2 * linear == 2 * (1 + 2 * 18)
    assert all(name.endswith((".a", ".b")) for name in found)
    assert all(float(p.grad.abs().sum()) > 0 for name, p in found.items() if name.endswith(".b") and p.grad is not None)
    assert all(p.grad is not None for p in found.values())
    assert all(p.grad is None for name, p in encoder.named_parameters() if name not in found)


def test_merged_encoder_says_what_the_adapted_one_says() -> None:
    torch.manual_seed(0)
    encoder = adapted(rank=4, alpha=8.0)
    with torch.no_grad():
        for parameter in learners(encoder).values():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
        wanted = encoder(features(), LENS).features
        merge_adapters(encoder)
        found = encoder(features(), LENS).features
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-5)
    plain = tiny_encoder().encoder
    assert float((found - plain(features(), LENS).features).detach().abs().max()) > 0.01
    assert encoder.state_dict().keys() == plain.state_dict().keys()
    plain.load_state_dict(encoder.state_dict())
    torch.testing.assert_close(plain(features(), LENS).features, found, rtol=0, atol=0)


def test_adapters_are_added_where_the_name_fits() -> None:
    found = learners(adapted(modules=r"self_attn\d\.out_proj"))
    assert {name.split(".parametrizations")[0].rpartition("layers.0.")[2] for name in found} == {"self_attn1.out_proj", "self_attn2.out_proj"}


def test_lora_raises_config_error_when_no_layer_fits_or_the_rate_is_zero() -> None:
    with pytest.raises(ConfigError, match=r"`encoder.lora.modules` must fit the name of a linear layer of the encoder, but 'q_proj' fits none"):
        adapted(modules="q_proj")
    with pytest.raises(ConfigError, match=r"`modules` must be a regular expression, but '\(' is none"):
        LoRAConfig(modules="(")
    with pytest.raises(ConfigError, match="`lr_scale` must be above 0 where there is `lora`"):
        StartConfig(student=tiny_config(), lr_scale=0.0, lora=LoRAConfig())


def test_finetune_module_with_adapters_trains_them_and_the_head() -> None:
    start = StartConfig(student=tiny_config(), lora=LoRAConfig(rank=2), layers="weighted")
    encoder, _ = starting_encoder(start, None, 0)
    masking = MaskConfig(time_prob=0.0, channel_prob=0.0, min_time_masks=0)
    module = make_module(start, encoder, masking, ClassificationConfig(), {"classes": ["a", "b"]}, 0)
    assert all(name.startswith("objective.") or name.endswith((".a", ".b")) for name in learners(module))
    assert sum(p.numel() for p in learners(module.student).values()) < 0.2 * sum(p.numel() for p in encoder.parameters())


@pytest.mark.slow
def test_compiled_layers_train_their_adapters() -> None:
    encoder = adapted(rank=2).train()
    encoder.set_batch_count(50_000.0)
    compile_layers(encoder, "aot_eager")
    encoder(features(), LENS).features.square().sum().backward()
    assert all(p.grad is not None for p in learners(encoder).values())
