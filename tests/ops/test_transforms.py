"""torch.func and vmap over the ops: values and gradients of one call a sample, or a sentence that names the way out."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import op_names
from helpers.op_cases import EVERYTHING, check_sentence, table, values
from helpers.suites import few
from torch import Tensor, nn

import diffkern
from diffkern import ops
from diffkern.ops import _vmap

V, B = 3, 2
SEEDS = torch.stack([ops.seeds(k, B) for k in range(V)])
NOISING = torch.tensor([[0.9, 0.43, 0.43, -0.9], [0.2, 0.98, 0.98, -0.2], [0.5, 0.6, 0.7, 0.8]], dtype=torch.float64)
LOSS = torch.tensor([[0.43, -0.9, 1.3], [-1.0, 1.0, 0.1], [0.3, 0.4, 25.0]], dtype=torch.float64)
BOUND = torch.tensor(
    [
        [0.3, -0.9, 0.7, 9.0, 3.0, 0.2, 0.1, 0.0, 0.1, 1.5, 0.5, 1.0],
        [0.1, 0.8, -0.6, 1.2, 2, 0.3, 0.1, 0, 0.1, 1, 2, 1],
    ],
    dtype=torch.float64,
)
STEPS = table({**EVERYTHING, "clip": 1.2}, {"a": 0.9, "d": 0.3, "g": 0.5}, {**EVERYTHING, "a": 0.1})
PLAIN = table(
    {"a": 0.9, "d": 0.3, "g": 0.5, "p": 1.0, "q": -0.5, "b": 0.3, "clip": 1.0, "w": 2.0}, {"a": 0.5, "g": 0.2}
)


def numbers(seed: int, *shape: int) -> Tensor:
    return values((V, B, *(shape or (3, 4))), seed)


def many(seed: int, *shape: int) -> Tensor:
    return values((V, *shape), seed)


TERMS = torch.tensor([7, 9]), torch.tensor([0.5, -2.0], dtype=torch.float64)
INDEX = torch.tensor([[0, 2], [1, 1], [2, 0]])
W, LINEAR, TAPS = values((2, 4), 30)[0], values((4, 4), 31), values((4, 3, 3, 3), 32)
MASK = numbers(20).abs().clamp(max=1)

# name -> (function of tensors, tensors [V, ...] of one call each, which of them have gradients)
CASES: dict[str, tuple[Callable[..., Any], tuple[Tensor, ...], int]] = {
    "randn": (lambda s: ops.randn((B, 3, 4), s, 7), (SEEDS,), 0),
    "noise_sum": (lambda s: ops.noise_sum((B, 3, 4), s, *TERMS), (SEEDS,), 0),
    "noise_sum, terms of each call": (
        lambda s, streams, weights: ops.noise_sum((B, 3, 4), s, streams, weights, torch.float64),
        (SEEDS, torch.arange(2 * V).reshape(V, 2), many(1, 2).double()),
        0,
    ),
    "noising": (
        lambda x, s, i: ops.noising(x, NOISING, i, seeds=s, want_target=True, want_eps=True),
        (numbers(1), SEEDS, INDEX),
        1,
    ),
    "noising by rows and a tensor": (
        lambda x, e, rows: ops.noising(x, rows, noise=e, want_target=True)[:2],
        (numbers(1), numbers(2), many(3, B, 4).double()),
        3,
    ),
    "loss": (
        lambda p, x, s, i: ops.loss(p, x, LOSS, i, seeds=s, reduction="none"),
        (numbers(1), numbers(2), SEEDS, INDEX),
        2,
    ),
    "loss, mean": (
        lambda p, x, e, rows: ops.loss(p, x, rows, noise=e),
        (numbers(1), numbers(2), numbers(3), many(4, 1, 3).double()),
        4,
    ),
    "loss, sum, one row by index": (
        lambda p, x, s, i: ops.loss(p, x, LOSS, i, seeds=s, reduction="sum"),
        (numbers(1), numbers(2), SEEDS, torch.tensor([2, 0, 1])),
        2,
    ),
    "loss, rows by index": (
        lambda p, x, e, rows, i: ops.loss(p, x, rows, i, noise=e),
        (numbers(1), numbers(2), numbers(3), many(4, 3, 3).double(), INDEX),
        4,
    ),
    "variational": (
        lambda p, x, s, i: ops.variational(p, x, BOUND, i, seeds=s),
        (0.3 * numbers(1, 4, 3), 0.3 * numbers(2, 2, 3), SEEDS, INDEX.clamp(max=1)),
        1,
    ),
    "step": (
        lambda x, m, h, k, s: ops.step(
            *(x, m, m + 1, h, h, h, h),
            **{"table": STEPS, "seeds": s, "mask": MASK[0], "known": k, "want_x0": True, "want_s": True},
            next_copies=2,
        ),
        (numbers(1), numbers(2), numbers(3), numbers(4), SEEDS),
        4,
    ),
    "step, doubled, each its row": (
        lambda x, m, i, e: ops.step(x, m, table=PLAIN, index=i, noise=e, next_copies=1),
        (numbers(1), many(2, 2 * B, 3, 4), INDEX.clamp(max=1), numbers(3)),
        2,
    ),
    "step, its table": (
        lambda x, m, e, rows: ops.step(x, m, table=rows, row=1, noise=e, want_s=True),
        (numbers(1), numbers(2), numbers(3), torch.stack([STEPS[:2] * (1 + 0.1 * k) for k in range(V)])),
        2,
    ),
    "step_logprob": (
        lambda m, a, x: ops.step_logprob(a, x, m, table=PLAIN, row=1),
        (numbers(1), numbers(2), numbers(3)),
        1,
    ),
    "step_logprob, doubled": (
        lambda m, a, x, i: ops.step_logprob(a, x, m, table=PLAIN, index=i),
        (many(1, 2 * B, 3, 4), numbers(2), numbers(3), INDEX.clamp(max=1)),
        1,
    ),
    "attention": (ops.attention, tuple(many(k, B, 2, 5, 8) for k in range(3)), 3),
    "spatial_attention": (lambda x: ops.spatial_attention(x, 2, "legacy"), (many(1, B, 48, 3, 2),), 1),
    "attention, a learned scale": (
        lambda q, k, s: ops.attention(q, k, k, s),
        (many(1, B, 2, 5, 8), many(2, B, 2, 5, 8), torch.tensor([0.2, 0.3, 0.4])),
        3,
    ),
    "group_norm_act": (
        lambda x, s, t, a, w: ops.group_norm_act(x, 2, W, W, scale=s, shift=t, add=a) + w,
        (many(1, B, 4, 3, 5), many(2, B, 4), many(3, B, 4), many(5, B, 4), many(4, 1)),
        4,
    ),
    "group_norm_act, each its parameters": (
        lambda w, b, x: ops.group_norm_act(x, 2, w, b),
        (many(1, 4), many(2, 4), many(3, B, 4, 3, 5)),
        3,
    ),
    "linear_rows": (
        lambda x, w: ops.linear_rows(x, LINEAR, LINEAR[0], act="silu") + w,
        (many(1, B, 4), many(2, 1)),
        2,
    ),
    "linear_rows, each its parameters": (
        lambda w, b, x: ops.linear_rows(x, w, b, act="silu"),
        (many(1, 5, 4), many(2, 5), many(3, B, 4)),
        3,
    ),
    "conv3x3": (
        lambda x, w: ops.conv3x3(x, TAPS, LINEAR[0]) + w,
        (many(1, B, 3, 4, 5), many(2, 1)),
        2,
    ),
    "conv3x3, each its parameters": (
        lambda w, b, x: ops.conv3x3(x, w, b, upsample=True),
        (many(1, 2, 3, 3, 3), many(2, 2), many(3, B, 3, 2, 3)),
        3,
    ),
    "pack_conv3x3": (ops.pack_conv3x3, (many(1, 2, 3, 3, 3),), 0),
    "quantile": (lambda x: ops.quantile(x, 0.3), (numbers(1),), 0),
    "dynamic_threshold": (lambda x: ops.dynamic_threshold(x, 0.6), (2 * numbers(1),), 0),
    "moments": (ops.moments, (numbers(1),), 0),
    "noised": (
        lambda x, t, s: diffkern.noised(x, t, diffkern.vp(), seeds=s),
        (numbers(1), many(2, B).sigmoid().double(), SEEDS),
        2,
    ),
    "prediction_loss": (
        lambda p, x, s, t: diffkern.prediction_loss(p, x, t, diffkern.linear(), "v", weight="min_snr", seeds=s),
        (numbers(1), numbers(2), SEEDS, 300 * INDEX),
        2,
    ),
    "prediction_loss by times": (
        lambda p, x, t, s: diffkern.prediction_loss(p, x, t, diffkern.flow(), "velocity", weight="edm", seeds=s),
        (numbers(1), numbers(2), 0.1 + 0.8 * many(3, B).sigmoid().double(), SEEDS),
        3,
    ),
}
DIFFERENTIABLE = [name for name, (*_, count) in CASES.items() if count]
QUICK = ("noising", "loss", "step", "attention", "prediction_loss by times")
AGAIN = {"noising", "noising by rows and a tensor", "step", "step, doubled, each its row", "noised"}
AGAIN |= {f"{name}{more}" for name in ("linear_rows", "conv3x3") for more in ("", ", each its parameters")}


def parts(result: Any) -> tuple[Tensor, ...]:
    return (result,) if isinstance(result, Tensor) else tuple(t for t in result if t is not None)


def of(function: Callable[..., Any]) -> Callable[..., tuple[Tensor, ...]]:
    return lambda *args: parts(function(*args))


def total(function: Callable[..., Any], *tensors: Tensor) -> Tensor:
    return sum((0.7 * t + t.sin()).sum() for t in parts(function(*tensors)))  # type: ignore[return-value]


def close(found: Any, right: Any) -> None:
    for f, r in zip(parts(found), parts(right), strict=True):
        assert f.shape == r.shape
        torch.testing.assert_close(f, r, rtol=2e-5, atol=2e-6)


def gradients(name: str, tensors: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    function, _, count = CASES[name]
    leaves = [t.clone().requires_grad_() for t in tensors[:count]]
    return torch.autograd.grad(total(function, *leaves, *tensors[count:]), leaves)


@pytest.mark.parametrize("name", CASES)
def test_vmap(name: str) -> None:
    """All operands batched; each alone unbatched; batched along the last dimension."""
    function, tensors, _ = CASES[name]
    right = [
        torch.stack(each) for each in zip(*(parts(function(*one)) for one in zip(*tensors, strict=True)), strict=True)
    ]
    close(torch.vmap(of(function))(*tensors), tuple(right))
    last = [t.movedim(0, -1) for t in tensors]
    close(torch.vmap(of(function), tuple(t.dim() - 1 for t in last))(*last), tuple(right))
    for k in range(len(tensors)) if len(tensors) > 1 else ():
        shared = [t[1] if j == k else t for j, t in enumerate(tensors)]
        each = [parts(function(*(s if j == k else s[v] for j, s in enumerate(shared)))) for v in range(V)]
        dims = tuple(None if j == k else 0 for j in range(len(tensors)))
        close(torch.vmap(of(function), dims)(*shared), tuple(torch.stack(e) for e in zip(*each, strict=True)))


@pytest.mark.parametrize("name", few(DIFFERENTIABLE, *QUICK))
def test_grad(name: str) -> None:
    function, tensors, count = CASES[name]
    one = tuple(t[0] for t in tensors)
    found = torch.func.grad(lambda *args: total(function, *args), tuple(range(count)))(*one)
    close(found, gradients(name, one))


@pytest.mark.parametrize("name", few(DIFFERENTIABLE, *QUICK))
def test_gradients_of_each_sample(name: str) -> None:
    """vmap over grad, grad over vmap, and jacrev (vmap over the backward pass alone)."""
    function, tensors, count = CASES[name]
    arguments = tuple(range(count))
    right = [gradients(name, one) for one in zip(*tensors, strict=True)]
    stacked = tuple(torch.stack(each) for each in zip(*right, strict=True))
    close(torch.vmap(torch.func.grad(lambda *args: total(function, *args), arguments))(*tensors), stacked)
    whole = lambda *args: torch.vmap(lambda *one: total(function, *one))(*args).sum()  # noqa: E731
    close(torch.func.grad(whole, arguments)(*tensors), stacked)
    leaves = [t.clone().requires_grad_() for t in tensors[:count]]  # ordinary autograd around vmap
    close(torch.autograd.grad(whole(*leaves, *tensors[count:]), leaves), stacked)


@pytest.mark.parametrize("name", few(DIFFERENTIABLE, *QUICK))
def test_jacobian(name: str) -> None:
    function, tensors, count = CASES[name]
    one = tuple(t[0] for t in tensors)
    first = lambda *args: parts(function(*args))[0].flatten()[:3]  # noqa: E731
    found = torch.func.jacrev(first, tuple(range(count)))(*one)
    for k in range(min(3, found[0].shape[0])):
        leaves = [t.clone().requires_grad_() for t in one[:count]]
        right = torch.autograd.grad(first(*leaves, *one[count:])[k], leaves)
        close(tuple(f[k] for f in found), right)


@pytest.mark.parametrize("name", few(DIFFERENTIABLE, *QUICK))
def test_twice(name: str) -> None:
    """Where plain autograd has a second derivative torch.func has the same, elsewhere both say that there is none."""
    function, tensors, _ = CASES[name]
    x, *rest = (t[0] for t in tensors)
    slope = torch.func.grad(lambda x: total(function, x, *rest))
    if name not in AGAIN and name != "step, its table":
        check_sentence(
            lambda: torch.func.grad(lambda x: slope(x).sum())(x),
            r"diffkern\.\w+: differentiable once only, use diffkern\.reference\.\w+ for higher derivatives",
        )
        return
    leaf = x.clone().requires_grad_()
    (once,) = torch.autograd.grad(total(function, leaf, *rest), leaf, create_graph=True)
    (right,) = torch.autograd.grad(once.sin().sum(), leaf)
    close(torch.func.grad(lambda x: slope(x).sin().sum())(x), right)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_per_sample_gradients_of_a_network(dtype: torch.dtype) -> None:
    """As for differential privacy: the gradient of each sample's loss in every parameter."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.SiLU(), nn.Conv2d(4, 3, 3, padding=1))
    parameters = {name: p.detach() for name, p in net.named_parameters()}
    x0, t, seeds, schedule = (
        values((4, 3, 5, 6), 1),
        torch.tensor([3, 200, 500, 900]),
        ops.seeds(0, 4),
        diffkern.linear(),
    )

    def loss(parameters: dict[str, Tensor], x: Tensor, t: Tensor, s: Tensor) -> Tensor:
        x, t, s = x[None], t[None], s[None]
        noisy = diffkern.noised(x, t, schedule, seeds=s)
        pred = torch.func.functional_call(net, parameters, (noisy,)).to(dtype)
        return diffkern.prediction_loss(pred, x, t, schedule, seeds=s)

    found = torch.vmap(torch.func.grad(loss), (None, 0, 0, 0))(parameters, x0, t, seeds)
    for b in range(4):
        net.zero_grad()
        loss(dict(net.named_parameters()), x0[b], t[b], seeds[b]).backward()
        for name, p in net.named_parameters():
            assert p.grad is not None
            tolerance = 1e-5 if dtype == torch.float32 else 1e-2
            torch.testing.assert_close(
                found[name][b], p.grad, rtol=tolerance, atol=tolerance * float(p.grad.abs().max())
            )


def test_what_has_no_part_in_them_says_so() -> None:
    x, rows, seeds = numbers(1), table({"a": 0.5}), SEEDS[0]
    out = torch.empty_like(x[0])
    learned = torch.zeros(1, 23, dtype=torch.float64)
    learned[0, [4, 5]] = 1.0
    calls: dict[str, Callable[[Tensor], Any]] = {
        "step_out": lambda x: ops.step_out(x, None, table=rows, out=out),
        "noising_out": lambda x: ops.noising_out(x, NOISING[:1], seeds=seeds, out=out),
        "noise_sum_out": lambda x: ops.noise_sum_out(seeds, torch.tensor([1]), torch.ones(1, dtype=torch.float64), x),
        "learned_step": lambda x: ops.learned_step(x, None, table=learned)[0],
        "dynamic_threshold_out": lambda x: ops.dynamic_threshold_out(x, out=out),
    }
    for name, call in calls.items():
        check_sentence(
            lambda call=call: torch.vmap(call)(x),
            rf"diffkern\.{name}: has no part in torch\.func and vmap, .*: use diffkern\.(ops|reference)\.\w+",
        )
        check_sentence(
            lambda call=call: torch.func.grad(lambda x: call(x).sum())(x[0]), r"diffkern\.\w+: not differentiable"
        )
    for op in (lambda x: ops.quantile(x, 0.5), ops.moments, ops.dynamic_threshold):
        check_sentence(lambda op=op: torch.func.grad(lambda x: op(x).sum())(x[0]), "not differentiable")
        check_sentence(lambda op=op: torch.func.grad(lambda x: torch.vmap(op)(x).sum())(x), "not differentiable")


def test_a_bound_step_does_not_lose_a_gradient_outside_of_vmap() -> None:
    """It does not look at its operands, and inside of vmap they do not say that they require grad."""
    bound = ops.bound_step(table({"a": 0.5}))
    run = lambda x: torch.vmap(lambda x: bound(x, x, 0).out)(x).sum()  # noqa: E731
    close(run(numbers(1)), 0.5 * numbers(1).sum())
    sentence = r"diffkern\.step: a bound step .* has no gradient out of vmap: use diffkern\.ops\.step"
    check_sentence(lambda: torch.func.grad(run)(numbers(1)), sentence)
    check_sentence(lambda: run(numbers(1).requires_grad_()), sentence)


def test_every_op_has_a_rule_or_says_so() -> None:
    told = {"learned_step"}
    returning = {name for name in op_names.registered() if not name.endswith("_out")}
    assert set(_vmap.rules(slice(0), slice(0))) == returning - told


def test_what_is_kept_in_a_transform_is_ordinary_afterwards() -> None:
    """Tables of a schedule that a transform was the first to ask for."""
    schedule, x, t = diffkern.linear(37), values((2, 3, 4), 1), torch.tensor([3, 30])
    bound = diffkern.objectives.variational.vlb_loss

    def loss(x: Tensor) -> Tensor:
        kept = diffkern.prediction_loss(x, x.detach(), t, schedule, "v", weight="p2", seeds=SEEDS[0])
        return kept + bound(x, x.detach(), t, schedule, variance="beta", seeds=SEEDS[0])

    found = torch.func.grad(loss)(x)
    leaf = x.clone().requires_grad_()
    close(found, torch.autograd.grad(loss(leaf), leaf)[0])
    with torch.autograd.forward_ad.dual_level():  # which asks every operand for its tangent
        close(loss(x), loss(leaf.detach()))
    assert not torch._C._functorch.is_functorch_wrapped_tensor(schedule.table("v"))
