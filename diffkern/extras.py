"""Packages that are not needed by `import diffkern`: imported where they are used, or one sentence that says how to get
them."""

from __future__ import annotations

import importlib
from typing import Any

__all__ = ["MissingExtra", "need"]


class MissingExtra(ImportError):
    """A package of one of diffkern's extras is not installed."""


def need(module: str, package: str, extra: str) -> Any:
    """The imported ``module``; MissingExtra naming the ``package`` and the ``extra`` it comes with."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise MissingExtra(
            f"this needs {package}, which cannot be imported ({error}): pip install 'diffkern[{extra}]'"
        ) from error
