"""Work in a process of its own: what it raises is raised here, and so is its crash."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from typing import Any, TypeVar

__all__ = ["alone", "reason"]

T = TypeVar("T")


def alone(work: Callable[..., T], *arguments: Any) -> T:
    """work(*arguments) in a fresh process."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(work, *arguments).result()


def reason(error: BaseException) -> str:
    """Its kind and the first line that it says, for a row of a table."""
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0][:200]}"
