"""The backward pass of `attention`: against float64, gradcheck, grad_out of any strides, bits, how autograd uses it."""

from __future__ import annotations

import math

import pytest
import torch
from helpers.attention_bounds import attention_floors
from helpers.attention_cases import ALL_LAYOUTS, DIMS, DTYPES, LAYOUTS, check_error, inputs, plain, with_gradients
from helpers.memory import SLACK, allocated, size
from helpers.op_cases import check_sentence, same_bits, threads, values
from helpers.suites import few
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import diffkern
from diffkern import reference

dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)
NAMES = ("out", "dq", "dk", "dv")
Tensors = tuple[Tensor, ...]


def exact_of(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return reference.attention(q, k, v)[0]


def compare(tensors: Tensors, what: str, up: Tensor | None = None) -> Tensors:
    """The rule of `check_error` for the result and each gradient; returns ours."""
    up = values(tuple(tensors[0].shape), 9, tensors[0].dtype) if up is None else up
    ours = with_gradients(diffkern.attention, tensors, up)
    exact = with_gradients(exact_of, tensors, up, torch.float64)
    torchs = with_gradients(plain, tensors, up)
    q, k, v = tensors
    least: tuple[Tensor | None, ...] = (None,) * len(NAMES)
    if q.dtype == torch.float64:  # which alone looks at it
        floors = attention_floors(q, k, v, q.shape[-1] ** -0.5, up)
        least = (floors.out, floors.dq, floors.dk, floors.dv)
    for name, a, b, c, floor in zip(NAMES, ours, exact, torchs, least, strict=True):
        check_error(a, b, c, f"{name}, {what}", floor)
    return ours


# ------------------------------------------------------------------------------------------------------------ accuracy
@dtypes
@pytest.mark.parametrize("dim", DIMS)
def test_sizes(dim: int, dtype: torch.dtype) -> None:
    names = list(LAYOUTS)
    for i, n in enumerate((1, 63, 64, 65, 77, 127, 256)):
        m = (n, 77, 130)[(i + dim // 8) % 3]
        q, k, v = (names[(dim // 8 + i * 3 + part) % len(names)] for part in (0, 1, 3))
        compare(inputs((1, 1 + n % 2, n, m, dim), dtype, (q, k, v), n), f"N {n}, M {m}, D {dim}, {q}, {k}, {v}")


@dtypes
@pytest.mark.parametrize(("n", "dim"), few([(1000, 40), (1000, 256), (4096, 64)], "1000-40"))
def test_many_tokens(n: int, dim: int, dtype: torch.dtype) -> None:
    compare(inputs((1, 1, n, n, dim), dtype, ("bhdn", "bhdn", "bhdn")), f"N {n}, D {dim}")


@dtypes
@pytest.mark.parametrize("layout", ALL_LAYOUTS)
def test_layouts(layout: str, dtype: torch.dtype) -> None:
    """Expanded tensors get their gradients in full. (Equal keys or values would make that of q zero.)"""
    for i, other in enumerate(name for name in ALL_LAYOUTS if name != "expanded tokens"):
        mine = layout if layout != "expanded tokens" else "bhdn"
        k, v = (mine, other) if i % 2 else (other, mine)
        compare(inputs((2, 3, 49, 35, 24), dtype, (layout, k, v)), f"{layout}, {k}, {v}")


def test_gradients_have_the_order_of_their_tensors() -> None:
    tensors = inputs((2, 3, 10, 6, 16), layouts=("bhdn", "bnhd", "unaligned bhnd"))
    _, dq, dk, dv = with_gradients(diffkern.attention, tensors, torch.ones(2, 3, 10, 16))
    assert dq.transpose(2, 3).is_contiguous()
    assert dk.transpose(1, 2).is_contiguous()
    assert dv.is_contiguous()


@pytest.mark.parametrize("layouts", [("bhnd",) * 3, ("bhdn", "bnhd", "bhdn"), ("bhdn",) * 3])
@pytest.mark.parametrize("sizes", [(1, 2, 3, 5, 8), (2, 1, 5, 1, 8), (1, 1, 1, 4, 16)])
def test_gradcheck(sizes: tuple[int, int, int, int, int], layouts: tuple[str, str, str]) -> None:
    q, k, v = (t.requires_grad_() for t in inputs(sizes, torch.float64, layouts))
    assert torch.autograd.gradcheck(diffkern.attention, (q, k, v))
    assert torch.autograd.gradcheck(lambda *t: diffkern.attention(*t, scale=-0.7), (q, k, v))


def test_float64_to_the_last_digits() -> None:
    compare(inputs((2, 2, 65, 77, 40), torch.float64, ("bhdn", "bhnd", "bhdn")), "float64")


# ------------------------------------------------------------------------------------------------------------ grad_out
UPS = {
    "expanded": lambda x: x.new_full((), 0.7).expand(x.shape),
    "one token": lambda x: x[:, :, :1].expand(x.shape),
    "transposed": lambda x: x.permute(3, 1, 0, 2).contiguous().permute(2, 1, 3, 0),
    "every second": lambda x: torch.stack([x, -x], -1).flatten(-2)[..., ::2],
    "other order": lambda x: x.transpose(2, 3).contiguous().transpose(2, 3),
}


@dtypes
@pytest.mark.parametrize("up", UPS)
def test_grad_out_of_any_strides(up: str, dtype: torch.dtype) -> None:
    for layout in ("bhnd", "bhdn"):
        tensors = inputs((2, 3, 70, 33, 16), dtype, (layout, "bhnd", layout))
        given = UPS[up](values((2, 3, 70, 16), 5, dtype))
        ours = compare(tensors, f"{layout}, {up}", given)
        dense = with_gradients(diffkern.attention, tensors, given.contiguous())
        assert all(same_bits(a, b) for a, b in zip(ours, dense, strict=True))


def test_sum_as_the_loss() -> None:
    tensors = [t.requires_grad_() for t in inputs((1, 2, 9, 7, 8))]
    diffkern.attention(*tensors).sum().backward()
    exact = torch.autograd.grad(reference.attention(*tensors)[0].sum(), tensors)
    for t, g in zip(tensors, exact, strict=True):
        torch.testing.assert_close(t.grad, g, rtol=1e-5, atol=1e-6)


# ------------------------------------------------------------------------------------------------------ odd numbers
@dtypes
@pytest.mark.parametrize("place", ["q", "k", "v", "grad_out"])
def test_nan_goes_where_the_formula_takes_it(place: str, dtype: torch.dtype) -> None:
    q, k, v = inputs((1, 2, 70, 100, 16), dtype)
    up = values((1, 2, 70, 16), 9, dtype)
    {"q": q, "k": k, "v": v, "grad_out": up}[place][0, 1, 37, 5] = math.nan
    ours = with_gradients(diffkern.attention, (q, k, v), up)
    exact = with_gradients(exact_of, (q, k, v), up, torch.float64)
    for name, a, b in zip(NAMES, ours, exact, strict=True):
        assert torch.equal(a.isnan(), b.isnan()), f"{name}: {int(a.isnan().sum())}, not {int(b.isnan().sum())}"


def test_no_queries_give_zero_gradients() -> None:
    q, k, v = inputs((2, 3, 0, 5, 8))
    _, dq, dk, dv = with_gradients(diffkern.attention, (q, k, v), torch.zeros(2, 3, 0, 8))
    assert dq.shape == q.shape
    assert not dk.any()
    assert not dv.any()
    empty = with_gradients(diffkern.attention, inputs((0, 3, 4, 5, 8)), torch.zeros(0, 3, 4, 8))
    assert [t.numel() for t in empty] == [0] * 4


# ----------------------------------------------------------------------------------------------- the same bits, always
@dtypes
@pytest.mark.parametrize(("dim", "layout"), [(40, "bhdn"), (64, "bhnd"), (512, "bnhd")])
def test_batch_threads_and_repetition_change_no_bit(layout: str, dim: int, dtype: torch.dtype) -> None:
    tensors = inputs((3, 2, 200, 77, dim), dtype, (layout, layout, layout))
    up = values((3, 2, 200, dim), 9, dtype)
    whole = with_gradients(diffkern.attention, tensors, up)
    for n in (1, 2, 3, 7):
        with threads(n):
            again = with_gradients(diffkern.attention, tensors, up)
        assert all(same_bits(a, b) for a, b in zip(again, whole, strict=True))
    for pick in ([1], [2, 0]):
        part = tuple(ALL_LAYOUTS[layout](t[pick]) for t in tensors)
        for a, b in zip(with_gradients(diffkern.attention, part, up[pick]), whole, strict=True):
            assert same_bits(a, b[pick])


# ------------------------------------------------------------------------------------------------- as autograd uses it
def test_one_input_only() -> None:
    tensors = inputs((1, 2, 9, 7, 8))
    up = values((1, 2, 9, 8), 9)
    _, *all_of_them = with_gradients(diffkern.attention, tensors, up)
    for i in range(3):
        leaves = [t.detach().requires_grad_(i == j) for j, t in enumerate(tensors)]
        (g,) = torch.autograd.grad(diffkern.attention(*leaves), leaves[i], up)
        assert same_bits(g, all_of_them[i])


def test_the_same_tensor_three_times() -> None:
    x = values((1, 2, 9, 8), 1).requires_grad_()
    (got,) = torch.autograd.grad(diffkern.attention(x, x, x).sum(), x)
    (want,) = torch.autograd.grad(reference.attention(x, x, x)[0].sum(), x)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)


def test_twice_through_one_graph_and_never_a_second_derivative() -> None:
    tensors = [t.requires_grad_() for t in inputs((1, 2, 9, 7, 8))]
    out = diffkern.attention(*tensors)
    up = torch.ones_like(out)
    first = torch.autograd.grad(out, tensors, up, retain_graph=True)
    assert all(map(same_bits, first, torch.autograd.grad(out, tensors, up, retain_graph=True)))
    check_sentence(
        lambda: torch.autograd.grad(out, tensors, up, create_graph=True),
        r"^diffkern\.attention: differentiable once only, use diffkern\.reference\.attention for higher derivatives$",
    )


def test_lse_has_no_gradient() -> None:
    tensors = [t.requires_grad_() for t in inputs((1, 2, 9, 7, 8))]
    out, lse = torch.ops.diffkern.attention(*tensors, 1.0)
    assert out.requires_grad
    assert not lse.requires_grad


def test_changed_in_place_is_noticed() -> None:
    q, k, v = (t.requires_grad_() for t in inputs((1, 2, 9, 7, 8)))
    key = k * 1
    out = diffkern.attention(q, key, v)
    key.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


def test_saved_are_the_inputs_out_and_a_number_a_query() -> None:
    """Nothing else between forward and backward, nothing at all without gradients."""
    tensors = inputs((2, 2, 128, 77, 64))
    used, out = allocated(lambda: diffkern.attention(*tensors))
    assert used <= size(out) + 4 * 2 * 2 * 128 + SLACK
    leaves = [t.detach().requires_grad_() for t in tensors]
    used, out = allocated(lambda: diffkern.attention(*leaves))
    assert used <= size(out) + 4 * 2 * 2 * 128 + SLACK
    with torch.no_grad():
        assert diffkern.attention(*leaves).grad_fn is None
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        diffkern.attention(*leaves)
    assert sorted(t.numel() for t in saved) == sorted([*(t.numel() for t in tensors), out.numel(), 2 * 2 * 128])


@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing(reentrant: bool) -> None:
    tensors = inputs((2, 2, 70, 77, 16))
    up = values((2, 2, 70, 16), 9)

    leaves = [t.detach().requires_grad_() for t in tensors]
    out = checkpoint(diffkern.attention, *leaves, use_reentrant=reentrant)
    out.backward(up)  # torch.autograd.grad is not for the reentrant kind
    expected = with_gradients(diffkern.attention, tensors, up)
    for a, b in zip((out.detach(), *(t.grad for t in leaves)), expected, strict=True):
        assert a is not None
        assert same_bits(a, b)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast(dtype: torch.dtype) -> None:
    """Casts what F.scaled_dot_product_attention casts; gradients come back in the dtype of the inputs."""
    tensors = inputs((2, 2, 33, 21, 16))
    up = values((2, 2, 33, 16), 9)
    with torch.autocast("cpu", dtype):
        out = diffkern.attention(*tensors)
        theirs = torch.nn.functional.scaled_dot_product_attention(*tensors)
        assert out.dtype == theirs.dtype == dtype
        assert same_bits(out, diffkern.attention(*(t.to(dtype) for t in tensors)))
        mixed = diffkern.attention(tensors[0].to(dtype), *tensors[1:])
        assert same_bits(mixed, out)
        assert diffkern.attention(*(t.double() for t in tensors)).dtype == torch.float64
        assert diffkern.spatial_attention(values((1, 48, 4, 4), 1), 2).dtype == dtype
        ours = with_gradients(diffkern.attention, tensors, up)
    assert all(g.dtype == torch.float32 for g in ours[1:])
    exact = with_gradients(exact_of, tensors, up, torch.float64)
    for a, b in zip(ours, exact, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=0.1, atol=0.05)
    with torch.autocast("cpu", dtype, enabled=False):
        assert diffkern.attention(*tensors).dtype == torch.float32


# ----------------------------------------------------------------------------------------- bad input of the native op
def test_bad_input_of_the_gradient() -> None:
    q, k, v = inputs((2, 3, 5, 7, 16))
    out, lse = torch.ops.diffkern.attention(q, k, v, 1.0)
    good = {"grad_out": out, "q": q, "k": k, "v": v, "out": out, "lse": lse, "scale": 1.0}
    for changes, sentence in (
        ({"grad_out": out[:1]}, r"grad_out must have the shape of q \[2, 3, 5, 16\], got \[1, 3, 5, 16\]"),
        ({"grad_out": out.half()}, r"grad_out must have the dtype of q \(float32\), got float16"),
        ({"out": out[:, :, :4]}, r"out must have the shape of q \[2, 3, 5, 16\], got \[2, 3, 4, 16\]"),
        ({"out": torch.zeros(2, 3, 10, 32)[:, :, ::2, ::2]}, r"out must have stride 1 in its tokens or its channels"),
        ({"lse": lse[:1]}, r"lse must have shape \[batch, heads, queries\] = \[2, 3, 5\], got \[1, 3, 5\]"),
        ({"lse": lse.double()}, r"lse must be float32 for q of float32, got float64"),
        ({"lse": lse.mT.contiguous().mT}, r"lse must be contiguous, got strides \[15, 1, 3\]"),
        ({"scale": math.nan}, r"scale must be finite, got nan"),
    ):
        check_sentence(
            lambda arguments={**good, **changes}: torch.ops.diffkern.attention_grad(**arguments),
            r"^diffkern\.attention_grad: " + sentence,
        )
