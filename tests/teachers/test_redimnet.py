"""The ReDimNet adapter on a stand-in with the interface of the authors' code."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from spear.errors import ConfigError
from spear.teachers import Teacher, extract
from spear.teachers.redimnet import ReDimNetConfig
from tests.teachers.conftest import noise

CODE = """
import torch
from torch import nn


class Spec(nn.Module):
    def __init__(self, bins, hop):
        super().__init__()
        self.bins, self.hop = bins, hop
        self.register_buffer("window", torch.hamming_window(400))

    def forward(self, x):
        power = torch.stft(x, 512, self.hop, 400, self.window, center=True, return_complex=True).abs().square()
        logs = (power[:, : self.bins] + 1e-6).log()
        return logs - logs.mean(dim=-1, keepdim=True)


class Backbone(nn.Module):
    def __init__(self, F, C, stages, everything):
        super().__init__()
        self.F, self.C, self.num_stages, self.everything = F, C, stages, everything
        self.stem = nn.Conv1d(F, F * C, 1)
        self.stages = nn.ModuleList(nn.Conv1d(F * C, F * C, 3, padding=1) for _ in range(stages))

    def forward(self, x):
        assert self.everything
        found = [self.stem(x[:, 0])]
        for stage in self.stages:
            found.append(torch.tanh(stage(found[-1])))
        found.append(sum(found))
        return found[-1], found


class ReDimNetWrap(nn.Module):
    def __init__(self, F=12, C=2, stages=3, hop_length=160, feat_type="pt", return_all_outputs=False):
        super().__init__()
        self.spec = Spec(F, hop_length)
        self.backbone = Backbone(F, C, stages, return_all_outputs)
"""


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    package = tmp_path / "checkout" / "redimnet"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("")
    (package / "model.py").write_text(CODE)
    monkeypatch.syspath_prepend(str(package.parent))
    yield tmp_path
    for name in ("redimnet", "redimnet.model"):
        sys.modules.pop(name, None)


def save(folder: Path, **config: object) -> Path:
    """Weights as released ones are stored."""
    from redimnet.model import ReDimNetWrap  # type: ignore[import-not-found]

    torch.manual_seed(1)
    path = folder / "b0.pt"
    torch.save({"model_config": config, "state_dict": ReDimNetWrap(**config).state_dict()}, path)
    return path


def build(path: Path, **settings: object) -> Teacher:
    return ReDimNetConfig(weights=str(path), **settings).build()  # type: ignore[arg-type]


@pytest.mark.parametrize(("hop", "rate"), [(160, 100.0), (240, 16000 / 240)])
def test_redimnet_reads_its_hop_from_the_checkpoint(checkout: Path, hop: int, rate: float) -> None:
    teacher = build(save(checkout, hop_length=hop))
    assert (teacher.frame_rate_hz, teacher.first_frame_s, teacher.dim, teacher.num_layers) == (rate, 0.0, 24, 5)
    assert teacher.depends_on_padding
    for samples in (400, 16000, 16001, 16239):
        assert len(extract(teacher, [noise(samples)])[0]) == samples // hop + 1
    assert teacher.num_frames(399) == 0


def test_redimnet_layers_are_the_stages(checkout: Path) -> None:
    path = save(checkout)
    model = build(path).model
    with torch.no_grad():
        _, stages = model.backbone(model.spec(noise(16000)[None]).unsqueeze(1))  # type: ignore[union-attr, operator]
    for layer, expected in [*enumerate(stages), ("last", stages[-1])]:
        torch.testing.assert_close(extract(build(path, layer=layer), [noise(16000)])[0], expected[0].T)
    assert build(path, layer=4).fingerprint() == build(path).fingerprint() != build(path, layer=0).fingerprint()


def test_redimnet_does_not_depend_on_batch_mates(checkout: Path) -> None:
    teacher = build(save(checkout))
    audio = [noise(16000, 1), noise(9000, 2), noise(16000, 3)]
    for item, found in zip(audio, extract(teacher, audio)):
        assert (extract(teacher, [item])[0] - found).abs().max() < 1e-4


def test_redimnet_raises_config_error_when_the_weights_are_wrong(checkout: Path) -> None:
    path = save(checkout)
    with pytest.raises(ConfigError, match=r"`weights` must be a file, but .*nothing\.pt does not exist"):
        build(checkout / "nothing.pt")
    with pytest.raises(ConfigError, match="`layer` must be between 0 and 4, but is 5"):
        build(path, layer=5)
    found = torch.load(path, weights_only=True)
    torch.save({**found, "model_config": {"C": 3}}, path)
    with pytest.raises(ConfigError, match=r"do not fit the code of `redimnet\.model`: Error"):
        build(path)
    torch.save({**found, "model_config": {"feat_type": "tf"}}, path)
    with pytest.raises(ConfigError, match="`feat_type` is tf"):
        build(path)
    torch.save(found["state_dict"], path)
    with pytest.raises(ConfigError, match="must hold model_config and state_dict, but does not"):
        build(path)
    path.write_bytes(b"damaged")
    with pytest.raises(ConfigError, match=r"`weights` .* cannot be read"):
        build(path)


def test_redimnet_raises_config_error_when_its_code_is_not_there(tmp_path: Path) -> None:
    path = tmp_path / "b0.pt"
    torch.save({"model_config": {}, "state_dict": {}}, path)
    with pytest.raises(ConfigError, match=r"`redimnet\.model` cannot be imported .*: name a checkout of ReDimNet in `code` or put it on PYTHONPATH"):
        build(path)


def test_redimnet_takes_its_code_from_the_checkout_it_is_given(checkout: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = save(checkout)
    expected = build(path)
    other = checkout / "data" / "hub" / "redimnet"  # no __init__.py, as in the authors' repository
    other.mkdir(parents=True)
    (other / "model.py").write_text(CODE.replace("torch.tanh(stage(found[-1]))", "2 * torch.tanh(stage(found[-1]))"))
    doubled = ReDimNetConfig(weights=str(path), layer=1, code="hub").build(checkout / "data")
    plain = build(path, layer=1, code=str(checkout / "checkout"))
    torch.testing.assert_close(extract(doubled, [noise(16000)])[0], 2 * extract(plain, [noise(16000)])[0])
    assert build(path, code=str(checkout / "checkout")).fingerprint() == expected.fingerprint()
    with pytest.raises(ConfigError, match=r"`code` must be a checkout with redimnet/model\.py, but is nowhere"):
        build(path, code="nowhere")
