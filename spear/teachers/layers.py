"""Several hidden states of one model side by side, from one forward pass."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from spear.errors import ConfigError
from spear.teachers.base import Teacher, resolve_layer, verified
from spear.teachers.huggingface import HuggingFaceConfig, make_teacher


@dataclass(frozen=True, kw_only=True, slots=True)
class LayersConfig(HuggingFaceConfig):
    """A model in the Hugging Face layout of which several layers are taken; Dasheng and codecs have one output only."""

    layers: list[int]
    """Hidden states, counted as by `layer`; frames are as wide as all of them together, in this order. `layer` must not be given."""

    def __post_init__(self) -> None:
        if self.layer != "last":
            raise ConfigError(f"`layer` must not be given beside `layers`, but is {self.layer}")
        if not self.layers or len(set(self.layers)) < len(self.layers):
            raise ConfigError(f"`layers` must be one or more different numbers, but is {self.layers}")

    def build(self, folder: Path | None = None) -> Teacher:
        """See TeacherConfig.build."""
        teacher: Any = make_teacher(self, folder)
        layers = [resolve_layer(layer, teacher.num_layers, teacher.name) for layer in self.layers]
        if teacher.settings["config"].get("model_type") in ("dasheng", "encodec", "dac", "mimi"):
            raise ConfigError(f"`layers` needs a model that gives its hidden states one by one, but {teacher.name} does not: take one `layer`")
        if len(set(layers)) < len(layers):
            raise ConfigError(f"`layers` must be different, but {self.layers} name one of {teacher.num_layers} twice ({teacher.name})")
        teacher.model = JoinedLayers(teacher.model, [layer for layer in layers if layer is not None], teacher.num_layers, teacher.name)
        teacher.layer, teacher.dim, teacher.num_parts = 0, teacher.dim * len(layers), len(layers)
        teacher.settings = {**teacher.settings, "layer": layers}
        return verified(teacher)


class JoinedLayers(nn.Module):
    """A transformers model whose only hidden state is several of another's, joined along the width.

    Args:
        layers: indexes into ``hidden_states`` of `model`, of which there must be `num_layers`. name: for messages.
    """

    def __init__(self, model: nn.Module, layers: list[int], num_layers: int, name: str) -> None:
        super().__init__()
        self.model, self.layers, self.num_layers, self.name = model, layers, num_layers, name

    def forward(self, *inputs: Tensor, **options: Any) -> SimpleNamespace:
        """``hidden_states`` of one tensor (N, T, sum of D).

        Raises:
            ConfigError: the model gives another number of hidden states than its config says.
        """
        states = self.model(*inputs, **{**options, "output_hidden_states": True}).hidden_states
        if len(states) != self.num_layers:
            raise ConfigError(f"{self.name} must give {self.num_layers} hidden states, but gives {len(states)}")
        return SimpleNamespace(hidden_states=[torch.cat([states[layer] for layer in self.layers], dim=-1)])
