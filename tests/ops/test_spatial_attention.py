"""`spatial_attention`: head orders, memory formats, gradient in place of q, k and v; nothing is moved or copied."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.attention_bounds import attention_floors
from helpers.attention_cases import (
    DTYPES,
    FORMATS,
    ORDERS,
    check_error,
    join,
    plain,
    qkv_of,
    split,
    with_gradients,
)
from helpers.memory import SLACK, allocated
from helpers.op_cases import check_sentence, same_bits, threads, values
from torch import Tensor

import diffkern
from diffkern import reference

dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)
LAID = [(order, form) for order in ORDERS for form in FORMATS if (order, form) != ("edm", "channels_last")]
laid = pytest.mark.parametrize(("order", "form"), LAID)
Function = Callable[[Tensor], Tensor]


def ours(heads: int, order: str) -> Function:
    return lambda qkv: diffkern.spatial_attention(qkv, heads, order)


def exact(heads: int, order: str) -> Function:
    return lambda qkv: reference.spatial_attention(qkv, heads, order)[0]


def torchs(heads: int, order: str) -> Function:
    def function(qkv: Tensor) -> Tensor:
        out = plain(*split(qkv, heads, order))
        return out.transpose(-1, -2).reshape(qkv.shape[0], qkv.shape[1] // 3, *qkv.shape[2:])

    return function


def guided_diffusion(qkv: Tensor, heads: int, legacy: bool) -> Tensor:
    """QKVAttentionLegacy and QKVAttention as formulas (Dhariwal and Nichol 2021): C^-1/4 on q and on k."""
    batch, width, length = qkv.shape
    d = width // (3 * heads)
    if legacy:
        q, k, v = qkv.reshape(batch * heads, 3 * d, length).split(d, 1)
    else:
        q, k, v = (t.reshape(batch * heads, d, length) for t in qkv.chunk(3, 1))
    factor = d**-0.25
    weight = torch.einsum("bct,bcs->bts", q * factor, k * factor).softmax(-1)
    return torch.einsum("bts,bcs->bct", weight, v).reshape(batch, -1, length)


def karras(qkv: Tensor, heads: int) -> Tensor:
    """EDM's attention as a formula: q, k, v unbound from the innermost channel axis."""
    batch, width, length = qkv.shape
    q, k, v = qkv.reshape(batch * heads, width // heads // 3, 3, length).unbind(2)
    weight = torch.einsum("ncq,nck->nqk", q, k / math.sqrt(k.shape[1])).softmax(2)
    return torch.einsum("nqk,nck->ncq", weight, v).reshape(batch, -1, length)


# ------------------------------------------------------------------------------------------------------- head orders
@pytest.mark.parametrize("order", ORDERS)
def test_orders_are_those_of_their_sources(order: str) -> None:
    qkv = values((2, 3 * 4 * 16, 35), 3, torch.float64)
    source = karras(qkv, 4) if order == "edm" else guided_diffusion(qkv, 4, order == "legacy")
    torch.testing.assert_close(diffkern.spatial_attention(qkv, 4, order), source, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(reference.spatial_attention(qkv, 4, order)[0], source, rtol=1e-12, atol=1e-12)


def test_one_head_has_one_order_of_parts() -> None:
    qkv = values((2, 48, 6, 5), 3)
    assert same_bits(diffkern.spatial_attention(qkv, 1, "new"), diffkern.spatial_attention(qkv, 1, "legacy"))


@laid
def test_it_is_attention_on_views(order: str, form: str) -> None:
    """The same bits as `attention` on views of qkv, forward and backward: one kernel, no copies to differ."""
    for dtype in DTYPES:
        qkv = qkv_of((2, 3 * 2 * 24, 7, 9), dtype, form)
        q, k, v = split(qkv, 2, order)
        up = values((2, 48, 7, 9), 5, dtype)
        out, dqkv = with_gradients(ours(2, order), (qkv,), up)
        heads, *parts = with_gradients(diffkern.attention, (q, k, v), split(torch.cat([up] * 3, 1), 2, "new")[0])
        assert same_bits(out, heads.transpose(-1, -2).reshape(out.shape))
        assert same_bits(dqkv, join((parts[0], parts[1], parts[2]), order, qkv.shape))


# ------------------------------------------------------------------------------------------------- accuracy and format
# Head dim -> a shape of qkv.
SHAPES: dict[int, tuple[int, ...]] = {
    8: (2, 3 * 3 * 8, 5, 7),
    40: (1, 3 * 2 * 40, 16, 16),
    80: (3, 3 * 80, 1, 1),
    64: (2, 3 * 64, 77),
    32: (1, 3 * 2 * 32, 2, 3, 11),
    512: (1, 3 * 512, 8, 9),
}


@dtypes
@laid
@pytest.mark.parametrize("dim", SHAPES)
def test_against_float64(dim: int, order: str, form: str, dtype: torch.dtype) -> None:
    shape = SHAPES[dim]
    heads = shape[1] // (3 * dim)
    qkv = qkv_of(shape, dtype, form)
    up = values((shape[0], shape[1] // 3, *shape[2:]), 5, dtype)
    mine = with_gradients(ours(heads, order), (qkv,), up)
    want = with_gradients(exact(heads, order), (qkv,), up, torch.float64)
    other = with_gradients(torchs(heads, order), (qkv,), up)
    q, k, v = split(qkv, heads, order)
    floors = attention_floors(q, k, v, dim**-0.5, split(torch.cat([up] * 3, 1), heads, "new")[0])
    least = (floors.out.transpose(-1, -2).reshape(up.shape), join(floors[2:], order, qkv.shape))
    for what, a, b, c, floor in zip(("out", "dqkv"), mine, want, other, least, strict=True):
        check_error(a, b, c, f"{what}, {shape}, {order}, {form}", floor)
        tokens = a.flatten(2).shape[2]
        moved = a.movedim(1, -1) if form == "channels_last" and tokens > 1 else a
        assert moved.is_contiguous(), f"{what} is not {form}: {a.stride()}"


def test_formats_torch_knows_are_kept() -> None:
    for form in (torch.contiguous_format, torch.channels_last):
        qkv = values((2, 96, 6, 5), 1).contiguous(memory_format=form).requires_grad_()
        out = diffkern.spatial_attention(qkv, 2)
        assert out.is_contiguous(memory_format=form)
        (grad,) = torch.autograd.grad(out.sum(), qkv)
        assert grad.is_contiguous(memory_format=form)


@pytest.mark.parametrize(("order", "form"), LAID)
def test_gradcheck(order: str, form: str) -> None:
    qkv = qkv_of((2, 3 * 2 * 8, 2, 3), torch.float64, form).requires_grad_()
    assert torch.autograd.gradcheck(ours(2, order), (qkv,))


# ------------------------------------------------------------------------------------------------------ views of memory
def test_slices_of_larger_tensors() -> None:
    """Some samples, some channels and an odd offset of a larger tensor are read where they are."""
    for form in FORMATS:
        large = qkv_of((5, 61, 4, 7), torch.float32, form)
        part = large[1::2, 7:55]
        expected = diffkern.spatial_attention(part.contiguous(), 2)
        torch.testing.assert_close(diffkern.spatial_attention(part, 2), expected)
        assert part.data_ptr() != part.contiguous().data_ptr()
    shared = qkv_of((1, 48, 4, 7)).expand(3, -1, -1, -1)
    assert same_bits(diffkern.spatial_attention(shared, 2)[2:], diffkern.spatial_attention(shared[:1], 2))


UPS: dict[str, Callable[[Tensor], Tensor]] = {
    "expanded": lambda x: x.new_full((), 0.7).expand(x.shape),
    "a channel for all": lambda x: x[:, :1].expand(x.shape),
    "channels_last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "transposed positions": lambda x: x.transpose(2, 3).contiguous().transpose(2, 3),
    "every second": lambda x: torch.stack([x, -x], -1).flatten(-2)[..., ::2],
}


@pytest.mark.parametrize("up", UPS)
@laid
def test_grad_out_of_any_strides(order: str, form: str, up: str) -> None:
    qkv = qkv_of((2, 3 * 2 * 16, 5, 6), torch.float32, form)
    given = UPS[up](values((2, 32, 5, 6), 5))
    got = with_gradients(ours(2, order), (qkv,), given)
    dense = with_gradients(ours(2, order), (qkv,), given.contiguous())
    assert all(map(same_bits, got, dense))


@laid
def test_nothing_is_moved(order: str, form: str) -> None:
    """Forward: the result and a number a query. Backward: dqkv and a workspace of about its size."""
    qkv = qkv_of((2, 3 * 4 * 40, 16, 16), torch.float32, form)
    item, sums = 4, 4 * 2 * 4 * 256
    used, out = allocated(lambda: diffkern.spatial_attention(qkv, 4, order))
    assert isinstance(out, Tensor)
    assert used <= out.numel() * item + sums + SLACK
    leaf = qkv.detach().requires_grad_()
    out, up = diffkern.spatial_attention(leaf, 4, order), values((2, 160, 16, 16), 5)
    used, _ = allocated(lambda: torch.autograd.grad(out, leaf, up, retain_graph=True))
    assert used <= 2.25 * qkv.numel() * item + SLACK


# ------------------------------------------------------------------------------------------------ the same bits, always
@dtypes
@laid
def test_batch_and_threads_change_no_bit(order: str, form: str, dtype: torch.dtype) -> None:
    qkv = qkv_of((3, 3 * 2 * 40, 12, 11), dtype, form)
    up = values((3, 80, 12, 11), 5, dtype)
    whole = with_gradients(ours(2, order), (qkv,), up)
    for n in (1, 3):
        with threads(n):
            assert all(map(same_bits, with_gradients(ours(2, order), (qkv,), up), whole))
    for b in range(3):
        one = with_gradients(ours(2, order), (qkv[b : b + 1],), up[b : b + 1])
        assert all(same_bits(a, w[b : b + 1]) for a, w in zip(one, whole, strict=True))


# ------------------------------------------------------------------------------------------------------------ bad input
QKV = qkv_of((2, 96, 4, 5))
LAST = QKV.contiguous(memory_format=torch.channels_last)


def _with(qkv: Tensor = QKV, heads: int = 2, order: str = "new", **more: float) -> Callable[[], object]:
    return lambda: diffkern.spatial_attention(qkv, heads, order, **more)


NATIVE = torch.ops.diffkern
BAD: dict[str, tuple[Callable[[], object], str]] = {
    "order": (_with(order="guided"), r"^order must be one of new, legacy, edm, got 'guided'$"),
    "order of the op": (
        lambda: NATIVE.spatial_attention(QKV, 2, 3, 1.0),
        r"order must be 0 \(new\), 1 \(legacy\) or 2 \(edm\), got 3",
    ),
    "heads": (_with(heads=0), r"^num_heads must be an integer of at least 1, below 2\^63, got 0$"),
    "heads that are no integer": (_with(heads=2.0), r"^num_heads must be an integer of at least 1, .*, got 2\.0$"),
    "heads beyond an int64": (_with(heads=2**70), r"^num_heads must be an integer .* below 2\^63, got 1180591620717"),
    "3 heads beyond an int64": (
        _with(QKV[:0], heads=(2**64 + 2) // 3),
        r"heads must be at most a third of the channels of qkv, 32, got 6148914691236517206",
    ),
    "heads of the op": (lambda: NATIVE.spatial_attention(QKV, -1, 0, 1.0), r"heads must be at least 1, got -1"),
    "channels": (_with(heads=5), r"the channels of qkv must be divisible by 3 heads = 15, got 96"),
    "no channels": (_with(QKV[:, :0]), r"the channels of qkv must be divisible by 3 heads = 6, got 0"),
    "head dim": (
        _with(heads=8),
        r"the channels of a head \(those of qkv / 3 / heads\) must be a multiple of 8 up to 256, or 512, got 4",
    ),
    "dims": (
        _with(QKV[0, :, 0]),
        r"qkv must have 3 dimensions or more, \[batch, channels, positions...\], got \[96, 5\]",
    ),
    "one dimension": (_with(QKV[0, :, 0, 0]), r"qkv must have 3 dimensions or more, .*, got \[96\]"),
    "no positions": (_with(QKV[..., :0]), r"qkv must have at least one position, got shape \[2, 96, 4, 0\]"),
    "transposed positions": (
        _with(QKV.transpose(2, 3)),
        r"qkv must have its positions one after the other \(contiguous or channels_last\), got strides .*20, 1, 5\]",
    ),
    "every second position": (
        _with(values((2, 96, 40), 1)[..., ::2]),
        r"qkv must have stride 1 in its positions or its channels, got strides \[3840, 40, 2\] for shape \[2, 96, 20\]",
    ),
    "edm in channels_last": (
        _with(LAST, order="edm"),
        r"qkv must be contiguous for order 2 \(edm\), where q, k and v alternate channel by channel, "
        r"got channels_last strides \[1920, 1, 480, 96\] for shape \[2, 96, 4, 5\]",
    ),
    "dtype": (_with(QKV.long()), r"qkv must be float64, float32, float16 or bfloat16, got int64"),
    "complex": (_with(QKV.to(torch.complex64)), r"qkv must be .*, got complex64"),
    "sparse": (_with(QKV.to_sparse()), r"qkv must be a dense \(strided\) tensor, got layout torch.sparse_coo"),
    "scale": (_with(scale=-math.inf), r"scale must be finite, got -inf"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(case: str) -> None:
    call, sentence = BAD[case]
    start = "" if sentence.startswith("^") else r"^diffkern\.spatial_attention: "
    check_sentence(call, start + sentence)


def test_bad_input_of_the_gradient() -> None:
    out, lse = NATIVE.spatial_attention(QKV, 2, 0, 1.0)
    good = {"grad_out": out, "qkv": QKV, "out": out, "lse": lse, "heads": 2, "order": 0, "scale": 1.0}
    shape = r"the shape of qkv with a third of its channels, \[2, 32, 4, 5\]"
    for changes, sentence in (
        ({"grad_out": out[:, :16]}, rf"grad_out must have {shape}, got \[2, 16, 4, 5\]"),
        ({"grad_out": out.flatten(2)}, rf"grad_out must have {shape}, got \[2, 32, 20\]"),
        ({"grad_out": out.double()}, r"grad_out must have the dtype of qkv \(float32\), got float64"),
        ({"out": out[:1]}, rf"out must have {shape}, got \[1, 32, 4, 5\]"),
        ({"lse": lse.half()}, r"lse must be float32 for qkv of float32, got float16"),
        ({"lse": lse.flatten(1)}, r"lse must have shape \[batch, heads, queries\] = \[2, 2, 20\], got \[2, 40\]"),
        ({"order": -1}, r"order must be 0 \(new\), 1 \(legacy\) or 2 \(edm\), got -1"),
    ):
        check_sentence(
            lambda arguments={**good, **changes}: NATIVE.spatial_attention_grad(**arguments),
            r"^diffkern\.spatial_attention_grad: " + sentence,
        )


def test_never_a_second_derivative() -> None:
    qkv = qkv_of((1, 48, 4, 4)).requires_grad_()
    out = diffkern.spatial_attention(qkv, 2)
    check_sentence(
        lambda: torch.autograd.grad(out.sum(), qkv, create_graph=True),
        r"^diffkern\.spatial_attention: differentiable once only, use diffkern\.reference\.spatial_attention for",
    )


def test_documented_examples(root: Path) -> None:
    """The code of docs/attention.md runs as it stands, and gives what its comments say."""
    page = root / "docs" / "attention.md"
    names: dict[str, Any] = {}
    blocks = re.findall(r"```python\n(.*?)```", page.read_text(), re.S)
    assert len(blocks) == 3  # the third: tests/nn/test_onnx.py
    exec(blocks[0], names)
    assert names["h"].transpose(-1, -2).flatten(1, 2).unflatten(2, (32, 32)).is_contiguous()
    exec(blocks[1], names)
    assert names["x"].shape == (1, 512, 16, 16)
