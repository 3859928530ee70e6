"""The CPU attention kernels without the ops around them: a small shared library, called with any split of the tasks."""

from __future__ import annotations

import ctypes
import math
import os
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from helpers import build_description
from helpers.native_layout import CODES, LEVELS

Grads = tuple[Tensor, Tensor, Tensor]


def build() -> Path:
    """The shared library."""
    return build_description.cpu_library(build_description.ROOT / "tests" / "cpu" / "attention.cpp")


def supported(library: Path, level: str) -> bool:
    lib = ctypes.CDLL(str(library))
    lib.dk_isa_best.restype = ctypes.c_char_p
    return LEVELS.index(level) <= LEVELS.index(lib.dk_isa_best().decode())


def empty(order: str, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """[B, H, N, D] in memory as `order` says, filled with NaN."""
    b, h, n, d = shape
    if order.startswith("odd_"):  # one element past an aligned address
        inner = empty(order[4:], (1, 1, 1, b * h * n * d + 1), dtype).flatten()[1:]
        return inner.view(b, h, d, n).mT if order == "odd_nchw" else inner.view(b, h, n, d)
    nan = math.nan
    if order == "tokens":
        return torch.full((b, h, n, d), nan, dtype=dtype)
    if order == "nchw":
        return torch.full((b, h, d, n), nan, dtype=dtype).mT
    if order == "rows":  # [B, N, H, D], as from a Linear
        return torch.full((b, n, h, d), nan, dtype=dtype).transpose(1, 2)
    if order == "qkv_nchw":  # a part of [B, 3 H D, N] with an odd row length
        return torch.full((b, h, 3 * d, n + 1), nan, dtype=dtype)[:, :, d : 2 * d, :n].mT
    if order == "qkv_tokens":  # a part of [B, N, 3 H D], odd row length
        return (
            torch.full((b, n, h * 3 * d + 1), nan, dtype=dtype)[..., : 3 * h * d]
            .view(b, n, h, 3 * d)[..., d : 2 * d]
            .transpose(1, 2)
        )
    assert order == "strided"  # neither stride is 1: grad_out only
    return torch.full((b, h, n, d, 2), nan, dtype=dtype)[..., 1]


def place(values: Tensor, order: str) -> Tensor:
    return empty(order, values.shape, values.dtype).copy_(values)


class Forward(NamedTuple):
    out: Tensor
    lse: Tensor


def _view(t: Tensor) -> list[int]:
    return [t.data_ptr(), *t.stride()]


def _ints(values: Sequence[int]) -> ctypes.Array[ctypes.c_int64]:
    return (ctypes.c_int64 * len(values))(*values)


class Kernels:
    def __init__(self, path: Path, level: str = "") -> None:
        """`level`: what DIFFKERN_ISA shall say; each level is a copy of the library, as a library chooses but once."""
        before = os.environ.get("DIFFKERN_ISA")
        if level:
            os.environ["DIFFKERN_ISA"] = level
        with tempfile.TemporaryDirectory() as folder:
            self.lib = ctypes.CDLL(shutil.copy(path, folder))
        self.lib.dk_isa.restype = ctypes.c_char_p
        self.lib.dk_attention_grad_workspace.restype = ctypes.c_int64
        self.isa: str = self.lib.dk_isa().decode()
        if before is None:
            os.environ.pop("DIFFKERN_ISA", None)
        else:
            os.environ["DIFFKERN_ISA"] = before

    @staticmethod
    def _problem(q: Tensor, k: Tensor, v: Tensor) -> list[int]:
        batch, heads, queries, dim = q.shape
        sizes = [CODES[q.dtype], batch, heads, queries, k.shape[2], dim]
        return [*sizes, *_view(q), *_view(k), *_view(v)]

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, scale: float, out: Tensor | None = None, threads: int = 1
    ) -> Forward:
        out = torch.full_like(q, math.nan) if out is None else out
        wide = torch.float64 if q.dtype == torch.float64 else torch.float32
        lse = torch.full(q.shape[:3], math.nan, dtype=wide)
        words = [*self._problem(q, k, v), *_view(out), lse.data_ptr()]
        self.lib.dk_attention(_ints(words), ctypes.c_double(scale), ctypes.c_int64(threads), ctypes.c_int64(0))
        return Forward(out, lse)

    def backward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        scale: float,
        saved: Forward,
        grad: Tensor,
        grads: Grads | None = None,
        threads: int = 1,
        at_once: int = 0,
        backwards: bool = False,
        workspace: Tensor | None = None,
    ) -> Grads:
        """dq, dk, dv, in the order of q, k, v in memory unless `grads` are given. The workspace comes full of NaN."""
        words = self._problem(q, k, v)
        if grads is None:
            grads = tuple(torch.full_like(t, math.nan) for t in (q, k, v))  # type: ignore[assignment]
        assert grads is not None
        if workspace is None:
            size = int(self.lib.dk_attention_grad_workspace(_ints(words)))
            workspace = torch.full((size // 4 + 64,), math.nan)
        base = (workspace.data_ptr() + 255) // 256 * 256
        for t in (saved.out, grad, *grads):
            words += _view(t)
        words += [saved.lse.data_ptr(), base]
        split = [ctypes.c_int64(n) for n in (threads, at_once, int(backwards))]
        self.lib.dk_attention_grad(_ints(words), ctypes.c_double(scale), *split)
        return grads


def formula(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    return torch.softmax(q @ k.mT * scale, -1) @ v


def exact_grads(q: Tensor, k: Tensor, v: Tensor, scale: float, grad: Tensor) -> Grads:
    """Gradients of the formula in float64."""
    inputs = [t.double().detach().requires_grad_() for t in (q, k, v)]
    out = formula(*inputs, scale)
    return torch.autograd.grad(out, inputs, grad.double())  # type: ignore[return-value]


def plain_grads(q: Tensor, k: Tensor, v: Tensor, scale: float, grad: Tensor, flash: bool = False) -> Grads:
    """Gradients of torch's own attention in the dtype of the inputs, its math or its flash backend."""
    inputs = [t.detach().clone(memory_format=torch.contiguous_format).requires_grad_() for t in (q, k, v)]
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION if flash else SDPBackend.MATH):
        out = torch.nn.functional.scaled_dot_product_attention(*inputs, scale=scale)
    return torch.autograd.grad(out, inputs, grad.contiguous())  # type: ignore[return-value]
