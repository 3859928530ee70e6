"""Large packages are imported by the tests that use them, not by collecting these."""

from __future__ import annotations

import ast
import importlib
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest


class Lazy(ModuleType):
    """Stands for the module of a name, which is imported at the first question for one of its attributes."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):  # asked for by whoever looks at all names of a test module, as pytest does
            raise AttributeError(name)
        return getattr(importlib.import_module(self.__name__), name)


def needs(*packages: str) -> pytest.MarkDecorator:
    """Skips the tests of a module (`pytestmark = needs("diffusers")`) where a package is not installed."""
    missing = [name for name in packages if find_spec(name) is None]
    return pytest.mark.skipif(bool(missing), reason=f"needs {', '.join(missing)}")


def exported(name: str) -> list[str]:
    """`__all__` of a package, as its source says it."""
    spec = find_spec(name)
    assert spec is not None
    assert spec.origin is not None
    for statement in ast.parse(Path(spec.origin).read_text()).body:
        if isinstance(statement, ast.Assign) and ast.unparse(statement.targets[0]) == "__all__":
            return list(ast.literal_eval(statement.value))
    raise AssertionError(f"{spec.origin} has no __all__")
