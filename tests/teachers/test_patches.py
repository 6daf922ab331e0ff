"""EAT, BEATs and ATST-Frame on tiny random models: through a stand-in of the authors' code, or against torch's own Transformer."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from spear.errors import ConfigError
from spear.teachers import Teacher, extract
from spear.teachers.atst import ATSTConfig
from spear.teachers.beats import MEAN, STD, BEATsConfig
from spear.teachers.frontend import decibel_mel, kaldi_log_mel
from spear.teachers.huggingface import HuggingFaceConfig
from spear.teachers.probe import first_frame_probe
from tests.teachers.conftest import noise

EAT_CODE = """
import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel


class TinyConfig(PretrainedConfig):
    model_type = "eat"

    def __init__(self, embed_dim=12, depth=2, **kwargs):
        self.embed_dim, self.depth = embed_dim, depth
        super().__init__(**kwargs)


class Block(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.linear = nn.Linear(width, width)

    def forward(self, x):
        return x + torch.tanh(self.linear(x)), x


class Inner(nn.Module):
    def __init__(self, width, depth):
        super().__init__()
        self.patch = nn.Conv2d(1, width, 16, 16)
        self.cls = nn.Parameter(torch.zeros(1, 1, width))
        self.blocks = nn.ModuleList([Block(width) for _ in range(depth)])

    def extract_features(self, x):
        x = self.patch(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.cls.expand(len(x), -1, -1), x], dim=1)
        for block in self.blocks:
            x, _ = block(x)
        return x


class TinyEAT(PreTrainedModel):  # no post_init(), as the published code
    config_class = TinyConfig

    def __init__(self, config):
        super().__init__(config)
        self.model = Inner(config.embed_dim, config.depth)

    def extract_features(self, x):
        return self.model.extract_features(x)
"""
BEATS_MODULES = "def scale(x):\n    return 2 * x\n"
BEATS_BACKBONE = """
import torch
from torch import nn
from modules import scale


class Layer(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.linear = nn.Linear(width, width)

    def forward(self, x):
        return x + torch.tanh(scale(self.linear(x))), None, None


class TransformerEncoder(nn.Module):
    def __init__(self, args):
        super().__init__()
        self.layers = nn.ModuleList([Layer(args.encoder_embed_dim) for _ in range(args.encoder_layers)])

    def forward(self, x, padding_mask=None, layer=None):
        x = x.transpose(0, 1)
        for block in self.layers:
            x, _, _ = block(x)
        return x.transpose(0, 1), []
"""
CFG = {"input_patch_size": 16, "embed_dim": 6, "encoder_embed_dim": 10, "encoder_layers": 2}


def tensors(shapes: dict[str, tuple[int, ...]]) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {name: 0.2 * torch.randn(shape, generator=generator) for name, shape in shapes.items()}


@pytest.fixture
def eat(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    from transformers import dynamic_module_utils

    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    path = tmp_path / "eat_tiny"
    path.mkdir()
    (path / "modeling_tiny.py").write_text(EAT_CODE)
    auto_map = {"AutoConfig": "modeling_tiny.TinyConfig", "AutoModel": "modeling_tiny.TinyEAT"}
    (path / "config.json").write_text(json.dumps({"model_type": "eat", "embed_dim": 12, "depth": 2, "img_size": [64, 128], "auto_map": auto_map}))
    shapes: dict[str, tuple[int, ...]] = {"model.patch.weight": (12, 1, 16, 16), "model.patch.bias": (12,), "model.cls": (1, 1, 12)}
    for i in range(2):
        shapes.update({f"model.blocks.{i}.linear.weight": (12, 12), f"model.blocks.{i}.linear.bias": (12,)})
    save_file(tensors(shapes), path / "model.safetensors")
    return path


def eat_teacher(path: Path, **settings: Any) -> Teacher:
    return HuggingFaceConfig(model=str(path), trust_remote_code=True, **settings).build()


def beats_folder(root: Path) -> BEATsConfig:
    (root / "code").mkdir(exist_ok=True)
    (root / "code" / "modules.py").write_text(BEATS_MODULES)
    (root / "code" / "backbone.py").write_text(BEATS_BACKBONE)
    shapes = {
        "patch_embedding.weight": (6, 1, 16, 16),
        "layer_norm.weight": (6,),
        "layer_norm.bias": (6,),
        "post_extract_proj.weight": (10, 6),
        "post_extract_proj.bias": (10,),
        "predictor.weight": (3, 10),
    }
    for i in range(2):
        shapes.update({f"encoder.layers.{i}.linear.weight": (10, 10), f"encoder.layers.{i}.linear.bias": (10,)})
    torch.save({"cfg": CFG, "model": tensors(shapes)}, root / "beats.pt")
    return BEATsConfig(weights="beats.pt", code="code")


def test_eat_gives_the_patches_of_its_own_code_averaged_over_frequency(eat: Path) -> None:
    built = eat_teacher(eat)
    assert (built.frame_rate_hz, built.dim, built.num_layers, built.num_frames(32000)) == (6.25, 12, 3, 12)
    assert built.first_frame_s == pytest.approx(0.0875)
    audio = noise(12000)
    mel = (kaldi_log_mel(audio, num_mel_bins=128, sample_rate=16000, window="hann")[:64] + 4.268) / (2 * 4.569)
    expected = built.model.extract_features(mel[None, None])[0, 1:].unflatten(0, (4, 8))  # type: ignore[operator, union-attr]
    torch.testing.assert_close(extract(built, [audio])[0], expected.mean(dim=1))
    torch.testing.assert_close(extract(eat_teacher(eat, frequency="concat"), [audio])[0], expected.flatten(1))
    torch.testing.assert_close(extract(eat_teacher(eat, layer=2), [audio])[0], expected.mean(dim=1))


def test_eat_hears_long_audio_in_pieces_and_gives_layers(eat: Path) -> None:
    first = eat_teacher(eat, layer=0)
    patch = first.model.model.patch  # type: ignore[union-attr]
    audio = noise(32000)
    mel = (kaldi_log_mel(audio, num_mel_bins=128, sample_rate=16000, window="hann")[: 12 * 16] + 4.268) / (2 * 4.569)
    torch.testing.assert_close(extract(first, [audio])[0], patch(mel[None, None]).mean(dim=3)[0].T, atol=1e-5, rtol=1e-5)  # type: ignore[operator]
    with pytest.raises(ConfigError, match="`layer` must be between 0 and 2, but is 3"):
        eat_teacher(eat, layer=3)


def test_eat_needs_trust(eat: Path) -> None:
    with pytest.raises(ConfigError, match="`trust_remote_code: true`"):
        HuggingFaceConfig(model=str(eat)).build()


def test_beats_gives_what_its_parts_give(tmp_path: Path) -> None:
    config = beats_folder(tmp_path)
    built: Any = config.build(tmp_path)
    assert (built.frame_rate_hz, built.dim, built.num_layers, built.sample_rate) == (6.25, 10, 3, 16000)
    audio = noise(20000)
    mel = kaldi_log_mel(audio, num_mel_bins=128, sample_rate=16000, window="povey", scale=2.0**15)
    mel = (mel[: len(mel) // 16 * 16] - MEAN) / (2 * STD)
    model = built.model
    x = model.layer_norm(model.patch_embedding(mel[None, None]).flatten(2).transpose(1, 2))
    x = model.post_extract_proj(x)
    states = [x]
    for layer in model.encoder.layers:
        states.append(layer(states[-1])[0])
    for index, state in enumerate(states):
        (found,) = extract(BEATsConfig(weights="beats.pt", code="code", layer=index).build(tmp_path), [audio])
        torch.testing.assert_close(found, state[0].unflatten(0, (-1, 8)).mean(dim=1))
    torch.testing.assert_close(extract(built, [audio])[0], states[-1][0].unflatten(0, (-1, 8)).mean(dim=1))
    assert "modules" not in sys.modules
    assert "backbone" not in sys.modules


def test_beats_raises_config_error_when_files_do_not_fit(tmp_path: Path) -> None:
    config = beats_folder(tmp_path)
    with pytest.raises(ConfigError, match=r"`code` must be a folder with modules\.py and backbone\.py, but is nowhere"):
        BEATsConfig(weights="beats.pt", code="nowhere").build(tmp_path)
    with pytest.raises(ConfigError, match=r"`weights` must be a file, but none\.pt does not exist"):
        BEATsConfig(weights="none.pt", code="code").build(tmp_path)
    torch.save({"cfg": {**CFG, "encoder_layers": 3}, "model": torch.load(tmp_path / "beats.pt", weights_only=True)["model"]}, tmp_path / "beats.pt")
    with pytest.raises(ConfigError, match=r"`weights` beats\.pt do not fit the code of code: .*lack encoder\.layers\.2\.linear\.bias and 1 more"):
        config.build(tmp_path)


def atst_state(dim: int = 128, depth: int = 2, positions: int = 25) -> dict[str, Tensor]:
    shapes: dict[str, tuple[int, ...]] = {
        "pos_embed": (1, positions + 1, dim),
        "mask_embed": (1, 1, dim),
        "patch_embed.patch_embed.weight": (dim, 256),
        "patch_embed.patch_embed.bias": (dim,),
        "norm_frame.weight": (dim,),
        "norm_frame.bias": (dim,),
    }
    for i in range(depth):
        for name, shape in (("attn.qkv.weight", (3 * dim, dim)), ("attn.proj.weight", (dim, dim)), ("mlp.fc1.weight", (2 * dim, dim))):
            shapes[f"blocks.{i}.{name}"] = shape
        shapes |= {f"blocks.{i}.attn.proj.bias": (dim,), f"blocks.{i}.mlp.fc1.bias": (2 * dim,)}
        shapes |= {f"blocks.{i}.mlp.fc2.weight": (dim, 2 * dim), f"blocks.{i}.mlp.fc2.bias": (dim,)}
        shapes |= {f"blocks.{i}.norm{k}.{part}": (dim,) for k in (1, 2) for part in ("weight", "bias")}
    return tensors(shapes)


def torch_layers(state: dict[str, Tensor], dim: int, depth: int) -> list[nn.Module]:
    """The same blocks as torch's own pre-norm encoder layers."""
    layers: list[nn.Module] = []
    for i in range(depth):
        layer = nn.TransformerEncoderLayer(dim, dim // 64, 2 * dim, 0.0, "gelu", layer_norm_eps=1e-6, batch_first=True, norm_first=True).eval()
        own = {name[len(f"blocks.{i}.") :]: value for name, value in state.items() if name.startswith(f"blocks.{i}.")}
        names = {"self_attn.out_proj": "attn.proj", "linear1": "mlp.fc1", "linear2": "mlp.fc2", "norm1": "norm1", "norm2": "norm2"}
        values = {f"{theirs}.{part}": own[f"{ours}.{part}"] for theirs, ours in names.items() for part in ("weight", "bias")}
        layer.load_state_dict({**values, "self_attn.in_proj_weight": own["attn.qkv.weight"], "self_attn.in_proj_bias": torch.zeros(3 * dim)})
        layers.append(layer)
    return layers


@pytest.mark.parametrize("prefix", ["model.teacher.encoder.", ""])
def test_atst_is_a_transformer_over_patches_of_decibels(tmp_path: Path, prefix: str) -> None:
    state = atst_state()
    torch.save({"state_dict": {f"{prefix}{name}": value for name, value in state.items()}, "epoch": 3}, tmp_path / "a.ckpt")
    built = ATSTConfig(weights="a.ckpt", layers=[0, 1, 2]).build(tmp_path)
    assert (built.frame_rate_hz, built.first_frame_s, built.dim, built.num_parts, built.num_layers) == (25.0, 0.015, 384, 3, 3)
    audio = noise(16000)  # one piece of 25 patches
    mel = decibel_mel(audio, num_mel_bins=64, sample_rate=16000, fft_samples=1024, low_hz=60.0, high_hz=7800.0, top_db=80.0)
    mel = 2 * (mel + 79.6482) / (50.6842 + 79.6482) - 1
    patches = torch.stack([mel[:, 4 * t : 4 * t + 4].flatten() for t in range(25)])
    x = nn.functional.linear(patches, state["patch_embed.patch_embed.weight"], state["patch_embed.patch_embed.bias"]) + state["pos_embed"][0, 1:]
    expected = [x]
    with torch.no_grad():
        for layer in torch_layers(state, 128, 2):
            x = layer(x[None])[0]
            expected.append(nn.functional.layer_norm(x, (128,), state["norm_frame.weight"], state["norm_frame.bias"], 1e-6))
    torch.testing.assert_close(extract(built, [audio])[0], torch.cat(expected, dim=1), atol=1e-4, rtol=1e-4)
    (last,) = extract(ATSTConfig(weights="a.ckpt").build(tmp_path), [audio])
    torch.testing.assert_close(last, expected[-1], atol=1e-4, rtol=1e-4)


def test_atst_hears_long_audio_in_pieces(tmp_path: Path) -> None:
    torch.save(atst_state(), tmp_path / "a.ckpt")
    built = ATSTConfig(weights="a.ckpt", layer=1).build(tmp_path)
    (frames,) = extract(built, [noise(40000)])
    assert len(frames) == built.num_frames(40000) == 62


def test_atst_mel_is_that_of_transformers() -> None:
    from transformers.audio_utils import mel_filter_bank, spectrogram, window_function

    audio = noise(8000)
    filters = mel_filter_bank(513, 64, 60.0, 7800.0, 16000, mel_scale="htk")
    window = window_function(1024, "hann")
    expected = spectrogram(audio.numpy(), window, 1024, 160, 1024, power=2.0, mel_filters=filters, log_mel="dB", db_range=80.0)
    found = decibel_mel(audio, num_mel_bins=64, sample_rate=16000, fft_samples=1024, low_hz=60.0, high_hz=7800.0, top_db=80.0)
    torch.testing.assert_close(found, torch.from_numpy(expected).float(), atol=1e-3, rtol=1e-4)


def test_atst_raises_config_error_when_weights_are_others(tmp_path: Path) -> None:
    torch.save({"state_dict": {"x": torch.zeros(1)}}, tmp_path / "a.ckpt")
    with pytest.raises(ConfigError, match=r"`weights` a\.ckpt must hold an ATST-Frame encoder"):
        ATSTConfig(weights="a.ckpt").build(tmp_path)
    state = atst_state()
    del state["blocks.1.norm1.weight"]
    torch.save(state, tmp_path / "a.ckpt")
    with pytest.raises(ConfigError, match=r"are not those of ATST-Frame: 'blocks\.1\.norm1\.weight'"):
        ATSTConfig(weights="a.ckpt").build(tmp_path)
    with pytest.raises(ConfigError, match="`layers` must be different numbers without `layer` beside"):
        ATSTConfig(weights="a.ckpt", layers=[1, 1])


@pytest.mark.parametrize("kind", ["eat", "beats", "atst"])
def test_first_frame_is_measured_where_it_is_declared(tmp_path: Path, eat: Path, kind: str) -> None:
    torch.save(atst_state(positions=250), tmp_path / "a.ckpt")
    made: dict[str, Any] = {
        "eat": lambda: eat_teacher(eat),
        "beats": lambda: beats_folder(tmp_path).build(tmp_path),
        "atst": lambda: ATSTConfig(weights="a.ckpt", layer=1).build(tmp_path),
    }
    built = made[kind]()
    measured = first_frame_probe(built)
    assert measured is not None
    assert abs(measured - built.first_frame_s) < 0.3 / built.frame_rate_hz
