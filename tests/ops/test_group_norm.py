"""group_norm_act: the formula in every dtype and layout, gradients, orders of sums, special values, bad input."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from helpers.op_cases import check_sentence, same_bits, threads
from helpers.tolerances import STATE_DTYPES
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import diffkern
from diffkern import ops, reference

# (shape, groups): one block of positions and several, rests of every tile, whole tasks and phases, one group, groups
# of one channel, no positions.
CASES = [
    ((2, 6, 5, 7), 3),
    ((1, 32, 32, 32), 8),
    ((3, 64, 8, 8), 32),
    ((2, 96, 37, 31), 2),
    ((2, 20), 5),
    ((2, 4, 3001), 2),
    ((17, 32, 3, 3), 8),
    ((1, 8, 70, 70), 1),
    ((2, 6, 3, 4, 5), 6),
]
ALL = ("weight", "bias", "scale", "shift", "add")
PARAMETERS = ((), ("weight",), ("weight", "bias", "add"), ALL, ("scale", "shift"), ("shift",), ALL[:4], ("add",))
dtypes = pytest.mark.parametrize("dtype", STATE_DTYPES, ids=str)
Given = dict[str, Tensor]


def numbers(shape: tuple[int, ...], dtype: torch.dtype, seed: int = 0, last: bool = False) -> Tensor:
    x = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).to(dtype)
    return x.movedim(1, -1).contiguous().movedim(-1, 1) if last else x


def parameters(shape: tuple[int, ...], names: tuple[str, ...], dtype: torch.dtype) -> Given:
    parts = numbers((shape[0], 3 * shape[1]), dtype, 3)  # thirds of one tensor: strides of their own
    all_of_them = {"weight": numbers(shape[1:2], dtype, 1), "bias": numbers(shape[1:2], dtype, 2)}
    all_of_them |= dict(zip(ALL[2:], parts.chunk(3, 1), strict=True))
    return {name: all_of_them[name] for name in names}


def plain(x: Tensor, groups: int, weight=None, bias=None, *, scale=None, shift=None, add=None, eps=1e-5, act="silu"):
    """The same by torch's own functions."""
    shape = (*x.shape[:2], *(1,) * (x.dim() - 2))
    y = F.group_norm(x if add is None else x + add.reshape(shape), groups, weight, bias, eps)
    y = y if scale is None else y * (1 + scale.reshape(shape))
    y = y if shift is None else y + shift.reshape(shape)
    return F.silu(y) if act else y


def error(got: Tensor, exact: Tensor) -> float:
    """The largest error by the size of the largest value, in roundings of the dtype."""
    return ((got.double() - exact).abs().max() / exact.abs().max() / torch.finfo(got.dtype).eps).item()


def check(got: Tensor, exact: Tensor, other: Tensor, what: str) -> None:
    """At most twice the error of torch's own functions, and roundings of the store and of the sums."""
    limit = 2 * error(other, exact) + (2 if got.dtype in (torch.float16, torch.bfloat16) else 8)
    assert error(got, exact) <= limit, (what, error(got, exact), limit)


def leaves(x: Tensor, given: Given, dtype: torch.dtype | None = None) -> tuple[Tensor, Given]:
    def leaf(t: Tensor) -> Tensor:
        return t.detach().to(dtype or t.dtype).requires_grad_()

    return leaf(x), {name: leaf(t) for name, t in given.items()}


# ------------------------------------------------------------------------------------------------------ the formula
@dtypes
@pytest.mark.parametrize("last", [False, True], ids=["contiguous", "channels_last"])
def test_value_and_gradients(dtype: torch.dtype, last: bool) -> None:
    for k, (shape, groups) in enumerate(CASES):
        names = PARAMETERS[k % len(PARAMETERS)]
        x = 1.5 * numbers(shape, dtype, 0, last and len(shape) > 2) + 0.5
        grad = numbers(shape, dtype, 9)
        for act in ("silu", None):
            found = []
            for function, wide in (
                (ops.group_norm_act, None),
                (reference.group_norm_act, torch.float64),
                (plain, None),
            ):
                at, given = leaves(x, parameters(shape, names, dtype), wide)
                y = function(at, groups, **given, act=act)
                found.append((y.detach(), *torch.autograd.grad(y, (at, *given.values()), grad.to(y.dtype))))
            assert found[0][0].stride() == x.stride() == found[0][1].stride()
            for name, *three in zip(("y", "x", *names), *found, strict=True):
                few, alone = math.prod(shape[1:]) // groups < 8, shape[1] == groups
                if (name in ("x", "add") and few) or (name == "add" and alone):
                    continue  # a group of few elements or one channel: its gradient is what cancellation leaves
                assert three[0].dtype == dtype
                check(*three, f"{name}, {shape}, {dtype}, {names}, {act}")


def test_a_constant_group_is_its_offset() -> None:
    """x_hat is 0: y = silu(bias (1 + scale) + shift), whatever the weight."""
    x = torch.full((1, 4, 3, 3), 7.0)
    one = torch.ones(4)
    y = ops.group_norm_act(x, 2, 5 * one, 2 * one, scale=0.5 * one[None], shift=-4 * one[None], act=None)
    assert y.eq(-1.0).all()
    y = ops.group_norm_act(x, 2, 5 * one, 2 * one, scale=0.5 * one[None], shift=-4 * one[None])
    assert y.flatten()[0].item() == pytest.approx(-1 / (1 + math.e), rel=1e-6)


def test_a_number_of_a_whole_group_is_taken_off_again() -> None:
    """mean(x + a) = mean(x) + a. Of one of two channels it moves both: (a, 0) has mean a / 2 and variance a^2 / 4."""
    x = torch.arange(36.0).reshape(1, 4, 3, 3)
    plain_y = ops.group_norm_act(x, 2)
    assert same_bits(ops.group_norm_act(x, 2, add=torch.tensor([[8.0, 8.0, -32.0, -32.0]])), plain_y)
    y = ops.group_norm_act(torch.zeros(1, 2, 3), 1, add=torch.tensor([[6.0, 0.0]]), eps=16.0, act=None)
    assert y.tolist() == [[[pytest.approx(0.6)] * 3, [pytest.approx(-0.6)] * 3]]  # 3 / sqrt(9 + 16)


def test_two_values_become_their_signs() -> None:
    """Values a and b of equal number have x_hat = -1 and 1 as eps goes to 0."""
    x = torch.tensor([[-3.0, 5.0, 5.0, -3.0]]).reshape(1, 1, 4)
    assert ops.group_norm_act(x, 1, eps=0.0, act=None).flatten().tolist() == [-1.0, 1.0, 1.0, -1.0]
    y = ops.group_norm_act(x, 1, eps=9.0, act=None).flatten()  # variance 16: 4 / sqrt(25)
    assert y.tolist() == pytest.approx([-0.8, 0.8, 0.8, -0.8])


def test_silu_over_its_whole_range() -> None:
    """By the shift alone: x_hat = 0. Below -87 it stays at -1e-36; the slope is that of u sigmoid(u)."""
    u = torch.cat([torch.linspace(-100, 100, 4001), torch.tensor([-3e38, -1e30, 1e30, 3e38, 0.0, -0.0])])
    shift = u[None].clone().requires_grad_()
    y = ops.group_norm_act(torch.zeros(1, len(u), 2), len(u), shift=shift)
    exact = u.double() * torch.sigmoid(u.double())
    assert torch.equal(y[0, :, 0], y[0, :, 1])
    torch.testing.assert_close(y[0, :, 0].double(), exact, rtol=4e-7, atol=2e-36)
    (slope,) = torch.autograd.grad(y.sum(), shift)
    wide = u.double().requires_grad_()
    (expected,) = torch.autograd.grad((2 * wide * torch.sigmoid(wide)).sum(), wide)
    torch.testing.assert_close(slope[0].double(), expected, rtol=0, atol=1e-6)


def test_a_mean_far_from_zero_costs_no_digits() -> None:
    """The reference at the rounded x: what is left is the rounding of the mean, 3e-5 of 1000."""
    for last in (False, True):
        x = 1000 + numbers((2, 32, 40, 40), torch.float64, 0, last)
        x[:, :, 0, 0] = 0.0  # an outlier where a shift by the first element would be taken from
        x = x.float()
        y = ops.group_norm_act(x, 4, act=None)
        exact = reference.group_norm_act(x, 4, act=None)
        torch.testing.assert_close(y.double(), exact, rtol=2e-6, atol=2e-6)


def test_gradcheck() -> None:
    for last, act in itertools.product((False, True), ("silu", None)):
        x = numbers((2, 6, 2, 3), torch.float64, 0, last).requires_grad_()
        given = [t.detach().requires_grad_() for t in parameters((2, 6), ALL, torch.float64).values()]

        def function(x: Tensor, w: Tensor, b: Tensor, s: Tensor, t: Tensor, h: Tensor, act: str | None = act) -> Tensor:
            return ops.group_norm_act(x, 3, w, b, scale=s, shift=t, add=h, act=act)

        assert torch.autograd.gradcheck(function, (x, *given))


def test_parameters_of_other_dtypes() -> None:
    """float32 parameters of a bfloat16 network, and their gradients in float32."""
    x = numbers((2, 8, 5, 5), torch.bfloat16)
    _, given = leaves(x, parameters((2, 8), ALL, torch.float32))
    y = ops.group_norm_act(x, 4, **given)
    exact = reference.group_norm_act(x, 4, **given)
    assert y.dtype == torch.bfloat16
    assert error(y, exact) < 1
    got = torch.autograd.grad(y, given.values(), torch.ones_like(y))
    for a, e in zip(got, torch.autograd.grad(exact, given.values(), torch.ones_like(exact)), strict=True):
        assert a.dtype == torch.float32
        torch.testing.assert_close(a, e, rtol=1e-5, atol=1e-5)


# -------------------------------------------------------------------------------------------- order, layouts, batch
@dtypes
def test_a_sample_alone_and_any_thread_count(dtype: torch.dtype) -> None:
    for shape, groups in (((20, 64, 16, 16), 32), ((3, 96, 40, 41), 2)):  # whole tasks, or phases when alone
        for last in (False, True):
            x, grad = numbers(shape, dtype, 0, last), numbers(shape, dtype, 1, last)
            given = parameters(shape, ALL, dtype)
            results = []
            for n in (1, 2, 3):
                with threads(n):
                    at, at_given = leaves(x, given)
                    y = ops.group_norm_act(at, groups, **at_given)
                    results.append((y.detach(), *torch.autograd.grad(y, (at, *at_given.values()), grad)))
            for other in results[1:]:
                assert all(same_bits(a, b) for a, b in zip(results[0], other, strict=True))
            for b in (0, shape[0] - 1):
                one = {k: v[b : b + 1] if v.dim() == 2 else v for k, v in given.items()}
                at, at_given = leaves(x[b : b + 1], one)
                y = ops.group_norm_act(at, groups, **at_given)
                alone = torch.autograd.grad(y, (at, *(at_given[k] for k in ALL[2:])), grad[b : b + 1])
                assert same_bits(y[0], results[0][0][b])
                assert all(same_bits(a[0], results[0][k][b]) for a, k in zip(alone, (1, 4, 5, 6), strict=True))


@dtypes
def test_other_strides_are_those_of_a_contiguous_copy(dtype: torch.dtype) -> None:
    x = numbers((4, 12, 6, 10), dtype)
    for view in (x[:, 6:], x[:, :, ::2], x[::2], x.transpose(2, 3), x[:1].expand(4, 12, 6, 10), x.mT[..., 1:]):
        y = ops.group_norm_act(view, 3)
        assert y.is_contiguous()
        assert same_bits(y, ops.group_norm_act(view.contiguous(), 3))
        at = view.detach().requires_grad_()
        grad = numbers(tuple(view.shape), dtype, 1)
        (got,) = torch.autograd.grad(ops.group_norm_act(at, 3), at, grad.transpose(2, 3).contiguous().transpose(2, 3))
        at = view.contiguous().requires_grad_()
        (expected,) = torch.autograd.grad(ops.group_norm_act(at, 3), at, grad)
        assert same_bits(got, expected)


@dtypes
def test_samples_2_to_the_31_elements_apart(dtype: torch.dtype) -> None:
    """Read where they lie; the pages between them are never touched."""
    shape, far = (2, 6, 5, 7), 2**31 + 3
    try:
        memory = torch.empty(far + 1024, dtype=dtype)
    except RuntimeError as error:
        pytest.skip(f"no address space: {error}")
    results = []
    for apart in (False, True):
        x, grad = (numbers(shape, dtype, seed) for seed in (0, 1))
        if apart:
            x, grad = (memory.as_strided(shape, (far, 35, 7, 1), at).copy_(t) for at, t in ((0, x), (512, grad)))
        y = ops.group_norm_act(x.requires_grad_(), 3)
        results.append((y.detach(), *torch.autograd.grad(y, x, grad)))
    assert all(same_bits(a, b) for a, b in zip(*results, strict=True))


def test_nan_stays_in_its_group() -> None:
    for bad in (math.nan, math.inf):
        x = numbers((2, 8, 5, 5), torch.float32)
        x[1, 3, 2, 2] = bad
        y = ops.group_norm_act(x.requires_grad_(), 4)
        (grad,) = torch.autograd.grad(y.sum(), x)
        for found in (y.detach(), grad):
            assert found[1, 2:4].isnan().all()
            found[1, 2:4] = 0.0
            assert found.isfinite().all()
    shift = torch.zeros(2, 8)
    shift[0, 5] = math.nan
    y = ops.group_norm_act(numbers((2, 8, 5, 5), torch.float32), 4, shift=shift)
    assert y[0, 5].isnan().all()
    assert y.isnan().sum() == 25


def test_an_empty_batch() -> None:
    x = torch.zeros(0, 6, 4, 4, requires_grad=True)
    weight, scale = torch.ones(6, requires_grad=True), torch.zeros(0, 6, requires_grad=True)
    y = ops.group_norm_act(x, 3, weight, scale=scale)
    assert y.shape == (0, 6, 4, 4)
    got = torch.autograd.grad(y.sum(), (x, weight, scale))
    assert [tuple(g.shape) for g in got] == [(0, 6, 4, 4), (6,), (0, 6)]
    assert got[1].eq(0).all()


def test_the_gradient_of_part_of_the_operands() -> None:
    x, given = numbers((2, 6, 4, 4), torch.float32), parameters((2, 6), ALL, torch.float32)
    all_x, all_given = leaves(x, given)
    whole = torch.autograd.grad(ops.group_norm_act(all_x, 3, **all_given).sum(), (all_x, *all_given.values()))
    for k, name in enumerate(given):
        leaf = given[name].clone().requires_grad_()
        (got,) = torch.autograd.grad(ops.group_norm_act(x, 3, **{**given, name: leaf}).sum(), leaf)
        assert same_bits(got, whole[k + 1])


def test_backward_keeps_x_and_two_numbers_a_group() -> None:
    x, given = leaves(numbers((2, 8, 16, 16), torch.float32), parameters((2, 8), ALL, torch.float32))
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        ops.group_norm_act(x, 4, **given)
    assert sorted(t.numel() for t in kept) == [8, 8, 8, 8, 16, 16, 16, x.numel()]
    assert any(t.data_ptr() == x.data_ptr() for t in kept)


def test_activation_checkpointing() -> None:
    """What was kept is asked for once: torch's checkpoints, which make it again, refuse a second time."""
    x, given = leaves(numbers((2, 6, 4, 4), torch.float32), parameters((2, 6), ALL, torch.float32))
    every = (x, *given.values())
    plain = torch.autograd.grad(ops.group_norm_act(x, 3, **given).sum(), every)
    out = checkpoint(lambda x: ops.group_norm_act(x, 3, **given), x, use_reentrant=False)
    assert all(same_bits(a, b) for a, b in zip(torch.autograd.grad(out.sum(), every), plain, strict=True))


# ------------------------------------------------------------------------------------------------- compile, bad input
@pytest.mark.full
def test_compile_and_export() -> None:
    def function(x: Tensor, w: Tensor, b: Tensor, s: Tensor, t: Tensor, h: Tensor) -> Tensor:
        return ops.group_norm_act(x * 2, 4, w, b, scale=s, shift=t, add=h) + 1

    for last in (False, True):
        x, given = leaves(numbers((2, 8, 5, 6), torch.float32, 0, last), parameters((2, 8), ALL, torch.float32))
        compiled = torch.compile(function, fullgraph=True)
        args = (x, *given.values())
        found = []
        for f in (function, compiled):
            y = f(*args)
            found.append((y.detach(), *torch.autograd.grad(y.square().sum(), args)))
        for a, e in zip(*found, strict=True):
            torch.testing.assert_close(a, e, rtol=1e-6, atol=1e-6)

    class Module(torch.nn.Module):
        def forward(self, x: Tensor, w: Tensor, b: Tensor, s: Tensor, t: Tensor, h: Tensor) -> Tensor:
            return function(x, w, b, s, t, h)

    plain_args = tuple(t.detach() for t in args)
    batch = torch.export.Dim("batch", min=2, max=64)
    exported = torch.export.export(Module(), plain_args, dynamic_shapes=({0: batch}, None, None, *[{0: batch}] * 3))
    more = (numbers((5, 8, 5, 6), torch.float32, 4, True), *plain_args[1:3], *torch.randn(3, 5, 8).unbind())
    assert same_bits(exported.module()(*more), function(*more))


def test_meta() -> None:
    x = torch.empty(3, 8, 5, 5, dtype=torch.bfloat16, device="meta").contiguous(memory_format=torch.channels_last)
    y = diffkern.ops.group_norm_act(x, 4)
    assert (y.shape, y.dtype, y.stride()) == (x.shape, x.dtype, x.stride())


def test_bad_input() -> None:
    x, eight = torch.zeros(2, 8, 3, 3), torch.ones(8)
    run = ops.group_norm_act
    check_sentence(lambda: run(x, 3), r"diffkern\.group_norm_act: groups must divide the channels of x, 8, got 3")
    check_sentence(lambda: run(x, 16), r"groups must divide the channels of x, 8, got 16")
    with pytest.raises(ValueError, match=r"groups must be an integer of at least 1, below 2\^63, got 0"):
        run(x, 0)
    with pytest.raises(ValueError, match="act must be one of silu, None, got 'relu'"):
        run(x, 4, act="relu")  # type: ignore[arg-type]
    check_sentence(
        lambda: run(x[:, 0, 0, 0], 1), r"x must have 2 dimensions or more, \[batch, channels, positions\.\.\.\]"
    )
    check_sentence(lambda: run(x[0, 0, 0, 0], 1), r"x must have a batch dimension, got a tensor without dimensions")
    check_sentence(lambda: run(x[:, :, :0], 4), r"x must have an element in each sample, got shape \[2, 8, 0, 3\]")
    check_sentence(lambda: run(x.long(), 4), r"x must be float64, float32, float16 or bfloat16, got int64")
    check_sentence(lambda: run(x, 4, eps=-1.0), r"eps must be finite and not negative, got -1")
    check_sentence(lambda: run(x, 4, eps=math.nan), r"eps must be finite and not negative, got -?nan")
    check_sentence(lambda: run(x, 4, eight[:4]), r"weight must have shape \[channels\] = \[8\], got \[4\]")
    check_sentence(lambda: run(x, 4, None, eight[None]), r"bias must have shape \[channels\] = \[8\], got \[1, 8\]")
    of_samples = r"must have shape \[batch, channels\] = \[2, 8\], got "
    check_sentence(lambda: run(x, 4, scale=eight), "scale " + of_samples + r"\[8\]")
    check_sentence(lambda: run(x, 4, shift=x[:, :, :1, :1]), "shift " + of_samples + r"\[2, 8, 1, 1\]")
    check_sentence(lambda: run(x, 4, add=eight[None]), "add " + of_samples + r"\[1, 8\]")
    check_sentence(lambda: run(x, 4, eight.long()), r"weight must be float64, float32, float16 or bfloat16, got int64")
    check_sentence(lambda: run(x, 4, eight.to("meta")), r"weight must be on the device of x \(cpu\), got meta")


def test_differentiable_once() -> None:
    x = torch.randn(2, 4, 3, 3, requires_grad=True)
    with pytest.raises(RuntimeError, match=r"diffkern\.group_norm_act: differentiable once only"):
        torch.autograd.grad(ops.group_norm_act(x, 2).sum(), x, create_graph=True)
