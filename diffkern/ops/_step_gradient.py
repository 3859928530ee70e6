"""The gradient of the sampler step: the transposed row, and what each coefficient of the row was multiplied by."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from diffkern._load import layout
from diffkern.checks import opened
from diffkern.ops._common import active, as_dtype_of, dot, function, gather, is_plain, native, table_gradient, times

COLUMNS: tuple[str, ...] = tuple(layout()["columns"]["step"])


def setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
    x, m, table, row, _, _, next_copies, _, m2, h0, h1, h2, h3, index, seeds, noise, mask, known = inputs
    ctx.save_for_backward(x, m, m2, h0, h1, h2, h3, table, index, seeds, noise, mask, known)
    ctx.row, ctx.copies, ctx.batch = row, next_copies, output[0].shape[0]


def backward(
    ctx: Any, g_out: Tensor, g_x0: Tensor | None, g_s: Tensor | None, g_next: Tensor | None
) -> tuple[Any, ...]:
    """The transposed row. In plain torch: differentiable again, and off the hot path of sampling."""
    x, m, m2, *histories, table, index, seeds, noise, mask, known = ctx.saved_tensors
    state = g_out
    rows = table[ctx.row].reshape(1, -1) if index is None else gather(table, index)
    rows = rows.to(state.device).reshape(*rows.shape, *(1,) * (state.dim() - 1))
    c = dict(zip(COLUMNS, rows.unbind(1), strict=True))
    by_table = ctx.needs_input_grad[2]
    halves = None
    if g_next is not None:
        wide = g_next.to(torch.float64 if state.dtype == torch.float64 else torch.float32)
        halves = wide[: ctx.batch] + wide[ctx.batch :] if ctx.copies == 2 else wide
        g_out = g_out + times(c["k"], halves)
    g_known = g_closed = None
    if mask is not None:
        open_ = opened(mask, g_out.dtype)
        g_closed = g_out * (1 - open_)
        if ctx.needs_input_grad[17]:
            g_known = as_dtype_of(times(c["known_s"], g_closed), state)
        g_out = g_out * open_
    g_clean = g_clamped = times(c["b"], g_out) + times(c["B"], g_s) + (0.0 if g_x0 is None else g_x0)
    x0 = None
    # z by address only where no tensor of it is given: seeds beside one are those of the known image.
    sources = (None, noise) if noise is not None else (seeds, None)
    known_on_host = is_plain(c["clip"]) and not table.is_cuda and not torch.compiler.is_compiling()  # not traced
    if by_table or not known_on_host or bool(torch.isfinite(c["clip"]).any()):
        operands = (m2, *histories, index, *sources, None, known)
        x0 = _again(by_table, x, m, table, ctx.row, True, False, 0, None, *operands)[1]
        g_clean = g_clean * (x0.abs() < c["clip"].to(x0.dtype))  # the gradient passes where x0 was inside
    g_m = times(c["d"], g_out) + times(c["q"], g_clean) + times(c["D"], g_s)
    guided = m is not None and (m2 is not None or m.shape[0] != ctx.batch)
    g_first = g_second = None
    if guided:
        g_cond = times(c["w"], g_m)
        g_first, g_second = as_dtype_of(g_m - g_cond, m), as_dtype_of(g_cond, m)
        if m2 is None:
            g_first = torch.cat([g_first, g_second])
    elif m is not None:
        g_first = as_dtype_of(g_m, m)
    g_table = None
    if by_table:
        model, difference = m, None
        if guided:
            first, second = (m, m2) if m2 is not None else (m[: ctx.batch], m[ctx.batch :])
            one = torch.ones_like(c["w"])
            difference = times(one, second) - times(one, first)
            model = times(one, first) + times(c["w"], difference)
        z = noise if noise is not None else _drawn(state.detach(), table, ctx.row, index, seeds, "stream")
        z2 = None if mask is None else _drawn(state.detach(), table, ctx.row, index, seeds, "known_stream")
        new = None
        if halves is not None:
            operands = (m2, *histories, index, seeds, noise, mask, known)
            new = _again(True, x, m, table, ctx.row, False, False, 0, None, *operands)[0]
        outside = (g_clamped - g_clean) * x0.sign()  # type: ignore[union-attr]
        found = {
            **{"a": dot(g_out, x), "b": dot(g_out, x0), "d": dot(g_out, model), "g": dot(g_out, z)},
            **{f"e{k}": dot(g_out, h) for k, h in enumerate(histories)},
            **{"p": dot(g_clean, x), "q": dot(g_clean, model), "r": dot(g_clean, z)},
            **{"A": dot(g_s, x), "B": dot(g_s, x0), "D": dot(g_s, model), "k": dot(halves, new)},
            **{"known_s": dot(g_closed, known), "known_n": dot(g_closed, z2)},
            **{"w": dot(g_m, difference), "clip": outside.reshape(len(outside), -1).sum(1).double()},
        }
        g_table = table_gradient([found.get(name, 0.0) for name in COLUMNS], table, index, ctx.row)
    return (
        None if x is None else as_dtype_of(times(c["a"], g_out) + times(c["p"], g_clean) + times(c["A"], g_s), state),
        g_first,
        g_table,
        *(None,) * 5,
        None if m2 is None else g_second,
        *(None if h is None else as_dtype_of(times(c[f"e{k}"], g_out), state) for k, h in enumerate(histories)),
        *(None,) * 2,
        None if noise is None else as_dtype_of(times(c["g"], g_out) + times(c["r"], g_clean), state),
        None,
        g_known,
    )


def _again(differentiable: bool, *args: Any) -> Any:
    """The step of the forward pass: differentiable where a gradient depends on more of x0 than what lies inside."""
    if differentiable:
        return Step.apply(*args) if active() else native.step_ad(*args)
    with torch.no_grad():
        return native.step(*args)


def _drawn(
    like: Tensor, table: Tensor, row: int, index: Tensor | None, seeds: Tensor | None, stream: str
) -> Tensor | None:
    """z of each sample on the stream that its row names, drawn by the step itself: x' = z."""
    if seeds is None:
        return None
    at = {name: i for i, name in enumerate(COLUMNS)}
    draws = torch.zeros_like(table)
    draws[:, at["clip"]] = draws[:, at["g"]] = 1.0
    draws[:, at["stream"]] = table[:, at[stream]].detach()
    return native.step(None, None, draws, row, h0=like, index=index, seeds=seeds)[0]


Step: Any = function(native.step, setup, backward)
"""`step_ad` for torch.func and vmap."""
