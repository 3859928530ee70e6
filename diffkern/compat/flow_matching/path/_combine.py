"""Two tensors times numbers that depend on the time, in one op."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from diffkern import ops
from diffkern.compat.kit.transforms import transformed


def rates_at(scheduler: Any, t: Tensor) -> Tensor:
    """[..., 4], alpha, sigma and their derivatives at times [...]; float32 for times of 16 bits, else t's dtype."""
    rates, dtype = asked(scheduler, t)
    return torch.stack(shaped(rates, dtype, t), -1)


def asked(scheduler: Any, t: Tensor) -> tuple[list[Any], torch.dtype]:
    """(alpha, sigma and their derivatives as the scheduler gives them, the dtype that it was asked in)."""
    at = t.float() if t.dtype.itemsize < 4 else t
    found = scheduler(at)
    return [found.alpha_t, found.sigma_t, found.d_alpha_t, found.d_sigma_t], at.dtype


def shaped(rates: list[Any], dtype: torch.dtype, t: Tensor) -> list[Tensor]:
    """The rates as tensors in the shape of t."""
    if all(isinstance(rate, Tensor) and rate.shape == t.shape for rate in rates):
        return rates
    return [torch.as_tensor(rate, dtype=dtype, device=t.device).expand(t.shape) for rate in rates]


Formula = Callable[[Any, Any, Any, Any], tuple[Any, Any]]
"""(alpha, sigma and their derivatives) -> the factors of x_t and of the other tensor, for floats and for tensors."""


def converted(scheduler: Any, t: Tensor, x_t: Tensor, other: Tensor, formula: Formula) -> Tensor:
    """`combined` with the factors of a formula; one time on the CPU is worked out in plain numbers."""
    rates, dtype = asked(scheduler, t)
    simple = t.ndim == 0 and t.device.type == "cpu" and not torch.compiler.is_compiling()
    if simple and x_t.ndim and x_t.shape == other.shape and not differentiates(*rates):
        try:
            factors = formula(*map(float, rates))
        except ZeroDivisionError:  # infinity or NaN, which the tensors give
            pass
        else:
            table = torch.tensor([[*factors, 0.0, 0.0]], dtype=torch.float64, device="cpu")
            return mixed(x_t, other, table, torch.promote_types(x_t.dtype, other.dtype))
    own, others = formula(*torch.stack(shaped(rates, dtype, t), -1).to(torch.float64).unbind(-1))
    return combined(t, x_t, own, other, others)


def mixed(a: Tensor, b: Tensor, table: Tensor, dtype: torch.dtype) -> Tensor:
    """table[:, 0] a + table[:, 1] b in ``dtype``, one row for all samples or one a sample."""
    a, b, table = a.to(dtype), b.to(dtype), _near(table, a)
    try:
        if wants_gradients(a, b):
            return ops.noising(a, table, noise=b)[0]
        return ops.noising_out(a, table, noise=b, out=torch.empty_like(a))
    except RuntimeError:
        if not bool(table[:, :2].isnan().any()):  # 0/0 at an end of the path, which the op refuses
            raise
    one, two = table[:, :2].to(a.device).reshape(-1, 2, *(1,) * (a.ndim - 1)).unbind(1)
    return (one * a + two * b).to(dtype)


def mixed_twice(a: Tensor, b: Tensor, table: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """`mixed` with columns 0 and 1, and with columns 2 and 3, in one op."""
    a, b, table = a.to(dtype), b.to(dtype), _near(table, a)
    if wants_gradients(a, b):
        one, two, _ = ops.noising(a, table, noise=b, want_target=True)
        assert two is not None
        return one, two
    one, two = torch.empty_like(a), torch.empty_like(a)
    ops.noising_out(a, table, noise=b, out=one, target=two)
    return one, two


def _near(table: Tensor, x: Tensor) -> Tensor:
    """The table on the CPU or where x is."""
    return table if table.device.type == "cpu" or table.device == x.device else table.to(x.device)


def combined(t: Tensor, a: Tensor, of_a: Tensor, b: Tensor | None = None, of_b: Tensor | None = None) -> Tensor:
    """of_a a + of_b b: a and b [B, ...], the factors float64 in the shape of t.

    t of one element is the time of all samples, [B] or [B, 1, ...] has one time a sample. The result has the dtype that
    plain torch would give. Times of other shapes, and those that `differentiates`, are left to plain torch.
    """
    dtype = a.dtype if b is None else torch.promote_types(a.dtype, b.dtype)
    if t.ndim:
        dtype = torch.promote_types(dtype, t.dtype)
    b, of_b = a if b is None else b, torch.zeros_like(of_a) if of_b is None else of_b
    each = a.ndim > 0 and t.shape[:1] == a.shape[:1] and t.numel() == a.shape[0]
    if each:
        of_a, of_b = of_a.reshape(-1), of_b.reshape(-1)
    alone = t.numel() == 1 and t.ndim <= a.ndim
    if a.ndim == 0 or a.shape != b.shape or not (each or alone) or differentiates(of_a):
        if each:
            of_a, of_b = (factor.reshape(-1, *(1,) * (a.ndim - 1)) for factor in (of_a, of_b))
        return (of_a * a + of_b * b).to(dtype)
    # The last two columns are not read.
    return mixed(a, b, torch.stack([of_a, of_b, of_a, of_b], -1).reshape(-1, 4), dtype)


def differentiates(*factors: Any) -> bool:
    """Whether the gradient by the times is wanted, or a derivative that the ops do not carry."""
    if transformed():
        return True
    return torch.is_grad_enabled() and any(isinstance(x, Tensor) and x.requires_grad for x in factors)


def wants_gradients(*tensors: Tensor) -> bool:
    """Whether the gradient of one is recorded."""
    return torch.is_grad_enabled() and (torch.compiler.is_compiling() or any(x.requires_grad for x in tensors))
