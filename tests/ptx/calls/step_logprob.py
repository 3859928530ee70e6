"""Calls of the log-density of a step: rows of every kind, by value or from a table."""

from __future__ import annotations

import torch
from ptx.harness import Call, row, values

ROWS = {
    "ddpm": row(p=1.2, q=-0.7, clip=1.0, a=0.3, b=0.6, g=0.2),
    "euler": row(a=1.0, d=-0.3, g=0.7, stream=5),
    "guided": row(w=4.0, p=1.2, q=-0.7, b=0.9, d=0.4, g=-0.11),
    "silent": row(w=4.0, p=1.2, q=-0.7, b=0.9, d=0.4, e0=1.0),
    "everything": row(
        w=1.5, p=1.1, q=-0.4, clip=2.0, a=0.8, b=0.3, d=0.2, e0=0.4, e1=-0.3, e2=0.2, e3=-0.1, g=0.3,
        A=0.5, B=-0.5, D=0.2, k=0.7, known_s=0.8, known_n=0.6, stream=11, known_stream=12,
    ),
    "small": row(p=1.1, q=-0.4, a=0.1, b=0.9, g=3e-5),
}  # fmt: skip
LEARNED_ROWS = {
    "ddpm": [*row(p=1.2, q=-0.7, clip=1.0, a=0.3, b=0.6, g=1.0), -6.0, 1.5],
    "direct": [*row(a=1.0, d=-0.3, g=0.5), 0.0, 1.0],
    "fixed": [*row(p=1.1, q=-0.4, a=0.1, b=0.9, g=1.0), -3.0, 0.0],
    "silent": [*row(a=1.0, d=-0.3), -3.0, 1.0],
}


def density(
    layout: str,
    batch: int,
    shape: tuple[int, ...],
    state: torch.dtype,
    values_of_row: list[float] | None = None,
    *,
    m_dtype: torch.dtype | None = None,
    grad: bool = True,
    learned: bool = False,
    doubled: bool = True,
    special: bool = False,
) -> Call:
    """A call with every operand; without a row, one of the table for each sample."""
    m_dtype = m_dtype or state
    names = ("after", "x", "h0", "h1", "h2", "h3")
    inputs = {name: values(k, batch, shape, state, layout, special) for k, name in enumerate(names)}
    inputs["u"] = values(7, batch, shape, m_dtype, layout, special)
    if learned:
        inputs["v"] = values(8, batch, shape, m_dtype, layout, special)
    elif doubled:
        both = values(9, 2 * batch, shape, m_dtype, layout, special)
        inputs["u"], inputs["c"] = both[:batch], both[batch:]
    outputs = {"grad_u": m_dtype, **({"grad_v": m_dtype} if learned else {"grad_c": m_dtype} if doubled else {})}
    call = Call("step_logprob", layout, batch, shape, inputs, outputs if grad else {}, row=values_of_row, state=state)
    if values_of_row is None:
        rows = (LEARNED_ROWS if learned else ROWS).values()
        call.table = torch.tensor(list(rows), dtype=torch.float64)
        call.index = torch.arange(batch, dtype=torch.int64) % len(call.table)
    return call
