"""compat.flow_matching and compat.torchcfm under forward_ad, torch.func and vmap, beside the originals.

The ops have no part in these, and tangents that reach one come out as zeros in silence: plain torch has to take over.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers.flow_matching_oracle import apart, exports, peer, solver, start
from torch import Tensor
from torch.autograd import forward_ad

from diffkern.compat import torchcfm as ours
from diffkern.compat.flow_matching.solver import ODESolver

MATCHERS = (
    "ConditionalFlowMatcher",
    "TargetConditionalFlowMatcher",
    "VariancePreservingConditionalFlowMatcher",
    "SchrodingerBridgeConditionalFlowMatcher",
)


def test_paths() -> None:
    """By both ends and by the times."""
    x_0, x_1, t = start(shape=(5, 3)), start(shape=(5, 3)).flip(0), torch.linspace(0.1, 0.9, 5).double()
    found = []
    for module in (exports("diffkern.compat.flow_matching"), peer()):
        path = module.AffineProbPath(module.CosineScheduler())

        def states(x_0: Tensor, x_1: Tensor, t: Tensor, path: Any = path) -> Tensor:
            made = path.sample(x_0=x_0, x_1=x_1, t=t)
            return path.velocity_to_target(made.dx_t, made.x_t, t[:, None]) + made.x_t * made.dx_t

        def at(x_1: Tensor, s: Tensor, path: Any = path) -> Tensor:
            return path.target_to_velocity(x_1, 2 * x_1, s)

        ones, s = torch.ones_like(x_0), torch.tensor(0.4, dtype=torch.float64)
        with forward_ad.dual_level():
            dual = forward_ad.unpack_dual(states(x_0, x_1, forward_ad.make_dual(t, t))).tangent
            assert dual is not None
        found.append(
            [
                *torch.func.jvp(states, (x_0, x_1, t), (ones, 2 * ones, t)),
                *torch.func.jvp(at, (x_1, s), (ones, s)),
                torch.func.grad(lambda *args, states=states: states(*args).sum())(x_0, x_1, t),
                torch.vmap(at, (0, None))(x_1, s),
                dual,
            ]
        )
    for f, w in zip(*found, strict=True):
        assert float(w.abs().max()) > 0.1
        assert apart(f, w) <= 1e-12


def test_solver() -> None:
    """Left to torchdiffeq; by the state and by a parameter."""
    found = []
    for cls in (ODESolver, solver()):

        def end(x: Tensor, scale: Tensor, cls: Any = cls) -> Tensor:
            out: Tensor = cls(lambda x, t: -scale * x * t).sample(x, 0.3, method="rk4", enable_grad=True)
            return out

        x, scale = start(), torch.tensor(0.7, dtype=torch.float64)
        with forward_ad.dual_level():
            dual = forward_ad.unpack_dual(end(x, forward_ad.make_dual(scale, scale))).tangent
        slope = torch.func.grad(lambda x, s, end=end: end(x, s).sum())(x, scale)
        found.append([*torch.func.jvp(end, (x, scale), (x, scale)), slope, dual])
    for f, w in zip(*found, strict=True):
        assert float(w.abs().max()) > 0.1
        assert apart(f, w) <= 1e-12


@pytest.mark.parametrize("name", MATCHERS)
def test_matchers(name: str) -> None:
    """By both batches and by the times."""
    theirs = pytest.importorskip("torchcfm.conditional_flow_matching")
    x0, x1 = start(torch.float32, (2, 4, 3)).unbind()
    t = torch.tensor([0.1, 0.2, 0.6, 0.9])
    found = []
    for module in (ours, theirs):
        matcher = getattr(module, name)(sigma=0.5)

        def whole(x0: Tensor, x1: Tensor, t: Tensor, matcher: Any = matcher) -> Tensor:
            xt = matcher.sample_xt(x0, x1, t, x0.sin())
            return xt * matcher.compute_conditional_flow(x0, x1, t, xt)

        one = lambda *args, whole=whole: whole(*(a[None] for a in args))[0]  # noqa: E731
        ones = torch.ones_like(x0)
        found.append(
            [
                *torch.func.jvp(whole, (x0, x1, t), (ones, 2 * ones, torch.ones(4))),
                torch.func.grad(lambda *args, whole=whole: whole(*args).sum())(x0, x1, t),
                torch.vmap(one)(x0, x1, t),
            ]
        )
    for f, w in zip(*found, strict=True):
        assert float(w.abs().max()) > 0.1
        torch.testing.assert_close(f, w, rtol=1e-4, atol=1e-4)
