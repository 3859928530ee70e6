"""A loss scale reaches the gradient of a 16-bit prediction before its one rounding (Micikevicius et al. 2018).

Plain torch has a float32 gradient in its hands until the cast of the prediction is differentiated. Small gradients, as
those of a mean over many elements are, would be 0 in float16 before the scale that lifts them.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from helpers.memory import SLACK, allocated
from helpers.op_cases import EVERYTHING, LAYOUTS, native_draws, same_bits, table, values
from helpers.suites import few
from torch import Tensor

from diffkern import ops, reference

SHAPE = (4, 3, 64, 65)
COUNT = 4 * 3 * 64 * 65
SEEDS, NARROW = ops.seeds(0, 4), [torch.float16, torch.bfloat16]
SCALES = [1.0, 65536.0, 2.0**-10]
LOSS = torch.tensor([[0.0, 1.0, 1.0], [0.43, -0.9, 1e-3], [1.0, 0.0, 30.0]], dtype=torch.float64)
BOUND = torch.tensor(
    [
        [0.0, 1.0, -0.5, 1.2, 2.0, 0.3, 0.3, 0.0, 0.004, 1.0, 0.1, 1.0],
        [0.1, 0.8, -0.6, 1.2, 0.0, 0.3, 0.15, 9.0, 0.005, 1e-3, 1e-3, 1.0],
        [0.0, 1.0, 0.5, 5.0, 2.0, 0.4, 0.05, 0.0, 0.006, 0.75, 0.7, 0.0],
    ],
    dtype=torch.float64,
)
STEPS = table({**EVERYTHING, "r": 0.0, "clip": 50.0}, {"a": 0.9, "d": 0.3, "g": 1e-3}, {"a": 0.9, "d": 0.3, "g": 0.0})
INDEX = torch.tensor([0, 1, 2, 1])
X0 = 0.3 * values(SHAPE, 2)
EACH = torch.tensor([1.0, 0.0, -3.0, 1e-4])


@pytest.fixture(params=["stored wide", "made in the backward pass"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Small predictions have their gradient stored in float32, larger ones when the scale is known."""
    monkeypatch.setattr("diffkern.ops._common._SMALL", 2**18 if request.param == "stored wide" else 0)


def rounded_once(found: Tensor, exact: Tensor, dtype: torch.dtype, terms: Tensor | float) -> None:
    """`found` is the exact value rounded to the dtype; `terms`: what float32 arithmetic may have rounded before."""
    assert found.dtype == dtype
    once = (exact.to(dtype).double() - exact).abs()
    largest = torch.finfo(dtype).max
    worst = ((found.double() - exact).abs() - once - 1e-6 * terms)[exact.abs() < largest].max().item()
    smallest = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
    assert worst <= smallest * 1e-3, worst


def check(run: Callable[..., Tensor], pred: Tensor, dtype: torch.dtype, scale: float, reduction: str) -> None:
    """`run(pred, library)`; the incoming gradient is the scale, and differs from sample to sample for "none"."""
    up = EACH * scale if reduction == "none" else torch.tensor(scale)
    narrow, wide = pred.to(dtype).requires_grad_(), pred.to(dtype).double().requires_grad_()
    (found,) = torch.autograd.grad(run(narrow, ops), narrow, up)
    with native_draws():
        value = run(wide, reference)
    (exact,) = torch.autograd.grad(value, wide, up.double())
    rounded_once(found, exact, dtype, exact.abs().amax(tuple(range(1, exact.dim())), keepdim=True))


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("dtype", NARROW, ids=str)
def test_loss(dtype: torch.dtype, scale: float, reduction: str) -> None:
    def run(pred: Tensor, library: object) -> Tensor:
        return library.loss(pred, X0, LOSS, INDEX, seeds=SEEDS, stream=3, reduction=reduction)  # type: ignore[attr-defined]

    check(run, values(SHAPE, 1), dtype, scale, reduction)


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("dtype", NARROW, ids=str)
def test_bound(dtype: torch.dtype, scale: float, reduction: str) -> None:
    def run(pred: Tensor, library: object) -> Tensor:
        return library.variational(pred, X0, BOUND, INDEX, seeds=SEEDS, reduction=reduction)[0]  # type: ignore[attr-defined]

    check(run, 0.3 * values((SHAPE[0], 2 * SHAPE[1], *SHAPE[2:]), 1), dtype, scale, reduction)


@pytest.mark.parametrize("form", ["m2", "doubled", "plain", "learned"])
@pytest.mark.parametrize("dtype", NARROW, ids=str)
def test_log_density(dtype: torch.dtype, form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also in pieces of one and of two samples, as large states are."""
    shape = (4, 3, 8, 9)
    after, x, h = (values(shape, k) for k in (1, 2, 3))
    m, m2 = values((8 if form == "doubled" else 4, 3, 8, 9), 4), values(shape, 5)
    steps, row = STEPS[:2] if form in ("m2", "doubled") else STEPS[1:], torch.tensor([0, 1, 0, 1])
    if form == "learned":
        m = values((4, 6, 8, 9), 4)
        steps = torch.cat([STEPS[1:], torch.tensor([[3.0, 0.3], [0.1, 0.2]]).double()], 1)

    def run(pred: Tensor, library: object, other: Tensor | None) -> Tensor:
        return library.step_logprob(after, x, pred, other, h, h, h, h, table=steps, index=row)  # type: ignore[attr-defined]

    for piece in (1, 432, 2**18):
        monkeypatch.setattr("diffkern.ops._step_logprob._PIECE", piece)
        other = m2.to(dtype).requires_grad_() if form == "m2" else None
        leaves = [t for t in (m.to(dtype).requires_grad_(), other) if t is not None]
        wides = [t.detach().double().requires_grad_() for t in leaves]
        found = torch.autograd.grad(run(leaves[0], ops, other), leaves, EACH * 2.0**-6)
        value = run(wides[0], reference, wides[1] if other is not None else None)
        exact = torch.autograd.grad(value, wides, EACH.double() * 2.0**-6)
        for ours, right in zip(found, exact, strict=True):
            rounded_once(ours, right, dtype, 10 * right.abs().amax(tuple(range(1, 4)), keepdim=True))


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("dtype", NARROW, ids=str)
def test_x0_and_noise_do_not_see_the_rounding_of_pred(dtype: torch.dtype) -> None:
    pred, noise = values(SHAPE, 1).to(dtype).requires_grad_(), values(SHAPE, 4).requires_grad_()
    x0 = X0.clone().requires_grad_()
    value = ops.loss(pred, x0, LOSS, INDEX, noise=noise)
    found = torch.autograd.grad(value * 2.0**-10, (pred, x0, noise))
    wides = [t.detach().double().requires_grad_() for t in (pred, x0, noise)]
    exact = torch.autograd.grad(reference.loss(*wides[:2], LOSS, INDEX, noise=wides[2]) * 2.0**-10, wides)
    assert [t.dtype for t in found] == [dtype, torch.float32, torch.float32]
    for ours, right in zip(found[1:], exact[1:], strict=True):
        torch.testing.assert_close(ours.double(), right, rtol=1e-5, atol=1e-6 * right.abs().max().item())
    rounded_once(found[0], exact[0], dtype, exact[0].abs().max())


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("layout", LAYOUTS[:-1])
def test_layout_and_accumulation(layout: str) -> None:
    """The gradient has the strides of pred; backward twice gives it twice; the bits are those of a stored one."""
    pred = values(SHAPE, 1, torch.bfloat16, layout).requires_grad_()
    loss = ops.loss(pred, X0, LOSS, INDEX, seeds=SEEDS)
    stored = torch.ops.diffkern.loss(pred.detach(), X0, LOSS, INDEX, SEEDS, 0, None, 1, True)[1]
    (first,) = torch.autograd.grad(loss, pred, retain_graph=True)
    (second,) = torch.autograd.grad(loss, pred)
    assert same_bits(first, stored)
    assert same_bits(second, stored)
    assert first.stride() == stored.stride()


def test_what_is_small() -> None:
    """1 MiB in float32 at the most."""
    for count, stores in ((2**18, True), (2**18 + 1, False)):
        pred = torch.zeros(1, count, dtype=torch.bfloat16, requires_grad=True)
        used, _ = allocated(lambda: ops.loss(pred, pred.detach(), LOSS[:1], seeds=SEEDS[:1]))  # noqa: B023
        assert (used >= 4 * count) == stores, count


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("scale", [2.0**24, 2.0**-24])
def test_float32_needs_no_second_pass(dtype: torch.dtype, scale: float) -> None:
    """One float32 rounding more: relative error of a unit, also for gradients that accumulate over 64 small ones."""
    pred = values(SHAPE, 1, dtype).requires_grad_()
    wide = pred.detach().double().requires_grad_()
    for _ in range(64):
        (ops.loss(pred, X0.to(dtype), LOSS, INDEX, seeds=SEEDS) * scale / 64).backward()
    with native_draws():
        (exact,) = torch.autograd.grad(reference.loss(wide, X0.double(), LOSS, INDEX, seeds=SEEDS) * scale, wide)
    torch.testing.assert_close(pred.grad.double(), exact, rtol=1e-5, atol=1e-6 * exact.abs().max().item())  # type: ignore[union-attr]


@pytest.mark.parametrize("dtype", NARROW, ids=str)
def test_memory(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both passes together allocate one gradient of pred's dtype, as a forward pass that stores it would."""
    monkeypatch.setattr("diffkern.ops._common._SMALL", 0)
    pred, x0 = values(SHAPE, 1, dtype).requires_grad_(), values(SHAPE, 2)
    both = values((SHAPE[0], 2 * SHAPE[1], *SHAPE[2:]), 1, dtype).requires_grad_()
    scale = torch.tensor(65536.0)
    calls: dict[str, tuple[Tensor, Callable[[], Tensor]]] = {
        "loss": (pred, lambda: ops.loss(pred, x0, LOSS, INDEX, seeds=SEEDS)),
        "loss of each": (pred, lambda: ops.loss(pred, x0, LOSS, INDEX, seeds=SEEDS, reduction="none").sum()),
        "bound": (both, lambda: ops.variational(both, x0, BOUND, INDEX, seeds=SEEDS)[0]),
    }
    for name, (leaf, call) in calls.items():
        forward, loss = allocated(call)
        assert forward <= 8 * COUNT // 64, name
        backward, _ = allocated(lambda: torch.autograd.grad(loss, leaf, scale, retain_graph=True))  # noqa: B023
        assert backward <= 2 * leaf.numel() + 8 * COUNT // 64 + SLACK, name


@pytest.mark.usefixtures("way")
def test_second_derivative_is_refused() -> None:
    pred = values((3, 7), 1).half().requires_grad_()
    loss = ops.loss(pred, pred.detach().float(), LOSS[:1], seeds=ops.seeds(0, 3))
    with pytest.raises(RuntimeError, match=r"diffkern\.loss: differentiable once only, use diffkern\.reference\.loss"):
        torch.autograd.grad(loss, pred, create_graph=True)


@pytest.mark.parametrize("backend", few(["aot_eager", "inductor"], "aot_eager"))
def test_in_a_compiled_graph(backend: str) -> None:
    def train(weight: Tensor, scale: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            pred = torch.nn.functional.linear(X0[..., 0].flatten(1), weight)
        loss = ops.loss(pred, X0[..., 0].flatten(1), LOSS, INDEX, seeds=SEEDS)
        each = ops.loss(pred, X0[..., 0].flatten(1), LOSS, INDEX, seeds=SEEDS, reduction="none")
        return (loss + each.square().sum()) * scale

    weight = (0.1 * values((192, 192), 5)).requires_grad_()
    scale = torch.tensor(4096.0)
    (expected,) = torch.autograd.grad(train(weight, scale), weight)
    compiled = torch.compile(train, fullgraph=True, backend=backend)
    (got,) = torch.autograd.grad(compiled(weight, scale), weight)
    torch.testing.assert_close(got, expected, rtol=2e-2, atol=1e-2 * expected.abs().max().item())
