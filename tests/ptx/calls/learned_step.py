"""Calls of the step with a learned variance."""

from __future__ import annotations

import torch
from ptx.harness import (
    Call,
    row,
    seeds_for,
    values,
)

from diffkern.plan import LEARNED_COLUMNS


def learned_row(**columns: float) -> list[float]:
    return row(LEARNED_COLUMNS, **columns)


RANGE = {"p": 1.2, "q": -0.7, "a": 0.3, "b": 0.6, "g": 1.0, "r0": -2.5, "r1": 0.8, "stream": (2 << 40) + 5}
MASKED = {"known_s": 0.8, "known_n": 0.6, "known_stream": 3 << 40}
ROWS = {
    "range": learned_row(**RANGE),
    "clip": learned_row(**RANGE, clip=1.0),
    "slope": learned_row(a=1.0, d=-0.3, g=0.5, r1=1.0, stream=7, k=0.7),
    "fixed": learned_row(**{**RANGE, "r1": 0.0}),
    "last": learned_row(**{**RANGE, "g": 0.0}, clip=1.0),
    "masked": learned_row(**RANGE, **MASKED, clip=2.0, d=0.2, k=0.7),
    "nothing": learned_row(),
}


def learned_step(
    layout: str,
    batch: int,
    shape: tuple[int, ...],
    state: torch.dtype,
    values_of_row: list[float],
    *,
    m_dtype: torch.dtype | None = None,
    mask_dtype: torch.dtype | None = None,
    outputs: dict[str, torch.dtype] | None = None,
    tensor_noise: bool = False,
    special: bool = False,
) -> Call:
    """A call with the operands that the row reads. m and v are halves of one tensor where the layout lets them."""
    c = dict(zip(LEARNED_COLUMNS, values_of_row, strict=True))
    m_dtype = m_dtype or state
    inputs: dict[str, torch.Tensor] = {}

    def give(name: str, dtype: torch.dtype) -> None:
        inputs[name] = values(len(inputs), batch, shape, dtype, layout, special)

    if c["p"] or c["a"]:
        give("x", state)
    if c["q"] or c["d"]:
        give("m", m_dtype)
    if c["g"] and c["r1"]:
        give("v", m_dtype)
    if tensor_noise and c["g"]:
        give("noise", state)
    if mask_dtype is not None:
        weights = torch.rand(batch, *shape, generator=torch.Generator().manual_seed(5)).mul(3).sub(1).clamp(0, 1)
        mask = weights.to(mask_dtype) if mask_dtype.is_floating_point else (weights > 0.5).mul(7)
        inputs["mask"] = values(0, batch, shape, mask_dtype, layout).copy_(mask)
        if c["known_s"]:
            give("known", state)
    call = Call(
        "learned_step", layout, batch, shape, inputs, {"out": state} | (outputs or {}), row=values_of_row, state=state
    )
    if not tensor_noise or c["known_n"]:
        call.seeds = seeds_for(batch)
    return call


def wanted(state: torch.dtype, following: torch.dtype | None, copies: int = 1) -> dict[str, torch.dtype]:
    out = {"x0": state}
    if following is not None:
        out["next"] = following
        if copies == 2:
            out["next2"] = following
    return out
