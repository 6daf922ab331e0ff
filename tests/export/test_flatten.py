"""Flat modules: what is rewritten, what is followed, what is refused."""

from __future__ import annotations

import ast
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from spear.errors import SpearError
from spear.export.flatten import flat_name, flatten_modules
from spear.export.huggingface import ENTRIES, HEADER, SUBSTITUTES, model_code

Make = Callable[[str, str], str]


@pytest.fixture
def make(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Make:
    """Writes a module below ``spear`` and returns its dotted name."""
    import spear

    folder = tmp_path / "spear" / "scratch"
    folder.mkdir(parents=True)
    (folder / "__init__.py").write_text("")
    monkeypatch.setattr(spear, "__path__", [*spear.__path__, str(tmp_path / "spear")])

    def write(name: str, source: str) -> str:
        (folder / f"{name}.py").write_text(source)
        return f"spear.scratch.{name}"

    yield write
    for name in [name for name in sys.modules if name.startswith("spear.scratch")]:
        del sys.modules[name]


def test_flatten_rewrites_imports_and_nothing_else(make: Make) -> None:
    make("other", "from spear.errors import DataError\nVALUE = 1\n")
    head = '"""Über ``from spear.scratch.other import``."""\n'
    body = (
        "from spear.scratch.other import (\n    VALUE,\n)\n\n\n"
        'def f():\n    from spear.scratch.other import VALUE as v  # late\n    return "spear.scratch"\n'
    )
    found = flatten_modules({make("entry", head + body): "entry"})
    assert set(found) == {"entry.py", "spear_scratch_other.py", "spear_errors.py"}
    assert found["entry.py"] == head + body.replace("from spear.scratch.other import", "from .spear_scratch_other import")
    assert found["spear_scratch_other.py"] == "from .spear_errors import DataError\nVALUE = 1\n"


def test_flatten_follows_circles_once_and_takes_substitutes(make: Make) -> None:
    make("b", "from spear.scratch.a import X\nfrom spear.registry import Registry\n")
    found = flatten_modules({make("a", "from spear.scratch.b import Y\nX = 1\n"): "a"}, SUBSTITUTES)
    assert set(found) == {"a.py", "spear_scratch_b.py", "spear_export_plain_registry.py"}
    assert found["spear_scratch_b.py"] == "from .a import X\nfrom .spear_export_plain_registry import Registry\n"


@pytest.mark.parametrize(
    "line",
    ["import spear.errors", "from spear import load_encoder", "from spear.errors import *", "from spear.models import base", "from . import other"],
)
def test_flatten_raises_error_when_import_has_no_flat_form(make: Make, line: str) -> None:
    with pytest.raises(SpearError, match=r"spear\.scratch\.bad, line 2: .*cannot be exported"):
        flatten_modules({make("bad", f"import os\n{line}\n"): "bad"})


def test_flat_name_is_that_of_an_entry_or_of_the_path() -> None:
    assert flat_name("spear.export.modeling_spear", ENTRIES) == "modeling_spear"
    assert flat_name("spear.types", ENTRIES) == "spear_types"


def test_model_code_is_closed_flat_and_free_of_training_packages() -> None:
    code = model_code()
    allowed = {"torch", "numpy", "transformers", "soundfile", "scipy", *sys.stdlib_module_names}
    for name, source in code.items():
        assert source.startswith(HEADER)
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.Import):
                assert {alias.name.split(".")[0] for alias in node.names} <= allowed, name
            elif isinstance(node, ast.ImportFrom) and node.level:
                assert node.level == 1, name
                assert f"{node.module}.py" in code, name
            elif isinstance(node, ast.ImportFrom):
                assert str(node.module).split(".")[0] in allowed, name
    assert not {name.removesuffix(".py") for name in code} & set(sys.stdlib_module_names)
    assert code == model_code()
