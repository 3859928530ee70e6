"""Which values of a parametrisation `make test` runs: the others are marked full, for `make test-all` and CI."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import pytest


def few(values: Iterable[Any], *quick: str, name: Callable[[Any], str] | None = None) -> list[Any]:
    """All `values`, tuples for several arguments, of which those with the ids `quick` are left to `make test`.

    `name` gives a value's id; without it that is its text, the parts of a tuple joined by "-".
    """
    found: dict[str, Any] = {}
    for value in values:
        marks = list(getattr(value, "marks", ()))  # of a pytest.param
        parts = value.values if hasattr(value, "marks") else value if isinstance(value, tuple) else (value,)
        label = "-".join(map(str, parts)) if name is None else name(value)
        assert label not in found, f"two values are called {label}"
        found[label] = pytest.param(*parts, id=label, marks=marks if label in quick else [*marks, pytest.mark.full])
    assert set(quick) <= set(found), f"{set(quick) - set(found)} are not among {list(found)}"
    return list(found.values())
