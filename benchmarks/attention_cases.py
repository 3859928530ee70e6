"""The cases of attention: UNet shapes (B, H, N, D), contiguous or as [B, 3 C, N], forward or with the gradients.

Baselines: torch's own attention where it is at its best (contiguous tensors), and for [B, 3 C, N] what is done today:
the same on permuted views, on contiguous copies, and guided-diffusion's two einsums, plain or compiled. All are given
the same numbers and give [B, H, N, D], or [B, C, N] contiguous.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.case import Baseline, Case, Check, Setting, bytes_of, compare, cpu_target, random_tensor, try_compile
from diffkern import ops, reference

__all__ = ["TABLE", "attention", "spatial"]

Sizes = tuple[int, int, int, int]
Results = tuple[Tensor, ...]
Function = Callable[..., Tensor]
ROWS = 64
"""Queries that are compared with float64: all of 4096 x 4096 logits would take a gigabyte."""

F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16
# What an error may be of the largest number, ours and the baselines': sums in float32, and in 16 bits the rounding of
# the weights before they meet v (and of the logits too, where einsum has them in 16 bits).
TOLERANCES = {F32: (1e-5, 4e-5), F16: (4e-3, 2e-2), BF16: (2e-2, 0.1)}


def _flops(sizes: Sizes, grad: bool) -> int:
    """Two matrix products forward; the backward pass has five."""
    b, h, n, d = sizes
    return (2 + (5 if grad else 0)) * 2 * b * h * n * n * d


def _differentiate(function: Function, up: Tensor, *leaves: Tensor) -> Results:
    out = function(*leaves)
    return (out, *torch.autograd.grad(out, leaves, up))


def _job(function: Function, given: Results, up: Tensor, grad: bool) -> Callable[[], Results]:
    """A call without arguments: the result, or with the gradients of what is given."""
    if not grad:
        return lambda: (function(*given),)
    leaves = [t.clone().requires_grad_() for t in given]
    return functools.partial(_differentiate, function, up, *leaves)


def _checks(
    contestants: dict[str, Function], exact: Function, given: Results, up: Tensor, rows: Tensor, grad: bool
) -> list[Check]:
    """Compares the rows of the result, and the gradients of what these rows give."""
    masked = torch.zeros_like(up)
    masked[..., rows, :] = up[..., rows, :]
    want = _job(exact, tuple(t.cpu().double() for t in given), masked[..., rows, :].cpu().double(), grad)()
    checks = []
    for who, function in contestants.items():
        got = _job(function, given, masked, grad)()
        bound = TOLERANCES[up.dtype][who != "ours"]
        for what, a, b in zip(("", " gradient", " gradient of k", " gradient of v"), got, want, strict=False):
            a = a if what else a[..., rows, :]
            scale = 1 / float(b.detach().abs().max())
            checks.append(compare(who + what, a.cpu().double() * scale, b * scale, bound))
    return checks


# -------------------------------------------------------------------------------------------------- contiguous q, k, v
def attention(
    name: str,
    setting: Setting,
    shape: Sizes,
    dtype: torch.dtype = F32,
    grad: bool = False,
    goal: float | None = None,
) -> Case:
    """[B, H, N, D], contiguous: where torch's own attention is at its best."""
    given = tuple(random_tensor(seed, shape, setting, dtype) for seed in range(3))
    up = random_tensor(3, shape, setting, dtype)
    rows = torch.arange(0, shape[2], max(1, shape[2] // ROWS), device=setting.device)

    def exact(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return reference.attention(q[..., rows.cpu(), :], k, v)[0]

    contestants: dict[str, Function] = {"ours": ops.attention, "sdpa": F.scaled_dot_product_attention}
    return Case(
        name,
        "attention + gradient" if grad else "attention",
        shape,
        dtype,
        _job(ops.attention, given, up, grad),
        (Baseline("sdpa", _job(F.scaled_dot_product_attention, given, up, grad), cpu_target(goal, setting)),),
        lambda: _checks(contestants, exact, given, up, rows, grad),
        bytes_of(*given, up) * (2 if grad else 1),
        grad=grad,
        flops=_flops(shape, grad),
    )


# -------------------------------------------------------------------------------------------------------- [B, 3 C, N]
def _heads(qkv: Tensor, heads: int) -> Results:
    """q, k, v [B, H, D, N], views."""
    return qkv.unflatten(1, (3, heads, -1)).unbind(1)


def _on_views(qkv: Tensor, heads: int) -> Tensor:
    out = F.scaled_dot_product_attention(*(t.transpose(-1, -2) for t in _heads(qkv, heads)))
    return out.transpose(-1, -2).reshape(qkv.shape[0], -1, qkv.shape[2])


def _with_copies(qkv: Tensor, heads: int) -> Tensor:
    out = F.scaled_dot_product_attention(*(t.transpose(-1, -2).contiguous() for t in _heads(qkv, heads)))
    return out.transpose(-1, -2).reshape(qkv.shape[0], -1, qkv.shape[2])


def _einsum(qkv: Tensor, heads: int) -> Tensor:
    """As guided-diffusion: the scale's root on q and on k, the softmax in float32, the weights in the dtype of qkv."""
    batch, width, length = qkv.shape
    q, k, v = (t.reshape(batch * heads, -1, length) for t in qkv.chunk(3, 1))
    root = (width / 3 / heads) ** -0.25
    weight = torch.einsum("bct,bcs->bts", q * root, k * root)
    weight = weight.float().softmax(-1).type(qkv.dtype)
    return torch.einsum("bts,bcs->bct", weight, v).reshape(batch, -1, length)


Goals = dict[str, float]
LARGE_GOALS: Goals = {"sdpa on views": 6.0, "sdpa with copies": 2.0, "einsum": 2.0}
SMALL_GOALS: Goals = dict.fromkeys(LARGE_GOALS, 1.5)
WIDE_GOALS: Goals = dict.fromkeys(LARGE_GOALS, 1.3)


def spatial(
    name: str,
    setting: Setting,
    shape: Sizes,
    dtype: torch.dtype = F32,
    grad: bool = False,
    goals: Goals | None = None,
    compiled: bool = False,
) -> Case:
    """[B, 3 C, N] as a 1 x 1 convolution writes it to [B, C, N] as the next one reads it."""
    b, h, n, d = shape
    qkv = random_tensor(0, (b, 3 * h * d, n), setting, dtype)
    up = random_tensor(1, (b, h * d, n), setting, dtype)
    rows = torch.arange(0, n, max(1, n // ROWS), device=setting.device)
    ways: dict[str, Function] = {"sdpa on views": _on_views, "sdpa with copies": _with_copies, "einsum": _einsum}
    ways = {who: functools.partial(way, heads=h) for who, way in ways.items()}
    ours = functools.partial(ops.spatial_attention, num_heads=h)
    why = ""
    fused = None
    if compiled:
        fused, why = try_compile(ways["einsum"], setting, qkv)

    def tokens_last(function: Function) -> Function:
        """[B, C, N] as [B, N, C], in which the rows are those of `_checks`."""
        return lambda x: function(x).transpose(-1, -2)

    def exact(x: Tensor) -> Tensor:
        q, k, v = (t.transpose(-1, -2) for t in _heads(x, h))
        out = reference.attention(q[..., rows.cpu(), :], k, v)[0]
        return out.transpose(1, 2).flatten(2)

    def check() -> list[Check]:
        contestants = {"ours": ours, **ways, **({"einsum compiled": fused} if fused else {})}
        turned = {who: tokens_last(function) for who, function in contestants.items()}
        return _checks(turned, exact, (qkv,), up.transpose(-1, -2), rows, grad)

    goals = goals or {}
    baselines = [
        Baseline(who, _job(way, (qkv,), up, grad), cpu_target(goals.get(who), setting)) for who, way in ways.items()
    ]
    if compiled:
        baselines.append(Baseline("einsum compiled", fused and _job(fused, (qkv,), up, grad), None, why))
    return Case(
        name,
        "attention + gradient, [B, 3C, N]" if grad else "attention, [B, 3C, N]",
        shape,
        dtype,
        _job(ours, (qkv,), up, grad),
        tuple(baselines),
        check,
        bytes_of(qkv, up) * (2 if grad else 1),
        grad=grad,
        flops=_flops(shape, grad),
    )


# ----------------------------------------------------------------------------------------------------------- the list
SD1, SD2, MIDDLE, XL = (1, 8, 4096, 40), (1, 5, 4096, 64), (2, 8, 1024, 64), (1, 20, 1024, 64)
LITTLE, WIDE, VAE = (4, 4, 256, 64), (16, 1, 256, 256), (1, 1, 4096, 512)
_NAMES = {F32: "", F16: "-f16", BF16: "-bf16"}


def _table() -> dict[str, tuple[Callable[..., Case], dict[str, Any]]]:
    table: dict[str, tuple[Callable[..., Case], dict[str, Any]]] = {}

    def add(build: Callable[..., Case], shape: Sizes, dtype: torch.dtype = F32, **options: Any) -> None:
        kind = ("-nchw" if build is spatial else "") + ("-grad" if options.get("grad") else "")
        name = f"attention{kind}-{'x'.join(map(str, shape))}{_NAMES[dtype]}"
        assert name not in table
        table[name] = (build, {"shape": shape, "dtype": dtype, **options})

    for shape in (SD1, SD2, MIDDLE, XL):
        add(attention, shape, goal=2.0)
    for shape, goal in ((LITTLE, 1.5), (WIDE, 1.5), (VAE, 1.3)):
        add(attention, shape, goal=goal)
    for shape in (SD1, MIDDLE):
        add(attention, shape, BF16, goal=3.0)
        add(attention, shape, F16, goal=2.5)
    add(attention, LITTLE, BF16, goal=1.5)
    add(attention, VAE, BF16, goal=1.3)
    add(spatial, SD1, goals=LARGE_GOALS, compiled=True)
    add(spatial, MIDDLE, goals=LARGE_GOALS)
    add(spatial, LITTLE, goals=SMALL_GOALS)
    add(spatial, WIDE, goals=SMALL_GOALS, compiled=True)
    add(spatial, VAE, goals=WIDE_GOALS)
    add(spatial, SD1, BF16)
    for shape in (SD1, MIDDLE):
        add(attention, shape, grad=True, goal=1.7)
    add(attention, MIDDLE, BF16, grad=True, goal=2.5)
    add(attention, VAE, grad=True)
    add(spatial, MIDDLE, grad=True)
    add(spatial, WIDE, grad=True)
    return table


TABLE = _table()
