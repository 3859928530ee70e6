"""The case of group normalisation with modulation and SiLU, forward and with its gradient."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.case import (
    Baseline,
    Case,
    Check,
    Setting,
    bytes_of,
    compare,
    cpu_target,
    loose,
    random_tensor,
    tight,
    try_compile,
)
from diffkern import ops, reference

__all__ = ["TABLE"]

GROUPS = 32


def group_norm_act(
    name: str,
    setting: Setting,
    shape: tuple[int, ...],
    goal: float | None = None,
    dtype: torch.dtype = torch.float32,
    last: bool = False,
    grad: bool = False,
) -> Case:
    """The normalisation of an adaptive residual block. Eager is what ADM's blocks do: norm, two products, SiLU."""
    form = torch.channels_last if last else torch.contiguous_format
    x = random_tensor(0, shape, setting, dtype).contiguous(memory_format=form).requires_grad_(grad)
    up = random_tensor(1, shape, setting, dtype).contiguous(memory_format=form)
    weight, bias = random_tensor(2, (2, shape[1]), setting, dtype).unbind()
    scale, shift = random_tensor(3, (shape[0], 2 * shape[1]), setting, dtype).chunk(2, 1)
    given = tuple(t.detach().requires_grad_(grad) for t in (weight, bias, scale, shift))

    def formula(x: Tensor, weight: Tensor, bias: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
        y = F.group_norm(x, GROUPS, weight, bias)
        return F.silu(y * (1 + scale[:, :, None, None]) + shift[:, :, None, None])

    def fused(x: Tensor, weight: Tensor, bias: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
        return ops.group_norm_act(x, GROUPS, weight, bias, scale=scale, shift=shift)

    def run(function: Callable[..., Tensor]) -> Tensor:
        with torch.set_grad_enabled(grad):
            y = function(x, *given)
            return torch.autograd.grad(y, (x, *given), up)[0] if grad else y

    def check() -> list[Check]:
        leaves = [t.detach().cpu().requires_grad_(grad) for t in (x, *given)]
        w, b, s, t = leaves[1:]
        with torch.set_grad_enabled(grad):
            exact = reference.group_norm_act(leaves[0], GROUPS, w, b, scale=s, shift=t)
        if grad:
            (exact,) = torch.autograd.grad(exact, leaves[0], up.cpu().double())
        return [compare("ours", run(fused), exact, tight(dtype)), compare("eager", run(formula), exact, loose(dtype))]

    compiled, why = (None, "timed forward") if grad else try_compile(formula, setting, x, *given)
    baselines = (
        Baseline("eager", functools.partial(run, formula), cpu_target(goal, setting)),
        Baseline("torch.compile", compiled and functools.partial(run, compiled), None, why),
    )
    moved = bytes_of(x, x, *((x, x, x) if grad else ()))
    title = "group norm, scale, shift, SiLU" + (" and gradient" if grad else "")
    return Case(name, title, shape, dtype, functools.partial(run, fused), baselines, check, moved)


DDPM, ADM, SD = (4, 128, 32, 32), (1, 256, 64, 64), (1, 320, 64, 64)
BF16, LAST = {"dtype": torch.bfloat16}, {"last": True}
TABLE: dict[str, tuple[Callable[..., Case], dict[str, Any]]] = {
    "group-norm-ddpm": (group_norm_act, {"shape": DDPM}),
    "group-norm-adm": (group_norm_act, {"shape": ADM}),
    "group-norm-sd": (group_norm_act, {"shape": SD}),
    "group-norm-sd-last": (group_norm_act, {"shape": SD, **LAST}),
    "group-norm-sd-bf16": (group_norm_act, {"shape": SD, **BF16}),
    "group-norm-sd-bf16-last": (group_norm_act, {"shape": SD, **BF16, **LAST}),
    "group-norm-sd-grad": (group_norm_act, {"shape": SD, "grad": True}),
    "group-norm-sd-bf16-last-grad": (group_norm_act, {"shape": SD, "grad": True, **BF16, **LAST}),
}
