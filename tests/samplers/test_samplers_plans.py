"""What all plan-driven samplers share: JSON, one fused op a model call, independence of the batch, refusals."""

from __future__ import annotations

import inspect
import math
from pathlib import Path

import pytest
import torch
from helpers.op_counter import CountOps
from helpers.oracles import Gaussian, run_plan
from torch import Tensor

import diffkern
from diffkern import ops, samplers, schedules, streams
from diffkern.plan import Plan
from diffkern.samplers import SAMPLERS
from diffkern.sampling import initial, sample

LINEAR, COSINE, FLOW, EDM = schedules.linear(), schedules.cosine(), schedules.flow(), schedules.edm()
VP, SUB_VP, VE = schedules.vp(), schedules.sub_vp(), schedules.ve()
PLANS: dict[str, Plan] = {
    "ddpm": samplers.ddpm(COSINE, 6),
    "ddim": samplers.ddim(LINEAR, 5, eta=0.5),
    "ddim_inversion": samplers.ddim_inversion(LINEAR, 5),
    "ddim_inversion flow": samplers.ddim_inversion(FLOW, 5),
    "euler": samplers.euler(VP, 5),
    "euler churn": samplers.euler(LINEAR, 5, churn=2.0, clip=1.5),
    "heun": samplers.heun(SUB_VP, 4),
    "heun churn": samplers.heun(EDM, 4, churn=2.0),
    "midpoint": samplers.midpoint(LINEAR, 4),
    "rk4": samplers.rk4(FLOW, 3),
    "rk4_38": samplers.rk4_38(VE, 3),
    "lms": samplers.lms(EDM, 7),
    "lms 5": samplers.lms(FLOW, 8, order=5),
    "deis": samplers.deis(LINEAR, 7, clip=1.5),
    "euler_ancestral": samplers.euler_ancestral(LINEAR, 5),
    "euler_ancestral flow": samplers.euler_ancestral(FLOW, 5, clip=1.5),
    "dpmpp_1s": samplers.dpmpp_1s(EDM, 4),
    "dpmpp_2s": samplers.dpmpp_2s(VP, 4, spacing="log_snr"),
    "dpmpp_2m": samplers.dpmpp_2m(LINEAR, 6, spacing="karras"),
    "dpmpp_3m": samplers.dpmpp_3m(FLOW, 6),
    "dpmpp_2m_sde": samplers.dpmpp_2m_sde(LINEAR, 5, clip=1.5),
    "dpmpp_3m_sde": samplers.dpmpp_3m_sde(EDM, 5, noise=1.01),
    "dpmpp_sde": samplers.dpmpp_sde(LINEAR, 4),
    "dpm_2": samplers.dpm_2(EDM, 4, churn=2.0),
    "dpm_2 vp": samplers.dpm_2(VP, 4, clip=1.5),
    "dpm_2_ancestral": samplers.dpm_2_ancestral(LINEAR, 4, prediction="v"),
    "dpmpp_2s_ancestral": samplers.dpmpp_2s_ancestral(LINEAR, 4, noise=1.01),
    "unipc": samplers.unipc(LINEAR, 8, order=3),
    "unipc flow": samplers.unipc(FLOW, 7, variant="bh1", lower_order_final=False),
    "euler_maruyama": samplers.euler_maruyama(SUB_VP, 6, clip=1.5),
    "euler_maruyama edm": samplers.euler_maruyama(EDM, 6, prediction="x0"),
    "flow_sde": samplers.flow_sde(FLOW, 5, sigma_t=lambda t: 1.0 - t),
    "langevin": samplers.langevin(LINEAR, 4, t=400, step_size=0.01),
    "annealed_langevin": samplers.annealed_langevin(VE, 3, each=2, step_size=1e-4, denoise=True),
    "repaint": samplers.repaint(LINEAR, 6, 2, 3),
}
SHAPE = (3, 2, 5, 4)
SEEDS = torch.tensor([11, -5, 2**62], dtype=torch.int64)


def network(x: Tensor, t: Tensor | float) -> Tensor:
    """Elementwise, so a sample cannot see its batch; smooth in time."""
    time = torch.as_tensor(t).reshape(-1, *[1] * (x.ndim - 1)).to(x.dtype)
    return 0.6 * torch.tanh(x) - 0.05 * torch.sin(0.01 * time) * x + 0.1


def start_of(plan: Plan, dtype: torch.dtype) -> Tensor:
    return initial(plan, SHAPE, SEEDS, dtype) + (0.3 if plan.init_scale == 0 else 0.0)


def test_every_sampler_is_here():
    assert {plan.name for plan in PLANS.values()} == set(SAMPLERS)
    assert all(getattr(diffkern, name) is function for name, function in SAMPLERS.items())
    assert set(samplers.__all__) - {"SAMPLERS", "get_sampler", "spaced_timesteps"} == set(SAMPLERS)
    assert set(SAMPLERS) <= set(diffkern.__all__)


@pytest.mark.parametrize("name", PLANS)
def test_json_round_trip(name):
    plan = PLANS[name]
    again = Plan.from_json(plan.to_json())
    assert again == plan
    assert torch.equal(again.table, plan.table)
    assert plan.name in str(plan)


@pytest.mark.parametrize("name", PLANS)
def test_rows_are_sound(name):
    """A stream of its own for each row, no -0.0, a model call in each (but in RePaint's jumps)."""
    plan = PLANS[name]
    for i, row in enumerate(plan.rows):
        assert (row.stream, row.known_stream) == (streams.STEP + i, streams.KNOWN + i)
        assert row.calls_model or name == "repaint"
        assert all(math.copysign(1, c) == 1 for c in row.coefficients() if c == 0)
    assert (plan.model_calls == len(plan.rows)) == (name != "repaint")


@pytest.mark.parametrize("name", PLANS)
def test_sampling_is_the_plan_and_a_sample_is_alone(name):
    """`sample` is the rows' formulas; sample b alone gives the bits it has in the batch."""
    plan = PLANS[name]
    x = start_of(plan, torch.float64)
    noises = [ops.randn(SHAPE, SEEDS, row.stream, dtype=torch.float64) for row in plan.rows if row.draws]
    got = sample(network, x, plan, seeds=SEEDS)
    torch.testing.assert_close(got, run_plan(plan, network, x, noises), rtol=2e-6, atol=2e-6)  # times are float32
    single = start_of(plan, torch.float32)
    together = sample(network, single, plan, seeds=SEEDS)
    for b in range(SHAPE[0]):
        assert torch.equal(sample(network, single[b : b + 1], plan, seeds=SEEDS[b : b + 1]), together[b : b + 1])


@pytest.mark.parametrize("name", PLANS)
def test_one_fused_op_a_model_call(name):
    """And no torch op of the state's size outside the model, but for the scaling of the first input."""
    plan = PLANS[name]
    x = start_of(plan, torch.float32)
    with CountOps(SHAPE) as counted:
        sample(lambda x, _t: x, x, plan, seeds=SEEDS)
    assert counted.fused["step_out"] == len(plan.rows)
    assert sum(counted.fused.values()) == counted.fused["step_out"]
    made = {key: n for key, n in counted.large.items() if not key.startswith(("empty", "new_empty"))}
    assert sum(made.values()) <= 2 * (plan.first_k != 1.0), made


def test_every_sampler_takes_every_prediction():
    """The same exact model in any of its guises gives the same sample."""
    data, x = Gaussian(0.4, 0.6), torch.tensor([-1.0, 0.2, 1.3], dtype=torch.float64)
    for name, function in SAMPLERS.items():
        if name in ("ddpm", "ddim", "flow_sde"):
            continue
        given = {"langevin": {"t": 300, "step_size": 0.01}, "annealed_langevin": {"each": 2, "step_size": 1e-4}}
        ends = []
        for prediction in ("eps", "x0", "v", "score"):
            steps = 400 if name == "ddim_inversion" else 7
            plan = function(LINEAR, steps, prediction=prediction, **given.get(name, {}))
            draws = [torch.cos(x + i) for i, row in enumerate(plan.rows) if row.draws]
            ends.append(run_plan(plan, data.model(LINEAR, prediction), x, draws))
        for end in ends[1:]:
            # Inversion takes each prediction at the state of the level before; between two times of a table the
            # model's level and the plan's, interpolated in other variables, differ by 1e-6.
            tol = {"ddim_inversion": 0.02, "midpoint": 1e-4, "rk4": 1e-4, "rk4_38": 1e-4}.get(name, 1e-8)
            tol = 1e-4 if name in ("dpmpp_2s", "dpmpp_sde", "dpm_2", "dpm_2_ancestral", "dpmpp_2s_ancestral") else tol
            torch.testing.assert_close(end, ends[0], rtol=tol, atol=tol, msg=lambda m, n=name: f"{n}: {m}")


def test_every_sampler_is_documented():
    page = (Path(__file__).resolve().parent.parent.parent / "docs" / "samplers.md").read_text()
    for name, function in SAMPLERS.items():
        assert f"`{name}`" in page, name
        assert inspect.getdoc(function), name


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: samplers.rk4(LINEAR), r"rk4 needs exactly one of steps, sigmas and timesteps, got none"),
        (lambda: samplers.midpoint(EDM, 0), r"steps must be an integer of at least 1, got 0"),
        (lambda: samplers.unipc(LINEAR, 1001), r"steps must be an integer in 1\.\.1000 \(T = 1000\), got 1001"),
        (lambda: samplers.euler(VP, 5, spacing="leading"), r"spacing must be linspace or one of karras, .*vp, got"),
        (lambda: samplers.euler(VP, timesteps=[0.1, 0.5]), r"timesteps must fall strictly from noise to data"),
        (lambda: samplers.euler(schedules.cosine_vp(), 5), r"finite sigma > 0 at each model call, .*cosine_vp"),
        (lambda: samplers.heun(EDM, 5, churn=-1), r"churn must be a finite number >= 0, got -1"),
        (lambda: samplers.heun(EDM, 5, churn=1, churn_noise=math.nan), r"churn_noise must be a finite number >= 0"),
        (lambda: samplers.heun(EDM, 5, churn=1, churn_range=(2, 1)), r"churn_range must be two levels, 0 <= lowest"),
        (lambda: samplers.euler(FLOW, 5, churn=1), r"churn needs a schedule that is integrated in sigma, got flow"),
        (lambda: samplers.lms(EDM, 5, order=6), r"order must be an integer in 1\.\.5, got 6"),
        (lambda: samplers.deis(EDM, 5, order=0), r"order must be an integer in 1\.\.5, got 0"),
        (lambda: samplers.deis(FLOW, 5), r"deis needs a schedule that is integrated in sigma, got flow"),
        (lambda: samplers.dpm_2(FLOW, 5), r"dpm_2 needs a schedule that is integrated in sigma, got flow"),
        (lambda: samplers.dpm_2(EDM, 5, churn=-1), r"churn must be a finite number >= 0, got -1"),
        (lambda: samplers.dpm_2_ancestral(FLOW, 5), r"dpm_2_ancestral needs a schedule that is integrated in sigma"),
        (lambda: samplers.dpm_2_ancestral(EDM, 5, eta=-1.0), r"eta must be a finite number >= 0, got -1\.0"),
        (lambda: samplers.dpmpp_2s_ancestral(FLOW, 5), r"dpmpp_2s_ancestral needs a schedule that is integrated in"),
        (lambda: samplers.dpmpp_2s_ancestral(EDM, 5, noise=-1.0), r"noise must be a finite number >= 0, got -1\.0"),
        (lambda: samplers.unipc(EDM, 5, order=4), r"order must be an integer in 1\.\.3, got 4"),
        (lambda: samplers.unipc(EDM, 5, variant="bh3"), r"variant must be 'bh1' or 'bh2', got 'bh3'"),
        (lambda: samplers.dpmpp_2m(EDM, 5, solver="euler"), r"solver must be 'midpoint' or 'heun', got 'euler'"),
        (lambda: samplers.dpmpp_2m(EDM, 5, eta=-0.5), r"eta must be a finite number >= 0, got -0\.5"),
        (lambda: samplers.dpmpp_2m_sde(EDM, 5, noise=-1.0), r"noise must be a finite number >= 0, got -1\.0"),
        (lambda: samplers.dpmpp_2s(EDM, 5, r=0.0), r"r must lie in \(0, 1\], got 0\.0"),
        (lambda: samplers.dpmpp_3m(EDM, 5, clip=0), r"clip must be positive, or None for no clip, got 0"),
        (lambda: samplers.euler_ancestral(EDM, 5, eta=math.inf), r"eta must be a finite number >= 0, got inf"),
        (lambda: samplers.ddim_inversion(LINEAR), r"ddim_inversion needs exactly one of steps, sigmas and timesteps"),
        (lambda: samplers.ddim_inversion(LINEAR, 5, timesteps=[3]), r"ddim_inversion needs exactly one of steps"),
        (lambda: samplers.euler_maruyama(VP), r"euler_maruyama needs exactly one of steps and timesteps"),
        (lambda: samplers.euler_maruyama(VP, 5, eta=-1), r"eta must be a finite number >= 0, got -1"),
        (lambda: samplers.euler_maruyama(FLOW, 5), r"needs a finite drift .* got -inf and inf at t=0 \(flow"),
        (lambda: samplers.euler_maruyama("vp", 5), r"schedule must be a diffkern Schedule, got str"),
        (lambda: samplers.euler_maruyama(VP, 5, prediction="noise"), r"prediction must be one of .*, got 'noise'"),
        (lambda: samplers.flow_sde(LINEAR, 5), r"flow_sde needs a continuous schedule of t in \[0, 1\], got linear"),
        (lambda: samplers.flow_sde(FLOW, 5, sigma_t=-1.0), r"sigma_t must be a finite number >= 0, got -1\.0"),
        (
            lambda: samplers.flow_sde(FLOW, 5, sigma_t=lambda t: 1 / t if t else math.inf),
            r"sigma_t\(0\) must be a finite number >= 0, got inf",
        ),
        (lambda: samplers.langevin(VP, 0, t=0.5, step_size=1), r"steps must be an integer of at least 1, got 0"),
        (lambda: samplers.langevin(VP, 5, t=0.5, step_size=0), r"step_size must be positive, got 0"),
        (lambda: samplers.langevin(VP, 5, t=0.0, step_size=1), r"langevin needs sigma > 0 at each model call, got 0"),
        (lambda: samplers.annealed_langevin(VE), r"annealed_langevin needs exactly one of levels and timesteps"),
        (lambda: samplers.annealed_langevin(VE, 3, each=0), r"each must be an integer of at least 1, got 0"),
        (lambda: samplers.annealed_langevin(VE, 3, each=2**63), r"each must make a plan of at most .*, got 922"),
        (lambda: samplers.annealed_langevin(VE, 3, each=10**7 // 2), r"each must make a plan of .* rows, got 5000000"),
        (lambda: samplers.langevin(VE, 2**63, t=0.5, step_size=0.1), r"steps must make a plan of at most 10000000"),
        (lambda: samplers.euler(VE, 2**63), r"steps must make a plan of at most 10000000 rows, got 922337203685"),
        (lambda: samplers.annealed_langevin(VE, timesteps=[0.1, 0.2]), r"timesteps must fall strictly"),
    ],
)  # fmt: skip
def test_bad_input_says_what_is_wrong(make, message):
    with pytest.raises(ValueError, match=message):
        make()
