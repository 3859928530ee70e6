"""compat.torchcfm by itself: x_t is the path of the papers, u_t its derivative in time, one op makes both."""

from __future__ import annotations

import math
import sys
import warnings
from collections.abc import Callable
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from helpers.op_counter import CountOps, EveryOp
from torch import Tensor
from torch.autograd.functional import jvp

import diffkern
from diffkern.compat import torchcfm as ours

PAIRED = ("ExactOptimalTransportConditionalFlowMatcher", "SchrodingerBridgeConditionalFlowMatcher")
Path = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
MATCHERS: dict[str, tuple[dict[str, Any], Path]] = {
    "ConditionalFlowMatcher": ({"sigma": 0.1}, lambda x0, x1, eps, t: t * x1 + (1 - t) * x0 + 0.1 * eps),
    "ExactOptimalTransportConditionalFlowMatcher": ({}, lambda x0, x1, eps, t: t * x1 + (1 - t) * x0),
    "TargetConditionalFlowMatcher": ({"sigma": 0.05}, lambda x0, x1, eps, t: t * x1 + (1 - 0.95 * t) * eps),
    "VariancePreservingConditionalFlowMatcher": (
        {"sigma": 0.3},
        lambda x0, x1, eps, t: (math.pi / 2 * t).cos() * x0 + (math.pi / 2 * t).sin() * x1 + 0.3 * eps,
    ),
    "SchrodingerBridgeConditionalFlowMatcher": (
        {"sigma": 0.5},
        lambda x0, x1, eps, t: t * x1 + (1 - t) * x0 + 0.5 * (t * (1 - t)).sqrt() * eps,
    ),
}
"""arXiv 2302.00482 (eq. 14 and 15; paired: section 3.2.2), 2210.02747 (eq. 20-23), 2303.08797, 2307.03672."""


def batch(shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    z = torch.randn(2, *shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    return z[0].to(dtype), (2 * z[1] + 0.5).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", MATCHERS)
def test_path_and_field(name: str, dtype: torch.dtype) -> None:
    options, path = MATCHERS[name]
    x0, x1 = batch((4, 3, 5), dtype)
    matcher = getattr(ours, name)(**options)
    if name in PAIRED:
        pytest.importorskip("ot")
        np.random.seed(2)
        pairs = matcher.ot_sampler.sample_plan(x0, x1)
        np.random.seed(2)
    else:
        pairs = x0, x1
    torch.manual_seed(1)
    t, xt, ut, eps = matcher.sample_location_and_conditional_flow(x0, x1, return_noise=True)
    torch.manual_seed(1)
    assert torch.equal(t, torch.rand(4).to(dtype))
    assert torch.equal(eps, torch.randn_like(x0))
    left, right, wide = (x.double() for x in (*pairs, eps))
    at = t.double().reshape(-1, 1, 1)
    want, slope = jvp(lambda t: path(left, right, wide, t), at, torch.ones_like(at))
    bound = 2e-6 if dtype == torch.float32 else 1e-7 if "Bridge" in name else 1e-12  # the bridge's 1e-8
    torch.testing.assert_close(xt.double(), want, rtol=0, atol=min(bound, 2e-6) * float(want.abs().max()))
    torch.testing.assert_close(ut.double(), slope, rtol=0, atol=bound * float(slope.abs().max()))
    given = matcher.compute_conditional_flow(*pairs, t, xt)
    torch.testing.assert_close(given.double(), slope, rtol=0, atol=20 * bound * float(slope.abs().max()))


@pytest.mark.parametrize("sigma", [0.0, 0.05])
def test_target_path_is_that_of_flow(sigma: float) -> None:
    """The same draws as a loss of `diffkern.flow`'s would see: `flow`'s coefficients, time running the same way."""
    x0, x1 = batch((4, 3, 5), torch.float64)
    found = ours.TargetConditionalFlowMatcher(sigma).sample_location_and_conditional_flow(x0, x1, return_noise=True)
    t, xt, ut, eps = found
    s, n, u, v = diffkern.flow(sigma).coefficients("velocity", t).reshape(4, 4, 1, 1).unbind(1)
    torch.testing.assert_close(xt, s * x1 + n * eps, rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(ut, u * x1 + v * eps, rtol=1e-13, atol=1e-13)


def test_pairs_of_least_cost() -> None:
    """The exact plan between two batches is a permutation: a draw pairs every x0 with its own x1."""
    pytest.importorskip("ot")
    x1 = torch.randn(6, 3, generator=torch.Generator().manual_seed(1))
    order = torch.tensor([3, 1, 5, 0, 2, 4])
    near = x1[order] + 0.01
    left, right, y0, y1 = ours.OTPlanSampler("exact").sample_plan_with_labels(near, x1, order, torch.arange(6))
    torch.testing.assert_close(left, right + 0.01)
    assert torch.equal(y0, y1)


@pytest.mark.parametrize("name", MATCHERS)
def test_ops(name: str) -> None:
    """One op makes x_t and u_t; no other tensor as large as the data but eps, and with a plan the pairs."""
    x0, x1 = batch((4, 3, 5, 6))
    matcher = getattr(ours, name)(**MATCHERS[name][0])
    matcher.sample_location_and_conditional_flow(x0, x1)
    with CountOps(x0.shape) as counted, torch.no_grad():
        matcher.sample_location_and_conditional_flow(x0, x1)
    assert counted.fused == {"step": 1}
    assert counted.large == {"randn_like": 1, **({"index": 2} if name in PAIRED else {})}
    if name not in PAIRED:
        with EveryOp() as every, torch.no_grad():
            matcher.sample_location_and_conditional_flow(x0, x1)
        assert not [op for op in every.counts if "item" in op or "local_scalar" in op]


def test_ops_of_the_parts() -> None:
    x0, x1 = batch((4, 3, 5, 6))
    t = torch.rand(4)
    for name, (options, _) in MATCHERS.items():
        matcher = getattr(ours, name)(**options)
        for call in (
            lambda m=matcher: m.compute_mu_t(x0, x1, t),
            lambda m=matcher: m.sample_xt(x0, x1, t, x0),
            lambda m=matcher: m.compute_conditional_flow(x0, x1, t, x0),
        ):
            with CountOps(x0.shape) as counted:
                call()
            assert counted.fused.total() + counted.large.total() == 1, (name, counted.fused, counted.large)


def test_inference_mode_first() -> None:
    """What is kept between calls serves training after inference."""
    x0, x1 = batch((7, 3))
    with torch.inference_mode():
        ours.ConditionalFlowMatcher(0.77).sample_location_and_conditional_flow(x0, x1)
    x1.requires_grad_()
    _, xt, ut = ours.ConditionalFlowMatcher(0.77).sample_location_and_conditional_flow(x0, x1)
    (xt.sum() + ut.sum()).backward()
    assert x1.grad is not None


def test_another_default_device_first() -> None:
    """What is kept between calls is on the device of the data."""
    x0, x1 = batch((7, 3))
    for matcher in (ours.ConditionalFlowMatcher(0.78), ours.VariancePreservingConditionalFlowMatcher(0.78)):
        with torch.device("meta"):
            matcher.sample_location_and_conditional_flow(x0, x1, x0[:, 0])
        _, xt, ut = matcher.sample_location_and_conditional_flow(x0, x1)
        assert xt.isfinite().all()
        assert ut.isfinite().all()


def test_bad_input() -> None:
    x0, x1 = batch((4, 3))
    with pytest.raises(AssertionError, match=r"t has to have batch size dimension 4, got \[3\]"):
        ours.ConditionalFlowMatcher().sample_location_and_conditional_flow(x0, x1, torch.rand(3))
    nan = float("nan")
    for matcher, t in (
        (ours.ConditionalFlowMatcher(0.1), [0.5, nan, 0.5, nan]),
        (ours.SchrodingerBridgeConditionalFlowMatcher(0.1), [0.5, -0.5, 1.0, 1.5]),
    ):
        with pytest.raises(
            ValueError, match=r"t and sigma must be inside the path's range, got NaN for samples \[1, 3\]"
        ):
            matcher.sample_xt(x0, x1, torch.tensor(t), x0)
    with pytest.raises(ValueError, match=r"got NaN for samples \[0, 1, 2, 3\]"):
        ours.ConditionalFlowMatcher(nan).sample_location_and_conditional_flow(x0, x1)
    for sigma in (0, -1.0):
        with pytest.raises(ValueError, match=f"Sigma must be strictly positive, got {sigma}"):
            ours.SchrodingerBridgeConditionalFlowMatcher(sigma)
    with pytest.warns(UserWarning, match="Small sigma values may lead to numerical instability"):
        ours.SchrodingerBridgeConditionalFlowMatcher(1e-4)
    with pytest.raises(ValueError, match="Unknown method: nearest"):
        ours.OTPlanSampler("nearest")
    for empty in ((x0[:0], x1), (x0, x1[:0]), (x0[:0], x1[:0])):  # the last ends the process in POT 0.9.7
        with pytest.raises(AssertionError, match=r"x0 and x1 must hold at least one sample, got \[[04], 3\] and"):
            ours.OTPlanSampler("exact").get_map(*empty)
    with pytest.raises(ValueError, match="x0 and x1 must be finite for a transport plan"):
        ours.OTPlanSampler("exact").get_map(x0, x1 * float("nan"))
    sinkhorn = ours.OTPlanSampler("sinkhorn", reg=1e-10)
    sinkhorn.ot_fn = lambda *args: np.full((4, 4), np.nan)
    with pytest.raises(ValueError, match=r"reg must be larger for costs up to .*, got 1e-10: no finite plan"):
        sinkhorn.get_map(x0, x1)
    with mock.patch("ot.sinkhorn", return_value=np.zeros((4, 4))):
        with pytest.warns(UserWarning, match="Numerical errors in OT plan, reverting to uniform plan"):
            plan = ours.OTPlanSampler("sinkhorn").get_map(x0, x1)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            ours.OTPlanSampler("sinkhorn", warn=False).get_map(x0, x1)
    assert (plan == 1 / 16).all()


def test_without_pot() -> None:
    """The matchers need torch alone; a plan says what to install."""
    with mock.patch.dict(sys.modules, {"ot": None}):
        ours.ConditionalFlowMatcher().sample_location_and_conditional_flow(*batch((4, 3)))
        with pytest.raises(ImportError, match=r"pip install 'diffkern\[ot\]'"):
            ours.ExactOptimalTransportConditionalFlowMatcher()
