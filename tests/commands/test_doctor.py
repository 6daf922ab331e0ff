"""``spear doctor`` names what is missing and what it costs."""

from __future__ import annotations

import pytest

from spear.commands import doctor as module


def test_doctor_is_content_with_this_environment() -> None:
    lines: list[str] = []
    assert module.doctor(lines.append) == 0
    assert any(line.startswith("ok      torch ") for line in lines)
    assert not any(line.startswith("MISSING") for line in lines)


def test_doctor_fails_only_for_required_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    lines: list[str] = []
    monkeypatch.setattr(module, "OPTIONAL", {"no_such_module": "nothing"})
    assert module.doctor(lines.append) == 0
    assert "absent  no_such_module (optional): nothing" in lines
    monkeypatch.setattr(module, "REQUIRED", {"no_such_module": "nothing works"})
    assert module.doctor(lines.append) == 1
    assert "MISSING no_such_module: without it nothing works" in lines


def test_doctor_says_what_a_missing_compiler_costs(monkeypatch: pytest.MonkeyPatch) -> None:
    lines: list[str] = []
    monkeypatch.setattr(module.native, "compiler", lambda: None)
    module.doctor(lines.append)
    assert any(line.startswith("absent  C++ compiler (optional)") for line in lines)
    monkeypatch.setenv(module.native.SWITCH, "0")
    module.doctor(lines.append)
    assert any("SPEAR_KERNELS=0 turns them off" in line for line in lines)
