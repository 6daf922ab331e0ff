"""The compiled loops of the Zipformer and their stand-ins in torch agree with the closed forms."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from collections.abc import Iterator
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch.nn import functional as F

from spear import native
from spear.models.zipformer import swoosh
from spear.models.zipformer.depthwise import depthwise_conv1d, depthwise_conv2d
from spear.models.zipformer.kernels import depthwise_loop, k2_kernels, swoosh_loops
from spear.models.zipformer.pointwise import ROWS, pointwise_swoosh
from spear.models.zipformer.swoosh import Swoosh, from_k2, swoosh_l, swoosh_r

needs_compiler = pytest.mark.skipif(native.compiler() is None, reason="there is no C++ compiler")


@pytest.fixture(params=["compiled", "torch"])
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "torch":
        monkeypatch.setenv(native.SWITCH, "0")
    elif native.compiler() is None:
        pytest.skip("there is no C++ compiler")
    return str(request.param)


@needs_compiler
def test_the_loops_are_built_here() -> None:
    assert swoosh_loops() is not None
    assert depthwise_loop() is not None


@pytest.mark.parametrize(("function", "shift", "offset"), [(swoosh_l, 4.0, 0.035), (swoosh_r, 1.0, 0.313261687)])
def test_swoosh_is_its_closed_form_far_out_too(backend: str, function, shift: float, offset: float) -> None:
    x = torch.cat([torch.linspace(-150, 150, 40_001), torch.tensor([0.0, 1e-30, -1e-30, 1e20, -1e20, shift])])
    wide = x.double()
    expected = F.softplus(wide - shift, threshold=1e9) - 0.08 * wide - offset
    assert ((function(x).double() - expected).abs() <= 1e-6 * (1 + expected.abs())).all()
    rounded = function(x.bfloat16())
    assert rounded.dtype == torch.bfloat16
    again = x.bfloat16().double()
    expected = F.softplus(again - shift, threshold=1e9) - 0.08 * again - offset
    assert ((rounded.double() - expected).abs() <= 0.005 * (0.01 + expected.abs())).all()


def test_swoosh_carries_nan_and_infinity(backend: str) -> None:
    x = torch.tensor([float("nan"), float("inf"), float("-inf"), 1.0]).repeat(40)
    for value in (x, x.bfloat16()):
        out = swoosh_l(value)
        assert out[0::4].isnan().all()
        assert not out[1::4].isfinite().any()
        assert (out[2::4] == float("inf")).all()
        assert out[3::4].isfinite().all()
        gradient = swoosh_l.gradient(value, torch.ones_like(value))
        assert gradient[0::4].isnan().all()
        assert gradient[1:4].isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_swoosh_gradient(backend: str, dtype: torch.dtype) -> None:
    x = (torch.randn(7, 33, 19, generator=torch.Generator().manual_seed(0)) * 5).to(dtype).requires_grad_()
    grad = torch.randn(7, 33, 19, generator=torch.Generator().manual_seed(1)).to(dtype)
    swoosh_l(x).backward(grad)
    expected = (torch.sigmoid(x.detach().double() - 4) - 0.08) * grad.double()
    assert x.grad is not None
    tolerance = 1e-6 if dtype == torch.float32 else 5e-3
    assert ((x.grad.double() - expected).abs() <= tolerance * (0.1 + expected.abs())).all()


class StandIn(ModuleType):
    """What k2 offers for Swoosh, by its documented formulas, float32 as in k2; notes which functions were called."""

    def __init__(self) -> None:
        super().__init__("k2")
        self.calls: list[str] = []
        self.__spec__ = ModuleSpec("k2", None)

    def _named(self, name: str, x: torch.Tensor, shift: float, offset: float) -> tuple[torch.Tensor, torch.Tensor]:
        self.calls.append(name)
        x = x.float()
        return torch.log1p(torch.exp(x - shift)) - 0.08 * x - offset, 0.92 - 1 / (1 + torch.exp(x - shift))

    def swoosh_l_forward(self, x: torch.Tensor) -> torch.Tensor:
        return self._named("l", x, 4.0, 0.035)[0]

    def swoosh_r_forward(self, x: torch.Tensor) -> torch.Tensor:
        return self._named("r", x, 1.0, 0.313261687)[0]

    def swoosh_l_forward_and_deriv(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return self._named("l'", x, 4.0, 0.035)

    def swoosh_r_forward_and_deriv(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return self._named("r'", x, 1.0, 0.313261687)


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> Iterator[StandIn]:
    module = StandIn()
    monkeypatch.setitem(sys.modules, "k2", module)
    k2_kernels.cache_clear()
    yield module
    k2_kernels.cache_clear()


@pytest.mark.parametrize(("function", "letter"), [(swoosh_l, "l"), (swoosh_r, "r")])
def test_k2_runs_swoosh_off_the_cpu(stand_in: StandIn, function: Swoosh, letter: str) -> None:
    function(torch.randn(9))
    assert stand_in.calls == []  # a CPU has its own loops
    x = torch.empty(3, 9, device="meta", dtype=torch.bfloat16, requires_grad=True)  # any device but a CPU
    out = function(x)
    assert stand_in.calls == [letter]
    assert out.dtype == torch.bfloat16
    assert torch.autograd.grad(out.sum(), x)[0].dtype == torch.bfloat16
    assert stand_in.calls == [letter, f"{letter}'"]
    function(x.detach().double())
    assert len(stand_in.calls) == 2  # k2 computes in float32


@pytest.mark.parametrize("function", [swoosh_l, swoosh_r])
def test_k2_gives_the_closed_form(stand_in: StandIn, function: Swoosh) -> None:
    x = torch.linspace(-30, 30, 4001)
    grad = torch.linspace(1, 2, 4001)
    torch.testing.assert_close(from_k2(stand_in, x, None, function.shift), function.of(x), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(from_k2(stand_in, x, grad, function.shift), function.gradient(x, grad), rtol=1e-5, atol=1e-6)


def test_without_k2_torch_computes_off_the_cpu() -> None:
    if importlib.util.find_spec("k2") is not None:
        pytest.skip("k2 is installed")
    k2_kernels.cache_clear()
    assert k2_kernels() is None
    x = torch.empty(3, 9, device="meta", requires_grad=True)
    assert torch.autograd.grad(swoosh_l(x).sum(), x)[0].shape == (3, 9)


@pytest.mark.skipif(importlib.util.find_spec("k2") is None, reason="k2 is not installed")
def test_installed_k2_gives_the_closed_form() -> None:
    k2 = k2_kernels()
    x = torch.linspace(-30, 30, 4001)
    torch.testing.assert_close(from_k2(k2, x, None, 4.0), swoosh_l.of(x), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(from_k2(k2, x, torch.ones(4001), 1.0), swoosh_r.gradient(x, torch.ones(4001)), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("shape", "kernel", "padding"), [((2, 9, 7, 19), (7, 7), (3, 3)), ((3, 40, 11, 128), (3, 5), (1, 2)), ((2, 1, 70, 80), (1, 15), (0, 7))]
)
def test_depthwise_gradients_are_those_of_torch(backend: str, shape, kernel, padding) -> None:
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(shape, generator=generator, dtype=torch.float64)
    weight = torch.randn(shape[3], 1, *kernel, generator=generator, dtype=torch.float64)
    bias = torch.randn(shape[3], generator=generator, dtype=torch.float64)
    single = [t.float().requires_grad_() for t in (x, weight, bias)]
    double = [t.requires_grad_() for t in (x, weight, bias)]
    out = depthwise_conv2d(*single, padding)
    wanted = F.conv2d(double[0].permute(0, 3, 1, 2), double[1], double[2], padding=padding, groups=shape[3]).permute(0, 2, 3, 1)
    grad = torch.randn(wanted.shape, generator=generator, dtype=torch.float64)
    found = torch.autograd.grad(out, single, grad.float())
    expected = torch.autograd.grad(wanted, double, grad)
    for a, b in zip((out, *found), (wanted, *expected)):
        assert (a.double() - b).abs().max() <= 3e-5 * (1 + b.abs().max())


def test_causal_depthwise_without_padding(backend: str) -> None:
    x = torch.randn(2, 50, 6, generator=torch.Generator().manual_seed(3)).requires_grad_()
    weight = torch.randn(6, 1, 8, generator=torch.Generator().manual_seed(4)).requires_grad_()
    bias = torch.zeros(6, requires_grad=True)
    mine = torch.autograd.grad(depthwise_conv1d(x, weight, bias).square().sum(), [x, weight])
    plain = F.conv1d(x.transpose(1, 2), weight, bias, groups=6)
    theirs = torch.autograd.grad(plain.square().sum(), [x, weight])
    for a, b in zip(mine, theirs):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("rows", [1, ROWS, 2 * ROWS + 5])
def test_pointwise_block_is_two_linears(backend: str, rows: int) -> None:
    generator = torch.Generator().manual_seed(5)
    tensors = [torch.randn(size, generator=generator).requires_grad_() for size in ((rows, 8), (24, 8), (24,), (8, 24), (8,))]

    def plain(x, weight1, bias1, weight2, bias2):
        return F.linear(swoosh_l(F.linear(x, weight1, bias1)), weight2, bias2)

    grad = torch.randn(rows, 8, generator=generator)
    out, wanted = pointwise_swoosh(*tensors), plain(*tensors)
    torch.testing.assert_close(out, wanted, rtol=1e-5, atol=1e-5)
    for a, b in zip(torch.autograd.grad(out, tensors, grad), torch.autograd.grad(wanted, tensors, grad)):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4 * max(1.0, float(b.abs().max())))
    with torch.no_grad():
        torch.testing.assert_close(pointwise_swoosh(*tensors), wanted, rtol=1e-5, atol=1e-5)
    with torch.autocast("cpu", torch.bfloat16):
        low = pointwise_swoosh(*tensors)
    assert low.dtype == torch.bfloat16
    assert (low.float() - wanted).abs().max() <= 0.05 * wanted.abs().max()


def test_a_missing_compiler_is_said_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    source = tmp_path / "one.cpp"
    source.write_text('extern "C" int one() { return 1; }\n')
    monkeypatch.setattr(native, "compiler", lambda: None)
    with caplog.at_level("WARNING"):
        assert native.load(source, "sums run") is None
        assert native.load(source, "sums run") is None
    assert [record.getMessage() for record in caplog.records] == [
        "no compiled loops, so sums run in plain torch, which is slower: there is no C++ compiler (c++, g++ or clang++)"
    ]


@needs_compiler
def test_a_library_is_built_once_and_again_when_a_header_changes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    source, header = tmp_path / "two.cpp", tmp_path / "two.h"
    header.write_text("#define NUMBER 2\n")
    source.write_text('#include "two.h"\nextern "C" int number() { return NUMBER; }\n')
    first = native.build(source)
    changed = first.stat().st_mtime_ns
    assert native.build(source) == first
    assert first.stat().st_mtime_ns == changed
    header.write_text("#define NUMBER 3\n")
    library = native.load(source, "nothing runs")
    assert library is not None
    assert library.number() == 3
    assert native.build(source) != first


@needs_compiler
def test_a_broken_source_is_a_failed_build(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    source = tmp_path / "broken.cpp"
    source.write_text("this is no C++\n")
    with pytest.raises(subprocess.CalledProcessError):
        native.build(source)
    assert native.load(source, "nothing runs") is None
    assert list((tmp_path / "cache" / "spear").iterdir()) == []


def test_swoosh_on_a_gpu_allocates_nothing_for_the_loops_of_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """The meta device stands for a GPU."""
    monkeypatch.setattr(torch, "empty_like", lambda _: pytest.fail("memory is taken"))
    monkeypatch.setattr(swoosh, "k2_kernels", lambda: None)
    assert swoosh_l.of(torch.ones(3, device="meta")).shape == (3,)
