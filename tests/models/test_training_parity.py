"""Gradient-only operations and schedules against the reference outputs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from spear.models.zipformer import ZipformerConfig, ZipformerEncoder
from spear.models.zipformer.balancer import balance, bounds
from spear.models.zipformer.gradient import limit_range, penalize_large
from spear.models.zipformer.scheduled_float import Schedule
from spear.models.zipformer.swoosh import swoosh_l
from spear.models.zipformer.whiten import HIGH_PROB, LOW_PROB, Whiten, _Whitening, whitening_metric
from tests.models.parity import Tensors, assert_near, read, under


@pytest.fixture(scope="module")
def operations(fixtures: Path) -> tuple[Tensors, dict[str, Any]]:
    tensors, metadata = read(fixtures, "training_ops")
    return tensors, json.loads(metadata["config"])


def backward(output: torch.Tensor, x: torch.Tensor, grad: torch.Tensor) -> torch.Tensor:
    """Gradient of x; the output must equal x."""
    assert torch.equal(output, x)
    return torch.autograd.grad(output, x, grad)[0]


def test_limit_and_penalty_match_the_reference(operations: tuple[Tensors, dict[str, Any]]) -> None:
    tensors, config = operations
    x = tensors["limit.x"].clone().requires_grad_()
    limited = limit_range(x, config["limit"]["min"], config["limit"]["max"])
    assert_near(backward(limited, x, tensors["limit.g"]), tensors["limit.gx"], 1e-7)
    x = tensors["penalize.x"].clone().requires_grad_()
    penalized = penalize_large(x, config["penalize"]["limit"], config["penalize"]["penalty"])
    assert_near(backward(penalized, x, tensors["penalize.g"]), tensors["penalize.gx"], 1e-6)


@pytest.mark.parametrize("name", ["balancer_a", "balancer_b", "balancer_c"])
def test_balancer_matches_the_reference(operations: tuple[Tensors, dict[str, Any]], name: str) -> None:
    tensors, config = operations[0], operations[1][name]
    x = tensors[f"{name}.x"].clone().requires_grad_()
    limits = bounds(config["min_positive"], config["max_positive"], config["min_abs"], config["max_abs"])
    balanced = balance(x, limits, grad_scale=config["grad_scale"], channel_dim=config["channel_dim"])
    # channels far from zero lose digits in mean^2 - square, in the reference too
    torch.testing.assert_close(backward(balanced, x, tensors[f"{name}.g"]), tensors[f"{name}.gx"], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("name", "above"), [("whiten_a", True), ("whiten_b", True), ("whiten_c", False)])
def test_whiten_matches_the_reference(operations: tuple[Tensors, dict[str, Any]], name: str, above: bool) -> None:
    tensors, config = operations[0], operations[1][name]
    module = Whiten(config["whitening_limit"], num_groups=config["num_groups"], grad_scale=config["grad_scale"])
    x = tensors[f"{name}.x"].clone().requires_grad_()
    assert_near(whitening_metric(x, config["num_groups"]), tensors[f"{name}.metric"], 1e-4)
    whitened = _Whitening.apply(x, module, config["whitening_limit"])
    assert_near(backward(whitened, x, tensors[f"{name}.g"]), tensors[f"{name}.gx"], 1e-5)
    assert module.training_state() == (HIGH_PROB if above else LOW_PROB)


def test_activation_and_linear_match_the_fused_reference(operations: tuple[Tensors, dict[str, Any]]) -> None:
    tensors = under(operations[0], "adl.")
    x, weight, bias = (tensors[key].clone().requires_grad_() for key in ("x", "param.weight", "param.bias"))
    y = F.linear(swoosh_l(x), weight, bias)
    assert_near(y, tensors["y"], 1e-5)
    y.backward(tensors["g"])
    for leaf, name in ((x, "gx"), (weight, "gw"), (bias, "gb")):
        assert leaf.grad is not None
        assert_near(leaf.grad, tensors[name], 1e-5)


def _setting(encoder: ZipformerEncoder, path: str) -> object:
    """The setting behind a name of the reference."""
    path = path.replace("out_proj.dropout_p", "dropout").replace("encoder_embed.dropout.p", "encoder_embed.dropout")
    path = path.replace("whitening_limit", "limit")
    found: object = encoder
    for name in path.split("."):
        found = getattr(found, name)
    return found


def test_schedules_match_the_reference(fixtures: Path) -> None:
    table = json.loads((fixtures / "schedules.json").read_text())
    # neither is used by any computation: the branch of the first is never taken, the second is not read
    unused = ("const_attention_rate", "downsample.dropout", "downsample_output.dropout")
    layers = [0] * 7
    for name in table["schedules"]:
        parts = name.split(".")
        if parts[:2] == ["encoder", "encoders"] and "layers" in parts:
            layers[int(parts[2])] = max(layers[int(parts[2])], int(parts[parts.index("layers") + 1]) + 1)
    with torch.device("meta"):
        encoder = ZipformerEncoder(ZipformerConfig(num_encoder_layers=tuple(layers), encoder_dim=64, encoder_unmasked_dim=32, feedforward_dim=64))
    checked = 0
    for name, expected in table["schedules"].items():
        if name.endswith(unused):
            continue
        setting = _setting(encoder, name)
        assert isinstance(setting, Schedule), name
        assert setting.default == expected["default"], name
        assert [setting(count) for count in table["batch_counts"]] == pytest.approx(expected["values"], abs=1e-9), name
        checked += 1
    assert checked > 400
