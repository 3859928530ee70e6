"""Checks of attention on a device: accuracy against float64, the same bits for any batch, graphs, streams, limits.

Other than the ops of the samplers, attention has no bits that all devices share: its sums have an order of their own on
each. What must hold on one device is that nothing else changes them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from gpu.harness import Target, assert_same
from helpers.attention_cases import AXES, FORMATS, LAYOUTS, ORDERS, check_error, inputs, plain, qkv_of, with_gradients
from helpers.op_cases import values
from torch import Tensor

from diffkern import ops, reference

Sizes = tuple[int, int, int, int, int]
# (B, H, N, M, D): one token, tails of a tile, the 77 tokens of a text, many tokens, few heads with many keys.
SIZES: list[Sizes] = [
    *((1, 2, n, m, 40) for n, m in ((1, 1), (63, 77), (64, 64), (65, 130), (127, 77))),
    *((2, 2, 130, 70, dim) for dim in (8, 24, 32, 64, 72, 80, 96, 128, 160, 248, 256)),
    (1, 1, 1000, 1000, 64),
    (1, 1, 64, 4096, 40),
    (1, 1, 200, 90, 512),
]


def has_backward(sizes: Sizes, dtype: torch.dtype, target: Target) -> bool:
    """Where the kernels of a GPU have a backward pass (cuda::attention_grad_limit)."""
    if not target.is_gpu or dtype == torch.float32:
        return True
    old = torch.cuda.get_device_capability(target.device) < (8, 0)
    return sizes[-1] <= (128 if old else 256)


def exact_of(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return reference.attention(q, k, v)[0]


def _results(
    target: Target, function: Callable[..., Tensor], given: tuple[Tensor, ...], up: Tensor, backward: bool
) -> tuple[Tensor, ...]:
    there, grad = target.move((given, up))
    made = with_gradients(function, there, grad) if backward else (function(*there),)
    return tuple(target.fetch(t) for t in made)


# ------------------------------------------------------------------------------------------------------------ accuracy
def check_attention(target: Target, dtype: torch.dtype, which: slice = slice(None), backward: bool = True) -> None:
    """Forward and gradients of all sizes, the layouts in turn."""
    names = list(LAYOUTS)
    for i, sizes in list(enumerate(SIZES))[which]:
        layouts = tuple(names[(i * 3 + part) % len(names)] for part in (0, 1, 3))
        given = inputs(sizes, dtype, layouts)
        up = values(tuple(given[0].shape), 9, dtype)
        both = backward and has_backward(sizes, dtype, target)
        got = _results(target, ops.attention, given, up, both)
        want = with_gradients(exact_of, given, up, torch.float64)
        theirs = with_gradients(plain, given, up)
        for name, a, b, c in zip(("out", "dq", "dk", "dv")[: len(got)], got, want, theirs, strict=False):
            check_error(a, b, c, f"{name}, {dtype}, {sizes}, {layouts}")


def check_spatial(target: Target, dtype: torch.dtype, form: str, backward: bool = True) -> None:
    """Head orders and memory formats; the gradient stands where q, k and v do."""
    for order in ORDERS if form == "contiguous" else ORDERS[:2]:
        for shape, heads in (((2, 3 * 2 * 40, 7, 9), 2), ((1, 3 * 64, 77), 1), ((2, 3 * 3 * 8, 1, 1), 3)):
            qkv = qkv_of(shape, dtype, form)
            up = values((shape[0], shape[1] // 3, *shape[2:]), 9, dtype)

            def theirs(x: Tensor, heads: int = heads, order: str = order) -> Tensor:
                axes = {"new": (3, heads, -1), "legacy": (heads, 3, -1), "edm": (heads, x.shape[1] // heads // 3, 3)}
                parts = x.flatten(2).unflatten(1, axes[order]).movedim(AXES[order], 0).transpose(-1, -2)
                out = plain(*parts.unbind(0))
                return out.transpose(-1, -2).reshape(x.shape[0], -1, *x.shape[2:])

            def ours(x: Tensor, heads: int = heads, order: str = order) -> Tensor:
                return ops.spatial_attention(x, heads, order)

            def exact(x: Tensor, heads: int = heads, order: str = order) -> Tensor:
                return reference.spatial_attention(x, heads, order)[0]

            got = _results(target, ours, (qkv,), up, backward)
            want = with_gradients(exact, (qkv,), up, torch.float64)
            for name, a, b, c in zip(("out", "dqkv"), got, want, with_gradients(theirs, (qkv,), up), strict=False):
                check_error(a, b, c, f"{name}, {dtype}, {shape}, {order}, {form}")


# ----------------------------------------------------------------------------------------------- the same bits, always
def check_batch_and_repetition(target: Target, dtype: torch.dtype) -> None:
    """A sample alone, in another batch, once more: the same bits, also where keys are split over blocks."""
    for sizes in ((3, 2, 130, 77, 40), (2, 1, 64, 3000, 64), (2, 1, 70, 300, 256)):
        given = inputs(sizes, dtype, ("bhdn", "bhnd", "bhdn"))
        up = values(tuple(given[0].shape), 9, dtype)
        there, grad = target.move((given, up))
        whole = [t.cpu() for t in with_gradients(ops.attention, there, grad)]
        for pick in ([0], [1], [1, 0]):
            part = tuple(LAYOUTS["bhdn" if i != 1 else "bhnd"](t[pick]) for i, t in enumerate(given))
            for name, a, b in zip(
                ("out", "dq", "dk", "dv"), _results(target, ops.attention, part, up[pick], True), whole, strict=True
            ):
                assert_same(a, b[pick], f"{name} of samples {pick}, {dtype}, {sizes}")
        for a, b in zip(_results(target, ops.attention, given, up, True), whole, strict=True):
            assert_same(a, b, f"once more, {dtype}, {sizes}")


# ------------------------------------------------------------------------------------------------- graphs and streams
def jobs(
    dtype: torch.dtype = torch.float16,
) -> Iterator[tuple[str, Callable[[dict[str, Tensor]], Any], dict[str, Tensor]]]:
    """(name, a function of operands, the operands on the CPU): forward, with split keys, and backward."""
    for name, sizes in (("attention", (2, 2, 70, 90, 40)), ("attention, split keys", (1, 1, 64, 4096, 64))):
        q, k, v = inputs(sizes, dtype, ("bhdn", "bhdn", "bhnd"))
        yield name, lambda o: ops.attention(o["q"], o["k"], o["v"]), {"q": q, "k": k, "v": v}
    q, k, v = inputs((2, 2, 70, 90, 40), dtype)
    out, lse = torch.ops.diffkern.attention(q, k, v, 0.2)
    given = {"grad_out": values(tuple(q.shape), 9, dtype), "q": q, "k": k, "v": v, "out": out, "lse": lse}
    yield (
        "gradient",
        lambda o: torch.cat([g.flatten() for g in torch.ops.diffkern.attention_grad(**o, scale=0.2)]),
        given,
    )
    qkv = qkv_of((2, 240, 7, 9), dtype)
    yield "spatial", lambda o: ops.spatial_attention(o["qkv"], 2), {"qkv": qkv}


def check_graphs(target: Target) -> None:
    """Captured once; replay sees changed operands. The workspace is in the graph's memory."""
    for name, function, given in jobs():
        there, found = target.move(given), {}

        def run(function: Any = function, there: Any = there, found: Any = found) -> None:
            found["result"] = function(there)

        replay = target.record(run)
        for operand in ("", *given):
            if operand:
                there[operand].mul_(0.5)
            replay()
            got = target.fetch(found["result"])
            assert_same(got, function(there).cpu(), f"{name}, {operand or 'nothing'} changed")


def check_streams(target: Target) -> None:
    """Operands that a side stream fills late are seen, and the host never waits."""
    for name, function, given in jobs():
        source = target.move(given)
        expected = function(source).cpu()
        late = {key: torch.zeros_like(t) for key, t in source.items()}
        with target.side_stream() as join:
            function(late)  # loads the kernel and makes memory, both of which may wait
            target.synchronize()
            with target.no_sync():
                target.busy()
                for key, t in late.items():
                    t.copy_(source[key])
                result = function(late)
                join()
        copy = result.clone()  # on the outer stream, behind the event
        target.synchronize()
        assert_same(target.fetch(copy), expected, f"{name} on a side stream")


# -------------------------------------------------------------------------------------------------------------- limits
def check_limits(target: Target) -> None:
    """What a GPU cannot do is one sentence; the CPU can."""
    cases: list[tuple[Callable[[], object], str]] = []
    q, k, v = target.move(inputs((1, 1, 9, 7, 16), torch.float64))
    cases.append(
        (lambda: ops.attention(q, k, v), r"diffkern\.attention: float64 .*, got float64 with 16 channels a head")
    )
    wide = target.move(tuple(t.requires_grad_() for t in inputs((1, 1, 9, 7, 512), torch.float16)))
    cases.append(
        (lambda: ops.attention(*wide).sum().backward(), r"diffkern\.attention_grad: .* head dim.*512 channels")
    )
    for call, sentence in cases:
        if target.is_gpu:
            with pytest.raises(RuntimeError, match=sentence):
                call()
        else:
            call()


def check_devices_do_not_mix(target: Target, other: torch.device) -> None:
    """Each operand on another device is refused by its name."""
    given = dict(zip("qkv", target.move(inputs((1, 2, 9, 7, 16))), strict=True))
    for name in "kv":
        with pytest.raises(RuntimeError, match=rf"diffkern\.attention: {name} must be on the device of q \(.*\), got "):
            ops.attention(**{**given, name: given[name].to(other)})
    out, lse = torch.ops.diffkern.attention(*given.values(), 1.0)
    rest = {"grad_out": out, **given, "out": out, "lse": lse}
    for name in ("grad_out", "k", "out", "lse"):
        mixed = {**rest, name: rest[name].to(other)}
        with pytest.raises(RuntimeError, match=rf"diffkern\.attention_grad: {name} must be on the device of q \("):
            torch.ops.diffkern.attention_grad(**mixed, scale=1.0)


def check_compile(target: Target, **options: Any) -> None:
    """One graph with the bits of the eager op, forward and backward."""
    torch._dynamo.reset()
    compiled: Any = torch.compile(lambda x: ops.spatial_attention(x * 0.5, 2), fullgraph=True, **options)
    try:
        for form in FORMATS:
            x = target.move(qkv_of((2, 240, 7, 9), torch.float16, form)).requires_grad_()
            up = target.move(values((2, 80, 7, 9), 9, torch.float16))
            out = compiled(x)
            (got,) = torch.autograd.grad(out, x, up)
            want = ops.spatial_attention(x * 0.5, 2)
            (grad,) = torch.autograd.grad(want, x, up)
            assert_same(target.fetch(out), want.detach().cpu(), f"compiled, {form}")
            assert_same(target.fetch(got), grad.cpu(), f"gradient compiled, {form}")
    finally:
        torch._dynamo.reset()


def check_opcheck(target: Target) -> None:
    """torch.library.opcheck on this device."""
    for dtype, layout in ((torch.float32, "bhdn"), (torch.float16, "bnhd")):
        q, k, v = target.move(tuple(t.requires_grad_() for t in inputs((1, 2, 9, 7, 16), dtype, (layout,) * 3)))
        torch.library.opcheck(torch.ops.diffkern.attention.default, (q, k, v, 0.25))
    qkv = target.move(qkv_of((2, 96, 3, 4), torch.float16, "channels_last").requires_grad_())
    torch.library.opcheck(torch.ops.diffkern.spatial_attention.default, (qkv, 2, 1, 0.25))
