"""Packages that import their modules when they are first asked for (PEP 562): a drop-in costs nothing until then."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from importlib import import_module
from typing import Any


def lazily(
    package: str, modules: Sequence[str], names: Sequence[str] = ()
) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """``__getattr__`` and ``__dir__`` of a package with these modules, and with ``names`` that the modules define.

    What an import raises (a peer that is missing) is raised by the attribute, too.
    """

    def find(name: str) -> Any:
        if name in modules:
            return import_module(f"{package}.{name}")
        if name in names:
            for module in modules:
                held = vars(import_module(f"{package}.{module}"))
                if name in held:
                    setattr(sys.modules[package], name, held[name])
                    return held[name]
        raise AttributeError(f"module {package!r} has no attribute {name!r}")

    def listed() -> list[str]:
        return sorted(name for name in {*modules, *names} if not name.startswith("_"))

    return find, listed
