"""Rows of coefficients for the ops, and what plain torch would make of operands: their dtype and their layout.

A table is float64 [rows, columns], the columns those of `diffkern.plan.COLUMNS` (or `LEARNED_COLUMNS`), on the CPU
unless it says otherwise.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from diffkern import streams
from diffkern.checks import check_level, most_in
from diffkern.modes import kept, readable
from diffkern.plan import COLUMNS, LEARNED_COLUMNS, Row

AT = {name: i for i, name in enumerate(LEARNED_COLUMNS)}
"""The number of each column, in both kinds of table."""
_ROW = Row().coefficients()


# -------------------------------------------------------------------------------------------------------------- tables
def table_of(rows: int, columns: Sequence[str] = COLUMNS, /, **values: Any) -> Tensor:
    """A table with these values in its columns (numbers or [rows]), the others at a row's defaults.

    Row i draws on ``streams.STEP + i``.
    """
    table = torch.zeros(rows, len(columns), dtype=torch.float64, device="cpu")
    table[:, AT["clip"]], table[:, AT["k"]] = math.inf, 1.0
    table[:, AT["stream"]] = streams.STEP + torch.arange(rows, dtype=torch.float64, device="cpu")
    for name, value in values.items():
        table[:, AT[name]] = torch.as_tensor(value, dtype=torch.float64, device="cpu")
    return table


def row_of(**values: float) -> list[float]:
    """One row of a table, for the steps that are known one at a time."""
    row = [*_ROW]
    for name, value in values.items():
        row[AT[name]] = value
    return row


def table_by_rows(*rows: Sequence[float]) -> Tensor:
    """A table of `row_of` rows."""
    return torch.tensor(rows, dtype=torch.float64, device="cpu")


def column(table: Tensor, name: str) -> Tensor:
    """A column of a table, as a view."""
    return table[:, AT[name]]


def with_columns(table: Tensor, **values: Any) -> Tensor:
    """A copy of a table with some columns set (numbers or [rows])."""
    copy = table.clone()
    for name, value in values.items():
        copy[:, AT[name]] = torch.as_tensor(value, dtype=torch.float64)
    return copy


def split(table: Tensor) -> tuple[Tensor, Tensor]:
    """Each row in two, for what comes between x0 and x': x0 = p x + q m, and the rest, which reads x0 as h0 (the other
    histories move up by one) and clips nothing."""
    clean = table_of(len(table), p=column(table, "p"), q=column(table, "q"), b=1.0)
    histories = {f"e{k}": column(table, f"e{k - 1}") for k in range(1, 4)}
    rest = with_columns(table, clip=math.inf, e0=column(table, "b"), **histories, p=0.0, q=0.0, b=0.0)
    return clean, rest


def of_samples(batch: int, device: torch.device, **values: float | Tensor) -> Tensor:
    """A table of one row a sample on a device, the values numbers or [batch] there; nothing is read back."""
    table = _blank(device).repeat(batch, 1)
    for name, value in values.items():
        table[:, AT[name]] = value
    return table


@kept(16)
def _blank(device: torch.device) -> Tensor:
    """[1, 21] on a device: a row's defaults, copied once."""
    return table_by_rows(row_of()).to(device)


# -------------------------------------------------------------------------------------------------- dtypes and layouts
SIXTEEN = (torch.float16, torch.bfloat16)


def promote(*dtypes: torch.dtype) -> torch.dtype:
    """What torch promotes these to."""
    found, *others = dtypes
    for dtype in others:
        if dtype is not found:
            found = torch.promote_types(found, dtype)  # which is dispatched as an op
    return found


def wide(*dtypes: torch.dtype) -> torch.dtype:
    """What arithmetic with float32 numbers gives: float32, or the widest of the dtypes."""
    found = torch.float32
    for dtype in dtypes:
        if dtype is not found:
            found = torch.promote_types(found, dtype)
    return found


_HALF = most_in(torch.float16)


def check_room(dtype: torch.dtype, owner: object, level: float | Tensor) -> None:
    """Raise ValueError, with the dtypes that work, for a float16 state whose noise level is above 8188.

    ``level``: that of the state, or a tensor of those of its samples; on a device they are not looked at. ``owner``:
    what the level is of.
    """
    if dtype is not torch.float16:
        return
    if isinstance(level, Tensor):
        if not readable(level):
            return
        level = float(level.detach().max())
    if not level <= _HALF:
        check_level(level, dtype, f"the noise level of {type(owner).__name__}")


_CASTS = {
    torch.float64: Tensor.double,
    torch.float32: Tensor.float,
    torch.float16: Tensor.half,
    torch.bfloat16: Tensor.bfloat16,
}


def as_dtype(x: Tensor, dtype: torch.dtype) -> Tensor:
    """x in this dtype, itself where it has it."""
    if x.dtype is dtype:
        return x
    cast = _CASTS.get(dtype)
    return x.to(dtype) if cast is None else cast(x)  # a method without arguments takes a microsecond less


def in_format(x: Tensor, like: Tensor) -> Tensor:
    """x with its dimensions in memory in the order of those of ``like``.

    Plain torch gives a sum the memory format of its first term, and ``randn_like`` of a state draws in that order.
    """
    if x.is_contiguous() and like.is_contiguous():
        return x
    order = _order(like)
    if order == _order(x):
        return x
    return x.permute(order).contiguous().permute(sorted(range(x.dim()), key=order.__getitem__))


def _order(x: Tensor) -> list[int]:
    """The dimensions from the outermost in memory to the innermost; torch's own choice for an expanded tensor."""
    x = torch.empty_like(x) if 0 in x.stride() else x
    return sorted(range(x.dim()), key=lambda d: -x.stride()[d])
