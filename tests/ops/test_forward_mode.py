"""Forward-mode derivatives: the ops have none, and say so where torch would take a tangent for zeros."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers.op_cases import table
from torch import Tensor
from torch.autograd import forward_ad

import diffkern
from diffkern import ops

X = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
SEEDS = ops.seeds(0, 2)
EULER = table({"a": 1.0, "d": 0.5})
NOISING = torch.tensor([[0.9, 0.43, 0.43, -0.9]], dtype=torch.float64)
LOSS = torch.tensor([[0.43, -0.9, 1.0]], dtype=torch.float64)
BOUND = torch.tensor([[0.3, -0.9, 0.7, 0.8, 3.0, 0.2, 0.1, 0.0, 0.004, 1.5, 0.5, 1.0]], dtype=torch.float64)
LEARNED = torch.zeros(1, len(ops.LEARNED_COLUMNS), dtype=torch.float64)
LEARNED[0, [ops.LEARNED_COLUMNS.index(name) for name in ("a", "clip")]] = 1.0
TIMES = torch.tensor([1, 2])


def sampled(x: Tensor, name: str = "ddim") -> Any:
    plan = getattr(diffkern, name)(diffkern.linear(), 4)
    return diffkern.sample(lambda x, t: 0.5 * x, x, plan, seeds=SEEDS)


CALLS: dict[str, Callable[[Tensor], Any]] = {
    "step": lambda x: ops.step(x, x, table=EULER)[0],
    "step, model alone": lambda x: ops.step(X, x, table=EULER)[0],
    "step, noise": lambda x: ops.step(X, X, table=table({"a": 1.0, "g": 0.5}), noise=x)[0],
    "step_out": lambda x: ops.step_out(x, x, table=EULER, out=torch.empty_like(x)),
    "learned_step": lambda x: ops.learned_step(x, torch.cat([X, X], 1), table=LEARNED, seeds=SEEDS)[0],
    "step_logprob": lambda x: ops.step_logprob(X, X, x, table=table({"a": 1.0, "d": 0.5, "g": 0.3})),
    "noising": lambda x: ops.noising(x, NOISING, seeds=SEEDS)[0],
    "noising_out": lambda x: ops.noising_out(x, NOISING, seeds=SEEDS, out=torch.empty_like(x)),
    "loss": lambda x: ops.loss(x, X, LOSS, seeds=SEEDS),
    "variational": lambda x: ops.variational(torch.cat([x, x], 1), X, BOUND, seeds=SEEDS)[0],
    "attention": lambda x: ops.attention(x, x, x),
    "spatial_attention": lambda x: ops.spatial_attention(torch.cat([x, x, x], 1).repeat(1, 2, 1, 1), 1),
    "group_norm_act": lambda x: ops.group_norm_act(x, 1),
    "linear_rows": lambda x: ops.linear_rows(x, X[0, 0]),
    "conv3x3": lambda x: ops.conv3x3(x, X[:, :, :3, :3]),
    "conv3x3 by weight": lambda x: ops.conv3x3(X, x[:, :, :3, :3], upsample=True),
    "pack_conv3x3": lambda x: ops.pack_conv3x3(x[:, :, :3, :3]),
    "quantile": lambda x: ops.quantile(x, 0.5),
    "dynamic_threshold": ops.dynamic_threshold,
    "moments": ops.moments,
    "sample": sampled,
    "sample, multistep": lambda x: sampled(x, "dpmpp_2m"),
    "loss by name": lambda x: diffkern.prediction_loss(x, X, TIMES, diffkern.linear(), "eps", seeds=SEEDS),
}


@pytest.mark.parametrize("name", CALLS)
def test_a_tangent_is_refused(name: str) -> None:
    with pytest.raises(NotImplementedError, match=r"has no forward-mode derivative .* use reverse mode"):
        torch.func.jvp(CALLS[name], (X,), (torch.ones_like(X),))
    with (
        forward_ad.dual_level(),
        pytest.raises(NotImplementedError, match=r"has no forward-mode derivative .* use reverse mode"),
    ):
        CALLS[name](forward_ad.make_dual(X, torch.ones_like(X)))


@pytest.mark.parametrize("name", CALLS)
def test_what_carries_no_tangent_runs(name: str) -> None:
    """Inside such a derivative of something else the ops compute as ever."""
    want = CALLS[name](X)
    with forward_ad.dual_level():
        got = CALLS[name](X)
    assert torch.equal(got, want) if isinstance(want, Tensor) else torch.equal(got[0], want[0])


def test_the_reference_has_them() -> None:
    """The way out that the sentence names."""
    _, tangent = torch.func.jvp(lambda x: diffkern.reference.step(x, x, table=EULER)[0], (X,), (torch.ones_like(X),))
    torch.testing.assert_close(tangent.float(), torch.full_like(X, 1.5))
