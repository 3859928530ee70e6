"""Every other public function of the top level, with arguments that are right and wrong: a result, or a sentence."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers.fuzzing import check_refusal, fuzz
from hypothesis import strategies as st
from torch import Tensor

import diffkern
from diffkern import Plan, ops, samplers, schedules

BATCH, SHAPE = 2, (2, 3, 4)


def model(x: Tensor, t: Tensor, cond: Any = None, **more: Any) -> Tensor:
    """A network that any wrapper can call, differentiable in x."""
    return 0.5 * torch.tanh(x)


def values(seed: int, shape: tuple[int, ...] = SHAPE) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) * 2 - 1


DISCRETE = [schedules.linear(20), schedules.cosine(20), schedules.cosine_arc(20)]
SCHEDULES = [*DISCRETE, schedules.vp(), schedules.flow(), schedules.edm(), schedules.ve(), schedules.sub_vp()]
PLANS = [samplers.ddim(DISCRETE[0], 4, eta=0.5), samplers.heun(schedules.edm(), 3), samplers.ddpm(DISCRETE[1], 3)]
LEARNED = {"vlb_loss", "hybrid_loss"}
# What an argument of this name may be: right values, then wrong ones.
NUMBERS = [-1, 0, 1.5, math.nan, math.inf, -math.inf, 1e300, -1e-300]
WHOLE = [-1, 0, -(2**63)]
WORDS = ["bad", "", "EPS"]
SEEDS = torch.tensor([3, 4])
WRONG_TENSORS = [values(1)[:1], values(1)[:, :2], values(1)[..., None], values(1).to(torch.int32)]
WRONG_SEEDS = [SEEDS[:1], SEEDS.int(), SEEDS.double(), SEEDS[:, None]]
TIMES = [torch.tensor([1, 2]), torch.tensor([0.3, 0.7]), torch.tensor(3), torch.tensor(0.5)]
WRONG_TIMES = [torch.tensor([5]), torch.tensor([-1, 2]), torch.tensor([0, 20]), torch.tensor([math.nan, 0.1])]
WRONG_TIMES += [torch.tensor([[1], [2]]), torch.tensor([1e30, 0.1]), torch.tensor([2**62, 1])]
LEVELS = [[0.9, 0.5, 0.1], [10.0, 1.0, 0.1]]
WRONG_LEVELS = [[], [0.1, 0.5], [math.nan, 0.1], [math.inf, 1.0], [1.0, -1.0], [0.5, 0.5]]
POOL: dict[str, tuple[list[Any], list[Any]]] = {
    **dict.fromkeys(("model", "score"), ([model], [])),
    **dict.fromkeys(
        ("x", "x0", "x1", "after", "noise", "known", "m"), ([values(0), values(1).double()], WRONG_TENSORS)
    ),
    **dict.fromkeys(("real", "fake"), ([values(0), values(1).double()], WRONG_TENSORS)),
    "kind": (["minimax", "hinge", "wasserstein", "relativistic"], WORDS),
    "pred": ([values(2), values(2, (2, 6, 4))], WRONG_TENSORS),
    "mask": ([values(3) > 0], WRONG_TENSORS),
    "cond": ([torch.tensor([0, 1])], [torch.tensor([0])]),
    "null": ([2], []),
    "p": ([0.0, 0.5, 1.0], [-0.1, 1.5, math.nan]),
    "t": (TIMES, WRONG_TIMES),
    "sigma": ([torch.tensor([0.5, 3.0])], [torch.tensor([1.0]), torch.tensor([-1.0, 1.0]), torch.tensor([0.0, 1.0])]),
    "index": ([torch.tensor([0, 1])], [torch.tensor([0, 9]), torch.tensor([0.0, 1.0]), torch.tensor([-1, 0])]),
    "schedule": (SCHEDULES, []),
    "plan": (PLANS, []),
    "shape": ([SHAPE], [(), (2, -1), (0, 3), (3, 2)]),
    "seeds": ([SEEDS], WRONG_SEEDS),
    "prediction": (["eps", "x0", "v", "velocity", "score"], WORDS),
    **dict.fromkeys(("source", "target"), (["eps", "x0", "v"], WORDS)),
    "reduction": (["none", "mean", "sum"], WORDS),
    "times": (["uniform"], WORDS),
    "coupling": (["independent"], WORDS),
    "weight": (["uniform", "snr"], WORDS),
    "variance": (["beta_tilde", "beta", "learned"], WORDS),
    "spacing": (["leading", "trailing", "linspace"], WORDS),
    "timesteps": ([[15, 7, 2], [0.8, 0.4]], [[], [3, 3], [2, 9], [99, 1], [-1], [math.nan]]),
    **dict.fromkeys(("sigmas", "alphas_cumprod"), (LEVELS, WRONG_LEVELS)),
    "betas": ([[0.1, 0.2, 0.9]], [[], [2.0], [-0.5], [math.nan]]),
    **dict.fromkeys(("steps", "levels", "each", "T", "n", "probes", "n_projections"), ([3, 5], WHOLE)),
    **dict.fromkeys(("order", "jump_length", "jump_n_sample", "corrector_steps", "max_steps"), ([1, 2, 3], WHOLE)),
    **dict.fromkeys(("step", "start", "offset", "stream"), ([0, 1], WHOLE)),
    **dict.fromkeys(("beta_start", "beta_end", "beta_min", "beta_max"), ([0.001, 0.02, 0.5], NUMBERS)),
    **dict.fromkeys(("sigma_min", "sigma_max", "sigma_data", "rho", "base", "rate"), ([0.01, 2.0, 50.0], NUMBERS)),
    **dict.fromkeys(("eta", "clip", "churn", "churn_noise", "r", "step_size", "sigma_t", "snr"), ([0.5, 1.0], NUMBERS)),
    **dict.fromkeys(("max_beta", "eps", "s", "mu", "b", "vlb_weight", "P_mean", "P_std"), ([0.3, 0.01], NUMBERS)),
    **dict.fromkeys(("rtol", "atol", "first_step", "dt", "t_data", "t_noise"), ([1e-3, 0.05], NUMBERS)),
    **dict.fromkeys(("highest", "lowest"), ([-5.0, 13.0], NUMBERS)),
    "guidance": ([1.5, 0.0], [math.nan, math.inf, [1.0], [1.0, math.nan]]),
    "churn_range": ([(0.0, 10.0)], [(1.0, 0.5), (math.nan, 1.0), (-1.0, 1.0)]),
    "span": ([(0.9, 0.1)], [(0.5, 0.5), (math.nan, 0.0), (5.0, -5.0)]),
    "noise_path": (["independent", "brownian"], WORDS),
    "solver": (["midpoint", "heun", "rk4", "rk45"], WORDS),
    "variant": (["bh1", "bh2"], WORDS),
    "corrector": (["ald", "langevin"], WORDS),
    "predictor": (["reverse_diffusion", "none"], WORDS),
    "norm": (["sample", "batch"], WORDS),
    "divergence": (["hutchinson", "exact"], WORDS),
    **dict.fromkeys(("probe", "projection"), (["rademacher", "gaussian"], WORDS)),
    "name": (["ddim", "x"], WORDS),
    **dict.fromkeys(("alpha", "beta", "log_snr"), ([lambda t: t, lambda t: 1 - t, lambda t: t**2], [])),
    **dict.fromkeys(("denoise", "compat", "trajectory", "logprob", "variance_reduced"), ([True, False], [])),
    "lower_order_final": ([True, False], []),
    "dtype": ([torch.float32, torch.float16], [torch.int32, torch.complex64]),
}
# Of a sampler, these are numbers and a choice of its own.
OWN = {"noise": ([0.5, 1.0], NUMBERS), "t": ([0.5, 3.0], NUMBERS), "corrector": ([True, False], [])}


def functions() -> dict[str, Callable[..., Any]]:
    """All public functions of the top level but the ops."""
    every = {name: getattr(diffkern, name) for name in diffkern.__all__}
    return {name: value for name, value in every.items() if inspect.isroutine(value) and name not in ops.__all__}


FUNCTIONS = functions()


def pool(function: str, argument: str) -> tuple[list[Any], list[Any]] | None:
    own = function in samplers.SAMPLERS or function == "pc_plan"
    found = OWN.get(argument) if own else None
    return found or POOL.get(argument)


def drawn(data: st.DataObject, name: str, wrong: bool) -> dict[str, Any]:
    """Arguments: all that have no default, some of the others; ``wrong``: one of them from the wrong values."""
    given: dict[str, Any] = {}
    may_be_wrong = []
    for key, parameter in inspect.signature(FUNCTIONS[name]).parameters.items():
        values = pool(name, key)
        required = parameter.default is inspect.Parameter.empty and parameter.kind != inspect.Parameter.VAR_KEYWORD
        assert values is not None or not required, f"{name} has a new argument {key}: give it values in POOL"
        if values is not None and (required or data.draw(st.integers(0, 3)) == 0):
            given[key] = data.draw(st.sampled_from(values[0]))
            if values[1]:
                may_be_wrong.append(key)
    if wrong and may_be_wrong:
        key = data.draw(st.sampled_from(may_be_wrong))
        given[key] = data.draw(st.sampled_from(pool(name, key)[1]))  # type: ignore[index]
    return given


@pytest.mark.parametrize("name", FUNCTIONS)
@fuzz(20, data=st.data())
def test_a_result_or_a_sentence(name: str, data: st.DataObject) -> None:
    given = drawn(data, name, data.draw(st.booleans()))
    before = {key: value.clone() for key, value in given.items() if isinstance(value, Tensor) and not value.is_meta}
    try:
        found = FUNCTIONS[name](**given)
    except ImportError:
        return
    except Exception as error:
        check_refusal(error, FUNCTIONS[name], f"{name}({', '.join(f'{k}={v!r:.50}' for k, v in given.items())})")
        found = None
    for key, value in before.items():
        assert torch.equal(value.nan_to_num(), given[key].nan_to_num()), f"{name} wrote into {key}"
    if isinstance(found, Plan):
        assert Plan.from_json(found.to_json()) == found
