"""Bad input of the step: one clear sentence each, that names the argument, the rule and the value."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers.op_cases import ROWS, check_sentence, table, values
from torch import Tensor

from diffkern import ops

F64 = torch.float64
SHAPE = (2, 3, 4)
X, M = values(SHAPE, 1), values(SHAPE, 2)
S, INDEX = ops.seeds(0, 2), torch.tensor([0, 1])
EPS, NOISY, GUIDED = table(ROWS["eps"]), table(ROWS["eps noise"]), table(ROWS["eps guided"])
META = X.to("meta")
BUFFER = torch.zeros(64)
Case = tuple[Callable[[], object], str]


def out_of(count: int, first: int = 0, shape: tuple[int, ...] = SHAPE) -> Tensor:
    return BUFFER[first : first + count].view(shape)


def step(x: Any = X, m: Any = M, rows: Tensor = EPS, **more: Any) -> object:
    return ops.step(x, m, table=rows, **more)


STEP: dict[str, Case] = {
    "nothing": (
        lambda: step(None, None),
        r"diffkern\.step: x, m, a history, noise or out must be given, got none",
    ),
    "x 0-D": (
        lambda: step(torch.tensor(1.0), torch.tensor(1.0)),
        r"x must have a batch dimension|out must have a batch",
    ),
    "x integer": (lambda: step(X.int()), r"must be float64, float32, float16 or bfloat16, got int32"),
    "m missing": (lambda: step(m=None), r"m must be given: the row has q = -0\.75"),
    "x missing": (lambda: step(None, M), r"x must be given: the row has p = 1\.25"),
    "m shape": (lambda: step(m=M[:, :1]), r"m must have the shape of x \[2, 3, 4\], got \[2, 1, 4\]"),
    "m integer": (lambda: step(m=M.long()), r"m must be float64.*, got int64"),
    "m on meta": (lambda: step(m=M.to("meta")), r"diffkern\.step: m must be on the device of like \(cpu\), got meta"),
    "x on meta": (lambda: step(META), r"m must be on the device of like \(meta\), got cpu"),
    "table on meta": (lambda: step(rows=EPS.to("meta")), r"table must be on the device of"),
    "guidance, odd batch": (
        lambda: step(m=values((3, 3, 4), 1), rows=GUIDED),
        r"m must have the shape of x \[2, 3, 4\], got \[3, 3, 4\]",
    ),
    "guidance, one prediction": (
        lambda: step(rows=GUIDED),
        r"m must hold two predictions for guidance \(a doubled batch \[uncond \| cond\], or m2\): the row has w = 2\.5",
    ),
    "m2 without m": (lambda: step(m=None, m2=M, rows=table({"a": 1.0})), r"m must be given with m2, got None"),
    "m2 dtype": (lambda: step(m2=M.half(), rows=GUIDED), r"m2 must have the dtype of m \(float32\), got float16"),
    "m2 shape": (lambda: step(m2=M[:1], rows=GUIDED), r"m2 must have the shape of x"),
    "doubled and m2": (lambda: step(m=torch.cat([M, M]), m2=M, rows=GUIDED), r"m must have the shape of x"),
    **{
        f"history {k}": (
            lambda k=k: step(rows=table({"a": 1.0, f"e{k}": 0.5})),  # type: ignore[misc]
            rf"h{k} must be given: the row has e{k} = 0\.5",
        )
        for k in range(4)
    },
    "history dtype": (lambda: step(h1=M.half()), r"h1 must have the dtype of x \(float32\), got float16"),
    "history shape": (lambda: step(h2=M[:, :, :2]), r"h2 must have the shape of x"),
    "slope without m": (
        lambda: step(m=None, rows=table({"a": 1.0, "D": 1.0}), want_s=True),
        r"m must be given: the row has D",
    ),
    "slope without x": (
        lambda: step(None, M, rows=table({"d": 1.0, "A": 1.0}), want_s=True),
        r"x must be given: the row has A",
    ),
    "noise missing": (lambda: step(rows=NOISY), r"seeds .* or noise .* must be given: the row has g = 0\.3"),
    "noise for r": (
        lambda: step(rows=table({"r": 0.5, "b": 1.0})),
        r"seeds .* or noise .* must be given: the row has r = 0\.5",
    ),
    "noise and seeds": (lambda: step(rows=NOISY, seeds=S, noise=M), r"give either seeds .* or noise .*, got both"),
    "noise dtype": (lambda: step(rows=NOISY, noise=M.double()), r"noise must have the dtype of x"),
    "seeds dtype": (lambda: step(rows=NOISY, seeds=S.int()), r"seeds must be int64, got int32"),
    "seeds length": (lambda: step(rows=NOISY, seeds=S[:1]), r"seeds must have shape \[2\]"),
    "known missing": (
        lambda: step(rows=table({"a": 1.0, "known_s": 0.5}), mask=X > 0),
        r"known must be given: the row has known_s = 0\.5",
    ),
    "known noise": (
        lambda: step(rows=table({"a": 1.0, "known_n": 0.5}), mask=X > 0, noise=M),
        r"seeds must be given: the row re-noises the known image with known_n = 0\.5",
    ),
    "known dtype": (lambda: step(known=X.half(), mask=X > 0), r"known must have the dtype of x"),
    "mask dtype": (
        lambda: step(mask=X.half()),
        r"mask must be bool, uint8 or the dtype of the state \(float32\), got float16",
    ),
    "mask int": (
        lambda: step(mask=X.int()),
        r"mask must be bool, uint8 or the dtype of the state \(float32\), got int32",
    ),
    "mask shape": (lambda: step(mask=(X > 0)[:, :, :1]), r"mask must have the shape of x \[2, 3, 4\], got \[2, 3, 1\]"),
    "mask of a sample": (lambda: step(mask=(X > 0)[:1, :1]), r"mask must have the shape of x .*, got \[1, 1, 4\]"),
    "mask without channels": (lambda: step(mask=(X > 0)[:, 0]), r"mask must have the shape of x .*, got \[2, 4\]"),
    "table dtype": (lambda: step(rows=EPS.float()), r"table must be float64, got float32"),
    "table width": (lambda: step(rows=EPS[:, :20].contiguous()), r"table must have shape \[rows, 21\], got \[1, 20\]"),
    "table strides": (lambda: step(rows=EPS.expand(3, 21)), r"table must be contiguous"),
    "row large": (lambda: step(row=1), r"row must be in \[0, 1\), the rows of the table, got 1"),
    "row negative": (lambda: step(row=-1), r"row must be in \[0, 1\), the rows of the table, got -1"),
    "row huge": (lambda: step(row=2**62), r"row must be in \[0, 1\)"),
    "row of none": (lambda: step(rows=EPS[:0]), r"row must be in \[0, 0\), the rows of the table, got 0"),
    "index large": (lambda: step(index=torch.tensor([0, 1])), r"index must be in \[0, 1\).*, got 1 for sample 1"),
    "index dtype": (lambda: step(index=torch.tensor(0.0)), r"index must be int64 or int32, got float32"),
    "index shape": (lambda: step(index=torch.zeros(3).long()), r"index must have shape \[\] or \[2\], got \[3\]"),
    "index, history": (
        lambda: step(rows=table(ROWS["eps"], {"e1": 1.0}), index=INDEX),
        r"h1 must be given: the row has e1 = 1",
    ),
    "coefficient NaN": (
        lambda: step(rows=table({"a": math.nan})),
        r"table must not hold NaN, got NaN in row 0, column 5",
    ),
    "NaN by index": (lambda: step(rows=table({}, {"g": math.nan}), index=INDEX), r"NaN in row 1, column 12"),
    "clip zero": (
        lambda: step(rows=table({"p": 1.0, "clip": 0.0})),
        r"clip must be positive \(inf: no clipping\), got 0 in row 0",
    ),
    "clip negative": (lambda: step(rows=table({"clip": -1.0})), r"clip must be positive .*, got -1 in row 0"),
    "stream fraction": (
        lambda: step(rows=table({"g": 1.0, "stream": 0.5}), seeds=S),
        r"stream must be an integer in \[0, 2\^53\), got 0\.5 in row 0",
    ),
    "stream negative": (lambda: step(rows=table({"g": 1.0, "stream": -1.0}), seeds=S), r"stream must be an integer"),
    "stream infinite": (
        lambda: step(rows=table({"r": 1.0, "b": 1.0, "stream": math.inf}), seeds=S),
        r"stream must be an integer",
    ),
    "known stream": (
        lambda: step(rows=table({"known_n": 1.0, "known_stream": 1e300}), seeds=S, mask=X > 0),
        r"known_stream must be an integer in \[0, 2\^53\), got 1e\+300",
    ),
    "copies": (lambda: step(next_copies=3), r"next_copies must be 0, 1 or 2, got 3"),
    "copies negative": (lambda: step(next_copies=-1), r"next_copies must be 0, 1 or 2, got -1"),
    "next dtype": (lambda: step(next_copies=1, next_dtype=torch.int8), r"next must be float64.*, got int8"),
}


def step_out(x: Any = X, m: Any = M, rows: Tensor = EPS, **more: Any) -> object:
    return ops.step_out(x, m, table=rows, **{"out": torch.zeros(SHAPE), **more})


STEP_OUT: dict[str, Case] = {
    "out shape": (
        lambda: step_out(out=torch.zeros(2, 3, 5)),
        r"x must have the shape of out \[2, 3, 5\], got \[2, 3, 4\]",
    ),
    "out dtype": (
        lambda: step_out(out=torch.zeros(SHAPE, dtype=F64)),
        r"x must have the dtype of out \(float64\), got float32",
    ),
    "out 0-D": (lambda: step_out(out=torch.tensor(0.0)), r"out must have a batch dimension"),
    "out expanded": (
        lambda: step_out(out=torch.zeros(2, 1, 4).expand(SHAPE)),
        r"out must not have stride 0.*\[4, 0, 1\]",
    ),
    "x0 expanded": (lambda: step_out(x0=torch.zeros(2, 1, 4).expand(SHAPE)), r"x0 must not have stride 0"),
    "out partly m": (lambda: step_out(m=out_of(24), out=out_of(24, 12)), r"out must not overlap m in memory"),
    "out is half of m": (
        lambda: step_out(m=out_of(48, 0, (4, 3, 4)), rows=GUIDED, out=out_of(24)),
        r"out must not overlap m in memory",
    ),
    "out partly a history": (
        lambda: step_out(h0=out_of(24, 1), out=out_of(24)),
        r"out must not overlap h0 in memory",
    ),
    "out over the mask": (
        lambda: step_out(mask=BUFFER.view(torch.uint8)[:24].view(SHAPE), out=out_of(24)),
        r"out must not overlap mask in memory",
    ),
    "out is x0": (lambda: step_out(out=out_of(24), x0=out_of(24)), r"out must not overlap the output x0 in memory"),
    "s is next": (lambda: step_out(s=out_of(24), next=out_of(24)), r"s must not overlap the output next in memory"),
    "out over the index": (
        lambda: (lambda i: step_out(i.view(F64)[:, None], None, table({"a": 1.0}), index=i, out=i.view(F64)[:, None]))(
            torch.zeros(2).long()
        ),
        r"out must not overlap index in memory",
    ),
    "x0 dtype": (
        lambda: step_out(x0=torch.zeros(SHAPE).half()),
        r"x0 must have the dtype of out \(float32\), got float16",
    ),
    "s shape": (lambda: step_out(s=torch.zeros(2, 3)), r"s must have the shape of out \[2, 3, 4\], got \[2, 3\]"),
    "next shape": (
        lambda: step_out(next=torch.zeros(6, 3, 4)),
        r"next must have the shape of out \[2, 3, 4\], got \[6, 3, 4\]",
    ),
    "next integer": (lambda: step_out(next=torch.zeros(SHAPE).int()), r"next must be float64.*, got int32"),
    "out on meta": (lambda: step_out(out=META), r"x must be on the device of out \(meta\), got cpu"),
    "m on meta": (lambda: step_out(m=META), r"m must be on the device of out \(cpu\), got meta"),
}

CASES = {
    f"{op}: {name}": case for op, cases in {"step": STEP, "step_out": STEP_OUT}.items() for name, case in cases.items()
}


@pytest.mark.parametrize("name", CASES)
def test_one_clear_sentence(name: str) -> None:
    before = BUFFER.clone()
    check_sentence(*CASES[name])
    assert torch.equal(BUFFER, before), "an output was written before the check"


def test_infinite_coefficients_are_numbers() -> None:
    """They give what arithmetic gives; only NaN is refused."""
    assert ops.step(X, None, table=table({"a": math.inf}))[0].abs().eq(math.inf).all()


def test_unused_operands_are_checked_too() -> None:
    """A wrong shape is an error even where the coefficient is 0: it should not wait for the row that reads it."""
    with pytest.raises(RuntimeError, match="h3 must have the shape of x"):
        ops.step(X, M, h3=M[:1], table=EPS)
