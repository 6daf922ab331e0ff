"""A user's own function as a teacher."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from spear.errors import ConfigError
from spear.teachers import TeacherConfig, extract
from spear.teachers.python import PythonConfig
from tests.teachers.conftest import noise

CODE = """
import torch
from torch import nn

VALUE = 1


class Energy(nn.Module):
    sample_rate, frame_rate_hz, first_frame_s = 16000, 100.0, 0.005

    def __init__(self, dim, rate=100.0):
        super().__init__()
        self.dim, self.frame_rate_hz = dim, rate
        self.scale = nn.Parameter(torch.arange(1.0, dim + 1))

    def num_frames(self, samples):
        return samples // 160

    def forward(self, audio, lens):
        frames = audio[:, : audio.shape[1] // 160 * 160].unflatten(1, (-1, 160))
        return frames.square().mean(dim=2, keepdim=True) * self.scale, lens // 160


def make(dim=4, **options):
    return Energy(dim, **options)


def broken(dim=4):
    raise ValueError("no weights here")


def bare():
    return nn.Linear(2, 2)
"""


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    path = tmp_path / "my_lab_teachers.py"
    path.write_text(CODE)
    monkeypatch.syspath_prepend(str(tmp_path))
    yield path
    sys.modules.pop("my_lab_teachers", None)


def config(name: str = "make", **settings: object) -> PythonConfig:
    return PythonConfig(factory=f"my_lab_teachers:{name}", **settings)  # type: ignore[arg-type]


@pytest.mark.parametrize("depends_on_padding", [True, False])
def test_python_teacher_gives_the_function_s_frames(module: Path, depends_on_padding: bool) -> None:
    teacher = config(options={"dim": 3}, depends_on_padding=depends_on_padding).build()
    assert (teacher.dim, teacher.frame_rate_hz, teacher.first_frame_s, teacher.num_layers) == (3, 100.0, 0.005, 1)
    assert teacher.depends_on_padding == depends_on_padding
    found = extract(teacher, [noise(16000), noise(8123)])
    for item, frames in zip((noise(16000), noise(8123)), found):
        energy = item[: len(item) // 160 * 160].unflatten(0, (-1, 160)).square().mean(dim=1, keepdim=True)
        torch.testing.assert_close(frames, energy * torch.tensor([1.0, 2.0, 3.0]))
    assert not any(parameter.requires_grad for parameter in teacher.parameters())


def test_python_teacher_fingerprint_covers_code_options_and_weights(module: Path) -> None:
    first, other = config().build().fingerprint(), config(options={"dim": 5}).build().fingerprint()
    assert first == config().build().fingerprint() != other
    sys.modules.pop("my_lab_teachers")
    module.write_text(CODE.replace("VALUE = 1", "VALUE = 22"))
    assert config().build().fingerprint() != first


def test_python_teacher_is_read_from_yaml(module: Path) -> None:
    import draccus

    found = draccus.decode(TeacherConfig, {"type": "python", "factory": "my_lab_teachers:make", "options": {"dim": 3}})
    assert found == config(options={"dim": 3})


@pytest.mark.parametrize(
    ("factory", "options", "message"),
    [
        ("my_lab_teachers", {}, r"`factory` must be package\.module:function, but is 'my_lab_teachers'"),
        ("my_lab_nowhere:make", {}, r"`factory` my_lab_nowhere:make cannot be imported: No module named"),
        ("my_lab_teachers:nothing", {}, r"cannot be imported: .*nothing"),
        ("my_lab_teachers:VALUE", {}, r"must be a function, but is a int"),
        ("my_lab_teachers:broken", {}, r"fails with `options` \{\}: no weights here"),
        ("my_lab_teachers:make", {"width": 3}, r"fails with `options` .*unexpected keyword"),
        ("my_lab_teachers:bare", {}, r"must have sample_rate, but has not"),
        ("my_lab_teachers:dict", {}, r"cannot be imported"),
        ("builtins:dict", {}, r"must give an nn\.Module, but gives a dict"),
        ("my_lab_teachers:make", {"rate": 50.0}, r"must give 50 frames per second, but gives 100"),
    ],
)
def test_python_teacher_raises_config_error_when_it_does_not_fit(module: Path, factory: str, options: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        PythonConfig(factory=factory, options=options).build()
