"""Every sampler on every schedule with every prediction: run on closed-form models, or refused with a remedy.

What the tables of docs/samplers.md and `diffkern.samplers` call possible is written down in `refusal`. Runs are those
of `diffkern.sample`, from the schedule's noise end to its data end, with few steps, one step, and all of a table.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import lru_cache

import pytest
import torch
from helpers.oracles import Gaussian, Mixture
from helpers.suites import few
from torch import Tensor

from diffkern import sample, schedules
from diffkern.plan import Plan
from diffkern.samplers import SAMPLERS
from diffkern.schedules import DiscreteSchedule, Schedule
from diffkern.schedules.predictions import PREDICTIONS

T = 20
TABLES = ("linear", "scaled_linear", "cosine", "cosine_arc", "sigmoid", "laplace", "exponential")
FLOWS = ("flow", "flow(0.1)", "t^2")
DATA, MIX = Gaussian(0.3, 0.6), Mixture()
Z = torch.tensor([[-1.0], [0.0], [1.0]], dtype=torch.float64)
NOT_IN_TIME = ("deis", "dpm_2", "dpm_2_ancestral", "dpmpp_2s_ancestral")
IN_SIGMA = (
    *("euler", "heun", "midpoint", "rk4", "rk4_38", "lms", "deis", "euler_ancestral", "dpm_2", "dpm_2_ancestral"),
    "dpmpp_2s_ancestral",
)
VELOCITY_IS_ENOUGH = ("euler", "heun", "midpoint", "rk4", "rk4_38", "lms")
BETWEEN = ("midpoint", "rk4", "rk4_38", "dpm_2", "dpm_2_ancestral", "dpmpp_2s", "dpmpp_sde", "dpmpp_2s_ancestral")
UNMOVED = (("cosine_arc", "velocity"), ("cosine_arc", "mu"))
"""Predictions of a level that does not move, which say nothing of x0: see test_equal_levels.py."""
STEEP = {
    *((sampler, name) for sampler in SAMPLERS for name in ("laplace", "exponential")),
    *((sampler, "laplace_vp") for sampler in ("euler_maruyama", "flow_sde", "heun")),
    *(("dpmpp_3m", name) for name in ("ve_exponential", "zero terminal SNR")),
}
"""Where so few steps are too few: tables whose level jumps in each, slopes without bound, extrapolation."""
SILENT = "take a prediction that does, or times without this one"
FROM_INFINITY = r"ddim, dpmpp_\* and unipc start there"


@lru_cache(maxsize=64)
def schedule_of(name: str) -> Schedule:
    if name in TABLES:
        return getattr(schedules, name)(T)
    if name == "zero terminal SNR":
        return schedules.zero_terminal_snr(schedules.linear(T, beta_end=0.5))
    if name == "t^2":
        return schedules.path(lambda t: t**2, lambda t: 1 - t**2)
    return schedules.flow(0.1) if name == "flow(0.1)" else schedules.SCHEDULES[name]()


NAMES = tuple(dict.fromkeys((*schedules.SCHEDULES, "zero terminal SNR", *FLOWS)))


def refusal(sampler: str, name: str, prediction: str) -> str | None:
    """What the sentence says where a combination is not possible."""
    schedule = schedule_of(name)
    table, in_time = isinstance(schedule, DiscreteSchedule), name in FLOWS
    if sampler == "flow_sde" and (table or name == "edm"):
        return r"flow_sde needs a continuous schedule"
    if (prediction == "mu" and not table) or (prediction == "edm" and name != "edm"):
        return f"prediction '{prediction}' needs a|{FROM_INFINITY}|give timesteps that leave it out"
    if in_time and sampler in NOT_IN_TIME:
        return "needs a schedule that is integrated in sigma"
    if sampler == "langevin":
        return None
    no_signal = float(schedule.alpha(schedule.noise_end)) == 0.0
    if sampler == "annealed_langevin":
        return "give timesteps that leave it out" if name in ("flow", "t^2") else None
    if sampler == "euler_maruyama" and no_signal and not table:
        return "give timesteps that begin later"
    if no_signal and not in_time and sampler in IN_SIGMA:
        return FROM_INFINITY
    if no_signal:
        return _says_nothing(sampler, name, prediction)
    return None


def _says_nothing(sampler: str, name: str, prediction: str) -> str | None:
    """From pure noise, x = eps: what is left to know is x0."""
    if sampler == "ddim_inversion":  # calls the model at the data end, not at the noise end, of a flow
        at_data = {"x0": SILENT, "score": "take another prediction, or times without this one"}
        return at_data.get(prediction) if name in ("flow", "t^2") else None
    if sampler == "flow_sde" and name == "t^2":
        return None
    silent = {"eps", "score"}
    if name in ("t^2", "zero terminal SNR"):
        silent.add("velocity")
    if prediction not in silent or (name == "t^2" and sampler in VELOCITY_IS_ENOUGH):
        return None
    if name == "zero terminal SNR" and sampler == "euler_maruyama":
        return None
    return SILENT


def plan_of(sampler: str, name: str, prediction: str, steps: int) -> Plan:
    schedule, make = schedule_of(name), SAMPLERS[sampler]
    if sampler == "langevin":
        low, high = schedule.time_range
        middle = (low + high) // 2 if isinstance(schedule, DiscreteSchedule) else (low + high) / 2
        return make(schedule, steps, t=middle, step_size=1e-3, prediction=prediction)
    if sampler == "annealed_langevin":
        return make(schedule, steps + 1, each=2, step_size=1e-5, prediction=prediction)
    more = {"spacing": "trailing"} if name == "zero terminal SNR" and sampler in ("ddim", "ddpm", "repaint") else {}
    return make(schedule, steps, prediction=prediction, **more)


def network(data: Gaussian | Mixture, schedule: Schedule, prediction: str) -> Callable[[Tensor, Tensor], Tensor]:
    """The exact prediction, called as a network is."""
    if isinstance(data, Gaussian):
        gaussian = data.model(schedule, prediction)
        return lambda x, t: gaussian(x, float(t[0]))

    def mixture(x: Tensor, t: Tensor) -> Tensor:
        time = t[0]
        if prediction == "edm":
            time = (4.0 * time.double()).exp()
            x = x / schedule.preconditioning(time)[2]
        return data.predict(schedule, prediction, x, time)

    return mixture


def start_of(plan: Plan, schedule: Schedule) -> Tensor:
    """Quantiles of the Gaussian data's marginal at the noise end, in the plan's state; of the data for an inversion."""
    if plan.init_scale == 0.0:
        return DATA.mean + DATA.std * Z
    alpha, sigma = schedule.alpha(schedule.noise_end), schedule.sigma(schedule.noise_end)
    x = alpha * DATA.mean + DATA.total(alpha, sigma).sqrt() * Z
    return x / alpha if plan.name in IN_SIGMA and plan.init_scale != 1.0 else x


def end_of(sampler: str, name: str, prediction: str, steps: int, data: Gaussian | Mixture) -> Tensor:
    """Where the quantiles of the data's marginal are taken, without noise; finite."""
    plan, schedule = plan_of(sampler, name, prediction, steps), schedule_of(name)
    noise = None if plan.deterministic else torch.zeros(len(plan.rows), *Z.shape, dtype=torch.float64)
    made = sample(network(data, schedule, prediction), start_of(plan, schedule), plan, noise=noise)
    assert made.isfinite().all(), (prediction, steps, made)
    return made


def agree(sampler: str, name: str, prediction: str, made: Tensor, known: Tensor) -> None:
    """Up to the float32 of the times (steep in `laplace_vp`); between a table's levels time and level do not match."""
    if sampler in BETWEEN and isinstance(schedule_of(name), DiscreteSchedule):
        return
    tolerance = 0.1 if name == "laplace_vp" else 3e-4
    torch.testing.assert_close(made, known, rtol=tolerance, atol=tolerance, msg=lambda m: f"{prediction}: {m}")


@pytest.mark.parametrize("name", few(NAMES, "linear", "t^2"))
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_it_runs_or_says_why_not(sampler, name):
    """All predictions of the exact model say the same, so they end at the same state."""
    for steps, data in ((5, MIX), (1, DATA)):
        known = None
        for prediction in PREDICTIONS:
            why = refusal(sampler, name, prediction)
            if why is not None:
                with pytest.raises(ValueError, match=why):
                    plan_of(sampler, name, prediction, steps)
                continue
            made = end_of(sampler, name, prediction, steps, data)
            known = made if known is None else known
            if prediction == "velocity" and name in FLOWS and sampler in ("midpoint", "rk4", "rk4_38"):
                continue  # which need no Euler step at the end
            agree(sampler, name, prediction, made, known)


@pytest.mark.full
@pytest.mark.parametrize("name", [*TABLES, "zero terminal SNR"])
@pytest.mark.parametrize("sampler", sorted(SAMPLERS.keys() - {"flow_sde", "langevin", "annealed_langevin"}))
def test_all_steps_of_a_table(sampler, name):
    known = None
    for prediction in PREDICTIONS:
        if refusal(sampler, name, prediction) is None and (name, prediction) not in UNMOVED:
            made = end_of(sampler, name, prediction, T, DATA)
            known = made if known is None else known
            agree(sampler, name, prediction, made, known)


@pytest.mark.full
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("sampler", sorted(SAMPLERS.keys() - {"langevin", "annealed_langevin", "ddim_inversion"}))
def test_it_samples_the_gaussian(sampler, name):
    """Affine in x: the middle ends on the mean, a deviation on the data's, or less where the noise is left out."""
    prediction = "velocity" if sampler in VELOCITY_IS_ENOUGH and name == "t^2" else "v"
    if refusal(sampler, name, prediction) is not None or (sampler, name) in STEEP:
        return
    steps = T if isinstance(schedule_of(name), DiscreteSchedule) else 60
    low, middle, high = end_of(sampler, name, prediction, steps, DATA).flatten().tolist()
    left = 0.1 if name == "flow(0.1)" else 0.0
    assert abs(middle - DATA.mean) < 0.15
    assert 0.0 <= (high - low) / 2 < math.hypot(DATA.std, left) + 0.15
    if plan_of(sampler, name, prediction, steps).deterministic:
        assert (high - low) / 2 > DATA.std - 0.15
