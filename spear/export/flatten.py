"""Turn a part of this package into flat modules with relative imports, so that it runs where ``spear`` is not installed.

Transformers copies the code of a model folder into its cache and loads it as a package of its own: only files that lie flat
beside each other and import each other as ``from .module import name`` survive that.
"""

from __future__ import annotations

import ast
import importlib.util
from collections.abc import Mapping, Sequence
from pathlib import Path

from spear.errors import SpearError

PACKAGE = "spear"


def flatten_modules(entries: Mapping[str, str], substitutes: Mapping[str, str] | None = None) -> dict[str, str]:
    """Source of every module that the entries import from this package, directly or not, as flat files.

    Args:
        entries: module -> name of its flat module, e.g. ``{"spear.export.modeling_spear": "modeling_spear"}``.
        substitutes: module -> module that stands in for it.
    Returns:
        file name -> source, the same for the same package; ``from spear.a.b import X`` has become ``from .spear_a_b import X``.
    Raises:
        SpearError: a module imports the package in a form that has no flat counterpart (``import spear.x``, a submodule, ``*``).
    """
    substitutes = substitutes or {}
    files: dict[str, str] = {}
    waiting, seen = list(entries), set(entries)
    while waiting:
        module = waiting.pop()
        source = _source_path(module).read_text(encoding="utf-8")
        found = _package_imports(module, source)
        targets = [substitutes.get(str(node.module), str(node.module)) for node in found]
        files[f"{flat_name(module, entries)}.py"] = _rewrite(source, found, [flat_name(target, entries) for target in targets])
        for target in targets:
            if target not in seen:
                seen.add(target)
                waiting.append(target)
    return dict(sorted(files.items()))


def flat_name(module: str, entries: Mapping[str, str] | None = None) -> str:
    """Name of the flat module: that of `entries`, else the dotted path joined by underscores, which no standard module has."""
    return (entries or {}).get(module) or module.replace(".", "_")


def _source_path(module: str) -> Path:
    spec = importlib.util.find_spec(module)
    if spec is None or spec.origin is None:
        raise SpearError(f"module {module} has no source file to export")
    return Path(spec.origin)


def _package_imports(module: str, source: str) -> list[ast.ImportFrom]:
    """Every ``from spear.x import y`` of a module, in the order of the lines."""
    found: list[ast.ImportFrom] = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import) and any(alias.name.split(".")[0] == PACKAGE for alias in node.names):
            raise SpearError(f"{module}, line {node.lineno}: `import {PACKAGE}...` cannot be exported, write `from {PACKAGE}.x import y`")
        if not isinstance(node, ast.ImportFrom):
            continue
        if node.level:
            raise SpearError(f"{module}, line {node.lineno}: a relative import cannot be exported")
        parent = str(node.module)
        if parent.split(".")[0] != PACKAGE:
            continue
        for alias in node.names:
            if alias.name == "*" or parent == PACKAGE or _is_submodule(parent, alias.name):
                raise SpearError(f"{module}, line {node.lineno}: `from {parent} import {alias.name}` cannot be exported, import the name itself")
        found.append(node)
    return sorted(found, key=lambda node: (node.lineno, node.col_offset))


def _is_submodule(parent: str, name: str) -> bool:
    path = _source_path(parent)
    return path.name == "__init__.py" and ((path.parent / f"{name}.py").exists() or (path.parent / name / "__init__.py").exists())


def _rewrite(source: str, nodes: Sequence[ast.ImportFrom], names: Sequence[str]) -> str:
    """Replace the module of each import statement and leave every other byte as it is."""
    lines = source.splitlines(keepends=True)
    for node, name in zip(nodes, names):
        line = lines[node.lineno - 1]
        # columns of the syntax tree count bytes
        start = len(line.encode()[: node.col_offset].decode())
        lines[node.lineno - 1] = line[:start] + line[start:].replace(f"from {node.module} import", f"from .{name} import", 1)
        if f"from .{name} import" not in lines[node.lineno - 1]:
            raise SpearError(f"the import of {node.module} on line {node.lineno} cannot be exported: write it as `from {node.module} import ...`")
    return "".join(lines)
