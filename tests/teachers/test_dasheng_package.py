"""The teacher on the package ``dasheng``: on the package itself where it is installed, and always on a stand-in with its interface."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from spear.errors import ConfigError
from spear.teachers import Teacher, extract
from spear.teachers.dasheng_package import PACKAGE, DashengConfig
from tests.teachers.conftest import noise

CODE = """
import torch
from torch import nn


class Block(nn.Module):
    def __init__(self, width, heads):
        super().__init__()
        self.linear, self.heads = nn.Linear(width, width), heads

    def forward(self, x, mask=None):
        return x + torch.tanh(self.linear(x)) / self.heads + x.mean(1, keepdim=True)


class Blocks(nn.Sequential):
    def forward(self, x, **options):
        for block in self:
            x = block(x, **options)
        return x


class Dasheng(nn.Module):
    def __init__(self, embed_dim=768, depth=12, num_heads=8, target_length=1008, pooling="mean", n_mels=64, hop_size=160):
        super().__init__()
        self.embed_dim, self.pooling, self.hop_size, self.n_mels = embed_dim, pooling, hop_size, n_mels
        self.target_length, self.patch_stride = target_length, (n_mels, 4)
        self.patch_embed = nn.Conv2d(1, embed_dim, (n_mels, 4), (n_mels, 4))
        self.blocks = Blocks(*[Block(embed_dim, num_heads) for _ in range(depth)])
        self.norm = nn.LayerNorm(embed_dim)

    def forward_to_spec(self, x):
        window = torch.hann_window(512)
        power = torch.stft(x, 512, self.hop_size, window=window, return_complex=True).abs().square()[:, : self.n_mels]
        level = 10 * power.clamp(min=1e-10).log10()
        return level.clamp(min=level.max() - 120)[:, None]  # of the whole batch, as in the package

    def forward_spectrogram(self, x, x_length=None):
        pieces = self.patch_embed(x).split(self.target_length // 4, dim=-1)
        return torch.cat([self.norm(self.blocks(piece.flatten(2).transpose(1, 2), mask=None)) for piece in pieces], dim=1)

    def forward(self, x):
        return self.forward_spectrogram(self.forward_to_spec(x))
"""
SIZES = {"embed_dim": 24, "depth": 3, "num_heads": 2}


def real_package() -> str:
    """Why the package cannot be used here; empty where it can."""
    if importlib.util.find_spec("dasheng") is None:
        return "the package dasheng is not installed"
    try:
        importlib.import_module(PACKAGE)
    except (ImportError, OSError) as error:
        return f"the package dasheng cannot be imported: {error}"
    return ""


MISSING = real_package()


@pytest.fixture(params=["stand-in", pytest.param("package", marks=pytest.mark.skipif(bool(MISSING), reason=MISSING or "it is there"))])
def dasheng(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The class Dasheng of the stand-in or of the package."""
    names = [name for name in sys.modules if name.split(".")[0] == "dasheng"]
    if request.param == "stand-in":
        saved = {name: sys.modules.pop(name) for name in names}
        inner = tmp_path / "code" / "dasheng" / "pretrained"
        inner.mkdir(parents=True)
        for place in (inner.parent, inner):
            (place / "__init__.py").write_text("")
        (inner / "pretrained.py").write_text(CODE)
        monkeypatch.syspath_prepend(str(tmp_path / "code"))
        yield importlib.import_module(PACKAGE).Dasheng
        for name in [name for name in sys.modules if name.split(".")[0] == "dasheng"]:
            del sys.modules[name]
        sys.modules.update(saved)
        return
    yield importlib.import_module(PACKAGE).Dasheng


def save(dasheng: Any, folder: Path, config: dict[str, Any] | None = None, **sizes: Any) -> tuple[Any, Path]:
    """A random model, and its file as released ones are."""
    torch.manual_seed(2)
    sizes = {**SIZES, **sizes}
    model = dasheng(**sizes).eval()
    torch.save({"model": model.state_dict(), "config": sizes if config is None else config}, folder / "tiny.pt")
    return model, folder / "tiny.pt"


def build(path: Path, layer: int | str = "last") -> Teacher:
    return DashengConfig(weights=path.name, layer=layer).build(path.parent)  # type: ignore[arg-type]


@torch.no_grad()
def test_dasheng_package_gives_what_the_model_gives_a_single_recording(dasheng: Any, tmp_path: Path) -> None:
    model, path = save(dasheng, tmp_path)
    teacher = build(path)
    assert (teacher.frame_rate_hz, teacher.first_frame_s, teacher.dim, teacher.num_layers) == (25.0, 0.015, 24, 4)
    for samples in (480, 16000, 16479, 16480, 200000):
        (found,) = extract(teacher, [noise(samples)])
        torch.testing.assert_close(found, model(noise(samples)[None])[0])
        assert len(found) == (samples // 160 + 1) // 4
    assert teacher.num_frames(479) == 0


@torch.no_grad()
def test_dasheng_package_layers_are_the_blocks_of_the_model_in_every_piece(dasheng: Any, tmp_path: Path) -> None:
    model, path = save(dasheng, tmp_path)
    audio = noise(161280 + 30000)
    for layer in range(4):
        seen: list[Tensor] = []
        if layer == 0:
            hook = model.blocks[0].register_forward_pre_hook(lambda _, inputs, seen=seen: seen.append(inputs[0]))
        else:
            hook = model.blocks[layer - 1].register_forward_hook(lambda _, inputs, output, seen=seen: seen.append(output))
        model(audio[None])
        hook.remove()
        assert [piece.shape[1] for piece in seen] == [252, (191280 // 160 + 1) // 4 - 252]
        (found,) = extract(build(path, layer), [audio])
        torch.testing.assert_close(found, torch.cat(seen, dim=1)[0])


@torch.no_grad()
def test_dasheng_package_does_not_depend_on_batch_mates(dasheng: Any, tmp_path: Path) -> None:
    model, path = save(dasheng, tmp_path)
    quiet, loud = 1e-5 * noise(200000, 1), 10 * noise(200000, 2)
    for item, found in zip((quiet, loud), extract(build(path), [quiet, loud])):
        torch.testing.assert_close(found, model(item[None])[0], atol=1e-5, rtol=1e-5)
    assert (model(torch.stack([quiet, loud]))[0] - model(quiet[None])[0]).abs().max() > 0.01  # the package's own batch does


def test_dasheng_package_takes_the_heads_of_the_file_or_of_the_published_model(dasheng: Any, tmp_path: Path) -> None:
    _, path = save(dasheng, tmp_path, {"target_length": 1008}, embed_dim=768, depth=1, num_heads=12)
    teacher: Any = build(path)
    assert "('num_heads', 12)" in teacher.settings["config"]
    _, path = save(dasheng, tmp_path, {"num_heads": 8}, embed_dim=768, depth=1, num_heads=8)
    assert "('num_heads', 8)" in build(path).settings["config"]
    _, path = save(dasheng, tmp_path, {})
    with pytest.raises(ConfigError, match=r"must have `num_heads`: a width of 24 is none of the published models'"):
        build(path)


def test_dasheng_package_raises_config_error_when_a_file_does_not_fit(dasheng: Any, tmp_path: Path) -> None:
    _, path = save(dasheng, tmp_path)
    content = torch.load(path, weights_only=True)
    del content["model"]["norm.bias"]
    torch.save(content, path)
    with pytest.raises(ConfigError, match=r"do not fit the package dasheng: .*norm\.bias"):
        build(path)
    torch.save({"state_dict": {}}, path)
    with pytest.raises(ConfigError, match="must hold model and config"):
        build(path)
    path.write_bytes(b"nothing")
    with pytest.raises(ConfigError, match="cannot be read"):
        build(path)
    with pytest.raises(ConfigError, match=r"`weights` must be a file, but .*none\.pt does not exist"):
        build(tmp_path / "none.pt")


def test_dasheng_package_raises_config_error_when_it_is_missing(dasheng: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, path = save(dasheng, tmp_path)
    monkeypatch.setitem(sys.modules, PACKAGE, None)
    with pytest.raises(ConfigError, match=r"`type` dasheng needs the package dasheng and torchaudio, `pip install dasheng`"):
        build(path)
