"""One rule for `seeds`, wherever they are taken: an integer s means seeds(s, batch), as the tensor itself does."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from diffkern import brownian, draws, ops, plan, sampling, schedules, simulate
from diffkern.objectives import adversarial, flow_matching, losses, score_matching, time_sampling, variational
from diffkern.simulate import likelihood

B, SHAPE = 3, (3, 2, 4, 4)
X = torch.linspace(-1.0, 1.0, 96).reshape(SHAPE)
T = torch.tensor([0, 5, 9])
TABLE = schedules.linear(10)
ROW = plan.Plan("one", (plan.Row(a=1.0, g=1.0, stream=5),)).table
HISTORY = ROW.clone()
HISTORY[0, plan.COLUMNS.index("a")] = 0.0
LEARNED = plan.Plan("one", (plan.Row(q=1.0, b=1.0, g=1.0, r0=-1.0, stream=5),), learned_variance=True).learned_table
NOISING = torch.tensor([[0.8, 0.6, 0.0, 1.0]], dtype=torch.float64)
LOSS = torch.tensor([[0.0, 1.0, 1.0]], dtype=torch.float64)
BOUND = variational.variational_table(TABLE, variance="beta")
TERMS = torch.tensor([1, 2]), torch.tensor([0.6, 0.8], dtype=torch.float64)


def half(x: Tensor, t: Tensor) -> Tensor:
    return 0.5 * x


def cube(x: Tensor, t: Tensor | None = None) -> Tensor:
    return x.cumsum(1) ** 3


def both(x: Tensor, t: Tensor) -> Tensor:
    return torch.cat([0.5 * x, 0.1 * x], 1)


TAKERS: dict[str, Callable[[Any], Any]] = {
    "randn": lambda s: ops.randn(SHAPE, s, 4),
    "noise_sum": lambda s: ops.noise_sum(SHAPE, s, *TERMS),
    "noise_sum_out": lambda s: ops.noise_sum_out(s, *TERMS, torch.empty(SHAPE)),
    "noising": lambda s: ops.noising(X, NOISING, seeds=s)[0],
    "noising_out": lambda s: ops.noising_out(X, NOISING, out=torch.empty(SHAPE), seeds=s),
    "loss": lambda s: ops.loss(X, X, LOSS, seeds=s),
    "variational": lambda s: ops.variational(X, X, BOUND, T, seeds=s)[0],
    "step": lambda s: ops.step(X, None, table=ROW, seeds=s)[0],
    "step of history": lambda s: ops.step(None, None, h0=X, table=HISTORY, seeds=s)[0],
    "step_out": lambda s: ops.step_out(X, None, table=ROW, out=torch.empty(SHAPE), seeds=s),
    "bound_step": lambda s: ops.bound_step(ROW)(X, None, 0, seeds=s).out,
    "learned_step": lambda s: ops.learned_step(X, both(X, T), table=LEARNED, seeds=s)[0],
    "brownian.noise": lambda s: brownian.noise(SHAPE, s, 0.25, 0.5),
    "projections": lambda s: draws.projections(SHAPE, s),
    "noised": lambda s: losses.noised(X, T, TABLE, seeds=s),
    "prediction_loss": lambda s: losses.prediction_loss(X, X, T, TABLE, seeds=s),
    "simple_loss": lambda s: losses.simple_loss(half, X, T, TABLE, seeds=s),
    "edm_loss": lambda s: losses.edm_loss(half, X, seeds=s),
    "drop_condition": lambda s: losses.drop_condition(torch.ones(64), 0.0, 0.5, s),
    "flow_matching_loss": lambda s: flow_matching.flow_matching_loss(half, X, seeds=s),
    "denoising": lambda s: score_matching.denoising_score_matching_loss(half, X, None, TABLE, seeds=s),
    "ncsn_loss": lambda s: score_matching.ncsn_loss(half, X, torch.tensor([1.0, 2.0]), seeds=s),
    "sliced": lambda s: score_matching.sliced_score_matching_loss(cube, X, seeds=s),
    "gradient_penalty": lambda s: adversarial.gradient_penalty(lambda x: cube(x).sum((1, 2, 3)), X, -X, seeds=s),
    "hybrid_loss": lambda s: variational.hybrid_loss(both(X, T), X, T, TABLE, seeds=s),
    "vlb_loss": lambda s: variational.vlb_loss(both(X, T), X, T, TABLE, seeds=s),
    "variational bound": lambda s: variational.bits_per_dim(half, X, TABLE, seeds=s).total,
    "time sampler": lambda s: time_sampling.get_time_sampler("logit_normal").sample(B, seeds=s),
    "initial": lambda s: sampling.initial(PLAN, SHAPE, s),
    "sample": lambda s: sampling.sample(half, X, PLAN, seeds=s),
    "predictor_corrector": lambda s: sampling.predictor_corrector(half, X, TABLE, 2, snr=0.1, seeds=s),
    "log_likelihood": lambda s: likelihood.log_likelihood(cube, X, TABLE, solver="euler", steps=2, seeds=s)[0],
    "dequantise": lambda s: likelihood.dequantise(torch.full(SHAPE, 7, dtype=torch.uint8), seeds=s),
    "GaussianPath": lambda s: simulate.GaussianPath(TABLE).sample(X, T, seeds=s),
    "DataMarginal": lambda s: simulate.DataMarginal(schedules.vp(), X).sample(64, 0.5, seeds=s),
    "EulerMaruyamaSimulator": lambda s: simulate.EulerMaruyamaSimulator(
        simulate.ReverseSDE(schedules.vp(), half), seeds=s
    ).step(X, 0.5, -0.1),
}


def _plan() -> plan.Plan:
    from diffkern.samplers import ddpm

    return ddpm(TABLE, 3)


PLAN = _plan()
RULE = r"seeds must be an integer or int64 \[\d+\]"
BATCHES = {"drop_condition": 64, "DataMarginal": 64}


@pytest.mark.parametrize("name", TAKERS)
def test_an_integer_is_the_seeds_of_that_job(name: str) -> None:
    take, batch = TAKERS[name], BATCHES.get(name, B)
    expected = take(ops.seeds(7, batch))
    assert torch.equal(take(7), expected)
    assert torch.equal(take(np.int64(7)), expected)
    assert not torch.equal(take(8), expected), "the seeds have no effect"


@pytest.mark.parametrize("name", TAKERS)
@pytest.mark.parametrize("wrong", [1.5, True, "0", float("nan")], ids=repr)
def test_what_is_no_integer_is_refused_in_one_sentence(name: str, wrong: Any) -> None:
    with pytest.raises(ValueError, match=rf"^{RULE}, got {wrong!r}$"):
        TAKERS[name](wrong)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ((1.5, 2), "s must be an integer, got 1.5"),
        ((float("nan"), 2), "s must be an integer, got nan"),
        ((True, 2), "s must be an integer, got True"),
        (("0", 2), "s must be an integer, got '0'"),
        ((0, 2.0), "n must be an integer, got 2.0"),
        ((0, 2, 0.5), "first must be an integer, got 0.5"),
        ((0, 2, 2**64), f"first + n must be below 2**63, got first={2**64}, n=2"),
        ((0, 2, 2**63 - 2), f"first + n must be below 2**63, got first={2**63 - 2}, n=2"),
    ],
)
def test_seeds_of_a_job_are_made_of_integers(arguments: tuple[Any, ...], sentence: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(sentence)}$"):
        ops.seeds(*arguments)


def test_numpy_integers_make_the_same_seeds() -> None:
    assert torch.equal(ops.seeds(np.uint64(2**64 - 1), np.int32(3), np.int64(5)), ops.seeds(-1, 3, 5))
    assert len(ops.seeds(0, 2, 2**63 - 3)) == 2
