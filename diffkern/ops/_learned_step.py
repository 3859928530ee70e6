"""The sampler step of a network that learned its variance."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from diffkern.ops._common import check_on_device, empty_like, native, one_device, refuse_batches, refuse_grad, wrote
from diffkern.ops._explained import explained
from diffkern.ops._seeds import Seeds, numbered


@explained("learned_step")
def learned_step(
    x: Tensor,
    m: Tensor | None,
    *,
    table: Tensor,
    row: int = 0,
    index: Tensor | None = None,
    seeds: Seeds | None = None,
    noise: Tensor | None = None,
    mask: Tensor | None = None,
    known: Tensor | None = None,
    want_x0: bool = False,
    next_copies: int = 0,
    next_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """`step` for a network that learned its variance: one fused update, with a noise level of its own per element.

        m, v = halves of the channels                   v: what the network says of the variance
        x0   = clamp(p x + q m, -clip, clip)
        x'   = a x + b x0 + d m + g exp((r0 + r1 v) / 2) z
        x'   = x' where mask is 1, known_s known + known_n z2 where it is 0, the blend of both between

    x, noise and known share shape [B, C, ...] and dtype; m is [B, 2C, ...] in any dtype (None where the row reads none
    of it). `table`: float64 [rows, 23], the columns of `step` and r0, r1 (`LEARNED_COLUMNS`): r0 + r1 v is the natural
    logarithm of the variance. A range in [-1, 1] between the two bounds of the posterior variance (Nichol and Dhariwal
    2021, arXiv 2102.09672, eq. 15) has r0 = (ln beta + ln beta~) / 2, r1 = (ln beta - ln beta~) / 2; a network that
    predicts the log-variance itself has r0 = 0, r1 = 1; r1 = 0 reads no v. g is 1, or 0 in the last row, where
    neither z nor v is read. The mask may be [B, 1, ...], as in `step`. w, r, e0 .. e3, A, B and D must be 0.
    Everything else is as in `step`, rows outside the table and operands that a device row lacks give NaN.
    Returns (x', x0 or None, next or None); next = k x' in next_dtype (m's by default), [next_copies B, C, ...].
    Not differentiable.
    """
    check_on_device("learned_step", index, table)
    refuse_grad("learned_step", x, m, noise, mask, known, table)
    refuse_batches("learned_step", x, m)
    seeds = numbered(seeds, x)
    out: tuple[Tensor, Tensor | None, Tensor | None] = native.learned_step(
        x, m, table, row, index, seeds, noise, mask, known, want_x0, next_copies, next_dtype
    )
    return out


@explained("learned_step_out")
def learned_step_out(
    x: Tensor,
    m: Tensor | None,
    *,
    table: Tensor,
    out: Tensor,
    x0: Tensor | None = None,
    next: Tensor | None = None,
    row: int = 0,
    index: Tensor | None = None,
    seeds: Seeds | None = None,
    noise: Tensor | None = None,
    mask: Tensor | None = None,
    known: Tensor | None = None,
) -> Tensor:
    """`learned_step` into given tensors, for loops that allocate nothing; `out` may be x, never m."""
    check_on_device("learned_step", index, table)
    refuse_grad("learned_step_out", x, m, noise, mask, known, table, out, x0, next)
    refuse_batches("learned_step_out", x, m, out)
    seeds = numbered(seeds, x)
    native.learned_step_out(x, m, table, row, index, seeds, noise, mask, known, out, x0, next)
    wrote(out, x0, next)
    return out


@torch.library.register_fake("diffkern::learned_step")
def _(
    x: Tensor,
    m: Tensor | None,
    table: Tensor,
    row: int,
    index: Tensor | None,
    seeds: Tensor | None,
    noise: Tensor | None,
    mask: Tensor | None,
    known: Tensor | None,
    want_x0: bool,
    next_copies: int,
    next_dtype: torch.dtype | None,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    others = {"m": m, "table": table, "index": index, "seeds": seeds, "noise": noise, "mask": mask, "known": known}
    one_device("learned_step", row_by_value=True, x=x, **others)
    dtype = next_dtype if next_dtype is not None else (x if m is None else m).dtype
    return (
        empty_like(x),
        empty_like(x) if want_x0 else None,
        empty_like(x, dtype, next_copies) if next_copies else None,
    )


@torch.library.register_fake("diffkern::learned_step_out")
def _(*args: Any) -> None:
    x, m, table, _, index, seeds, noise, mask, known, out, x0, next_ = args
    inputs = {"x": x, "m": m, "table": table, "index": index, "seeds": seeds, "noise": noise, "mask": mask}
    one_device("learned_step", row_by_value=True, out=out, **inputs, known=known, x0=x0, next=next_)
