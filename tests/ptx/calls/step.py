"""Calls of the sampler step: rows of every kind, and the operands that a row reads."""

from __future__ import annotations

import torch
from ptx.harness import Call, row, seeds_for, values

from diffkern.plan import COLUMNS

ROWS = {
    "ddim": row(p=1.2, q=-0.7, b=0.9, d=0.4),
    "ddpm": row(p=1.2, q=-0.7, clip=1.0, a=0.3, b=0.6, g=0.2, stream=(2 << 40) + 5),
    "euler": row(a=1.0, d=-0.3),
    "guided": row(w=4.0, p=1.2, q=-0.7, b=0.9, d=0.4),
    "first": row(g=14.6, stream=0),
    "late noise": row(p=1.1, q=-0.4, r=0.05, b=0.9, d=0.1, g=0.03, stream=2 << 40),
    "slope": row(p=1.1, q=-0.4, a=1.0, d=-0.3, A=0.5, B=-0.5, D=0.2, k=0.7),
    "multistep": row(w=2.0, p=1.1, q=-0.4, clip=1.5, a=0.8, b=0.3, e0=0.4, e1=-0.3, e2=0.2, e3=-0.1, B=1.0),
    "inpaint": row(a=1.0, d=-0.3, g=0.1, stream=7, known_s=0.8, known_n=0.6, known_stream=3 << 40),
    "everything": row(
        w=1.5, p=1.1, q=-0.4, r=0.1, clip=2.0, a=0.8, b=0.3, d=0.2, e0=0.4, e1=-0.3, e2=0.2, e3=-0.1, g=0.3,
        A=0.5, B=-0.5, D=0.2, k=0.7, known_s=0.8, known_n=0.6, stream=11, known_stream=12,
    ),
    "nothing": row(),
}  # fmt: skip


def step(
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
    doubled: bool = True,
) -> Call:
    """A call with the operands that the row reads."""
    c = dict(zip(COLUMNS, values_of_row, strict=True))
    m_dtype = m_dtype or state
    outputs = {"out": state} | (outputs or {})
    inputs = {}

    def give(name: str, dtype: torch.dtype) -> None:
        inputs[name] = values(len(inputs), batch, shape, dtype, layout, special)

    if c["p"] or c["a"] or c["A"]:
        give("x", state)
    if c["q"] or c["d"] or c["D"]:
        if doubled and c["w"]:
            both = values(99, 2 * batch, shape, m_dtype, layout, special)
            inputs["u"], inputs["c"] = both[:batch], both[batch:]
        else:
            give("u", m_dtype)
            if c["w"]:
                give("c", m_dtype)
    for name in ("e0", "e1", "e2", "e3"):
        if c[name]:
            give("h" + name[1], state)
    if tensor_noise and (c["r"] or c["g"]):
        give("noise", state)
    if mask_dtype is not None:
        weights = torch.rand(batch, *shape, generator=torch.Generator().manual_seed(5)).mul(3).sub(1).clamp(0, 1)
        mask = weights.to(mask_dtype) if mask_dtype.is_floating_point else (weights > 0.5).mul(7)
        inputs["mask"] = values(0, batch, shape, mask_dtype, layout).copy_(mask)
        if c["known_s"]:
            give("known", state)
    call = Call("step", layout, batch, shape, inputs, outputs, row=values_of_row, state=state)
    if not tensor_noise or c["known_n"]:
        call.seeds = seeds_for(batch)
    return call


def wanted(state: torch.dtype, following: torch.dtype | None, copies: int = 1) -> dict[str, torch.dtype]:
    out = {"x0": state, "s": state}
    if following is not None:
        out["next"] = following
        if copies == 2:
            out["next2"] = following
    return out
