"""compat.torchcfm beside the installed torchcfm: same seed, same times, locations, fields and pairs."""

from __future__ import annotations

import inspect
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from helpers.lazy import Lazy, needs
from torch import Tensor

from diffkern.compat import torchcfm as ours

pytestmark = needs("torchcfm")
theirs = Lazy("torchcfm.conditional_flow_matching")

SHAPES = [(5, 2), (4, 3, 5, 6), (3, 2, 4, 4, 4), (6,)]


def name_of(value: Any) -> str:
    if isinstance(value, dict):
        return "-".join(f"{k}{v}" for k, v in value.items()) or "default"
    return str(value).removeprefix("torch.")


PAIRED = ("ExactOptimalTransportConditionalFlowMatcher", "SchrodingerBridgeConditionalFlowMatcher")
MATCHERS: list[tuple[str, dict[str, Any]]] = [
    ("ConditionalFlowMatcher", {}),
    ("ConditionalFlowMatcher", {"sigma": 0.1}),
    ("ConditionalFlowMatcher", {"sigma": 1}),
    ("TargetConditionalFlowMatcher", {}),
    ("TargetConditionalFlowMatcher", {"sigma": 0.05}),
    ("TargetConditionalFlowMatcher", {"sigma": 1.5}),
    ("VariancePreservingConditionalFlowMatcher", {}),
    ("VariancePreservingConditionalFlowMatcher", {"sigma": 0.3}),
    ("ExactOptimalTransportConditionalFlowMatcher", {"sigma": 0.1}),
    ("SchrodingerBridgeConditionalFlowMatcher", {}),
    ("SchrodingerBridgeConditionalFlowMatcher", {"sigma": 4.0, "ot_method": "sinkhorn"}),
]

CASES = [
    (name, options, shape, dtype)
    for name, options in MATCHERS
    for shape in SHAPES
    for dtype in (torch.float32, torch.float64, torch.float16, torch.bfloat16)
    # torchcfm has no distances of single numbers or of 16 bits.
    if name not in PAIRED or (len(shape) > 1 and dtype.itemsize > 2)
]


def batch(shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    z = torch.randn(2, *shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    return z[0].to(dtype), (2 * z[1] + 0.5).to(dtype)


def run(module: Any, name: str, options: dict[str, Any], *args: Any, method: str = "", **kwargs: Any) -> Any:
    """The result of one draw, and the state both generators are left in."""
    matcher = getattr(module, name)(**options)
    torch.manual_seed(11)
    np.random.seed(11)
    out = getattr(matcher, method or "sample_location_and_conditional_flow")(*args, **kwargs)
    return out, (torch.rand(2), np.random.rand(2))


def same_generators(a: Any, b: Any) -> None:
    assert torch.equal(a[0], b[0])
    assert (a[1] == b[1]).all()


def close(found: Tensor, want: Tensor, exact: Tensor, bound: float) -> None:
    """Within the bound of the original, beyond what the original itself is off."""
    size = float(exact.abs().max())
    own = float((want.double() - exact).abs().max())
    assert found.dtype == want.dtype
    assert found.shape == want.shape
    assert float((found.double() - want.double()).abs().max()) <= bound * size + 2 * own
    assert float((found.double() - exact).abs().max()) <= bound * size + own


@pytest.mark.parametrize(("name", "options", "shape", "dtype"), CASES, ids=name_of)
def test_sample(name: str, options: dict[str, Any], shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x0, x1 = batch(shape, dtype)
    want, state = run(theirs, name, options, x0, x1, return_noise=True)
    found, state_found = run(ours, name, options, x0, x1, return_noise=True)
    same_generators(state_found, state)
    assert torch.equal(found[0], want[0])
    assert torch.equal(found[3], want[3])
    assert len(found) == len(want) == 4
    # The original in float64 at the same times, noise and pairs: mock its draws.
    with mock.patch("torch.randn_like", return_value=want[3].double()):
        (_, *exact), _ = run(theirs, name, options, x0.double(), x1.double(), want[0].double())
    bound = {torch.float32: 2e-6, torch.float64: 1e-12}.get(dtype, torch.finfo(dtype).eps / 2)
    if dtype.itemsize == 2:
        for a, b, c in zip(found[1:3], want[1:3], exact, strict=True):
            assert a.dtype == dtype
            size = float(c.abs().max())
            assert float((a.double() - c).abs().max()) <= float((b.double() - c).abs().max()) + bound * size
    else:
        for a, b, c in zip(found[1:3], want[1:3], exact, strict=True):
            close(a, b, c, bound)
    short, _ = run(ours, name, options, x0, x1)
    assert len(short) == 3
    assert all(torch.equal(a, b) for a, b in zip(short, found, strict=False))


@pytest.mark.parametrize(("name", "options"), MATCHERS, ids=name_of)
def test_given_times(name: str, options: dict[str, Any]) -> None:
    """[B] and [B, 1]; the ends 0 and 1 too, except where the original divides by 0."""
    x0, x1 = batch((4, 3, 5), torch.float64)
    last = 0.99 if name.startswith("Target") and not options else 1.0
    t = torch.tensor([0.25, 0.6, 0.0, last], dtype=torch.float64)
    for times in (t, t[:, None]):
        want, state = run(theirs, name, options, x0, x1, times)
        found, state_found = run(ours, name, options, x0, x1, times)
        same_generators(state_found, state)
        assert found[0] is times
        for a, b in zip(found[1:], want[1:], strict=True):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_field_at_the_data_end() -> None:
    """Where the original's quotient cancels, and at t = 1 is 0/0, the field is x1 - (1 - sigma) eps."""
    x0, x1 = batch((2, 3))
    t = torch.tensor([1.0 - 2**-20, 1.0])
    (_, _, want, eps), _ = run(theirs, "TargetConditionalFlowMatcher", {}, x0, x1, t, return_noise=True)
    (_, _, found, _), _ = run(ours, "TargetConditionalFlowMatcher", {}, x0, x1, t, return_noise=True)
    torch.testing.assert_close(found, x1 - eps, rtol=1e-6, atol=1e-6)
    assert not want[1].isfinite().any()
    assert float((want[0] - (x1 - eps)[0]).abs().max()) > 1e-2


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("name", "options"), MATCHERS, ids=name_of)
def test_parts(name: str, options: dict[str, Any], dtype: torch.dtype) -> None:
    """compute_mu_t, compute_sigma_t, sample_xt, compute_conditional_flow, compute_lambda."""
    x0, x1 = batch((4, 3, 5), dtype)
    t = torch.tensor([0.1, 0.25, 0.6, 0.9], dtype=dtype)
    a, b = (getattr(module, name)(**options) for module in (ours, theirs))
    eps = torch.randn(4, 3, 5, dtype=dtype)
    tolerance = {"rtol": 0, "atol": 4e-6 if dtype == torch.float32 else 1e-13}
    torch.testing.assert_close(a.compute_mu_t(x0, x1, t), b.compute_mu_t(x0, x1, t), **tolerance)
    torch.testing.assert_close(a.compute_sigma_t(t), b.compute_sigma_t(t), **tolerance)
    torch.testing.assert_close(a.compute_lambda(t), b.compute_lambda(t), **tolerance)
    xt = b.sample_xt(x0, x1, t, eps)
    torch.testing.assert_close(a.sample_xt(x0, x1, t, eps), xt, **tolerance)
    flow = b.compute_conditional_flow(x0, x1, t, xt)
    loose = {"rtol": 1e-5, "atol": 2e-5} if dtype == torch.float32 else {"rtol": 1e-12, "atol": 1e-12}
    torch.testing.assert_close(a.compute_conditional_flow(x0, x1, t, xt), flow, **loose)
    assert torch.equal(ours.pad_t_like_x(t, x0), theirs.pad_t_like_x(t, x0))
    assert ours.pad_t_like_x(0.5, x0) == 0.5


@pytest.mark.parametrize("name", ["ConditionalFlowMatcher", "TargetConditionalFlowMatcher"])
def test_a_number_for_t(name: str) -> None:
    x0, x1 = batch((4, 3))
    a, b = (getattr(module, name)(0.1) for module in (ours, theirs))
    torch.testing.assert_close(a.compute_mu_t(x0, x1, 0.3), b.compute_mu_t(x0, x1, 0.3))
    torch.testing.assert_close(a.sample_xt(x0, x1, 0.3, x0), b.sample_xt(x0, x1, 0.3, x0))
    flow = b.compute_conditional_flow(x0, x1, 0.3, x0)
    torch.testing.assert_close(a.compute_conditional_flow(x0, x1, 0.3, x0), flow)


@pytest.mark.parametrize("return_noise", [False, True])
@pytest.mark.parametrize("labels", ["none", "both", "one"])
@pytest.mark.parametrize("name", PAIRED)
def test_guided(name: str, labels: str, return_noise: bool) -> None:
    x0, x1 = batch((6, 3))
    y0 = torch.arange(6) if labels == "both" else None
    y1 = torch.arange(6) * 10 if labels != "none" else None
    options = {"method": "guided_sample_location_and_conditional_flow", "y0": y0, "y1": y1}
    want, state = run(theirs, name, {"sigma": 0.2}, x0, x1, return_noise=return_noise, **options)
    found, state_found = run(ours, name, {"sigma": 0.2}, x0, x1, return_noise=return_noise, **options)
    same_generators(state_found, state)
    assert len(found) == len(want)
    for a, b in zip(found, want, strict=True):
        if b is None:
            assert a is None
        else:
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("name", "options"), MATCHERS, ids=name_of)
def test_gradient(name: str, options: dict[str, Any]) -> None:
    grads = []
    for module in (ours, theirs):
        x0, x1 = (x.requires_grad_() for x in batch((4, 3, 5), torch.float64))
        (_, xt, ut), _ = run(module, name, options, x0, x1)
        found = torch.autograd.grad((xt.sin() + ut.cos()).sum(), [x0, x1], allow_unused=True)
        grads.append([torch.zeros_like(x0) if g is None else g for g in found])
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-11)


def test_what_one_op_cannot_take() -> None:
    """Broadcast and promoted operands, a t with a gradient, a sigma that is a tensor: torch's own, the same numbers."""
    x0, x1 = batch((4, 3, 5))
    cases: list[tuple[Tensor, Tensor, Tensor | None, Any]] = [
        (x0, x1[:, :1], None, 0.1),
        (x0, x1.double(), None, 0.1),
        (x0[:0], x1[:0], None, 0.1),
        (x0, x1, torch.rand(4), torch.tensor(0.1)),
    ]
    for name in ("ConditionalFlowMatcher", "TargetConditionalFlowMatcher", "VariancePreservingConditionalFlowMatcher"):
        for a, b, t, sigma in cases:
            want, state = run(theirs, name, {"sigma": sigma}, a, b, t)
            found, state_found = run(ours, name, {"sigma": sigma}, a, b, t)
            same_generators(state_found, state)
            for f, w in zip(found, want, strict=True):
                torch.testing.assert_close(f, w, rtol=1e-5, atol=1e-5)
    for name in (n for n, o in MATCHERS if not o):
        grads = []
        for module in (theirs, ours):
            t = torch.tensor([0.1, 0.2, 0.6, 0.9], requires_grad=True)
            (_, xt, ut), _ = run(module, name, {"sigma": 0.5}, x0, x1, t)
            grads.append(torch.autograd.grad((xt.sin() + ut.cos()).sum(), t)[0])
        torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("name", "options"), MATCHERS, ids=name_of)
def test_dtype_of_the_times(name: str, options: dict[str, Any]) -> None:
    """A wider t widens the result, as in the original."""
    kinds = [(torch.float32, torch.float64), (torch.float64, torch.float32), (torch.float32, torch.int64)]
    kinds += [(torch.float16, torch.float32), (torch.bfloat16, torch.float16)] if name not in PAIRED else []
    for dtype, of_t in kinds:
        x0, x1 = batch((4, 3), dtype)
        t = torch.tensor([0.2, 0.4, 0.6, 0.7]).to(of_t)
        want, _ = run(theirs, name, options, x0, x1, t)
        found, _ = run(ours, name, options, x0, x1, t)
        for f, w in zip(found, want, strict=True):
            bound = (
                1e-12 if f.dtype == torch.float64 and of_t == torch.float64 else 1e-5 if dtype.itemsize > 2 else 0.05
            )
            torch.testing.assert_close(f, w, rtol=bound, atol=bound)


def test_a_number_for_t_keeps_float64() -> None:
    x0, x1 = batch((4, 3), torch.float64)
    for name in ("ConditionalFlowMatcher", "TargetConditionalFlowMatcher"):
        a, b = (getattr(module, name)(0.1) for module in (ours, theirs))
        for method, args in (
            ("compute_mu_t", (0.3,)),
            ("sample_xt", (0.3, x0)),
            ("compute_conditional_flow", (0.3, x0)),
        ):
            found, want = (getattr(m, method)(x0, x1, *args) for m in (a, b))
            torch.testing.assert_close(found, want, rtol=1e-14, atol=1e-14)
    # In plain torch too, where the bridge's mean needs no root of the number.
    a, b = (module.SchrodingerBridgeConditionalFlowMatcher(0.1) for module in (ours, theirs))
    torch.testing.assert_close(a.compute_mu_t(x0, x1[:1], 0.3), b.compute_mu_t(x0, x1[:1], 0.3), rtol=1e-14, atol=1e-14)


def test_layouts() -> None:
    x0, x1 = batch((4, 3, 6, 6))
    views = [
        (x0.contiguous(memory_format=torch.channels_last), x1),
        (x0, x1.contiguous(memory_format=torch.channels_last)),
        (x0.transpose(2, 3), x1.transpose(2, 3)),
        (x0.flip(0)[:, :, ::2], x1[:, :, 1::2]),
        (x0[:1].expand(4, -1, -1, -1), x1),
    ]
    for a, b in views:
        want, state = run(theirs, "ConditionalFlowMatcher", {"sigma": 0.4}, a, b)
        found, state_found = run(ours, "ConditionalFlowMatcher", {"sigma": 0.4}, a, b)
        same_generators(state_found, state)
        for f, w in zip(found, want, strict=True):
            torch.testing.assert_close(f, w, rtol=1e-6, atol=2e-6)


def test_subclasses_with_formulas_of_their_own() -> None:
    """A user's override of any part is what counts, as in the original."""

    def make(base: Any) -> list[Any]:
        class Mean(base):  # type: ignore[misc]
            def compute_mu_t(self, x0: Tensor, x1: Tensor, t: Tensor) -> Tensor:
                return x0 * 3

        class Spread(base):  # type: ignore[misc]
            def compute_sigma_t(self, t: Tensor) -> Any:
                return 2 * t

        class Flow(base):  # type: ignore[misc]
            def compute_conditional_flow(self, x0: Tensor, x1: Tensor, t: Tensor, xt: Tensor) -> Tensor:
                return xt - x0

        class Noise(base):  # type: ignore[misc]
            def sample_noise_like(self, x: Tensor) -> Tensor:
                return torch.ones_like(x)

        class Further(Flow):
            pass

        class Mixin:
            def compute_mu_t(self, x0: Tensor, x1: Tensor, t: Tensor) -> Tensor:
                return x1 * 3

        class Mixed(Mixin, base):  # type: ignore[misc]
            pass

        class Given(base):  # type: ignore[misc]
            def __init__(self, sigma: float) -> None:
                super().__init__(sigma)
                self.compute_sigma_t = lambda t: 3 * t

        return [Mean, Spread, Flow, Noise, Further, Mixed, Given]

    x0, x1 = batch((4, 3))
    for name in ("ConditionalFlowMatcher", "TargetConditionalFlowMatcher"):
        for a, b in zip(make(getattr(ours, name)), make(getattr(theirs, name)), strict=True):
            results = []
            for cls in (a, b):
                torch.manual_seed(2)
                results.append(cls(0.2).sample_location_and_conditional_flow(x0, x1))
            for f, w in zip(*results, strict=True):
                torch.testing.assert_close(f, w, rtol=1e-5, atol=1e-5, msg=a.__name__)


def test_signatures() -> None:
    for name in {name for name, _ in MATCHERS} | {"OTPlanSampler"}:
        mine, original = getattr(ours, name), getattr(theirs, name)
        for method, function in vars(original).items():
            if inspect.isfunction(function):
                names = [(p.name, p.default, p.kind) for p in inspect.signature(function).parameters.values()]
                found = inspect.signature(getattr(mine, method))
                assert [(p.name, p.default, p.kind) for p in found.parameters.values()] == names, (name, method)


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("exact", {}),
        ("exact", {"normalize_cost": True}),
        ("sinkhorn", {"reg": 5.0}),
        ("unbalanced", {"reg": 0.5, "reg_m": 2.0}),
        ("partial", {"reg": 50.0}),
    ],
    ids=name_of,
)
@pytest.mark.parametrize("sizes", [(7, 7), (5, 9)], ids=str)
def test_plans(method: str, options: dict[str, Any], sizes: tuple[int, int]) -> None:
    x0, x1 = batch((9, 2, 3))
    x0, x1 = x0[: sizes[0]], x1[: sizes[1]]
    y0, y1 = torch.arange(sizes[0]), torch.arange(sizes[1])
    samplers = [module.OTPlanSampler(method, **options) for module in (ours, theirs)]
    a, b = (sampler.get_map(x0, x1) for sampler in samplers)
    assert a.shape == b.shape == sizes
    np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-12)
    for call in (
        lambda s: s.sample_plan(x0, x1),
        lambda s: s.sample_plan_with_labels(x0, x1, y0, y1),
        lambda s: s.sample_plan_with_labels(x0, x1, None, y1, replace=True),
    ):
        drawn = []
        for sampler in samplers:
            np.random.seed(4)
            drawn.append(call(sampler))
        for f, w in zip(*drawn, strict=True):
            assert f is None if w is None else torch.equal(f, w)
    i, j = samplers[0].sample_map(np.full((3, 4), 1 / 12), 12, replace=False)
    assert sorted(zip(i.tolist(), j.tolist(), strict=True)) == [(a, b) for a in range(3) for b in range(4)]


def test_trajectories() -> None:
    populations = torch.randn(6, 4, 3, generator=torch.Generator().manual_seed(1))
    drawn = []
    for module in (ours, theirs):
        np.random.seed(4)
        drawn.append(module.OTPlanSampler("sinkhorn", reg=5.0).sample_trajectory(populations))
    assert drawn[0].shape == (6, 4, 3)
    np.testing.assert_array_equal(*drawn)
