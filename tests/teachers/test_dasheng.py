"""The Dasheng adapter on a folder that brings its own code, as the published ones do."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from spear.errors import ConfigError
from spear.teachers import Teacher, extract
from spear.teachers.frontend import decibel_mel
from spear.teachers.huggingface import HuggingFaceConfig
from tests.teachers.conftest import noise

CODE = """
import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import SequenceClassifierOutput


class TinyConfig(PretrainedConfig):
    model_type = "dasheng"

    def __init__(self, width=16, depth=3, **kwargs):
        self.width, self.depth = width, depth
        super().__init__(**kwargs)


class Block(nn.Module):
    def __init__(self, width, rate):
        super().__init__()
        self.linear, self.rate = nn.Linear(width, width), rate

    def forward(self, x):
        return x + torch.tanh(self.linear(x)) + x.mean(1, keepdim=True) * (1 + self.rate)


class Encoder(nn.Module):
    def __init__(self, width, depth):
        super().__init__()
        self.embed_dim, self.n_mels, self.target_length, self.patch_stride = width, 64, 1008, [64, 4]
        self.patch = nn.Conv2d(1, width, (64, 4), (64, 4))
        rates = [r.item() for r in torch.linspace(0, 0.1, depth)]  # fails where transformers builds models without memory
        self.blocks = nn.Sequential(*[Block(width, rate) for rate in rates])
        self.norm = nn.LayerNorm(width)

    def forward(self, x):
        return self.norm(self.blocks(self.patch(x).flatten(2).transpose(1, 2)))


class TinyDasheng(PreTrainedModel):
    config_class = TinyConfig

    def __init__(self, config):
        super().__init__(config)
        self.encoder = Encoder(config.width, config.depth)
        self.post_init()

    def forward(self, input_values):
        hidden = self.encoder(input_values.unsqueeze(1))
        return SequenceClassifierOutput(logits=hidden.mean(1), hidden_states=hidden)
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("dasheng_tiny")
    (path / "modeling_tiny.py").write_text(CODE)
    auto_map = {"AutoConfig": "modeling_tiny.TinyConfig", "AutoModel": "modeling_tiny.TinyDasheng"}
    (path / "config.json").write_text(json.dumps({"model_type": "dasheng", "width": 16, "depth": 3, "auto_map": auto_map}))
    generator = torch.Generator().manual_seed(1)
    state = {"encoder.patch.weight": (16, 1, 64, 4), "encoder.patch.bias": (16,), "encoder.norm.weight": (16,), "encoder.norm.bias": (16,)}
    state.update({f"encoder.blocks.{i}.linear.{kind}": (16, 16)[: 2 - (kind == "bias")] for i in range(3) for kind in ("weight", "bias")})
    save_file({name: 0.1 * torch.randn(shape, generator=generator) for name, shape in state.items()}, path / "model.safetensors")
    return path


@pytest.fixture(autouse=True)
def modules_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import dynamic_module_utils

    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path_factory.mktemp("modules")))


def build(folder: Path, layer: int | str = "last") -> Teacher:
    return HuggingFaceConfig(model=str(folder), layer=layer, trust_remote_code=True).build()  # type: ignore[arg-type]


def test_dasheng_states_rate_and_gives_its_frames(folder: Path) -> None:
    teacher = build(folder)
    assert (teacher.frame_rate_hz, teacher.first_frame_s, teacher.dim, teacher.num_layers) == (25.0, 0.015, 16, 4)
    assert teacher.depends_on_padding
    for samples in (480, 16000, 16479, 16480):
        assert len(extract(teacher, [noise(samples)])[0]) == (samples // 160 + 1) // 4


def test_dasheng_layers_are_the_blocks_of_the_model(folder: Path) -> None:
    teacher = build(folder)
    mel = decibel_mel(noise(16000), num_mel_bins=64, sample_rate=16000)[None, None, :, :100]
    encoder = teacher.model.encoder  # type: ignore[union-attr]
    with torch.no_grad():
        x = encoder.patch(mel).flatten(2).transpose(1, 2)  # type: ignore[operator, union-attr]
        for layer in range(4):
            (found,) = extract(build(folder, layer), [noise(16000)])
            torch.testing.assert_close(found, x[0])
            if layer < 3:
                x = encoder.blocks[layer](x)  # type: ignore[operator, index, union-attr]
        (last,) = extract(teacher, [noise(16000)])
        torch.testing.assert_close(last, encoder.norm(x)[0])  # type: ignore[operator, union-attr]


def test_dasheng_does_not_depend_on_batch_mates(folder: Path) -> None:
    teacher = build(folder, 2)
    audio = [noise(16000, 1), 5 * noise(9000, 2), noise(16000, 3)]
    for item, found in zip(audio, extract(teacher, audio)):
        assert (extract(teacher, [item])[0] - found).abs().max() < 1e-5


def test_dasheng_reads_long_audio_in_pieces_of_252_frames(folder: Path) -> None:
    teacher = build(folder, 3)
    audio = noise(2 * 161280 + 5000)
    (found,) = extract(teacher, [audio])
    assert len(found) == teacher.num_frames(len(audio)) == (len(audio) // 160 + 1) // 4
    mel = decibel_mel(audio, num_mel_bins=64, sample_rate=16000)
    with torch.no_grad():
        second = teacher._piece(mel[None, :, 1008:2016])  # type: ignore[operator]
    torch.testing.assert_close(found[252:504], second[0])


def test_dasheng_raises_config_error_when_its_code_is_not_trusted(folder: Path) -> None:
    with pytest.raises(ConfigError, match=r"brings its own Python code; read it, then set `trust_remote_code: true`"):
        HuggingFaceConfig(model=str(folder)).build()


def test_dasheng_raises_config_error_when_a_weight_is_missing(folder: Path, tmp_path: Path) -> None:
    for file in folder.glob("*.*"):
        (tmp_path / file.name).write_bytes(file.read_bytes())
    save_file({"encoder.norm.weight": torch.ones(16)}, tmp_path / "model.safetensors")
    with pytest.raises(ConfigError, match=r"its weights lack encoder\.blocks\.0\.linear\.bias and 8 more"):
        build(tmp_path)
