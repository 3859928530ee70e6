"""Who imports what in the package, by full dotted name, read from the syntax trees."""

from __future__ import annotations

import ast
from collections.abc import Container, Iterator
from pathlib import Path
from typing import NamedTuple


class Import(NamedTuple):
    """One imported module or name."""

    name: str
    """Full dotted name: `diffkern.samplers.nodes.Node`."""
    at_import: bool
    """Runs when the module is imported, not when a function of it is called."""
    typing_only: bool
    """Under `if TYPE_CHECKING`."""


def module_name(path: Path, package: Path) -> str:
    parts = [package.name, *path.relative_to(package).with_suffix("").parts]
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def wing(name: str, modules: Container[str]) -> str:
    """The first room of a dotted name: `samplers` of `diffkern.samplers.nodes.Node`; `diffkern` at the top."""
    parts = name.split(".")
    return parts[1] if ".".join(parts[:2]) in modules and len(parts) > 1 else parts[0]


def code(path: Path) -> str:
    """The file without comments and docstrings."""
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            node.value.value = ""
    return ast.unparse(tree)


def imports(package: Path) -> dict[str, list[Import]]:
    """Of every module what it imports of the package; attributes of an imported module count as imported names."""
    paths = {module_name(path, package): path for path in sorted(package.rglob("*.py"))}
    native = {f"{package.name}._C", f"{package.name}._cuda"}
    return {module: list(_imports(module, path, {*paths, *native}, package.name)) for module, path in paths.items()}


def _imports(module: str, path: Path, modules: set[str], top: str) -> Iterator[Import]:
    tree = ast.parse(path.read_text())
    folder = module if path.name == "__init__.py" else module.rpartition(".")[0]
    bound: dict[str, str] = {}
    for node, at_import, typing_only in _statements(tree.body, True, False):
        if isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.split(".")[0] == top:
                    yield Import(alias.name, at_import, typing_only)
                    bound[alias.asname or top] = alias.name if alias.asname else top
        elif isinstance(node, ast.ImportFrom):
            above = folder.split(".")[: len(folder.split(".")) - node.level + 1] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            if base.split(".")[0] == top:
                for alias in node.names:
                    name = f"{base}.{alias.name}"
                    yield Import(name, at_import, typing_only)
                    if name in modules:
                        bound[alias.asname or alias.name] = name
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in bound:
            yield Import(f"{bound[node.value.id]}.{node.attr}", False, False)


def _statements(body: list[ast.stmt], at_import: bool, typing_only: bool) -> Iterator[tuple[ast.stmt, bool, bool]]:
    for node in body:
        yield node, at_import, typing_only
        inside = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        guarded = isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING")
        for field in ("body", "orelse", "finalbody", "handlers"):
            inner = getattr(node, field, None)
            if isinstance(inner, list):
                kept = [s for h in inner for s in (h.body if isinstance(h, ast.ExceptHandler) else [h])]
                yield from _statements(kept, at_import and not inside, typing_only or (guarded and field == "body"))


def owner(name: str, modules: dict[str, list[Import]]) -> str | None:
    """The package that a private name belongs to, or None for a public one."""
    parts = name.split(".")
    for i, part in enumerate(parts):
        if part.startswith("_") and not part.startswith("__"):
            above = ".".join(parts[:i])
            is_package = any(module.startswith(f"{above}.") for module in modules)
            return above if is_package else above.rpartition(".")[0]
    return None


def longest_chain(modules: dict[str, list[Import]]) -> list[str]:
    """The longest chain of modules, each of which imports the next when it is imported itself."""
    edges: dict[str, set[str]] = {}
    for module, found in modules.items():
        ends = set()
        for one in found:
            if one.at_import and not one.typing_only:
                end = one.name if one.name in modules else one.name.rpartition(".")[0]
                ends.add(end)
        edges[module] = {end for end in ends if end in modules and end != module}
    longest: dict[str, list[str]] = {}

    def chain(module: str, above: tuple[str, ...]) -> list[str]:
        if module in above:
            raise AssertionError(f"a circle of imports: {' -> '.join([*above[above.index(module) :], module])}")
        if module not in longest:
            behind = (chain(end, (*above, module)) for end in sorted(edges[module]))
            longest[module] = [module, *max(behind, key=len, default=[])]
        return longest[module]

    return max((chain(module, ()) for module in sorted(modules)), key=len)
