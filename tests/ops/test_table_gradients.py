"""Tables that require grad: the gradient of every coefficient by finite differences, and which ops refuse one."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from helpers.op_cases import EVERYTHING, check_sentence, table, values
from torch import Tensor

from diffkern import ops
from diffkern.plan import COLUMNS, LEARNED_COLUMNS

SHAPE = (3, 2, 3)
SEEDS = ops.seeds(0, 3)
NOISING = torch.tensor([[0.9, 0.43, 0.43, -0.9], [0.2, 0.98, 0.98, -0.2], [0.5, 0.6, 0.7, 0.8]], dtype=torch.float64)
LOSS = torch.tensor([[0.43, -0.9, 1.3], [-1.0, 1.0, 0.0], [0.3, 0.4, 25.0]], dtype=torch.float64)
INDICES = {"rows": None, "one": torch.tensor(1), "each": torch.tensor([2, 0, 2])}
X, M, M2, H0, H1, H2, H3, NOISE, KNOWN = (values(SHAPE, k, torch.float64) for k in range(9))
MASK = values(SHAPE, 19, torch.float64).abs().clamp(max=1)
STREAMS = torch.tensor([name.endswith("stream") for name in COLUMNS])


def leaf(t: Tensor) -> Tensor:
    return t.clone().requires_grad_()


@pytest.mark.parametrize("source", ["address", "tensor"])
@pytest.mark.parametrize("index", INDICES)
def test_noising(index: str, source: str) -> None:
    at = INDICES[index]
    noise = {"seeds": SEEDS, "stream": 5} if source == "address" else {"noise": NOISE}

    def run(rows: Tensor, x0: Tensor) -> tuple[Tensor, ...]:
        return ops.noising(x0, rows, at, **noise, want_target=True)[:2]  # type: ignore[return-value]

    assert torch.autograd.gradcheck(run, (leaf(NOISING), leaf(X)))
    if at is None:  # one row for all samples
        assert torch.autograd.gradcheck(lambda rows: run(rows, X), (leaf(NOISING[:1]),))
    assert torch.autograd.gradgradcheck(run, (leaf(NOISING), leaf(X)))


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize("index", INDICES)
def test_loss(index: str, reduction: str) -> None:
    """A weight of 0 (row 1) included: its derivative is the error, which the value does not show."""
    at = INDICES[index]

    def run(rows: Tensor, pred: Tensor, x0: Tensor, noise: Tensor) -> Tensor:
        return ops.loss(pred, x0, rows, at, noise=noise, reduction=reduction)

    leaves = [leaf(t) for t in (M, X, NOISE)]
    assert torch.autograd.gradcheck(run, (leaf(LOSS), *leaves))
    assert torch.autograd.gradcheck(
        lambda rows: ops.loss(M, X, rows, at, seeds=SEEDS, reduction=reduction), (leaf(LOSS),)
    )
    if at is None:
        assert torch.autograd.gradcheck(lambda rows: run(rows, M, X, NOISE), (leaf(LOSS[:1]),))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_16_bits(dtype: torch.dtype) -> None:
    """dL/dweight is the mean square, dL/du and dL/dv its slopes, in the precision of float32."""
    pred, x0, noise = (t.to(dtype) for t in (M, X, NOISE))
    rows = LOSS.clone().requires_grad_()
    (found,) = torch.autograd.grad(ops.loss(pred, x0, rows, noise=noise, reduction="sum") * 65536.0, rows)
    d = pred.double() - LOSS[:, :1, None] * x0.double() - LOSS[:, 1:2, None] * noise.double()
    by = [-2 * LOSS[:, 2] * (d * t.double()).flatten(1).mean(1) for t in (x0, noise)]
    right = 65536.0 * torch.stack([*by, d.square().flatten(1).mean(1)], 1)
    torch.testing.assert_close(found, right, rtol=1e-5, atol=1e-3)


# ------------------------------------------------------------------------------------------------------------ step
STEPS = table({**EVERYTHING, "clip": 1.1}, {**EVERYTHING, "a": 0.1}, {"a": 1.0, "d": 0.5})


def perturbable(rows: Tensor, spread: Tensor) -> Tensor:
    """`rows` with the real columns those of `spread`: a finite difference must not touch the whole ones."""
    return torch.where(STREAMS | torch.isinf(rows), rows, spread)


@pytest.mark.parametrize("case", ["row", "index", "each", "noise", "open mask", "no mask", "m2"])
def test_step(case: str) -> None:
    more: dict[str, object] = {"seeds": SEEDS, "mask": MASK, "known": KNOWN, "row": 1}
    m, m2 = torch.cat([M, M2]), None
    if case == "index":
        more["index"] = torch.tensor(0)
    elif case == "each":
        more["index"] = torch.tensor([1, 2, 0])
    elif case == "noise":
        more["noise"] = NOISE
    elif case == "open mask":
        more["mask"] = torch.full(SHAPE, 255, dtype=torch.uint8)
    elif case == "no mask":
        del more["mask"], more["known"]
    else:
        m, m2 = M, M2

    def run(spread: Tensor, x: Tensor) -> tuple[Tensor, ...]:
        rows = perturbable(STEPS, spread)
        found = ops.step(x, m, m2, H0, H1, H2, H3, table=rows, **more, want_x0=True, want_s=True, next_copies=2)  # type: ignore[arg-type]
        return tuple(t for t in found if t is not None)

    given = torch.where(torch.isinf(STEPS), 0.0, STEPS).requires_grad_()
    assert torch.autograd.gradcheck(run, (given, leaf(X)))
    if case in ("row", "each"):
        assert torch.autograd.gradgradcheck(run, (given, leaf(X)))


def test_step_of_the_table_alone() -> None:
    """d x'/da = x, d/dd = m of the row that ran; none for the others."""
    rows = STEPS.clone().requires_grad_()
    (found,) = torch.autograd.grad(ops.step(X, M, table=rows, row=2)[0].sum(), rows)
    assert not found[:2].any()
    torch.testing.assert_close(found[2, COLUMNS.index("a")], X.sum())
    torch.testing.assert_close(found[2, COLUMNS.index("d")], M.sum())


# --------------------------------------------------------------------------------------------------------- refusals
def refused() -> dict[str, tuple[Callable[[], object], str]]:
    steps, out = STEPS.clone().requires_grad_(), torch.empty(SHAPE, dtype=torch.float64)
    learned = torch.zeros(1, len(LEARNED_COLUMNS), dtype=torch.float64)
    learned[0, [LEARNED_COLUMNS.index(name) for name in ("a", "clip", "k")]] = 1.0
    learned.requires_grad_()
    bound = torch.rand(1, 12, dtype=torch.float64, requires_grad=True)
    weights = torch.ones(1, dtype=torch.float64, requires_grad=True)
    both, stream = torch.cat([M, M], 1), torch.tensor([1])
    not_once = r": not differentiable, and a tensor requires grad: use torch.no_grad\(\)"
    return {
        "step_out": (lambda: ops.step_out(X, M, table=steps, row=2, out=out), "step_out" + not_once),
        "noising_out": (
            lambda: ops.noising_out(X, NOISING.clone().requires_grad_(), seeds=SEEDS, out=out),
            "noising_out" + not_once,
        ),
        "learned_step": (lambda: ops.learned_step(X, both, table=learned), "learned_step" + not_once),
        "learned_step_out": (
            lambda: ops.learned_step_out(X, both, table=learned, out=out),
            "learned_step_out" + not_once,
        ),
        "noise_sum": (lambda: ops.noise_sum(SHAPE, SEEDS, stream, weights), "noise_sum" + not_once),
        "noise_sum_out": (lambda: ops.noise_sum_out(SEEDS, stream, weights, out), "noise_sum" + not_once),
        "variational": (
            lambda: ops.variational(M, X, bound, seeds=SEEDS),
            r"variational: differentiable in pred only, and x0, noise or table requires grad: detach it",
        ),
        "step_logprob": (
            lambda: ops.step_logprob(X, X, M, table=steps, row=2),
            r"step_logprob: differentiable in m and m2 only, and after, x, a history or the table requires grad",
        ),
    }


@pytest.mark.parametrize("name", refused())
def test_refused(name: str) -> None:
    call, sentence = refused()[name]
    check_sentence(call, r"diffkern\." + sentence)
