"""The log-density of a sampler step, with its gradient, in one pass."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from diffkern.ops._common import (
    active,
    check_on_device,
    empty_like,
    function,
    is_plain,
    native,
    once,
    one_device,
    refuse_tangents,
    scaled_gradient,
    stores_gradient,
)
from diffkern.ops._explained import explained


@explained("step_logprob")
def step_logprob(
    after: Tensor,
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
) -> Tensor:
    """ln of the density with which a row of `step` makes the given next state `after` from x; [B], in nats.

        m     = u + w (c - u)
        x0    = clamp(p x + q m, -clip, clip)
        mean  = a x + b x0 + d m + sum_k e_k h_k
        std_i = g, or g exp((r0 + r1 v_i) / 2) for a learned variance
        L_b   = sum_i ln N(after_i; mean_i, std_i^2)
              = sum_i -(after_i - mean_i)^2 / (2 std_i^2) - ln std_i - ln(2 pi) / 2

    Operands, guidance, `table`, `row` and `index` as in `step`; `after` [B, ...] has the shape and dtype of x. A table
    of 23 columns ends in (r0, r1), as in `learned_step`: m is [B, 2C, ...], its second half of channels v. g = 0 gives
    0.0: a step without randomness adds nothing to a ratio of densities; then nothing is read. r must be 0, and w where
    the variance is learned; the mask, the slope and k play no part.

    The value is float32 (float64 for float64 states) with the same bits for any thread count, and L_b does not depend
    on the other samples. Only each element's own distance is rounded to float32: the sum's scale and what all elements
    have in common are float64. Differentiable once, in m and m2 (both halves of the channels); the gradient is made in
    the same pass. On CUDA an index outside the table, and a row that is not such a Gaussian, give NaN.

    The transition kernels of the reverse process: Sohl-Dickstein et al. 2015 (arXiv 1503.03585); used as the policy's
    log-probability by Black et al. 2023 (DDPO, arXiv 2305.13301); lectures 000, 002.
    """
    check_on_device("step_logprob", index, table)
    refuse_tangents("step_logprob", after, x, m, m2, h0, h1, h2, h3)
    given = (after, x, m, m2, h0, h1, h2, h3, table, row, index)
    wants = False
    if torch.is_grad_enabled():
        for t in (after, x, h0, h1, h2, h3, table):
            if t is not None and t.requires_grad:
                raise RuntimeError(
                    "diffkern.step_logprob: differentiable in m and m2 only, and after, x, a history or the table "
                    "requires grad: detach it, or use diffkern.reference.step_logprob"
                )
        wants = m is not None and stores_gradient(m, after) and any(t is not None and t.requires_grad for t in (m, m2))
    if active():
        return _StepLogprob.apply(*given, False)[0]
    return native.step_logprob(*given, wants)[0]


@torch.library.register_fake("diffkern::step_logprob")
def _(
    after: Tensor,
    x: Tensor | None,
    m: Tensor | None,
    m2: Tensor | None,
    h0: Tensor | None,
    h1: Tensor | None,
    h2: Tensor | None,
    h3: Tensor | None,
    table: Tensor,
    row: int,
    index: Tensor | None,
    want_grad: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    histories = {"h0": h0, "h1": h1, "h2": h2, "h3": h3}
    one_device("step_logprob", row_by_value=True, after=after, x=x, m=m, m2=m2, table=table, index=index, **histories)
    dtype = torch.float64 if after.dtype == torch.float64 else torch.float32
    grad, grad2 = (empty_like(t) if want_grad and t is not None else None for t in (m, m2))
    return after.new_empty([after.shape[0]], dtype=dtype), grad, grad2


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
    *tensors, table, ctx.row, index, _ = inputs
    _, grad, grad2 = output
    if grad is None:
        ctx.save_for_backward(None, None, *tensors, table, index)
    else:
        ctx.save_for_backward(grad, grad2, *(None,) * (len(tensors) + 2))
    ctx.mark_non_differentiable(*(t for t in (grad, grad2) if t is not None))
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, g_value: Tensor | None, g_grad: None, g_grad2: None) -> tuple[Any, ...]:
    grad, grad2, *given = ctx.saved_tensors
    if g_value is None:
        return (None,) * 12

    def make() -> tuple[Tensor, Tensor | None]:
        if grad is None:
            return _made_now(g_value, ctx.row, *given)
        first = g_value if grad.shape[0] == g_value.shape[0] else torch.cat([g_value, g_value])  # [uncond | cond]
        return scaled_gradient(grad, first), None if grad2 is None else scaled_gradient(grad2, g_value)

    return None, None, *once("step_logprob", make, g_value, *given[2:4]), *(None,) * 8


_PIECE = 2**18


def _made_now(
    g_value: Tensor, row: int, after: Tensor, x: Tensor | None, m: Tensor, m2: Tensor | None, *more: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """The gradients of m and m2 times that of the value, rounded once: from a wide m, some samples at a time."""
    *histories, table, index = more
    batch = after.shape[0]
    doubled = m2 is None and m.shape[0] != batch
    firsts = [m[:batch], m[batch:]] if doubled else [m, m2]
    slices = [slice(None)]
    if is_plain(after) and after.numel() > _PIECE:  # not traced
        step = max(1, _PIECE // after[0].numel())
        slices = [slice(i, i + step) for i in range(0, batch, step)]
    pieces: list[tuple[Tensor | None, ...]] = []
    for part in slices:
        u, c = (None if t is None else t[part].to(g_value.dtype) for t in firsts)
        state = (None if t is None else t[part] for t in histories)
        at = index if index is None or index.dim() == 0 else index[part]
        given = (after[part], None if x is None else x[part], u, c, *state, table, row, at, True)
        made = native.step_logprob(*given)[1:]
        scale = g_value[part].reshape(-1, *(1,) * (m.dim() - 1))
        pieces.append(tuple(None if t is None else (t * scale).to(m.dtype) for t in made))
    first, second = (_joined(parts) for parts in zip(*pieces, strict=True))
    assert first is not None
    return (torch.cat([first, second]), None) if doubled and second is not None else (first, second)


def _joined(parts: tuple[Tensor | None, ...]) -> Tensor | None:
    found = [part for part in parts if part is not None]
    return torch.cat(found) if found else None


torch.library.register_autograd("diffkern::step_logprob", _backward, setup_context=_setup)
_StepLogprob: Any = function(native.step_logprob, _setup, _backward)
