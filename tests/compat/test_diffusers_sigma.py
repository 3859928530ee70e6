"""diffusers' schedulers in sigma (Euler, ancestral Euler, Heun, EDM, LMS, flow matching) against ours."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from helpers.diffusers_peers import (
    ANCESTRAL,
    EDM,
    EULER,
    FLOW,
    FLOW_HEUN,
    HEUN,
    LMS,
    AllOps,
    compare_runs,
    distance,
    exact_step,
    network,
    options,
    pair,
    scaled,
    start,
)
from helpers.lazy import Lazy, needs
from helpers.tolerances import check

pytestmark = needs("diffusers")
diffusers, ours = Lazy("diffusers"), Lazy("diffkern.compat.diffusers")


WITH_BETAS = (EULER, ANCESTRAL, HEUN, LMS)
CHURN = {"s_churn": 3.0, "s_tmin": 0.1, "s_tmax": 50.0, "s_noise": 1.01}
BETAS = [1e-4 * 1.06**i for i in range(100)]
S8, S12 = {"num_inference_steps": 8}, {"num_inference_steps": 12}

# (class, config, arguments of set_timesteps, of step): every option of every constructor, one at a time.
CASES: list[tuple[str, dict[str, Any], dict[str, Any], dict[str, Any]]] = [
    *[(EULER, {"prediction_type": p}, S8, c) for p in ("epsilon", "v_prediction", "sample") for c in ({}, CHURN)],
    (EULER, {"prediction_type": "original_sample"}, S8, {}),
    (ANCESTRAL, {"prediction_type": "epsilon"}, S8, {}),
    (ANCESTRAL, {"prediction_type": "v_prediction"}, S8, {}),
    *[
        (HEUN, {"prediction_type": p, "clip_sample": c, "clip_sample_range": 0.7}, S8, {})
        for p in ("epsilon", "v_prediction", "sample")
        for c in (False, True)
    ],
    *[(EDM, {"prediction_type": p}, S8, c) for p in ("epsilon", "v_prediction") for c in ({}, CHURN)],
    *[(LMS, {"prediction_type": p}, S8, {}) for p in ("epsilon", "v_prediction", "sample")],
    *[(LMS, {}, S12, {"order": order}) for order in (1, 2, 3, 5, 6, 10)],
    *[(n, {"timestep_spacing": s, "steps_offset": 1}, S8, {}) for n in WITH_BETAS for s in ("leading", "trailing")],
    *[(n, {"beta_schedule": b}, S8, {}) for n in WITH_BETAS for b in ("scaled_linear", "squaredcos_cap_v2")],
    *[(n, {"trained_betas": BETAS, "num_train_timesteps": 100}, S8, {}) for n in WITH_BETAS],
    *[(n, {f"use_{k}_sigmas": True}, S8, {}) for n in (EULER, HEUN, LMS) for k in ("karras", "exponential", "beta")],
    *[(n, {"rescale_betas_zero_snr": True, "prediction_type": "v_prediction"}, S8, {}) for n in (EULER, ANCESTRAL)],
    (HEUN, {"beta_schedule": "exp"}, S8, {}),
    (EULER, {"interpolation_type": "log_linear"}, S8, {}),
    (EULER, {"timestep_type": "continuous", "prediction_type": "v_prediction", "use_karras_sigmas": True}, S8, {}),
    (EULER, {"final_sigmas_type": "sigma_min"}, S8, {}),
    (EULER, {"use_karras_sigmas": True, "sigma_min": 0.05, "sigma_max": 20.0}, S8, {}),
    (EULER, {}, {"timesteps": [900, 500, 100]}, {}),
    (EULER, {}, {"sigmas": [20.0, 5.0, 1.0, 0.1, 0.0]}, CHURN),
    (HEUN, {}, {"timesteps": [900, 500, 100]}, {}),
    (EDM, {"sigma_schedule": "exponential", "sigma_data": 0.7}, S8, {}),
    (EDM, {"final_sigmas_type": "sigma_min", "rho": 5.0, "sigma_min": 0.01, "sigma_max": 20.0}, S8, CHURN),
    (FLOW, {}, S8, {}),
    (FLOW, {"shift": 3.0}, S8, {}),
    (FLOW, {"stochastic_sampling": True}, S8, {}),
    (FLOW, {"invert_sigmas": True}, S8, {}),
    (FLOW, {"shift_terminal": 0.1}, S8, {}),
    *[(FLOW, {f"use_{k}_sigmas": True}, S8, {}) for k in ("karras", "exponential", "beta")],
    *[
        (FLOW, {"use_dynamic_shifting": True, "time_shift_type": k}, {**S8, "mu": 0.7}, {})
        for k in ("exponential", "linear")
    ],
    (FLOW, {}, {"sigmas": [1.0, 0.6, 0.2]}, {}),
    (FLOW_HEUN, {}, S8, {}),
    (FLOW_HEUN, {"shift": 3.0}, S8, {}),
    (FLOW_HEUN, {}, S8, {"s_churn": 3.0, "s_tmin": 0.3, "s_tmax": 0.9, "s_noise": 1.01}),
]


@pytest.mark.parametrize(("name", "config", "setup", "call"), CASES, ids=str)
def test_whole_trajectories(name: str, config: dict[str, Any], setup: dict[str, Any], call: dict[str, Any]) -> None:
    compare_runs(name, config, setup, call)


@pytest.mark.parametrize("model_dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize(
    ("name", "config"),
    [
        *[(n, {"prediction_type": p}) for n in (EULER, HEUN, LMS) for p in ("epsilon", "v_prediction", "sample")],
        (ANCESTRAL, {}),
        (EDM, {}),
        (FLOW, {}),
        (FLOW, {"stochastic_sampling": True}),
        (FLOW_HEUN, {}),
    ],
    ids=str,
)
def test_dtypes(name: str, config: dict[str, Any], dtype: torch.dtype, model_dtype: torch.dtype) -> None:
    """The original's dtypes; in half precision at least as close to the original in float64 as the original is."""
    theirs, mine = pair(name, config, 4)
    wide = copy.deepcopy(theirs)
    x = start(theirs).to(dtype)
    runs = [torch.Generator().manual_seed(1) for _ in range(3)]
    kwargs = [options(s, {}, g) for s, g in zip((theirs, mine, wide), runs, strict=True)]
    for t in theirs.timesteps[:3]:
        mine = copy.copy(mine)  # which carries nothing that 16 bits do not hold from one step to the next
        m = network(scaled(theirs, x, t), t).to(model_dtype)
        scaled(mine, x, t), scaled(wide, x.double(), t)
        plain = theirs.step(m, t, x, return_dict=False, **kwargs[0])
        found = mine.step(m, t, x, return_dict=False, **kwargs[1])
        exact = exact_step(wide, m, t, x, **kwargs[2])
        for a, b, c in zip(found, plain, exact, strict=True):
            assert a.dtype == b.dtype
            if torch.float64 in (dtype, model_dtype):  # theirs has float32 coefficients there too
                ours_off, theirs_off = distance(a.double(), c.double(), x), distance(b.double(), c.double(), x)
                assert ours_off <= 2 * theirs_off + max(2e-6, torch.finfo(a.dtype).eps)
            else:
                check(a, c, b, dtype=a.dtype)
        x = plain[0]


@pytest.mark.parametrize("name", [EULER, ANCESTRAL, HEUN, EDM, LMS])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_add_noise(name: str, dtype: torch.dtype) -> None:
    theirs, mine = pair(name, {}, 8)
    x, z = start(theirs).to(dtype) / 100, start(theirs, seed=1).to(dtype)
    for t in (theirs.timesteps[[1, 5]], theirs.timesteps[3:4]):
        plain, found = theirs.add_noise(x, z, t), mine.add_noise(x, z, t)
        exact = theirs.add_noise(x.double(), z.double(), t)
        check(found, exact, plain)
        assert mine.add_noise(x[:1], z[:1], t).shape == theirs.add_noise(x[:1], z[:1], t).shape
    for scheduler in (theirs, mine):  # image to image: at the loop's step, whatever the timesteps
        scheduler.set_begin_index(2)
    assert distance(mine.add_noise(x, z, t), theirs.add_noise(x, z, t), x) <= torch.finfo(dtype).eps
    for scheduler in (theirs, mine):
        scaled(scheduler, x, t)
        scheduler._step_index = 4
    with AllOps() as count:
        found = mine.add_noise(x, z, t)
    assert count.names["diffkern.step.default"] == 1
    assert distance(found, theirs.add_noise(x, z, t), x) <= torch.finfo(dtype).eps
    with pytest.raises(IndexError):
        pair(name, {}, 8)[1].add_noise(x, z, torch.tensor([1.25, 1.25]))


@pytest.mark.parametrize("name", [FLOW, FLOW_HEUN])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_scale_noise(name: str, dtype: torch.dtype) -> None:
    theirs, mine = pair(name, {"shift": 2.0}, 8)
    x, z = start(theirs).to(dtype), start(theirs, seed=1).to(dtype)
    given = [theirs.timesteps[[1, 5]], theirs.timesteps[3:4]] if name == FLOW else [theirs.timesteps[3]]
    for t in given:
        plain, exact = theirs.scale_noise(x, t, z), theirs.scale_noise(x.double(), t, z.double())
        check(mine.scale_noise(x, t, z), exact, plain)
    if name == FLOW:
        with pytest.raises(TypeError, match="noise must be a tensor, got None"):
            mine.scale_noise(x, given[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_velocity(dtype: torch.dtype) -> None:
    """The original's takes the table at the step's number; exact=True at the timestep's level."""
    theirs, mine = diffusers.EulerDiscreteScheduler(), ours.EulerDiscreteScheduler()
    x, z = start(theirs).to(dtype) / 100, start(theirs, seed=1).to(dtype) / 100
    t = torch.tensor([900.0, 20.0])
    exact = theirs.get_velocity(x.double(), z.double(), t)
    check(mine.get_velocity(x, z, t), exact, theirs.get_velocity(x, z, t))
    abar = theirs.alphas_cumprod.double()[[900, 20]].reshape(2, 1, 1, 1)
    right = abar.sqrt() * z.double() - (1 - abar).sqrt() * x.double()
    check(mine.diffkern(exact=True).get_velocity(x, z, t), right, right.to(dtype))
    with pytest.raises(ValueError, match=r"`EulerDiscreteScheduler.get_velocity\(\)` is not supported"):
        mine.get_velocity(x, z, torch.tensor([3, 4]))


def test_exact_converts_v_where_the_churned_state_is() -> None:
    """x0 = 0 and a model that knows it: v = eps/sqrt(sigma_hat^2 + 1) at the state with the noise of the churn."""
    for exact, near in ((True, True), (False, False)):
        mine = ours.EulerDiscreteScheduler(prediction_type="v_prediction").diffkern(exact=exact)
        mine.set_timesteps(6)
        t = mine.timesteps[4]
        mine.scale_model_input(torch.zeros(1, 1), t)
        sigma = float(mine.sigmas[4])
        hat = sigma * 2**0.5
        x = torch.full((1, 4), sigma)
        x_hat = x + torch.randn(1, 4, generator=torch.Generator().manual_seed(0)) * (hat**2 - sigma**2) ** 0.5
        m = x_hat / hat / (hat**2 + 1) ** 0.5
        x0 = mine.step(m, t, x, s_churn=1e6, generator=torch.Generator().manual_seed(0)).pred_original_sample
        assert bool(x0.abs().max() < 1e-6) == near


def test_exact_takes_the_order_that_a_late_start_allows() -> None:
    """dx/dsigma = 1: every consistent rule is exact; the original's first step is not, started at step 3."""
    for exact in (False, True):
        mine = ours.LMSDiscreteScheduler().diffkern(exact=exact)
        mine.set_timesteps(8)
        mine.set_begin_index(3)
        x = torch.zeros(1, 4)
        for t in mine.timesteps[3:6]:
            mine.scale_model_input(x, t)
            x = mine.step(torch.ones_like(x), t, x).prev_sample
        right = torch.full_like(x, float(mine.sigmas[6] - mine.sigmas[3]))
        assert torch.allclose(x, right, rtol=1e-5) == exact
    theirs, same = pair(LMS, {}, 8)
    for scheduler in (theirs, same):
        scheduler.set_begin_index(3)
    x = start(theirs)
    for t in theirs.timesteps[3:6]:
        m = network(x, t)
        scaled(theirs, x, t), scaled(same, x, t)
        after = theirs.step(m, t, x).prev_sample
        assert distance(same.step(m, t, x).prev_sample, after, x) < 2e-6
        x = after


@pytest.mark.parametrize("name", [FLOW, FLOW_HEUN])
def test_exact_shifts_the_levels_once(name: str) -> None:
    theirs, mine = pair(name, {"shift": 3.0}, 4)
    t = torch.linspace(1, 1 / 1000, 4, dtype=torch.float64)
    once = 3 * t / (1 + 2 * t)
    assert torch.equal(mine.sigmas, theirs.sigmas)
    assert not torch.allclose(mine.sigmas.unique(), torch.cat([once, t.new_zeros(1)]).flip(0).float(), rtol=1e-3)
    mine.diffkern(exact=True).set_timesteps(4)
    assert torch.allclose(mine.sigmas.unique(), torch.cat([once, t.new_zeros(1)]).flip(0).float(), rtol=1e-6)
    assert mine.sigma_min == theirs.sigma_min
    mine.diffkern(exact=False).set_timesteps(4)
    assert torch.equal(mine.sigmas, theirs.sigmas)


@pytest.mark.parametrize("stochastic", [False, True])
def test_per_token_timesteps(stochastic: bool) -> None:
    theirs, mine = pair(FLOW, {"stochastic_sampling": stochastic}, 5)
    x, m = (torch.randn(2, 6, 4, generator=torch.Generator().manual_seed(s)) for s in (0, 1))
    tokens = torch.tensor([[1000.0, 700, 500.5, 400, 1, 0], [900, 750.25, 200, 100, 50, 3]])
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        found = []
        for scheduler in (theirs, mine):
            scheduler.set_timesteps(5)
            t, g = scheduler.timesteps[0], torch.Generator().manual_seed(3)
            found.append(
                scheduler.step(m.to(dtype), t, x, per_token_timesteps=tokens, generator=g, return_dict=False)[0]
            )
            assert scheduler.step_index == 1
        assert distance(found[1], found[0], x) < 2e-6


def test_edm_takes_a_given_x0() -> None:
    theirs, mine = pair(EDM, {}, 4)
    x, given = start(theirs), start(theirs, seed=1) / 80
    for dtype in (torch.float32, torch.bfloat16):
        found = []
        for scheduler in (theirs, mine):
            scheduler.set_timesteps(4)
            scaled(scheduler, x, scheduler.timesteps[0])
            out = scheduler.step(x.to(dtype), scheduler.timesteps[0], x, pred_original_sample=given)
            assert out.pred_original_sample is given
            found.append(out.prev_sample)
        assert distance(found[1], found[0], x) <= torch.finfo(dtype).eps * 4
