"""The log-density of a sampler step, with its gradient, in one pass."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from diffkern.ops._common import check_on_device, empty_like, native, one_device, refuse_tangents, scaled_gradient
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
    wants = False
    if torch.is_grad_enabled():
        for t in (after, x, h0, h1, h2, h3):
            if t is not None and t.requires_grad:
                raise RuntimeError(
                    "diffkern.step_logprob: differentiable in m and m2 only, and after, x or a history requires grad: "
                    "detach it, or use diffkern.reference.step_logprob"
                )
        wants = any(t is not None and t.requires_grad for t in (m, m2))
    return native.step_logprob(after, x, m, m2, h0, h1, h2, h3, table, row, index, wants)[0]


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
    _, grad, grad2 = output
    ctx.save_for_backward(grad, grad2)
    ctx.mark_non_differentiable(*(t for t in (grad, grad2) if t is not None))
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, g_value: Tensor | None, g_grad: None, g_grad2: None) -> tuple[Any, ...]:
    grad, grad2 = ctx.saved_tensors
    if g_value is None:
        return (None,) * 12
    if grad is None:
        raise RuntimeError("diffkern.step_logprob: want_grad must be true where a gradient is asked for")
    if torch.is_grad_enabled():  # create_graph: the stored gradient would pass for a constant
        raise RuntimeError(
            "diffkern.step_logprob: differentiable once only, use diffkern.reference.step_logprob for higher "
            "derivatives"
        )
    first = g_value if grad.shape[0] == g_value.shape[0] else torch.cat([g_value, g_value])  # [uncond | cond]
    second = None if grad2 is None else scaled_gradient(grad2, g_value)
    return None, None, scaled_gradient(grad, first), second, *(None,) * 8


torch.library.register_autograd("diffkern::step_logprob", _backward, setup_context=_setup)
