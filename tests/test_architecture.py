"""The shape of the code: imports only downward, short files and functions, documented public names."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "spear"
BASE = {"errors", "types", "registry", "files", "progress", "bounds", "native", "transfer"}
PARTS = {"config", "data", "quantizers", "models", "training"}
MAY_IMPORT = {
    **{name: BASE - {name} for name in BASE},
    **dict.fromkeys(PARTS, BASE),
    "objectives": BASE | {"models", "quantizers"},
    "export": BASE | {"config", "models", "data", "training"},
    "teachers": BASE | {"config", "data", "export"},
    "evaluation": BASE | {"config", "data", "models", "quantizers", "training", "export", "teachers"},
    "finetune": BASE | {"config", "data", "models", "objectives", "training", "export", "evaluation"},
    "recipe": BASE | PARTS | {"objectives", "export", "teachers", "evaluation"},
}
MAY_IMPORT["stages"] = MAY_IMPORT["recipe"] | {"recipe"}
MAY_IMPORT["commands"] = MAY_IMPORT["stages"] | {"stages", "finetune"}
MAY_IMPORT["cli"] = MAY_IMPORT["commands"] | {"commands"}
MAX_LINES, MAX_FUNCTION_LINES = 400, 60
FILES = sorted(PACKAGE.rglob("*.py"))


def part_of(path: Path) -> str:
    first = path.relative_to(PACKAGE).parts[0]
    return first.removesuffix(".py")


def imports(tree: ast.AST) -> Iterator[tuple[int, str]]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.lineno, node.module


def type_only(tree: ast.Module) -> set[int]:
    """Lines under ``if TYPE_CHECKING``: names for the reader, never run."""
    lines: set[int] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            lines.update(range(node.lineno, (node.end_lineno or node.lineno) + 1))
    return lines


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_file_follows_the_rules(path: Path) -> None:
    text = path.read_text()
    tree = ast.parse(text)
    part, skipped = part_of(path), type_only(tree)
    problems = []
    for line, module in imports(tree):
        target = module.split(".")
        if target[0] == "sys" and "sys.path" in text:
            problems.append(f"{line}: sys.path")
        if target[0] != "spear" or len(target) < 2 or part.startswith("__") or line in skipped:
            continue
        if target[1] != part and target[1] not in MAY_IMPORT[part]:
            problems.append(f"{line}: {part} must not import {module}")
    if text.count("\n") > MAX_LINES:
        problems.append(f"{text.count(chr(10))} lines, at most {MAX_LINES}")
    if text.strip() and not ast.get_docstring(tree):
        problems.append("no docstring that says what the file is for")
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            length = (node.end_lineno or node.lineno) - node.lineno + 1
            if length > MAX_FUNCTION_LINES:
                problems.append(f"{node.lineno}: {node.name} has {length} lines, at most {MAX_FUNCTION_LINES}")
        if isinstance(node, ast.ExceptHandler) and node.type is None:
            problems.append(f"{node.lineno}: bare except")
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "print" and part != "cli":
            problems.append(f"{node.lineno}: print")
    assert not problems, "\n".join(problems)


def public_functions(tree: ast.Module) -> Iterator[ast.FunctionDef | ast.ClassDef]:
    for node in tree.body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and not node.name.startswith("_"):
            yield node


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_public_names_have_docstrings(path: Path) -> None:
    missing = [f"{node.lineno}: {node.name}" for node in public_functions(ast.parse(path.read_text())) if not ast.get_docstring(node)]
    assert not missing, "\n".join(missing)


def test_every_part_is_in_the_table_of_imports() -> None:
    parts = {part_of(path) for path in FILES} - {"__init__", "__main__"}
    assert parts <= set(MAY_IMPORT), sorted(parts - set(MAY_IMPORT))


def test_nothing_reads_or_writes_pickles() -> None:
    found = []
    foreign = {("icefall.py", "torch.save")}  # a checkpoint for icefall is one, by that program's format
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text())):
            if (
                isinstance(node, ast.Call)
                and isinstance(node.func, ast.Attribute)
                and ast.unparse(node.func) in ("torch.save", "pickle.dump", "pickle.load")
                and (path.name, ast.unparse(node.func)) not in foreign
            ):
                found.append(f"{path.name}:{node.lineno}")
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "torch.load" and "weights_only=True" not in ast.unparse(node):
                found.append(f"{path.name}:{node.lineno}")
    assert not found, found
