"""What the ops share: fake tensors, checks, coefficients in the arithmetic of the kernels."""

from __future__ import annotations

import os

import torch
from torch import Tensor
from torch.autograd import forward_ad

native = torch.ops.diffkern
REDUCTIONS = {"none": 0, "mean": 1, "sum": 2}
_CHECKED = os.environ.get("DIFFKERN_CHECK", "") not in ("", "0")


def empty_like(x: Tensor, dtype: torch.dtype | None = None, copies: int = 1) -> Tensor:
    """The fake of csrc/bind's empty_like: the strides of x where it is [B, ...] or channels_last without gaps."""
    dtype = x.dtype if dtype is None else dtype
    shape = list(x.shape)
    inner = 1
    for n in shape[1:]:
        inner = inner * n
    strides = list(x.stride())
    if (is_packed(x, False) or is_packed(x, True)) and (shape[0] <= 1 or strides[0] == inner):
        strides[0] = inner
        shape[0] = shape[0] * copies
        return torch.empty_strided(shape, strides, dtype=dtype, device=x.device)
    shape[0] = shape[0] * copies
    return torch.empty(shape, dtype=dtype, device=x.device)


def is_packed(x: Tensor, channels_last: bool) -> bool:
    if channels_last and x.dim() < 3:
        return False
    order = [1, *range(x.dim() - 1, 1, -1)] if channels_last else range(x.dim() - 1, 0, -1)
    expected = 1
    for d in order:
        if x.shape[d] != 1 and x.stride(d) != expected:
            return False
        expected = expected * x.shape[d]
    return True


def check_on_device(name: str, index: Tensor | None, table: Tensor) -> None:
    """Checked mode (DIFFKERN_CHECK=1): reads a CUDA index back and raises where the kernel would give NaN."""
    if _CHECKED and index is not None and index.is_cuda:
        outside = (index < 0) | (index >= table.shape[0])
        if bool(outside.any()):
            raise RuntimeError(
                f"diffkern.{name}: index must be in [0, {table.shape[0]}), the rows of the table, "
                f"got {index[outside].flatten()[0].item()}"
            )


def gather(table: Tensor, index: Tensor) -> Tensor:
    """table[index] as [B or 1, columns]; NaN where the index is outside, as in the kernels (never a device assert)."""
    at = index.reshape(-1).long()
    inside = (at >= 0) & (at < table.shape[0])
    return torch.where(inside[:, None], table[at.clamp(0, table.shape[0] - 1)], float("nan"))


def rows_of(table: Tensor, index: Tensor | None, dims: int) -> Tensor:
    """Rows of a noising or loss table as [B or 1, columns, 1, ...]: coefficients that broadcast over samples."""
    rows = table if index is None else gather(table, index)
    return rows.reshape(rows.shape[0], rows.shape[1], *(1,) * (dims - 1))


def times(coefficient: Tensor, x: Tensor | float | None) -> Tensor | float:
    """coefficient * x in the arithmetic of the kernels; 0.0 where there is no x."""
    if not isinstance(x, Tensor):
        return 0.0
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    return coefficient.to(wide) * x.to(wide)


def as_dtype_of(value: Tensor | float, like: Tensor) -> Tensor:
    return value.to(like.dtype) if isinstance(value, Tensor) else torch.zeros_like(like)


def refuse_tangents(op: str, *tensors: Tensor | None) -> None:
    """The ops have no forward-mode derivatives: said, as torch would take their tangents for zeros."""
    if forward_ad._current_level < 0:
        return
    for t in tensors:
        if t is None:
            continue
        wrapped = torch._C._functorch.is_functorch_wrapped_tensor(t)
        if wrapped or forward_ad.unpack_dual(t).tangent is not None:
            raise NotImplementedError(
                f"diffkern.{op}: has no forward-mode derivative (torch.func.jvp, forward_ad), and a tensor carries a "
                f"tangent: use reverse mode, or diffkern.reference.{op.removesuffix('_out')}"
            )


def refuse_grad(op: str, *tensors: Tensor | None) -> None:
    """Ops that write into given tensors have no gradient: said, instead of a graph that ends in silence."""
    refuse_tangents(op, *tensors)
    if not torch.is_grad_enabled():
        return
    for t in tensors:  # a loop: any() with a generator takes twice as long
        if t is not None and t.requires_grad:
            raise RuntimeError(f"diffkern.{op}: not differentiable, and a tensor requires grad: use torch.no_grad()")


def wrote(*outputs: Tensor | None) -> None:
    """Tells autograd that tensors have changed, so that a backward pass that saved one of them raises."""
    torch.autograd.graph.increment_version([t for t in outputs if t is not None])


def one_device(op: str, *, row_by_value: bool = False, **tensors: Tensor | None) -> None:
    """For the fakes: a mix of meta and real tensors comes here, and must not pass for a result.

    row_by_value: the table may stay on the CPU, as its row travels in the arguments.
    """
    given = {name: t for name, t in tensors.items() if t is not None}
    first = next(iter(given))
    for name, t in given.items():
        if t.device != given[first].device and not (row_by_value and name == "table" and t.is_cpu):
            raise RuntimeError(
                f"diffkern.{op}: {name} must be on the device of {first} ({given[first].device}), got {t.device}"
            )


def scaled_gradient(grad: Tensor, g_value: Tensor) -> Tensor:
    """The gradient that a forward pass stored, times that of its value ([] or [B])."""
    one = type(g_value) is Tensor and not g_value.is_cuda and g_value.numel() > 0 and not any(g_value.stride())
    if one and g_value[(0,) * g_value.dim()].item() == 1.0:
        return grad  # the usual loss.backward() or value.sum(): nothing to scale, and reading a CPU value costs nothing
    scale = g_value.reshape(-1, *(1,) * (grad.dim() - 1)) if g_value.dim() else g_value
    return (grad * scale).to(grad.dtype)
