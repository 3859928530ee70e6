"""The fused loss: against the reference, its bits, and its gradient, which the same pass makes."""

from __future__ import annotations

import math

import pytest
import torch
from helpers.op_cases import LAYOUTS, SHAPES, arrange, native_draws, same_bits, threads, values
from helpers.tolerances import STATE_DTYPES, check, coarser
from torch import Tensor

from diffkern import _C, ops, reference

TABLE = torch.tensor(
    [[0.0, 1.0, 1.0], [1.0, 0.0, 0.7], [0.43, -0.9, 1.3], [-1.0, 1.0, 0.1], [0.3, 0.4, 25.0]], dtype=torch.float64
)
REDUCTIONS = ["none", "mean", "sum"]
LARGE = (4, 3, 131, 127)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", STATE_DTYPES, ids=str)
def test_against_the_reference(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """Value and gradient with respect to the prediction, for every layout and a prediction of every dtype."""
    seeds, index = ops.seeds(4, shape[0]), torch.arange(shape[0]) % len(TABLE)
    for k, layout in enumerate(LAYOUTS):
        pred_dtype = STATE_DTYPES[(STATE_DTYPES.index(dtype) + k) % 4]
        x0, pred = values(shape, 1, dtype, layout), values(shape, 3, pred_dtype, layout).requires_grad_()
        wide_pred = pred.detach().double().requires_grad_()
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        for noise in (None, values(shape, 2, dtype, LAYOUTS[k - 1])):
            source = {"seeds": seeds, "stream": 9} if noise is None else {"noise": noise}
            for reduction in REDUCTIONS:
                ours = ops.loss(pred, x0, TABLE, index, **source, reduction=reduction)
                assert ours.dtype == wide
                with native_draws():
                    exact = reference.loss(wide_pred, x0, TABLE, index, **source, reduction=reduction)
                    plain = reference.loss(pred, x0, TABLE, index, **source, reduction=reduction, compute=wide)
                check(ours, exact, plain, f"{reduction}, {layout}")
                if 0 in shape:
                    continue
                (g_ours,) = torch.autograd.grad(ours.sum(), pred)
                (g_exact,), (g_plain,) = (
                    torch.autograd.grad(exact.sum(), wide_pred),
                    torch.autograd.grad(plain.sum(), pred),
                )
                assert g_ours.dtype == pred_dtype
                what = f"gradient, {reduction}, {layout}"
                check(g_ours, g_exact, g_plain, what, coarser(pred_dtype, wide))


def test_empty() -> None:
    """A mean of nothing is NaN, a sum of nothing 0, as torch says."""
    for shape in ((2, 0, 3), (2, 0)):
        pred = torch.empty(shape)
        loss = [ops.loss(pred, pred, TABLE[:1], seeds=ops.seeds(0, 2), reduction=r) for r in REDUCTIONS]
        assert loss[0].shape == (2,)
        assert all(value.isnan().all() for value in loss)
    pred = torch.empty(0, 3)
    none, mean, total = (ops.loss(pred, pred, TABLE[:1], seeds=ops.seeds(0, 0), reduction=r) for r in REDUCTIONS)
    assert none.shape == (0,)
    assert mean.isnan()
    assert total == 0


def test_index_forms() -> None:
    shape = (5, 3, 41)
    x0, pred, seeds = values(shape, 1), values(shape, 2), ops.seeds(0, 5)
    some = torch.arange(5) * 3 % len(TABLE)
    for index in (some, some.int(), torch.stack([some, some]).t().reshape(-1)[::2], torch.tensor(3), None):
        ours = ops.loss(pred, x0, TABLE, index, seeds=seeds, reduction="none")
        rows = torch.arange(5) if index is None else index.long().expand(5)
        for b in range(5):
            row = TABLE[rows[b]][None].clone()
            one = ops.loss(pred[b : b + 1], x0[b : b + 1], row, seeds=seeds[b : b + 1], reduction="none")
            assert same_bits(ours[b : b + 1], one)


@pytest.mark.parametrize("dtype", STATE_DTYPES, ids=str)
def test_same_address_as_noising(dtype: torch.dtype) -> None:
    """A model that predicts the target of `noising` has no loss, and the loss draws the eps that made x_t."""
    x0, seeds, index = values((3, 4, 29), 1, dtype), ops.seeds(8, 3), torch.tensor([0, 1, 2])
    rows = torch.cat([torch.ones(5, 2, dtype=torch.float64), TABLE[:, :2]], 1)
    target = ops.noising(x0, rows, index, seeds=seeds, stream=77, want_target=True)[1]
    assert target is not None
    loss = ops.loss(target, x0, TABLE, index, seeds=seeds, stream=77, reduction="none")
    assert loss.max() <= (0.0 if target.element_size() >= 4 else torch.finfo(dtype).eps ** 2 * 10)
    assert ops.loss(target, x0, TABLE, index, seeds=seeds, stream=78) > 0.1


# ----------------------------------------------------------------------------------------------------- the same bits
def run(pred: Tensor, x0: Tensor, index: Tensor, seeds: Tensor, reduction: int = 0) -> tuple[Tensor, Tensor]:
    return torch.ops.diffkern.loss(pred, x0, TABLE, index, seeds, 4, None, reduction, True)


def test_bits_do_not_depend_on_threads_or_batch() -> None:
    x0, pred, seeds, index = values(LARGE, 1), values(LARGE, 2), ops.seeds(2, 4), torch.tensor([0, 1, 2, 4])
    with threads(1):
        expected = [run(pred, x0, index, seeds, reduction) for reduction in range(3)]
    for n in (2, 3, 5):
        with threads(n):
            for reduction in range(3):
                got = run(pred, x0, index, seeds, reduction)
                assert all(same_bits(a, b) for a, b in zip(got, expected[reduction], strict=True)), (n, reduction)
    for b in range(4):
        one = run(*(t[b : b + 1] for t in (pred, x0, index, seeds)))
        assert same_bits(one[0][0], expected[0][0][b])
        assert same_bits(one[1][0], expected[0][1][b])
    order = torch.tensor([2, 0, 3, 1])
    assert same_bits(run(*(t[order] for t in (pred, x0, index, seeds)))[0], expected[0][0][order])


def test_layouts_agree() -> None:
    """The gradient has the same bits in every layout; the value where elements are added in the same order."""
    x0, pred, seeds, index = values(LARGE, 1), values(LARGE, 2), ops.seeds(2, 4), torch.tensor([0, 1, 2, 4])
    expected = run(pred, x0, index, seeds)
    for layout in ("channels_last", "permuted", "sliced"):
        value, grad = run(arrange(pred, layout), arrange(x0, layout), index, seeds)
        assert same_bits(grad, expected[1])
        if layout == "channels_last":
            torch.testing.assert_close(value, expected[0], rtol=1e-6, atol=0)
            assert grad.stride() == arrange(pred, layout).stride()
        else:
            assert same_bits(value, expected[0])


def test_sum_has_the_documented_order() -> None:
    """csrc/core/ordered_sum.h's order, repeated in plain torch float32: the value is reproducible by anybody."""
    assert _C.layout()["ordered_sum"] == {"block": 1024, "lanes": 256}
    count = 700 * 1024 + 77
    pred, x0 = values((1, count), 1), values((1, count), 2)
    rows = torch.tensor([[1.0, 0.0, 1.0]], dtype=torch.float64)
    ours = ops.loss(pred, x0, rows, noise=torch.zeros(1, count), reduction="none")
    squares = torch.zeros(701 * 1024)
    squares[:count] = (pred - x0)[0] ** 2

    def fold(x: Tensor) -> Tensor:
        while x.shape[-1] > 1:
            half = x.shape[-1] // 2
            x = x[..., :half] + x[..., half:]
        return x[..., 0]

    partials = torch.zeros(3 * 256)
    partials[:701] = fold(squares.reshape(-1, 1024))
    lanes = torch.zeros(256)
    for chunk in partials.reshape(3, 256):
        lanes = lanes + chunk
    assert same_bits(ours, (fold(lanes) * torch.tensor(1.0 / count, dtype=torch.float32)).reshape(1))


def test_operands_with_coefficient_zero_are_not_read() -> None:
    nan, pred, seeds = torch.full((2, 5), math.nan), values((2, 5), 1), ops.seeds(0, 2)
    eps_only, x0_only = TABLE[:1], TABLE[1:2].clone()
    assert torch.isfinite(ops.loss(pred, nan, eps_only, seeds=seeds))
    assert torch.isfinite(ops.loss(pred, pred, x0_only, noise=nan))
    assert ops.loss(pred, nan, x0_only, seeds=seeds).isnan()


# --------------------------------------------------------------------------------------------------------- gradients
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("index", [None, torch.tensor(2), torch.tensor([2, 4, 2])], ids=["rows", "one", "each"])
def test_gradcheck(reduction: str, index: Tensor | None) -> None:
    pred, x0, noise = (values((3, 2, 3), k, torch.float64).requires_grad_() for k in (1, 2, 3))
    rows = TABLE[2:].clone() if index is None else TABLE

    def by_tensor(pred: Tensor, x0: Tensor, noise: Tensor) -> Tensor:
        return ops.loss(pred, x0, rows, index, noise=noise, reduction=reduction)

    def by_address(pred: Tensor, x0: Tensor) -> Tensor:
        return ops.loss(pred, x0, rows, index, seeds=ops.seeds(0, 3), reduction=reduction)

    assert torch.autograd.gradcheck(by_tensor, (pred, x0, noise))
    assert torch.autograd.gradcheck(by_address, (pred, x0))


def test_upstream_gradient_is_applied() -> None:
    pred, x0, seeds = values((3, 7), 1).requires_grad_(), values((3, 7), 2), ops.seeds(0, 3)
    one = torch.autograd.grad(ops.loss(pred, x0, TABLE[2:3], seeds=seeds), pred)[0]
    scaled = torch.autograd.grad(ops.loss(pred, x0, TABLE[2:3], seeds=seeds) * 65536.0, pred)[0]
    assert same_bits(scaled, one * 65536.0)
    weights = torch.tensor([0.5, 0.0, -3.0])
    each = ops.loss(pred, x0, TABLE[2:3], seeds=seeds, reduction="none")
    torch.testing.assert_close(torch.autograd.grad(each, pred, weights)[0], 3 * one * weights[:, None])


def test_backward_twice() -> None:
    """retain_graph: gradients accumulate, and accumulating does not change the gradient that was stored."""
    pred, x0 = values((3, 7), 1).requires_grad_(), values((3, 7), 2)
    loss = ops.loss(pred, x0, TABLE[2:3], seeds=ops.seeds(0, 3))
    loss.backward(retain_graph=True)
    first = pred.grad.clone()
    for k in (2, 3):
        loss.backward(retain_graph=True)
        torch.testing.assert_close(pred.grad, k * first)
    pred.grad.zero_()
    loss.backward()
    assert same_bits(pred.grad, first)


def test_second_derivative_is_refused() -> None:
    pred = values((3, 7), 1).requires_grad_()
    loss = ops.loss(pred, pred.detach(), TABLE[2:3], seeds=ops.seeds(0, 3))
    with pytest.raises(RuntimeError, match=r"diffkern\.loss: differentiable once only, use diffkern\.reference\.loss"):
        torch.autograd.grad(loss, pred, create_graph=True)


def test_no_gradient_is_made_where_none_is_wanted() -> None:
    pred = values((2, 5), 1)
    assert not ops.loss(pred, pred, TABLE[:1], seeds=ops.seeds(0, 2)).requires_grad
    pred.requires_grad_()
    with torch.no_grad():
        assert not ops.loss(pred, pred, TABLE[:1], seeds=ops.seeds(0, 2)).requires_grad
    value, grad = torch.ops.diffkern.loss(pred, pred, TABLE[:1], None, ops.seeds(0, 2), 0, None, 1, False)
    assert grad is None
    value.backward()  # the backward pass makes it then
    assert pred.grad is not None
    assert same_bits(
        pred.grad,
        torch.ops.diffkern.loss(pred.detach(), pred.detach(), TABLE[:1], None, ops.seeds(0, 2), 0, None, 1, True)[1],
    )


@pytest.mark.parametrize("reduction", range(3))
@pytest.mark.parametrize("dtype", STATE_DTYPES, ids=str)
def test_eager_training_has_the_bits_of_the_op_in_a_graph(dtype: torch.dtype, reduction: int) -> None:
    """The function of eager mode stores what the op's own formula stores, wide for 16 bits, and scales it alike."""
    pred, x0 = values((3, 4, 9), 1, dtype).requires_grad_(), values((3, 4, 9), 2, torch.float32)
    seeds, at, wide = ops.seeds(0, 3), torch.tensor([1, 4, 2]), pred.element_size() < 4
    for up in (1.0, 2.0**-12, 3.0):
        ours = ops.loss(pred, x0, TABLE, at, seeds=seeds, reduction=REDUCTIONS[reduction])
        value, stored = torch.ops.diffkern.loss(pred, x0, TABLE, at, seeds, 0, None, reduction, True, wide)
        found, expected = (torch.autograd.grad(t, pred, torch.full_like(t, up))[0] for t in (ours, value))
        assert same_bits(ours, value)
        assert same_bits(found, expected)
        assert same_bits(found, (stored * up).to(dtype))
        assert stored.dtype == (torch.float32 if wide else dtype)


def test_what_is_stored_for_the_backward_pass_can_be_packed() -> None:
    """Hooks on saved tensors (offloading, activation checkpointing) are given the gradient, and it alone."""
    pred, x0, packed = values((3, 7), 1).requires_grad_(), values((3, 7), 2), []

    def pack(t: Tensor) -> Tensor:
        packed.append(t)
        return -2.0 * t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: -0.5 * t):
        loss = ops.loss(pred, x0, TABLE[2:3], seeds=ops.seeds(0, 3))
    (grad,) = torch.autograd.grad(loss, pred)
    assert len(packed) == 1
    assert same_bits(grad, packed[0])


def test_descent() -> None:
    """The gradient points downhill: a few steps of it reach the target."""
    x0, seeds = values((4, 33), 1), ops.seeds(0, 4)
    pred = torch.zeros_like(x0).requires_grad_()
    for _ in range(60):
        (grad,) = torch.autograd.grad(ops.loss(pred, x0, TABLE[2:3], seeds=seeds, reduction="sum"), pred)
        pred = (pred - 6.0 * grad).detach().requires_grad_()
    assert ops.loss(pred, x0, TABLE[2:3], seeds=seeds) < 1e-6
