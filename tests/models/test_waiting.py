"""A training step never makes the host wait for its device; the meta device stands for a GPU, because no value can be read from it."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from spear.models.base import Encoder
from spear.models.masking import MaskConfig
from spear.models.student import Student
from tests.models.parity import random_batch, tiny_config
from tests.models.test_uniform import tiny


class Waits(TorchDispatchMode):
    """Fails on what waits: values read from the device (which meta refuses anyway), and copies to it that are not asynchronous."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        aten = torch.ops.aten
        if func is aten._local_scalar_dense.default:
            assert args[0].device.type == "cpu", "a value is read from the device"
        if func is aten._to_copy.default and torch.device(kwargs.get("device") or args[0].device) != args[0].device:
            assert args[0].device.type == "cpu", "a tensor is copied from the device"
            assert kwargs.get("non_blocking"), f"{tuple(args[0].shape)} is copied to the device and waited for"
        return func(*args, **kwargs)


def encoders() -> dict[str, Encoder]:
    return {
        "zipformer": tiny_config(output_downsampling_factor=2).build(),
        "causal": tiny_config(causal=True, chunk_size=(4, 8, -1), left_context_frames=(8, -1)).build(),
        "conformer": tiny("conformer").build(),
        "transformer": tiny("transformer").build(),
    }


@pytest.mark.parametrize("kind", ["zipformer", "causal", "conformer", "transformer"])
def test_a_training_step_never_waits(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda kind: False)  # autocast does not know the meta device
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: nullcontext())
    encoder = encoders()[kind].to("meta")
    for module in encoder.modules():
        if hasattr(module, "load_training_state"):
            module.load_training_state(1.0)  # every whitening is computed
    student = Student(encoder, MaskConfig())
    features, host_lens = random_batch([101, 57])
    features, lens = features.to("meta"), host_lens.to("meta")
    for count in (0.0, 1e6):  # all regularisers, and those of late training
        encoder.set_batch_count(count)
        torch.manual_seed(0)
        with Waits():
            student(features, lens, torch.Generator(), host_lens).features.square().mean().backward()
        for module in encoder.modules():
            if hasattr(module, "load_training_state"):
                module.load_training_state(1.0)


def test_the_check_notices_a_wait() -> None:
    with pytest.raises(AssertionError, match="waited for"), Waits():
        torch.zeros(3).to("meta")
    with pytest.raises((AssertionError, RuntimeError)), Waits():
        torch.zeros((), device="meta").item()
