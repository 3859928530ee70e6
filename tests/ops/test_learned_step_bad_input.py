"""learned_step: one clear sentence for each kind of bad input, and gradients where none are recorded."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers.learned_cases import ROWS, table, twice
from helpers.op_cases import check_sentence, values
from torch import Tensor

from diffkern import ops
from diffkern.ops import LEARNED_COLUMNS

# --------------------------------------------------------------------------------------------------------- bad input
SHAPE = (2, 3, 4)
X, M = values(SHAPE, 1), values(twice(SHAPE), 2)
S, NOISY, LAST = ops.seeds(0, 2), table(ROWS["range"]), table(ROWS["last"])
BUFFER = torch.zeros(64)
TWICE = r"m must hold the prediction and its log-variance, twice the channels of x \[2, 3, 4\], got "
GRAD = "not differentiable, and a tensor requires grad"


def call(x: Tensor = X, m: Tensor | None = M, rows: Tensor = LAST, **more: Any) -> object:
    return ops.learned_step(x, m, table=rows, **more)


def call_out(x: Tensor = X, m: Tensor | None = M, rows: Tensor = LAST, **more: Any) -> object:
    return ops.learned_step_out(x, m, table=rows, **{"out": torch.zeros(SHAPE), **more})


def unused(column: str) -> tuple[Callable[[], object], str]:
    at = LEARNED_COLUMNS.index(column)
    sentence = rf"w, r, e0 \.\. e3, A, B and D must be 0 in a row with learned variance, got 0\.5 in row 0, column {at}"
    return (lambda: call(rows=table({**ROWS["last"], column: 0.5}))), sentence


BAD: dict[str, tuple[Callable[[], object], str]] = {
    "m of one half": (lambda: call(m=X), r"diffkern\.learned_step: " + TWICE + r"\[2, 3, 4\]"),
    "m of three": (lambda: call(m=torch.cat([M, X], 1)), TWICE + r"\[2, 9, 4\]"),
    "m doubled in its batch": (lambda: call(m=torch.cat([X, X])), TWICE + r"\[4, 3, 4\]"),
    "m in other places": (lambda: call(m=M[:, :, :3]), TWICE + r"\[2, 6, 3\]"),
    "no channels": (lambda: call(X[:, 0, 0], M[:, 0, 0]), r"twice the channels of x \[2\], got \[2\]"),
    "m integer": (lambda: call(m=M.int()), r"m must be float64, float32, float16 or bfloat16, got int32"),
    "m missing for q": (lambda: call(m=None), r"m must be given: the row has q = -0\.75"),
    "m missing for d": (lambda: call(m=None, rows=table({"d": 0.5})), r"m must be given: the row has d = 0\.5"),
    "m missing for r1": (
        lambda: call(m=None, rows=table({"g": 1.0, "r1": 0.5}), seeds=S),
        r"m must be given: the row has r1 = 0\.5",
    ),
    "m on meta": (lambda: call(m=M.to("meta")), r"m must be on the device of x \(cpu\), got meta"),
    "x 0-D": (lambda: call(torch.tensor(1.0)), r"x must have a batch dimension"),
    "x integer": (lambda: call(X.int()), r"x must be float64, float32, float16 or bfloat16, got int32"),
    **{f"{column} is not 0": unused(column) for column in ("w", "r", "e0", "e1", "e2", "e3", "A", "B", "D")},
    "not 0 by index": (
        lambda: call(rows=table(ROWS["last"], {"e2": 0.5}), index=torch.tensor([0, 1])),
        r"got 0\.5 in row 1, column 10",
    ),
    "r0 infinite": (lambda: call(rows=table({"r0": -math.inf})), r"r0 must be finite, got -inf in row 0"),
    "r1 infinite": (lambda: call(rows=table({"r1": math.inf})), r"r1 must be finite, got inf in row 0"),
    "r1 NaN": (lambda: call(rows=table({"r1": math.nan})), r"table must not hold NaN, got NaN in row 0, column 22"),
    "clip zero": (lambda: call(rows=table({"clip": 0.0})), r"clip must be positive \(inf: no clipping\), got 0 in row"),
    "table of the step": (
        lambda: call(rows=LAST[:, :21].contiguous()),
        r"table must have shape \[rows, 23\], got \[1, 21\]",
    ),
    "table dtype": (lambda: call(rows=LAST.float()), r"table must be float64, got float32"),
    "row large": (lambda: call(row=1), r"row must be in \[0, 1\), the rows of the table, got 1"),
    "row negative": (lambda: call(row=-1), r"row must be in \[0, 1\), the rows of the table, got -1"),
    "index large": (lambda: call(index=torch.tensor([0, 1])), r"index must be in \[0, 1\).*, got 1 for sample 1"),
    "index shape": (lambda: call(index=torch.zeros(3).long()), r"index must have shape \[\] or \[2\], got \[3\]"),
    "noise missing": (lambda: call(rows=NOISY), r"seeds .* or noise .* must be given: the row has g = 1"),
    "noise and seeds": (lambda: call(rows=NOISY, seeds=S, noise=X), r"give either seeds .* or noise .*, got both"),
    "noise shape": (lambda: call(rows=NOISY, noise=M), r"noise must have the shape of x \[2, 3, 4\], got \[2, 6, 4\]"),
    "noise dtype": (lambda: call(rows=NOISY, noise=X.half()), r"noise must have the dtype of x \(float32\), got floa"),
    "seeds length": (lambda: call(rows=NOISY, seeds=S[:1]), r"seeds must have shape \[2\]"),
    "stream fraction": (
        lambda: call(rows=table({"g": 1.0, "stream": 0.5}), seeds=S),
        r"stream must be an integer in \[0, 2\^53\), got 0\.5 in row 0",
    ),
    "known missing": (
        lambda: call(rows=table(ROWS["masked"]), seeds=S, mask=X > 0),
        r"known must be given: the row has known_s = 0\.9",
    ),
    "known noise": (
        lambda: call(rows=table({"known_n": 0.5}), mask=X > 0),
        r"seeds must be given: the row re-noises the known image with known_n = 0\.5",
    ),
    "mask dtype": (lambda: call(mask=X.half()), r"mask must be bool, uint8 or the dtype of the state \(float32\), got"),
    "mask shape": (lambda: call(mask=M > 0), r"mask must have the shape of x \[2, 3, 4\], got \[2, 6, 4\]"),
    "copies": (lambda: call(next_copies=3), r"next_copies must be 0, 1 or 2, got 3"),
    "x requires grad": (lambda: call(X.clone().requires_grad_()), r"diffkern\.learned_step: " + GRAD),
    "m requires grad": (lambda: call(m=M.clone().requires_grad_()), GRAD),
    "out: x0 requires grad": (
        lambda: call_out(x0=torch.zeros(SHAPE).requires_grad_()),
        r"diffkern\.learned_step_out: " + GRAD,
    ),
    "out shape": (
        lambda: call_out(out=torch.zeros(2, 3, 5)),
        r"x must have the shape of out \[2, 3, 5\], got \[2, 3, 4\]",
    ),
    "out expanded": (lambda: call_out(out=torch.zeros(2, 1, 4).expand(SHAPE)), r"out must not have stride 0"),
    "out over m": (
        lambda: call_out(m=BUFFER[:48].view(2, 6, 4), out=BUFFER[:24].view(SHAPE)),
        r"out must not overlap m in memory",
    ),
    "out partly x": (
        lambda: call_out(BUFFER[:24].view(SHAPE), out=BUFFER[8:32].view(SHAPE)),
        r"out must not overlap x in memory",
    ),
    "out is x0": (
        lambda: call_out(out=BUFFER[:24].view(SHAPE), x0=BUFFER[:24].view(SHAPE)),
        r"out must not overlap the output x0 in memory",
    ),
    "next shape": (
        lambda: call_out(next=torch.zeros(6, 3, 4)),
        r"next must have the shape of out \[2, 3, 4\], got \[6, 3, 4\]",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_one_clear_sentence(name: str) -> None:
    before = BUFFER.clone()
    check_sentence(*BAD[name])
    assert torch.equal(BUFFER, before), "an output was written before the check"


def test_gradients_are_no_obstacle_where_none_are_recorded() -> None:
    with torch.no_grad():
        out = ops.learned_step(X.clone().requires_grad_(), M, table=LAST)[0]
    assert not out.requires_grad
