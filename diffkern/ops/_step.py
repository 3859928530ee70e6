"""The universal sampler step."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from diffkern.ops import _step_gradient
from diffkern.ops._common import (
    active,
    check_on_device,
    empty_like,
    native,
    one_device,
    refuse_batches,
    refuse_grad,
    refuse_tangents,
    wrote,
)
from diffkern.ops._explained import explain, explained
from diffkern.ops._seeds import Seeds, numbered


def step(
    x: Tensor | None,
    m: Tensor | None,
    m2: Tensor | None = None,
    h0: Tensor | None = None,
    h1: Tensor | None = None,
    h2: Tensor | None = None,
    h3: Tensor | None = None,
    *,
    table: Tensor,
    row: int = 0,
    index: Tensor | None = None,
    seeds: Seeds | None = None,
    noise: Tensor | None = None,
    mask: Tensor | None = None,
    known: Tensor | None = None,
    want_x0: bool = False,
    want_s: bool = False,
    next_copies: int = 0,
    next_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """One fused sampler update: every linear sampler is a row of coefficients (columns: `diffkern.plan.COLUMNS`).

        m   = u + w (c - u)                          classifier-free guidance (Ho and Salimans 2022, arXiv 2207.12598)
        x0  = clamp(p x + q m + r z, -clip, clip)
        x'  = a x + b x0 + d m + sum_k e_k h_k + g z
        s   = A x + B x0 + D m
        x'  = x' where mask is 1, known_s known + known_n z2 where it is 0, the blend of both between

    x, the histories h0..h3, noise and known share shape [B, ...] and dtype; m may have another dtype. Guidance: m is
    [2B, ...] = [uncond | cond], or m and m2. z is noise by address (`seeds` and the row's stream) or the tensor
    `noise`. A term whose coefficient is 0 is neither read nor drawn. The row: `row` of `table` (float64, on the CPU or
    the device), or `index` (int [] or [B], on the device): every sample may be at a step of its own; on CUDA an index
    outside the table, and an operand that such a row lacks, give NaN (DIFFKERN_CHECK=1 raises for the index).
    Returns (x', x0 or None, s or None, next or None); next = k x' in next_dtype (m's by default), [next_copies B, ...].
    The mask has the shape of x, or [B, 1, ...] for all channels: the one operand that broadcasts. bool and uint8 are
    open where they are not 0; a mask of numbers is taken as it is, also outside [0, 1].
    Differentiable in x, m, m2, the histories, noise, known and table (its streams are whole numbers: no gradient).
    """
    try:
        if seeds is not None and not isinstance(seeds, Tensor):
            seeds = numbered(seeds, x, h0, h1, h2, h3, noise, known, m)
        check_on_device("step", index, table)
        refuse_tangents("step", x, m, m2, h0, h1, h2, h3, noise, known, table)
        if mask is not None and mask.requires_grad and torch.is_grad_enabled():
            raise RuntimeError(
                "diffkern.step: mask must not require grad, as it selects: detach it, or blend in plain torch"
            )
        if active():
            op = _step_gradient.Step.apply
        else:
            op = native.step_ad if _wants_grad(x, m, m2, h0, h1, h2, h3, noise, known, table) else native.step
        wants, histories = (want_x0, want_s, next_copies, next_dtype), (h0, h1, h2, h3)
        return op(x, m, table, row, *wants, m2, *histories, index, seeds, noise, mask, known)
    except Exception as error:
        explain("step", step, locals(), error)
        raise


def _wants_grad(*tensors: Tensor | None) -> bool:
    if not torch.is_grad_enabled():
        return False
    return torch.compiler.is_compiling() or any(t is not None and t.requires_grad for t in tensors)


@explained("step_out")
def step_out(
    x: Tensor | None,
    m: Tensor | None,
    m2: Tensor | None = None,
    h0: Tensor | None = None,
    h1: Tensor | None = None,
    h2: Tensor | None = None,
    h3: Tensor | None = None,
    *,
    table: Tensor,
    out: Tensor,
    x0: Tensor | None = None,
    s: Tensor | None = None,
    next: Tensor | None = None,
    row: int = 0,
    index: Tensor | None = None,
    seeds: Seeds | None = None,
    noise: Tensor | None = None,
    mask: Tensor | None = None,
    known: Tensor | None = None,
) -> Tensor:
    """`step` into given tensors, for loops that allocate nothing; `out` may be x (in place). Not differentiable."""
    check_on_device("step", index, table)
    refuse_grad("step_out", x, m, m2, h0, h1, h2, h3, noise, mask, known, table, out, x0, s, next)
    refuse_batches("step_out", x, m, m2, out)
    seeds = numbered(seeds, out)
    native.step_out(x, m, table, row, out, x0, s, next, m2, h0, h1, h2, h3, index, seeds, noise, mask, known)
    wrote(out, x0, s, next)
    return out


def _step_fake(
    x: Tensor | None,
    m: Tensor | None,
    table: Tensor,
    row: int,
    want_x0: bool = False,
    want_s: bool = False,
    next_copies: int = 0,
    next_dtype: torch.dtype | None = None,
    m2: Tensor | None = None,
    h0: Tensor | None = None,
    h1: Tensor | None = None,
    h2: Tensor | None = None,
    h3: Tensor | None = None,
    index: Tensor | None = None,
    seeds: Tensor | None = None,
    noise: Tensor | None = None,
    mask: Tensor | None = None,
    known: Tensor | None = None,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    like = next(t for t in (x, h0, h1, h2, h3, noise, known, m) if t is not None)
    others = {"seeds": seeds, "noise": noise, "mask": mask, "known": known}
    one_device("step", row_by_value=True, like=like, m=m, m2=m2, table=table, index=index, **others)
    dtype = next_dtype if next_dtype is not None else (m if m is not None else like).dtype
    return (
        empty_like(like),
        empty_like(like) if want_x0 else None,
        empty_like(like) if want_s else None,
        empty_like(like, dtype, next_copies) if next_copies else None,
    )


torch.library.register_fake("diffkern::step", _step_fake)
torch.library.register_fake("diffkern::step_ad", _step_fake)


@torch.library.register_fake("diffkern::step_out")
def _(
    x: Any, m: Any, table: Any, row: int, out: Tensor, x0: Any = None, s: Any = None, next: Any = None, *few: Any
) -> None:
    names = ("m2", "h0", "h1", "h2", "h3", "index", "seeds", "noise", "mask", "known")
    others = {"x": x, "m": m, "table": table, "x0": x0, "s": s, "next": next, **dict(zip(names, few, strict=False))}
    one_device("step", row_by_value=True, out=out, **others)


torch.library.register_autograd("diffkern::step_ad", _step_gradient.backward, setup_context=_step_gradient.setup)
