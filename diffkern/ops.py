"""The native ops as typed functions: `randn`, `noising`, `loss`, `step`, their fake tensors and gradients.

Every op runs on CPU and CUDA tensors, under torch.compile and torch.export. Dimension 0 is the batch. Tables of
coefficients are float64; arithmetic is float32 (float64 for float64 tensors) and rounds once, at the store.
Wrong input raises RuntimeError with one sentence that names the argument, the rule and the value.

Noise is an address: element i of a sample is a fixed function of (seed of the sample, stream, i), see `randn`.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from . import _load  # noqa: F401  (registers the ops)
from .plan import COLUMNS

__all__ = ["loss", "noising", "noising_out", "randn", "seeds", "step", "step_out"]

_ops = torch.ops.diffkern
_REDUCTIONS = {"none": 0, "mean": 1, "sum": 2}
_CHECKED = os.environ.get("DIFFKERN_CHECK", "") not in ("", "0")


# ------------------------------------------------------------------------------------------------------ seeds
def _mix64(z: np.ndarray) -> np.ndarray:
    """A bijection of 64-bit integers with full avalanche: the finaliser of splitmix64 (Steele, Lea, Flood 2014)."""
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def seeds(s: int, n: int, first: int = 0, device: torch.device | str | None = None) -> Tensor:
    """Seeds of the samples first, ..., first + n - 1 of a job with seed `s`, int64 [n].

        seed_j = mix64(mix64(s + 0x9E3779B97F4A7C15) xor mix64(j + 0xD1B54A32D192ED03))

    mix64 is the finaliser of splitmix64. Sample j has the same seed in every split of the job, and jobs with
    neighbouring s share nothing. Who wants image j to have seed s + j passes that tensor instead.
    """
    if n < 0 or first < 0:
        raise ValueError(f"n and first must not be negative, got n={n}, first={first}")
    with np.errstate(over="ignore"):
        job = _mix64(np.array([s % 2**64], dtype=np.uint64) + np.uint64(0x9E3779B97F4A7C15))
        sample = np.arange(first, first + n, dtype=np.uint64) + np.uint64(0xD1B54A32D192ED03)
        mixed = _mix64(job ^ _mix64(sample))
    return torch.from_numpy(mixed.view(np.int64)).to(device)


# ---------------------------------------------------------------------------------------------------- helpers
def _like(x: Tensor, dtype: torch.dtype | None = None, copies: int = 1) -> Tensor:
    """The fake of csrc/bind's empty_like: the strides of x where it is [B, ...] or channels_last without gaps."""
    dtype = x.dtype if dtype is None else dtype
    shape = list(x.shape)
    inner = 1
    for n in shape[1:]:
        inner = inner * n
    strides = list(x.stride())
    if (_is_packed(x, False) or _is_packed(x, True)) and (shape[0] <= 1 or strides[0] == inner):
        strides[0] = inner
        shape[0] = shape[0] * copies
        return torch.empty_strided(shape, strides, dtype=dtype, device=x.device)
    shape[0] = shape[0] * copies
    return torch.empty(shape, dtype=dtype, device=x.device)


def _is_packed(x: Tensor, channels_last: bool) -> bool:
    if channels_last and x.dim() < 3:
        return False
    order = [1, *range(x.dim() - 1, 1, -1)] if channels_last else range(x.dim() - 1, 0, -1)
    expected = 1
    for d in order:
        if x.shape[d] != 1 and x.stride(d) != expected:
            return False
        expected = expected * x.shape[d]
    return True


def _check_on_device(name: str, index: Tensor | None, table: Tensor) -> None:
    """Checked mode (DIFFKERN_CHECK=1): reads a CUDA index back and raises where the kernel would give NaN."""
    if _CHECKED and index is not None and index.is_cuda:
        outside = (index < 0) | (index >= table.shape[0])
        if bool(outside.any()):
            raise RuntimeError(
                f"diffkern.{name}: index must be in [0, {table.shape[0]}), the rows of the table, "
                f"got {index[outside].flatten()[0].item()}"
            )


def _gather(table: Tensor, index: Tensor) -> Tensor:
    """table[index] as [B or 1, columns]; NaN where the index is outside, as in the kernels (never a device assert)."""
    at = index.reshape(-1).long()
    inside = (at >= 0) & (at < table.shape[0])
    return torch.where(inside[:, None], table[at.clamp(0, table.shape[0] - 1)], float("nan"))


def _rows(table: Tensor, index: Tensor | None, dims: int) -> Tensor:
    """Rows of a noising or loss table as [B or 1, columns, 1, ...]: coefficients that broadcast over samples."""
    rows = table if index is None else _gather(table, index)
    return rows.reshape(rows.shape[0], rows.shape[1], *(1,) * (dims - 1))


def _times(coefficient: Tensor, x: Tensor | float | None) -> Tensor | float:
    """coefficient * x in the arithmetic of the kernels; 0.0 where there is no x."""
    if not isinstance(x, Tensor):
        return 0.0
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    return coefficient.to(wide) * x.to(wide)


def _as(value: Tensor | float, like: Tensor) -> Tensor:
    return value.to(like.dtype) if isinstance(value, Tensor) else torch.zeros_like(like)


def _refuse_grad(op: str, *tensors: Tensor | None) -> None:
    """Ops that write into given tensors have no gradient: said, instead of a graph that ends in silence."""
    if not torch.is_grad_enabled():
        return
    for t in tensors:  # a loop: any() with a generator takes twice as long
        if t is not None and t.requires_grad:
            raise RuntimeError(f"diffkern.{op}: not differentiable, and a tensor requires grad: use torch.no_grad()")


def _wrote(*outputs: Tensor | None) -> None:
    """Tells autograd that tensors have changed, so that a backward pass that saved one of them raises."""
    torch.autograd.graph.increment_version([t for t in outputs if t is not None])


def _one_device(op: str, **tensors: Tensor | None) -> None:
    """For the fakes: a mix of meta and real tensors comes here, and must not pass for a result."""
    given = {name: t for name, t in tensors.items() if t is not None}
    first = next(iter(given))
    for name, t in given.items():
        if t.device != given[first].device and not (op == "step" and name == "table" and t.is_cpu):
            raise RuntimeError(
                f"diffkern.{op}: {name} must be on the device of {first} ({given[first].device}), got {t.device}"
            )


# ------------------------------------------------------------------------------------------------------ randn
def randn(
    shape: Sequence[int],
    seeds: Tensor,
    stream: int = 0,
    *,
    dtype: torch.dtype | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """Standard normals by address, [B, ...] on the device of `seeds` (int64 [B], one a sample).

    Element i (row-major within its sample) is lane i mod 4 of Philox4x32-10 (Salmon et al. 2011) at counter
    (i div 4, stream) under the key seed, made normal by Box and Muller's transform (1958) in fixed float32 arithmetic.
    The bits depend on nothing else: not on the batch, the memory format, threads, the SIMD level or the device.
    float64 tensors hold the float32 normals, 16-bit tensors the rounded ones. `dtype` is float32 unless given.
    `out`, any strides: written instead; shape and dtype must be its own.
    """
    if out is None:
        return _ops.randn(list(shape), seeds, stream, torch.float32 if dtype is None else dtype)
    if list(out.shape) != list(shape):
        raise RuntimeError(f"diffkern.randn: out must have shape {list(shape)}, got {list(out.shape)}")
    if dtype is not None and dtype != out.dtype:
        raise RuntimeError(f"diffkern.randn: out must have dtype {dtype}, got {out.dtype}")
    _refuse_grad("randn", out)
    _ops.randn_out(seeds, stream, out)
    _wrote(out)
    return out


@torch.library.register_fake("diffkern::randn")
def _(size: Sequence[int], seeds: Tensor, stream: int, dtype: torch.dtype) -> Tensor:
    return seeds.new_empty(size, dtype=dtype)


@torch.library.register_fake("diffkern::randn_out")
def _(seeds: Tensor, stream: int, out: Tensor) -> None:
    _one_device("randn", out=out, seeds=seeds)


# ---------------------------------------------------------------------------------------------------- noising
def noising(
    x0: Tensor,
    table: Tensor,
    index: Tensor | None = None,
    *,
    seeds: Tensor | None = None,
    stream: int = 0,
    noise: Tensor | None = None,
    want_target: bool = False,
    want_eps: bool = False,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Forward noising and the training target in one pass (lecture 000, 001, 002; Ho et al. 2020, arXiv 2006.11239).

        x_t = s x0 + n eps,    target = u x0 + v eps

    `table` float64 [rows, 4] holds (s, n, u, v), `index` (int [B] or []) picks the row of each sample; without it the
    table has one row for all samples or one row a sample. eps is noise by address (`seeds`, `stream`) or the tensor
    `noise` (dtype of x0). Returns (x_t, target or None, eps or None), all in the dtype and memory format of x0.
    Differentiable in x0 and noise.
    """
    _check_on_device("noising", index, table)
    return _ops.noising(x0, table, index, seeds, stream, noise, want_target, want_eps)


def noising_out(
    x0: Tensor,
    table: Tensor,
    index: Tensor | None = None,
    *,
    out: Tensor,
    target: Tensor | None = None,
    eps: Tensor | None = None,
    seeds: Tensor | None = None,
    stream: int = 0,
    noise: Tensor | None = None,
) -> Tensor:
    """`noising` into given tensors; `out` may be x0 or noise itself, in place. Not differentiable."""
    _check_on_device("noising", index, table)
    _refuse_grad("noising_out", x0, noise, out, target, eps)
    _ops.noising_out(x0, table, index, seeds, stream, noise, out, target, eps)
    _wrote(out, target, eps)
    return out


@torch.library.register_fake("diffkern::noising")
def _(
    x0: Tensor,
    table: Tensor,
    index: Tensor | None,
    seeds: Tensor | None,
    stream: int,
    noise: Tensor | None,
    want_target: bool,
    want_eps: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    _one_device("noising", x0=x0, table=table, index=index, seeds=seeds, noise=noise)
    return _like(x0), _like(x0) if want_target else None, _like(x0) if want_eps else None


@torch.library.register_fake("diffkern::noising_out")
def _(
    x0: Tensor,
    table: Tensor,
    index: Tensor | None,
    seeds: Tensor | None,
    stream: int,
    noise: Tensor | None,
    out: Tensor,
    target: Tensor | None,
    eps: Tensor | None,
) -> None:
    _one_device("noising", x0=x0, table=table, index=index, seeds=seeds, noise=noise, out=out, target=target, eps=eps)


def _noising_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
    x0, table, index, _, _, noise, *_ = inputs
    ctx.save_for_backward(table, index)
    ctx.shape, ctx.has_noise = x0.shape, noise is not None


def _noising_backward(ctx: Any, g_x: Tensor, g_target: Tensor | None, g_eps: Tensor | None) -> tuple[Any, ...]:
    table, index = ctx.saved_tensors
    s, n, u, v = _rows(table, index, len(ctx.shape)).unbind(1)
    g_x0 = _as(_times(s, g_x) + _times(u, g_target), g_x)
    g_noise = None
    if ctx.has_noise:
        g_noise = _as(_times(n, g_x) + _times(v, g_target) + (0.0 if g_eps is None else g_eps), g_x)
    return g_x0, None, None, None, None, g_noise, None, None


torch.library.register_autograd("diffkern::noising", _noising_backward, setup_context=_noising_setup)


# ------------------------------------------------------------------------------------------------------- loss
def loss(
    pred: Tensor,
    x0: Tensor,
    table: Tensor,
    index: Tensor | None = None,
    *,
    seeds: Tensor | None = None,
    stream: int = 0,
    noise: Tensor | None = None,
    reduction: str = "mean",
) -> Tensor:
    """Weighted squared error against a target that is never stored; its gradient is made in the same pass.

        L_b = weight_b mean_i (pred_i - (u x0_i + v eps_i))^2

    `table` float64 [rows, 3] holds (u, v, weight); index, seeds, stream and noise as in `noising`: the same address
    gives the same eps. `reduction`: "none" [B], "mean" or "sum" over the batch. The value is float32 (float64 for
    float64 x0) and has the same bits for any thread count; L_b does not depend on the other samples. With
    reduction "none" the weight (lambda_t of lecture 002) and mean follow Ho et al. 2020, eq. 14.
    """
    if reduction not in _REDUCTIONS:
        raise ValueError(f"reduction must be one of {', '.join(_REDUCTIONS)}, got {reduction!r}")
    _check_on_device("loss", index, table)
    differentiable = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (pred, x0, noise))
    return _ops.loss(pred, x0, table, index, seeds, stream, noise, _REDUCTIONS[reduction], differentiable)[0]


@torch.library.register_fake("diffkern::loss")
def _(
    pred: Tensor,
    x0: Tensor,
    table: Tensor,
    index: Tensor | None,
    seeds: Tensor | None,
    stream: int,
    noise: Tensor | None,
    reduction: int,
    want_grad: bool,
) -> tuple[Tensor, Tensor | None]:
    _one_device("loss", x0=x0, pred=pred, table=table, index=index, seeds=seeds, noise=noise)
    dtype = torch.float64 if x0.dtype == torch.float64 else torch.float32
    value = x0.new_empty([x0.shape[0]] if reduction == 0 else [], dtype=dtype)
    return value, _like(pred) if want_grad else None


def _loss_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
    _, x0, table, index, _, _, noise, *_ = inputs
    grad = output[1]
    ctx.save_for_backward(grad, table, index)
    ctx.dtypes = x0.dtype, noise.dtype if noise is not None else None
    if grad is not None:
        ctx.mark_non_differentiable(grad)
    ctx.set_materialize_grads(False)  # else every backward makes zeros as large as pred, for `grad`


def _loss_backward(ctx: Any, g_value: Tensor | None, g_grad: None) -> tuple[Any, ...]:
    grad, table, index = ctx.saved_tensors
    if g_value is None:
        return (None,) * 9
    if grad is None:
        raise RuntimeError("diffkern.loss: want_grad must be true where a gradient is asked for")
    if torch.is_grad_enabled():  # create_graph: the stored gradient would pass for a constant
        raise RuntimeError(
            "diffkern.loss: differentiable once only, use diffkern.reference.loss for higher derivatives"
        )
    if type(g_value) is Tensor and g_value.dim() == 0 and not g_value.is_cuda and g_value.item() == 1.0:
        g_pred = grad  # the usual loss.backward(): nothing to scale, and reading a CPU value costs nothing
    else:
        scale = g_value.reshape(-1, *(1,) * (grad.dim() - 1)) if g_value.dim() else g_value
        g_pred = (grad * scale).to(grad.dtype)
    g_x0 = g_noise = None
    if ctx.needs_input_grad[1] or ctx.needs_input_grad[6]:
        u, v, _ = _rows(table, index, grad.dim()).unbind(1)
        if ctx.needs_input_grad[1]:
            g_x0 = (-_times(u, g_pred)).to(ctx.dtypes[0])  # type: ignore[union-attr]
        if ctx.needs_input_grad[6]:
            g_noise = (-_times(v, g_pred)).to(ctx.dtypes[1])  # type: ignore[union-attr]
    return g_pred, g_x0, None, None, None, None, g_noise, None, None


torch.library.register_autograd("diffkern::loss", _loss_backward, setup_context=_loss_setup)


# ------------------------------------------------------------------------------------------------------- step
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
    seeds: Tensor | None = None,
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
    Differentiable in x, m, m2, the histories, noise and known.
    """
    args = (x, m, m2, h0, h1, h2, h3, table, row, index, seeds, noise, mask, known)
    _check_on_device("step", index, table)
    op = _ops.step_ad if _wants_grad(x, m, m2, h0, h1, h2, h3, noise, known) else _ops.step
    return op(*args, want_x0, want_s, next_copies, next_dtype)


def _wants_grad(*tensors: Tensor | None) -> bool:
    if not torch.is_grad_enabled():
        return False
    return torch.compiler.is_compiling() or any(t is not None and t.requires_grad for t in tensors)


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
    seeds: Tensor | None = None,
    noise: Tensor | None = None,
    mask: Tensor | None = None,
    known: Tensor | None = None,
) -> Tensor:
    """`step` into given tensors, for loops that allocate nothing; `out` may be x (in place). Not differentiable."""
    _check_on_device("step", index, table)
    _refuse_grad("step_out", x, m, m2, h0, h1, h2, h3, noise, known, out, x0, s, next)
    _ops.step_out(x, m, m2, h0, h1, h2, h3, table, row, index, seeds, noise, mask, known, out, x0, s, next)
    _wrote(out, x0, s, next)
    return out


def _step_fake(
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
    seeds: Tensor | None,
    noise: Tensor | None,
    mask: Tensor | None,
    known: Tensor | None,
    want_x0: bool,
    want_s: bool,
    next_copies: int,
    next_dtype: torch.dtype | None,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    like = next(t for t in (x, h0, h1, h2, h3, noise, known, m) if t is not None)
    _one_device(
        "step", like=like, m=m, m2=m2, table=table, index=index, seeds=seeds, noise=noise, mask=mask, known=known
    )
    dtype = next_dtype if next_dtype is not None else (m if m is not None else like).dtype
    return (
        _like(like),
        _like(like) if want_x0 else None,
        _like(like) if want_s else None,
        _like(like, dtype, next_copies) if next_copies else None,
    )


torch.library.register_fake("diffkern::step", _step_fake)
torch.library.register_fake("diffkern::step_ad", _step_fake)


@torch.library.register_fake("diffkern::step_out")
def _(*args: Any) -> None:
    x, m, m2, h0, h1, h2, h3, table, _, index, seeds, noise, mask, known, out, x0, s, next_ = args
    inputs = {"x": x, "m": m, "m2": m2, "h0": h0, "h1": h1, "h2": h2, "h3": h3, "table": table, "index": index}
    others = {"seeds": seeds, "noise": noise, "mask": mask, "known": known, "x0": x0, "s": s, "next": next_}
    _one_device("step", out=out, **inputs, **others)


def _step_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
    x, m, m2, h0, h1, h2, h3, table, row, index, seeds, noise, mask, known, *_, next_copies, _ = inputs
    ctx.save_for_backward(x, m, m2, h0, h1, h2, h3, table, index, seeds, noise, mask, known)
    ctx.row, ctx.copies, ctx.batch = row, next_copies, output[0].shape[0]


def _step_backward(
    ctx: Any, g_out: Tensor, g_x0: Tensor | None, g_s: Tensor | None, g_next: Tensor | None
) -> tuple[Any, ...]:
    """The transposed row. In plain torch: differentiable again, and off the hot path of sampling."""
    x, m, m2, *histories, table, index, seeds, noise, mask, known = ctx.saved_tensors
    state = g_out
    rows = table[ctx.row].reshape(1, -1) if index is None else _gather(table, index)
    rows = rows.to(state.device).reshape(*rows.shape, *(1,) * (state.dim() - 1))
    c = dict(zip(COLUMNS, rows.unbind(1), strict=True))
    if g_next is not None:
        wide = g_next.to(torch.float64 if state.dtype == torch.float64 else torch.float32)
        halves = wide[: ctx.batch] + wide[ctx.batch :] if ctx.copies == 2 else wide
        g_out = g_out + _times(c["k"], halves)
    g_known = None
    if mask is not None:
        open_ = mask.to(g_out.dtype)
        if ctx.needs_input_grad[13]:
            g_known = _as(_times(c["known_s"], g_out * (1 - open_)), state)
        g_out = g_out * open_
    g_clean = _times(c["b"], g_out) + _times(c["B"], g_s) + (0.0 if g_x0 is None else g_x0)
    known_on_host = type(table) is Tensor and not table.is_cuda and not torch.compiler.is_compiling()  # not traced
    if not known_on_host or bool(torch.isfinite(c["clip"]).any()):  # the gradient passes where x0 was inside
        inputs = (x, m, m2, *histories, table, ctx.row, index, seeds, noise, None, known)
        x0 = _ops.step(*inputs, True, False, 0, None)[1]
        g_clean = g_clean * (x0.abs() < c["clip"].to(x0.dtype))
    g_m = _times(c["d"], g_out) + _times(c["q"], g_clean) + _times(c["D"], g_s)
    g_first = g_second = None
    if m is not None and (m2 is not None or m.shape[0] != ctx.batch):
        g_cond = _times(c["w"], g_m)
        g_first, g_second = _as(g_m - g_cond, m), _as(g_cond, m)
        if m2 is None:
            g_first = torch.cat([g_first, g_second])
    elif m is not None:
        g_first = _as(g_m, m)
    return (
        None if x is None else _as(_times(c["a"], g_out) + _times(c["p"], g_clean) + _times(c["A"], g_s), state),
        g_first,
        None if m2 is None else g_second,
        *(None if h is None else _as(_times(c[f"e{k}"], g_out), state) for k, h in enumerate(histories)),
        *(None,) * 4,
        None if noise is None else _as(_times(c["g"], g_out) + _times(c["r"], g_clean), state),
        None,
        g_known,
        *(None,) * 4,
    )


torch.library.register_autograd("diffkern::step_ad", _step_backward, setup_context=_step_setup)
