"""Integers that callers give, by one rule for all arguments: Python's, NumPy's, a tensor of one; no bool, no float."""

from __future__ import annotations

from operator import index

import torch

MOST_ROWS = 10_000_000
"""Of a plan, and of a grid that is made from a number of steps: what is asked for beyond has no end."""


def as_integer(value: object) -> int | None:
    """``value`` as an int (a `torch.SymInt` as it is); None where it is no integer: 2.0, "2" and True are none."""
    if type(value) is int:
        return value
    if isinstance(value, torch.SymInt):
        return value  # type: ignore[return-value]  # an int while a graph is traced
    if isinstance(value, bool) or getattr(value, "dtype", None) in (bool, torch.bool):
        return None
    try:
        return index(value)  # type: ignore[arg-type]
    except TypeError:
        return None


def integer(argument: str, value: object, least: int = 1, most: int | None = None, rule: str | None = None) -> int:
    """`as_integer`; raises ValueError unless it lies in ``least``..``most``, which ``rule`` puts into words."""
    found = as_integer(value)
    if found is None or found < least or (most is not None and found > most):
        if rule is None:
            rule = f"of at least {least}" if most is None else f"in {least}..{most}"
        raise ValueError(f"{argument} must be an integer {rule}, got {value if found is not None else repr(value)}")
    return found


def check_rows(argument: str, count: int, rows: int) -> int:
    """``count``; raises ValueError where ``rows`` for each of it are more than a plan may have."""
    if count * rows > MOST_ROWS:
        raise ValueError(f"{argument} must make a plan of at most {MOST_ROWS} rows, got {count}")
    return count
