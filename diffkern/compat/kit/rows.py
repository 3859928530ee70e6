"""Tables of rows for `diffkern.ops.step`, by the names of their columns; the dtypes that plain torch would step in."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from diffkern import streams
from diffkern.plan import COLUMNS

AT = {name: j for j, name in enumerate(COLUMNS)}
"""The number of a column."""


def table_of(rows: int, **columns: Any) -> Tensor:
    """[rows, 21] float64: the given columns (numbers or [rows]), the others at a row's defaults; row i draws on the
    stream of step i."""
    table = torch.zeros(rows, len(COLUMNS), dtype=torch.float64)
    table[:, AT["clip"]] = float("inf")
    table[:, AT["k"]] = 1.0
    table[:, AT["stream"]] = streams.STEP + torch.arange(rows, dtype=torch.float64)
    for name, value in columns.items():
        table[:, AT[name]] = torch.as_tensor(value, dtype=torch.float64)
    return table


def column(table: Tensor, name: str) -> Tensor:
    """A column of a table, as a view."""
    return table[:, AT[name]]


def with_columns(table: Tensor, **columns: Any) -> Tensor:
    """A copy of a table with some columns set (numbers or [rows])."""
    copy = table.clone()
    for name, value in columns.items():
        copy[:, AT[name]] = torch.as_tensor(value, dtype=torch.float64)
    return copy


def split(table: Tensor) -> tuple[Tensor, Tensor]:
    """Each row in two, for what comes between x0 and x': x0 = p x + q m, and the rest, which reads x0 as h0 (the other
    histories move up by one) and clips nothing."""
    clean = table_of(len(table), p=column(table, "p"), q=column(table, "q"), b=1.0)
    histories = {f"e{k}": column(table, f"e{k - 1}") for k in range(1, 4)}
    rest = with_columns(table, clip=float("inf"), e0=column(table, "b"), **histories, p=0.0, q=0.0, b=0.0)
    return clean, rest


def promote(*dtypes: torch.dtype) -> torch.dtype:
    """What torch promotes these to."""
    found, *others = dtypes
    for dtype in others:
        if dtype is not found:
            found = torch.promote_types(found, dtype)  # which is dispatched as an op
    return found


def as_dtype(x: Tensor, dtype: torch.dtype) -> Tensor:
    """x in a dtype: x itself where it has it."""
    return x if x.dtype is dtype else x.to(dtype)
