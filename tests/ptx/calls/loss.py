"""Calls of the loss, with a table of targets of every kind."""

from __future__ import annotations

import torch
from ptx.harness import Call, seeds_for, values

NONE, MEAN, SUM = 0, 1, 2


def table(rows: int) -> torch.Tensor:
    """[rows, 3] of u, v, weight; some have u or v zero."""
    t = torch.randn(rows, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    t[:, 2] = t[:, 2].abs() + 0.1
    if rows >= 3:
        t[1, 0] = 0  # eps prediction
        t[2, 1] = 0  # x0 prediction
    return t


def loss(
    layout: str,
    batch: int,
    shape: tuple[int, ...],
    state: torch.dtype,
    *,
    pred_dtype: torch.dtype | None = None,
    grad_dtype: torch.dtype | None = None,
    reduction: int = NONE,
    grad: bool = True,
    tensor_noise: bool = False,
    special: bool = False,
) -> Call:
    pred_dtype = pred_dtype or state
    inputs = {
        "pred": values(1, batch, shape, pred_dtype, layout, special),
        "x0": values(2, batch, shape, state, layout),
    }
    if tensor_noise:
        inputs["noise"] = values(3, batch, shape, state, layout)
    outputs = {"grad": grad_dtype or pred_dtype} if grad else {}
    return Call(
        "loss", layout, batch, shape, inputs, outputs, table=table(5), state=state,
        index=torch.arange(batch, dtype=torch.int64) % 5, seeds=None if tensor_noise else seeds_for(batch),
        stream=1 << 40, reduction=reduction,
    )  # fmt: skip
