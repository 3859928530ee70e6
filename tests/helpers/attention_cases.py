"""Inputs of the attention tests: [B, H, N, D] in every memory layout, qkv, and what results are compared with."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from helpers.op_cases import values
from helpers.tolerances import TOLERANCES

DIMS = (8, 24, 32, 40, 64, 72, 80, 96, 128, 160, 256, 512)
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
ORDERS = ("new", "legacy", "edm")
FORMATS = ("contiguous", "channels_last")
AXES = {"new": 1, "legacy": 2, "edm": 3}


def _wide(x: Tensor, gap: int) -> Tensor:
    """x as a slice of rows that are `gap` longer, at an odd element of its memory."""
    buffer = x.new_full((*x.shape[:-1], x.shape[-1] + gap), -7.0).flatten()
    memory = torch.cat([buffer.new_full((1,), -7.0), buffer])[1:].view(*x.shape[:-1], x.shape[-1] + gap)
    memory[..., : x.shape[-1]] = x
    return memory[..., : x.shape[-1]]


# Values [B, H, N, D] -> the same values in another layout.
LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "bhnd": lambda x: x.contiguous(),
    "bnhd": lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
    "bhdn": lambda x: x.transpose(2, 3).contiguous().transpose(2, 3),
    "hbnd": lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
    "bdhn": lambda x: x.permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1),
    "unaligned bhnd": lambda x: _wide(x, 3),
    "unaligned bhdn": lambda x: _wide(x.transpose(2, 3), 5).transpose(2, 3),
    "slice of qkv": lambda x: (
        torch.cat([x.transpose(2, 3).flatten(1, 2)] * 3, 1)
        .chunk(3, 1)[1]
        .unflatten(1, x.shape[1:2] + x.shape[3:])
        .transpose(2, 3)
    ),
}
# These repeat values: the first sample, head or token for all.
EXPANDED: dict[str, Callable[[Tensor], Tensor]] = {
    "expanded batch": lambda x: x[:1].expand(x.shape),
    "expanded heads": lambda x: x[:, :1].expand(x.shape),
    "expanded tokens": lambda x: x[:, :, :1].expand(x.shape),
}
ALL_LAYOUTS = LAYOUTS | EXPANDED


def inputs(
    shape: tuple[int, int, int, int, int],
    dtype: torch.dtype = torch.float32,
    layouts: tuple[str, str, str] = ("bhnd", "bhnd", "bhnd"),
    seed: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v for (B, H, N, M, D)."""
    b, h, n, m, d = shape
    made = [values((b, h, tokens, d), seed + i, dtype) for i, tokens in enumerate((n, m, m))]
    q, k, v = (ALL_LAYOUTS[layout](x) for layout, x in zip(layouts, made, strict=True))
    return q, k, v


def qkv_of(
    shape: tuple[int, ...], dtype: torch.dtype = torch.float32, form: str = "contiguous", seed: int = 0
) -> Tensor:
    """[B, 3 C, positions...] in a memory format."""
    x = values(shape, seed, dtype)
    return x if form == "contiguous" else x.movedim(1, -1).contiguous().movedim(-1, 1)


def split(qkv: Tensor, heads: int, order: str) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v [B, heads, N, D] as views of qkv."""
    d = qkv.shape[1] // 3 // heads
    axes = {"new": (3, heads, d), "legacy": (heads, 3, d), "edm": (heads, d, 3)}[order]
    q, k, v = qkv.flatten(2).unflatten(1, axes).movedim(AXES[order], 0).transpose(-1, -2).unbind(0)
    return q, k, v


def join(parts: tuple[Tensor, Tensor, Tensor], order: str, shape: torch.Size) -> Tensor:
    """The inverse of `split`, a copy."""
    return torch.stack([p.transpose(-1, -2) for p in parts], AXES[order]).reshape(shape)


def plain(q: Tensor, k: Tensor, v: Tensor, scale: float | None = None) -> Tensor:
    """torch's own attention from its formula, in the dtype of the inputs."""
    with sdpa_kernel(SDPBackend.MATH):
        return scaled_dot_product_attention(q, k, v, scale=scale)


def with_gradients(
    function: Callable[..., Tensor], tensors: tuple[Tensor, ...], up: Tensor, dtype: torch.dtype | None = None
) -> tuple[Tensor, ...]:
    """(result, gradient of each tensor) of the function on copies of the tensors in `dtype`, which lie as they do."""
    leaves = [t.detach() if dtype is None else t.detach().to(dtype) for t in tensors]
    leaves = [t.requires_grad_() for t in leaves]
    out = function(*leaves)
    return (out.detach(), *torch.autograd.grad(out, leaves, up.to(out.dtype)))


def check_error(ours: Tensor, exact: Tensor, theirs: Tensor, what: str, floor: Tensor | None = None) -> None:
    """Asserts that ours is at most 2 times as far from float64 as plain PyTorch, in the root mean square.

    The largest of many roundings scatters by half its size from one set of numbers to the next, for ours as for
    theirs, so it may be 3 times theirs. Both may round once more where they are stored (tolerances.py). In float64,
    where exact is rounded as often, an error below ``floor`` (attention_bounds.py) follows from the arithmetic alone.
    """
    assert ours.shape == exact.shape, f"{what}: shape {tuple(ours.shape)}, not {tuple(exact.shape)}"
    assert torch.equal(ours.isnan(), exact.isnan()), f"{what}: NaN in other places"
    allowed = TOLERANCES[ours.dtype].allowed
    mine, other = ours.double() - exact, theirs.double() - exact
    for kind, size, factor in (("rms", lambda t: float(t.square().mean().sqrt()), 2), ("largest", _largest, 3)):
        least = size(floor) if floor is not None and ours.dtype == torch.float64 else 0.0
        error, baseline = size(mine), size(other)
        bound = max(factor * baseline, least) + allowed * size(exact)
        assert error <= bound or not ours.numel(), f"{what}: {kind} error {error:.3g}, plain PyTorch {baseline:.3g}"


def _largest(t: Tensor) -> float:
    return float(t.abs().max()) if t.numel() else 0.0
