"""Calls of the variational bound: a table of rows of every kind."""

from __future__ import annotations

import math

import torch
from ptx.harness import Call, seeds_for, values

from diffkern.ops import VARIATIONAL_COLUMNS

NONE, MEAN, SUM = 0, 1, 2


def row(**columns: float) -> list[float]:
    defaults = {"v": 1.0, "q": -0.7, "clip": math.inf, "k2": 30.0, "bin": 1 / 255, "w_squares": 1.0, "w_bound": 0.1}
    return [{**defaults, "w_mean": 1.0, **columns}.get(name, 0.0) for name in VARIATIONAL_COLUMNS]


# KL with learned and fixed variance, clipping, a stopped mean; decoders from narrow to wide bins; no noise; no bound.
LEARNED = {"r0": 0.6, "r1": 0.5}
TABLE = torch.tensor(
    [
        row(**LEARNED),
        row(r0=0.4, u=0.3, v=-0.9),
        row(**LEARNED, clip=1.0, w_mean=0.0),
        row(**LEARNED, inv_std=90.0, q=-0.01),
        row(**LEARNED, inv_std=2.0, q=-0.3),
        row(**LEARNED, inv_std=900.0, q=-0.1, clip=1.0),
        row(r0=0.2, u=1.0, v=0.0),
        row(w_bound=0.0, q=2.0),
    ],
    dtype=torch.float64,
)


def variational(
    layout: str,
    batch: int,
    shape: tuple[int, ...],
    state: torch.dtype,
    *,
    pred_dtype: torch.dtype | None = None,
    reduction: int = NONE,
    grad: bool = True,
    learned: bool = True,
    tensor_noise: bool = False,
    special: bool = False,
    first: int = 0,
) -> Call:
    pred_dtype = pred_dtype or state
    x0 = (values(2, batch, shape, torch.float64) / 2).clamp(-1, 1)  # some in the open bins
    x0 = (x0 * 127.5).round() / 127.5
    inputs = {"pred": values(1, batch, shape, pred_dtype, layout, special), "x0": x0.to(state)}
    inputs["x0"] = values(2, batch, shape, state, layout).copy_(inputs["x0"])
    outputs = {"grad": pred_dtype} if grad else {}
    if learned:
        inputs["w"] = values(4, batch, shape, pred_dtype, layout, special)
        outputs |= {"grad_w": pred_dtype} if grad else {}
    if tensor_noise:
        inputs["noise"] = values(3, batch, shape, state, layout)
    rows = torch.arange(first, first + batch, dtype=torch.int64) % len(TABLE)
    return Call(
        "variational", layout, batch, shape, inputs, outputs, table=TABLE, state=state, index=rows,
        seeds=None if tensor_noise else seeds_for(batch), stream=1 << 40, reduction=reduction,
    )  # fmt: skip
