"""Forward noising: against the reference over dtypes, layouts, shapes and sources of noise; bits; gradients."""

from __future__ import annotations

import math

import pytest
import torch
from helpers.op_cases import LAYOUTS, SHAPES, arrange, native_draws, same_bits, threads, values
from helpers.tolerances import STATE_DTYPES, check
from torch import Tensor

from diffkern import ops, reference, schedules

TABLE = torch.tensor(
    [
        [0.9, 0.43, 0.43, -0.9],
        [0.2, 0.98, 0.98, -0.2],
        [1.0, 0.001, 0.0, 1.0],
        [0.3, 0.7, 1.0, 0.0],
        [1.5, 2.5, -1.0, 1.0],
    ],
    dtype=torch.float64,
)


def indices(batch: int) -> list[Tensor | None]:
    some = torch.arange(batch) * 3 % len(TABLE)
    spread = torch.stack([some, some]).t().reshape(-1)[::2]  # a strided index
    return [some, some.int(), spread, torch.tensor(1), torch.tensor(2, dtype=torch.int32), some[:1].expand(batch), None]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", STATE_DTYPES, ids=str)
def test_against_the_reference(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    batch, seeds = shape[0], ops.seeds(4, shape[0])
    index = torch.arange(batch) % len(TABLE)
    for layout in LAYOUTS:
        x0 = values(shape, 1, dtype, layout)
        for noise in (None, values(shape, 2, dtype, layout), values(shape, 2, dtype, "permuted")):
            source = {"seeds": seeds, "stream": 9} if noise is None else {"noise": noise}
            ours = ops.noising(x0, TABLE, index, **source, want_target=True, want_eps=True)
            with native_draws():
                exact = reference.noising(x0, TABLE, index, **source)
                plain = reference.noising(x0, TABLE, index, **source, compute=dtype)
            for name, o, e, p in zip(("x_t", "target", "eps"), ours, exact, plain, strict=True):
                assert o is not None
                assert o.dtype == dtype
                check(o, e, p, f"{name}, {layout}, {'address' if noise is None else 'tensor'}")
            drawn = ops.randn(shape, seeds, 9, dtype=dtype) if noise is None else noise
            assert same_bits(ours[2], drawn)


@pytest.mark.parametrize("which", range(7))
def test_index_forms(which: int) -> None:
    """int64, int32, strided, 0-dim, expanded, and none (a row a sample, or one row)."""
    shape = (5, 3, 41)
    x0, seeds = values(shape, 1), ops.seeds(0, 5)
    index = indices(5)[which]
    ours = ops.noising(x0, TABLE, index, seeds=seeds, want_target=True)
    rows = torch.arange(5) if index is None else index.long().expand(5)
    for b in range(5):
        one = ops.noising(x0[b : b + 1], TABLE[rows[b]][None].clone(), seeds=seeds[b : b + 1], want_target=True)
        assert same_bits(ours[0][b], one[0][0])
        assert same_bits(ours[1][b], one[1][0])


def test_table_of_one_row_serves_all() -> None:
    x0, seeds = values((4, 9), 1), ops.seeds(0, 4)
    ours = ops.noising(x0, TABLE[:1], seeds=seeds)[0]
    assert same_bits(ours, ops.noising(x0, TABLE, torch.zeros(4, dtype=torch.int64), seeds=seeds)[0])


def test_bits_do_not_depend_on_layout_batch_or_threads() -> None:
    shape = (4, 3, 131, 127)
    x0, seeds, index = values(shape, 1), ops.seeds(2, 4), torch.tensor([3, 0, 1, 2])
    with threads(1):
        expected = ops.noising(x0, TABLE, index, seeds=seeds, stream=4, want_target=True, want_eps=True)
    for n in (2, 3):
        with threads(n):
            for layout in LAYOUTS[:-1]:
                got = ops.noising(
                    arrange(x0, layout), TABLE, index, seeds=seeds, stream=4, want_target=True, want_eps=True
                )
                assert all(same_bits(a, b) for a, b in zip(got, expected, strict=True)), layout
    for b in range(4):
        got = ops.noising(x0[b : b + 1], TABLE, index[b : b + 1], seeds=seeds[b : b + 1], stream=4)
        assert same_bits(got[0][0], expected[0][b])


def test_memory_format_is_kept() -> None:
    x0, seeds = values((2, 3, 8, 8), 1), ops.seeds(0, 2)
    for layout in ("contiguous", "channels_last"):
        x = arrange(x0, layout)
        for out in ops.noising(x, TABLE[:1], seeds=seeds, want_target=True, want_eps=True):
            assert out is not None
            assert out.stride() == x.stride()


@pytest.mark.parametrize("dtype", STATE_DTYPES, ids=str)
def test_out_and_in_place(dtype: torch.dtype) -> None:
    shape, seeds = (3, 4, 19, 23), ops.seeds(1, 3)
    index = torch.tensor([1, 0, 4])
    x0 = values(shape, 1, dtype)
    expected = ops.noising(x0, TABLE, index, seeds=seeds, want_target=True, want_eps=True)
    for layout in LAYOUTS[:-1]:
        outs = [arrange(torch.full(shape, math.nan, dtype=dtype), layout) for _ in range(3)]
        got = ops.noising_out(x0, TABLE, index, seeds=seeds, out=outs[0], target=outs[1], eps=outs[2])
        assert got is outs[0]
        assert all(same_bits(a, b) for a, b in zip(outs, expected, strict=True)), layout
    place, goal = x0.clone(), torch.empty_like(x0)
    ops.noising_out(place, TABLE, index, seeds=seeds, out=place, target=goal)  # over x0
    assert same_bits(place, expected[0])
    assert same_bits(goal, expected[1])
    noise = ops.randn(shape, seeds, dtype=dtype)
    expected_tensor = ops.noising(x0, TABLE, index, noise=noise)[0]
    ops.noising_out(x0, TABLE, index, noise=noise, out=noise)  # over the noise
    assert same_bits(noise, expected_tensor)


def test_noise_with_coefficient_zero_is_not_read() -> None:
    noise = torch.full((2, 5), math.nan)
    x0 = values((2, 5), 1)
    signal = torch.tensor([[0.5, 0.0, 2.0, 0.0]], dtype=torch.float64)
    x_t, target, _ = ops.noising(x0, signal, noise=noise, want_target=True)
    assert same_bits(x_t, 0.5 * x0)
    assert same_bits(target, 2 * x0)
    # The coefficients of the target do not matter where it is not asked for.
    assert not ops.noising(x0, torch.tensor([[0.5, 0.0, 0.0, 1.0]], dtype=torch.float64), noise=noise)[0].isnan().any()
    assert ops.noising(x0, torch.tensor([[0.5, 1.0, 0.0, 0.0]], dtype=torch.float64), noise=noise)[0].isnan().all()


def test_bfloat16_keeps_the_noise_of_the_first_timesteps() -> None:
    """diffusers' add_noise in bfloat16 rounds alpha to 1 and, where |x0| is near 1, adds nothing in the first steps."""
    schedule = schedules.linear()
    shape = (10, 1, 64, 64)
    x0 = values(shape, 1, torch.bfloat16).clamp(-1, 1)
    seeds, t = ops.seeds(0, 10), torch.arange(10)
    rows = schedule.table("eps")
    ours = ops.noising(x0, rows, t, seeds=seeds)[0]
    eps = ops.randn(shape, seeds, dtype=torch.float64)
    s, n = rows[:10, 0].reshape(10, 1, 1, 1), rows[:10, 1].reshape(10, 1, 1, 1)
    exact = s * x0.double() + n * eps
    assert same_bits(ours, exact.to(torch.bfloat16)) or bool((ours != exact.to(torch.bfloat16)).float().mean() < 1e-4)
    # What was added has, at every timestep, the size of the noise: regression of x_t - s x0 on n eps.
    added = ours.double() - s * x0.double()
    slope = ((added * n * eps).flatten(1).sum(1) / ((n * eps) ** 2).flatten(1).sum(1)).tolist()
    assert all(abs(value - 1) < 0.02 for value in slope), slope


# ---------------------------------------------------------------------------------------------------- gradients
@pytest.mark.parametrize("index", [None, torch.tensor(1), torch.tensor([0, 3])], ids=["rows", "one", "each"])
def test_gradcheck(index: Tensor | None) -> None:
    x0 = values((2, 3, 2), 1, torch.float64).requires_grad_()
    noise = values((2, 3, 2), 2, torch.float64).requires_grad_()
    rows = TABLE[:2].clone() if index is None else TABLE

    def by_tensor(x0: Tensor, noise: Tensor) -> tuple[Tensor, ...]:
        return ops.noising(x0, rows, index, noise=noise, want_target=True, want_eps=True)  # type: ignore[return-value]

    def by_address(x0: Tensor) -> tuple[Tensor, ...]:
        return ops.noising(x0, rows, index, seeds=ops.seeds(0, 2), want_target=True)[:2]  # type: ignore[return-value]

    assert torch.autograd.gradcheck(by_tensor, (x0, noise))
    assert torch.autograd.gradgradcheck(by_tensor, (x0, noise))
    assert torch.autograd.gradcheck(by_address, (x0,))


@pytest.mark.parametrize("dtype", STATE_DTYPES, ids=str)
def test_gradients_against_the_reference(dtype: torch.dtype) -> None:
    index = torch.tensor([0, 1, 4])
    x0, noise = (values((3, 5, 7), k, dtype).requires_grad_() for k in (1, 2))
    weights = [values((3, 5, 7), k, dtype) for k in (3, 4, 5)]

    def gradients(compute: torch.dtype | None) -> tuple[Tensor, ...]:
        if compute is None:
            outs = ops.noising(x0, TABLE, index, noise=noise, want_target=True, want_eps=True)
        else:
            outs = reference.noising(x0, TABLE, index, noise=noise, compute=compute)
        total = sum((o.to(compute or dtype) * w.to(compute or dtype)).sum() for o, w in zip(outs, weights, strict=True))
        return torch.autograd.grad(total, (x0, noise))

    for ours, exact, plain in zip(gradients(None), gradients(torch.float64), gradients(dtype), strict=True):
        assert ours.dtype == dtype
        check(ours, exact, plain)


def test_unused_outputs_cost_no_gradient() -> None:
    x0 = values((2, 3), 1).requires_grad_()
    _, target, eps = ops.noising(x0, TABLE[:1], seeds=ops.seeds(0, 2), want_target=True, want_eps=True)
    assert target is not None
    assert eps is not None
    (grad,) = torch.autograd.grad(target.sum(), x0)
    assert torch.allclose(grad, torch.full_like(grad, 0.43))
