"""Deterministic samplers beyond DDIM, Euler and Heun: order of convergence, identities, grids. All in float64."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from helpers.oracles import Gaussian, Mixture, run_plan
from helpers.suites import few
from torch import Tensor

from diffkern import samplers, schedules, tableaus
from diffkern.plan import Plan
from diffkern.samplers._phi import exponential_weights, phi
from diffkern.tableaus import Tableau

LINEAR, FLOW, EDM = schedules.linear(), schedules.flow(), schedules.edm()
VP, SUB_VP, VE = schedules.vp(), schedules.sub_vp(), schedules.ve()
SCHEDULES = [LINEAR, VP, SUB_VP, VE, EDM, FLOW]
PATH = schedules.path(lambda t: (0.5 * math.pi * t).sin(), lambda t: (0.5 * math.pi * t).cos())
DATA = Gaussian(0.4, 0.6)
X = torch.tensor([-1.7, -0.2, 0.0, 0.9, 2.5], dtype=torch.float64)
ODE = [
    "euler",
    "heun",
    "midpoint",
    "rk4",
    "rk4_38",
    "lms",
    "deis",
    "dpmpp_1s",
    "dpmpp_2s",
    "dpmpp_2m",
    "dpmpp_3m",
    "unipc",
]
NATIVE = ["dpmpp_1s", "dpmpp_2s", "dpmpp_2m", "dpmpp_3m", "unipc"]
"""Those whose state is the schedule's own, alpha x0 + sigma eps."""


def run(plan: Plan, schedule: schedules.Schedule, x: Tensor = X) -> Tensor:
    return run_plan(plan, DATA.model(schedule, plan.prediction), x)


def levels(n: int, power: float = 1.0, first: float = 20.0, last: float = 0.02) -> Tensor:
    """Geometric noise levels; ``power`` > 1 starts with smaller steps, for methods whose first are of low order."""
    return first * (last / first) ** ((torch.arange(n + 1, dtype=torch.float64) / n) ** power)


def observed(errors: list[float]) -> float:
    """Mean slope of log2(error) against doublings of the number of steps."""
    return float(np.mean(np.log2(np.array(errors[:-1]) / np.array(errors[1:]))))


def errors_in_sigma(make: Callable[..., Plan], counts: list[int], power: float = 1.0) -> list[float]:
    """Against the exact solution on EDM's schedule, whose two states are one."""
    exact = DATA.ode(20 * X, (1, 20.0), (1, 0.02))
    return [float((run(make(EDM, sigmas=levels(n, power)), EDM, 20 * X) - exact).abs().max()) for n in counts]


# --- orders ----------------------------------------------------------------------------------------------------------


def options(name: str, **given: object) -> Callable[..., Plan]:
    return lambda schedule, *a, **k: samplers.get_sampler(name)(schedule, *a, **given, **k)


# Sampler, options, order and the power of its grid of levels.
ORDERS: list[tuple[str, dict[str, object], int, float]] = [
    *[(name, {}, order, 1.0) for name, order in (("rk4", 4), ("rk4_38", 4), ("midpoint", 3), ("dpm_2", 2))],
    *[("lms", {"order": order}, order, 2.0 if order > 1 else 1.0) for order in (1, 2, 3, 4, 5)],
    *[("deis", {"order": order}, order, 2.0 if order > 1 else 1.0) for order in (1, 2, 3, 4)],
    *[(name, {"eta": 0.0}, 2, 1.0) for name in ("dpm_2_ancestral", "dpmpp_2s_ancestral")],
    ("dpmpp_1s", {}, 1, 1.0),
    *[("dpmpp_2s", given, 2, 1.0) for given in ({}, {"r": 0.7})],
    *[("dpmpp_2m", given, 2, 1.0) for given in ({}, {"solver": "heun"})],
    ("dpmpp_3m", {}, 3, 2.0),
    ("dpmpp_3m", {"compat": True}, 2, 2.0),
]


def order_name(case: tuple[str, dict[str, object], int, float]) -> str:
    return " ".join([case[0], *(f"{key}={value}" for key, value in case[1].items())])


def test_the_default_orders_are_among_those_measured() -> None:
    for name, order in (("lms", 4), ("deis", 3)):
        plans = (samplers.get_sampler(name)(EDM, sigmas=levels(12), **given) for given in ({}, {"order": order}))
        assert len({plan.rows for plan in plans}) == 1


# make test has one a family: of several stages, of slopes kept, exponential, data predicted once, twice and kept.
QUICK = ("rk4", "lms order=4", "deis order=3", "dpm_2", "dpmpp_2s", "dpmpp_2m", "dpmpp_3m")


@pytest.mark.parametrize(("name", "given", "order", "power"), few(ORDERS, *QUICK, name=order_name))
def test_order_in_sigma(name, given, order, power):
    """From 20 to 0.02. In geometric levels the midpoint rule gains an order on Gaussian data; in flow time not."""
    make = options(name, **given)
    errors = errors_in_sigma(make, [128, 256, 512] if order == 5 else [64, 128, 256], power)
    assert observed(errors) == pytest.approx(order, abs=0.2)
    assert errors[-1] < {1: 0.03, 2: 3e-3}.get(order, 1e-4)


@pytest.mark.parametrize(
    ("order", "variant"), few([(order, variant) for order in (1, 2, 3) for variant in ("bh1", "bh2")], "2-bh1", "3-bh2")
)
def test_order_of_unipc(variant, order):
    """The corrector adds one."""
    for corrector in (False, True):
        make = options("unipc", order=order, variant=variant, corrector=corrector, lower_order_final=False)
        assert observed(errors_in_sigma(make, [64, 128, 256], 2.0)) == pytest.approx(order + corrector, abs=0.2)


MIXTURE = Mixture(stds=(0.6, 0.8))


def mixture_flow(schedule: schedules.Schedule, name: str, n: int, power: float = 1.0, **given: object) -> Tensor:
    """Where n steps over t = u^power take X."""
    times = (torch.arange(n + 1, dtype=torch.float64) / n) ** power
    plan = samplers.get_sampler(name)(schedule, timesteps=times, **given)
    return run_plan(plan, lambda x, t: MIXTURE.predict(schedule, "velocity", x, torch.tensor(t, dtype=X.dtype)), X)


@functools.cache
def exact_flow(schedule: schedules.Schedule) -> Tensor:
    return mixture_flow(schedule, "rk4", 600)


def flow_errors(
    name: str, schedule: schedules.Schedule, counts: list[int], power: float, **given: object
) -> list[float]:
    """On a mixture, t = u^power, against rk4 with 600 steps (Gaussian data would cancel leading errors)."""
    exact = exact_flow(schedule)
    return [float((mixture_flow(schedule, name, n, power, **given) - exact).abs().max()) for n in counts]


FLOWS = [
    FLOW,
    pytest.param(schedules.flow(0.1), id="flow to 0.1", marks=pytest.mark.full),
    pytest.param(PATH, id="path", marks=pytest.mark.full),
]


@pytest.mark.parametrize(("name", "order"), [("midpoint", 2), ("rk4", 4), ("rk4_38", 4)])
@pytest.mark.parametrize("schedule", FLOWS)
def test_order_in_flow_time(name, order, schedule):
    """To the very end, where the velocity exists though the score does not."""
    counts = [64, 128, 256] if order == 2 else [24, 48, 96]
    assert observed(flow_errors(name, schedule, counts, 1.2)) == pytest.approx(order, abs=0.2)


@pytest.mark.full
@pytest.mark.parametrize("order", [2, 3, 4])
def test_order_of_adams_bashforth_in_flow_time(order):
    """Small first steps hide that there are no slopes before them."""
    assert observed(flow_errors("lms", FLOW, [160, 320, 640], 2.5, order=order)) == pytest.approx(order, abs=0.2)


@pytest.mark.parametrize("name", ODE)
# A table, a path that explodes and one of flow matching: the kinds of state and of times.
@pytest.mark.parametrize("schedule", few(SCHEDULES, "linear", "ve", "flow", name=lambda s: s.name))
def test_every_schedule_is_integrated(name, schedule):
    """60 steps end near the exact transport, whatever the schedule, grid and state."""
    if name == "deis" and schedule is FLOW:
        pytest.skip("deis integrates in sigma")
    spacing = {} if schedule in (FLOW, EDM) else {"spacing": "log_snr"}
    plan = samplers.get_sampler(name)(schedule, 60, **spacing)
    start = plan.init_scale * X
    begin = float(schedule.sigma_ve(schedule.time_range[schedule.direction > 0]))
    native = name in NATIVE and schedule not in (EDM, VE)
    ratio = 1.0 if not native else plan.init_scale / begin if schedule is not FLOW else 0.0
    level = (0.0, 1.0) if schedule is FLOW else (ratio, plan.init_scale)
    want = DATA.ode(start, level, (1, 0))
    low_order = name in ("euler", "dpmpp_1s")
    torch.testing.assert_close(run(plan, schedule, start), want, rtol=0, atol=0.2 if low_order else 0.02)


# --- identities ------------------------------------------------------------------------------------------------------


def test_one_stage_is_euler():
    """The tableau of Heun's method cut to its first stage is Euler's, and a one-step Heun is an Euler step."""
    heun = tableaus.HEUN
    assert heun._replace(order=1, nodes=heun.nodes[:1], coupling=heun.coupling[:1], weights=(1.0,)) == tableaus.EULER
    for schedule in (LINEAR, EDM, FLOW, VP):
        assert samplers.heun(schedule, 1).rows == samplers.euler(schedule, 1).rows


@pytest.mark.parametrize("name", [name for name, value in vars(tableaus).items() if isinstance(value, Tableau)])
def test_tableaus_are_consistent(name):
    tableau = getattr(tableaus, name)
    assert sum(tableau.weights) == pytest.approx(1)
    assert [sum(line) for line in tableau.coupling] == pytest.approx(tableau.nodes)
    assert [len(line) for line in tableau.coupling] == list(range(len(tableau.nodes)))
    assert sum(tableau.error) == pytest.approx(0, abs=1e-15)


def test_rk4_by_hand():
    def slope(x: Tensor, t: float) -> Tensor:
        return DATA.predict(FLOW, "velocity", x, t)

    h, t = 0.25, 0.25
    for name in ("rk4", "rk4_38"):
        plan = getattr(samplers, name)(FLOW, 4)
        got = run_plan(plan, DATA.model(FLOW, "velocity"), X, rows=plan.steps[1])
        one = slope(X, t)
        if name == "rk4":
            two = slope(X + h / 2 * one, t + h / 2)
            three = slope(X + h / 2 * two, t + h / 2)
            four = slope(X + h * three, t + h)
            want = X + h / 6 * (one + 2 * two + 2 * three + four)
        else:
            two = slope(X + h / 3 * one, t + h / 3)
            three = slope(X + h * (two - one / 3), t + 2 * h / 3)
            four = slope(X + h * (one - two + three), t + h)
            want = X + h / 8 * (one + 3 * two + 3 * three + four)
        torch.testing.assert_close(got, want, rtol=1e-14, atol=1e-14)


def test_histories_are_no_more_than_needed():
    """Heun and midpoint keep one tensor, the four-stage methods x and three slopes, multistep methods order - 1."""
    want = {"heun": 1, "midpoint": 1, "rk4": 4, "rk4_38": 4, "dpmpp_2s": 1, "dpmpp_1s": 0, "dpmpp_2m": 1, "dpmpp_3m": 2}
    want |= {"lms": 3, "deis": 2, "unipc": 2, "euler": 0}
    for name, count in want.items():
        plan = samplers.get_sampler(name)(EDM, 12)
        assert max(len(live) for live in plan.live) == count, name
        # Nothing is saved that no later row reads.
        assert all(slot in plan.live[i + 1] for i, row in enumerate(plan.rows) for slot, _ in row.saves), name


@pytest.mark.parametrize("prediction", ["eps", "x0", "v"])
def test_first_order_dpm_solver_is_ddim(prediction):
    times = [900, 640, 333, 50, 3]
    one = samplers.dpmpp_1s(LINEAR, timesteps=times, prediction=prediction)
    two = samplers.ddim(LINEAR, timesteps=times, prediction=prediction)
    torch.testing.assert_close(run(one, LINEAR), run(two, LINEAR), rtol=1e-12, atol=1e-12)
    assert [(r.time, r.known_s, r.stream) for r in one.rows] == [
        (r.time, pytest.approx(r.known_s), r.stream) for r in two.rows
    ]


def test_orders_of_one_are_euler():
    """LMS, DEIS and UniPC without corrector at order 1, and the ancestral sampler without noise."""
    want = run(samplers.euler(EDM, 9), EDM, 80 * X)
    for plan in (
        samplers.lms(EDM, 9, order=1),
        samplers.deis(EDM, 9, order=1),
        samplers.unipc(EDM, 9, order=1, corrector=False),
        samplers.dpmpp_1s(EDM, 9),
        samplers.euler_ancestral(EDM, 9, eta=0.0),
    ):
        torch.testing.assert_close(run(plan, EDM, 80 * X), want, rtol=1e-12, atol=1e-12)


def test_adams_bashforth_weights():
    """On even steps the classic ones."""
    plan = samplers.lms(FLOW, 10)
    h, last = 0.1, plan.rows[6]
    assert [last.d / h, *(e / h for e in (last.e2, last.e1, last.e0))] == pytest.approx(
        [55 / 24, -59 / 24, 37 / 24, -9 / 24]
    )


def test_exponential_weights():
    """phi against its recursion on both sides of the series, and weights against integrals of a fine sum."""
    for z in (-3.0, -1.0001, -0.9999, -0.02, -1e-9, 0.0, 0.5):
        u = (torch.arange(20000, dtype=torch.float64) + 0.5) / 20000
        for k in (1, 2, 3, 4):
            want = float((((1 - u) * z).exp() * u ** (k - 1)).mean()) / math.factorial(k - 1)
            assert phi(k, z) == pytest.approx(want, rel=1e-7)
        points = [0.0, -0.7, -2.0]
        for j, got in enumerate(exponential_weights(points, z)):
            others = [p for i, p in enumerate(points) if i != j]
            basis = math.prod([(u - p) / (points[j] - p) for p in others])
            assert got == pytest.approx(float((((1 - u) * z).exp() * basis).mean()), abs=1e-7)
    assert phi(2, -math.inf) == 0.0
    assert phi(0, -1.0) == math.exp(-1.0)


@pytest.mark.parametrize("schedule", few([LINEAR, EDM, FLOW, VP, VE], "linear", "flow", name=lambda s: s.name))
def test_inversion_then_sampling_returns_the_start(schedule):
    """Within an error that falls with the steps; one and the same grid."""
    if schedule is FLOW:
        grids = [{"timesteps": torch.linspace(0, 1, n + 1, dtype=torch.float64)} for n in (25, 50, 100)]
    elif schedule is LINEAR:
        grids = [{"timesteps": torch.linspace(999, 0, n).round()} for n in (25, 50, 100)]
    else:
        ends = (80.0, 0.002) if schedule is EDM else (40.0, 0.02)
        grids = [{"sigmas": schedules.karras_sigmas(n, ends[1], ends[0])} for n in (100, 200, 400)]
    errors = []
    for grid in grids:
        noise = run(samplers.ddim_inversion(schedule, **grid), schedule)
        back = samplers.euler(schedule, **grid) if schedule is FLOW else samplers.dpmpp_1s(schedule, **grid)
        errors.append(float((run(back, schedule, noise) - X).abs().max()))
    assert observed(errors) == pytest.approx(1, abs=0.2)
    assert errors[-1] < 0.2


def test_inversion_follows_the_probability_flow():
    plan = samplers.ddim_inversion(LINEAR, 500)
    assert [row.time for row in plan.rows] == list(range(0, 1000, 2))
    assert plan.time_dtype == "int64"
    top = float(LINEAR.alpha(998)), float(LINEAR.sigma(998))
    torch.testing.assert_close(run(plan, LINEAR), DATA.ode(X, (1, 0), top), rtol=0, atol=0.03)
    assert (plan.rows[-1].known_s, plan.rows[-1].known_n) == pytest.approx(top)
    assert samplers.ddim_inversion(LINEAR, 7, spacing="linspace").rows[-1].time == 999


def test_a_step_to_sigma_0_ends_on_x0():
    """Also with an infinite step in log-SNR, whose formulas would be 0 times infinity."""
    for name in ODE:
        row = samplers.get_sampler(name)(EDM, 5).rows[-1]
        if name != "lms":
            assert (row.a, row.b, row.d, row.reads) == (0.0, 1.0, 0.0, ()), name
        assert (row.known_s, row.known_n) == (1.0, 0.0)


def test_flows_start_where_there_is_no_signal():
    """alpha = 0: the step from pure noise is of first order and finite, in every exponential method."""
    for name in NATIVE:
        plan = samplers.get_sampler(name)(FLOW, 40)
        assert torch.isfinite(plan.table[:, 5:]).all()
        torch.testing.assert_close(run(plan, FLOW), DATA.ode(X, (0, 1), (1, 0)), rtol=0, atol=0.06)


def test_clipping_keeps_x0_inside():
    for name in ODE:
        plan = samplers.get_sampler(name)(EDM, 8, prediction="x0", clip=0.5)
        x0 = run_plan(plan, lambda x, _t: torch.full_like(x, 3.0), 80 * X)
        torch.testing.assert_close(x0, torch.full_like(X, 0.5), rtol=0, atol=0.05 if name == "lms" else 1e-9)


def test_churn_keeps_marginals_and_leaves_one_row_a_call():
    plan, calm = samplers.heun(EDM, 40, churn=20.0), samplers.heun(EDM, 40)
    assert len(plan.rows) == len(calm.rows) == plan.model_calls
    assert plan.init_scale > calm.init_scale
    assert [row.draws for row in plan.rows[:4]] == [False, True, False, True]
    assert not plan.rows[-1].draws
    inside = samplers.euler(EDM, 10, churn=5.0, churn_range=(0.1, 10.0))
    drawn = [0.1 <= level <= 10.0 for level in EDM.sigmas(10).tolist()[1:-1]]
    assert [row.draws for row in inside.rows] == [*drawn, False]
    table = samplers.euler(LINEAR, 10, churn=5.0)
    assert table.rows[0].time == 999  # above the table the time is its last
    assert table.rows[0].q < -157.0
