"""Steps of no length, between equal levels of a table: the identity, and no part of any history."""

from __future__ import annotations

import pytest
import torch
from helpers.oracles import Gaussian, Mixture, run_plan
from helpers.suites import few
from torch import Tensor

from diffkern import samplers, schedules
from diffkern.plan import Plan
from diffkern.samplers import SAMPLERS

ABAR = torch.tensor([0.99, 0.99, 0.95, 0.85, 0.7, 0.7, 0.7, 0.5, 0.3, 0.12, 0.03, 0.03], dtype=torch.float64)
TABLE = schedules.from_alphas_cumprod(ABAR)
EVERY, ONCE = list(range(11, -1, -1)), [11, 9, 8, 7, 6, 3, 2, 1]
MIX = Mixture()
X = torch.linspace(-2, 2, 7, dtype=torch.float64)
ARC = schedules.cosine_arc()
IN_SIGMA = ("euler", "heun", "midpoint", "rk4", "rk4_38", "lms", "deis", "dpm_2")
OWN = ("dpmpp_1s", "dpmpp_2s", "dpmpp_2m", "dpmpp_3m", "unipc", "ddim_inversion")
NOISY = ("euler_ancestral", "dpmpp_2m_sde", "dpmpp_3m_sde", "dpmpp_sde", "dpm_2_ancestral", "dpmpp_2s_ancestral")
OPTIONS = [
    *((name, {}) for name in (*IN_SIGMA, *OWN, *NOISY, "ddim", "ddpm")),
    ("lms", {"order": 5}),
    ("deis", {"order": 2, "clip": 9.0}),
    ("dpmpp_2m", {"solver": "heun", "lower_order_final": True}),
    ("dpmpp_3m", {"lower_order_final": True, "clip": 9.0}),
    ("unipc", {"order": 3}),
    ("unipc", {"order": 3, "variant": "bh1", "lower_order_final": False}),
    ("unipc", {"order": 2, "corrector": False}),
    ("euler", {"prediction": "v"}),
    ("dpmpp_2m", {"prediction": "x0"}),
]


def run(plan: Plan, prediction: str = "eps") -> Tensor:
    """On the exact model of the mixture, the j-th drawn noise the same whatever stands between."""

    def model(x: Tensor, t: float) -> Tensor:
        return MIX.predict(TABLE, prediction, x, torch.tensor(int(t)))

    draws = sum(row.draws for row in plan.rows)
    noises = [0.5 * torch.sin(X + j) for j in range(draws)]
    return run_plan(plan, model, plan.init_scale * X if plan.init_scale else X, noises)


@pytest.mark.parametrize(("name", "options"), OPTIONS, ids=[f"{name}-{i}" for i, (name, _) in enumerate(OPTIONS)])
def test_repeated_levels_change_nothing(name, options):
    """All twelve times, of which four repeat a level, against the eight levels once."""
    make, prediction = SAMPLERS[name], options.get("prediction", "eps")
    every, once = make(TABLE, timesteps=EVERY, **options), make(TABLE, timesteps=ONCE, **options)
    assert len(every.steps) == 12
    assert len(once.steps) == 8
    assert sum(row.draws for row in every.rows) == sum(row.draws for row in once.rows)
    torch.testing.assert_close(run(every, prediction), run(once, prediction), rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("name", [*IN_SIGMA, *OWN, *NOISY])
def test_such_a_step_is_one_row_that_keeps_the_state(name):
    plan = SAMPLERS[name](TABLE, timesteps=EVERY)
    for step in plan.steps:
        rows = [plan.rows[i] for i in step]
        if rows[0].time in (11.0, 6.0, 5.0, 1.0) and name != "ddim_inversion":
            assert len(rows) == 1
            row = rows[0]
            assert (row.a, row.b, row.d, row.g, row.reads, row.saves) == (1.0, 0.0, 0.0, 0.0, (), ())
            assert row.makes_x0  # for a callback


@pytest.mark.parametrize(
    "name",
    few(
        sorted(SAMPLERS.keys() - {"flow_sde", "langevin", "annealed_langevin", "repaint"}),
        *("dpmpp_3m", "unipc", "deis", "ddpm"),
    ),
)
def test_cosine_arc_with_all_its_steps(name):
    """Its levels repeat at both bounds; on Gaussian data every sampler ends near the data's mean and deviation."""
    data = Gaussian(0.3, 0.6)
    plan = SAMPLERS[name](ARC, 1000)
    assert len(plan.steps) == 1000
    alpha, sigma = (float(rate(999)) for rate in (ARC.alpha, ARC.sigma))
    ratio = plan.init_scale / sigma if plan.init_scale not in (0.0, 1.0) else 1.0
    start = torch.tensor([-1.0, 1.0], dtype=torch.float64) * data.total(torch.tensor(alpha), torch.tensor(sigma)).sqrt()
    x = (alpha * data.mean + start) * ratio
    if name == "ddim_inversion":
        x = torch.tensor([-0.3, 0.9], dtype=torch.float64)
    made = run_plan(plan, data.model(ARC, "eps"), x, [torch.zeros(2, dtype=torch.float64)] * len(plan.rows))
    mean, std = float(made.mean()), float(made[1] - made[0]) / 2
    if name == "ddim_inversion":
        assert abs(mean - alpha * data.mean) < 2e-2
        assert abs(std - float(start[1])) < 2e-2
        return
    assert abs(mean - data.mean) < 2e-2
    if plan.deterministic:
        assert abs(std - data.std) < 1e-2
    else:
        assert std < data.std  # the rest of the variance is the noise's, which was 0


def test_a_velocity_that_says_nothing_is_a_sentence():
    """At t = 999 the level does not move, so the velocity is 0 whatever x0: five steps cannot start there."""
    with pytest.raises(
        ValueError, match=r"'velocity' does not determine x0 and eps .*: cosine_arc, t=999; take a pred"
    ):
        samplers.euler(ARC, 5, prediction="velocity")
    samplers.euler(ARC, timesteps=[996, 700, 400, 100, 0], prediction="velocity")
    assert len(samplers.euler(ARC, 1000, prediction="velocity").steps) == 1000  # a step of no length needs nothing


def test_learned_variance_has_none_in_such_a_step():
    plan = samplers.ddpm(TABLE, variance="learned")
    for row in plan.rows:
        repeats = row.time in (11.0, 6.0, 5.0, 1.0)
        assert (row.g == 0.0) == (repeats or row.time == 0.0)
        if repeats:
            assert (row.a, row.b, row.r0, row.r1) == (1.0, 0.0, 0.0, 0.0)
    assert samplers.ddpm(ARC, variance="learned").learned_table.isfinite()[:, :4].all()
