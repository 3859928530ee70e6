"""Tables, spacings and paths against other libraries, which are used as oracles where they are installed.

Their tables are float32: rtol is 1e-6, or what float32 makes of them (peers compute 1 - abar and cumulative products in
it). Where one of them is wrong, the test shows both: its own branch, and ours.
"""

from __future__ import annotations

import math
from types import ModuleType

import numpy as np
import pytest
import torch
from helpers import k_diffusion_oracle
from torch import Tensor

from diffkern import schedules
from diffkern.schedules import grids

# diffusers makes numpy arrays of tensors in a way that numpy 2 deprecates.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")


def close(got: object, want: object, rtol: float = 1e-6, atol: float = 0.0) -> None:
    np.testing.assert_allclose(np.asarray(got, dtype=np.float64), np.asarray(want, dtype=np.float64), rtol, atol)


@pytest.fixture(scope="module")
def diffusers() -> ModuleType:
    return pytest.importorskip("diffusers")


@pytest.fixture(scope="module")
def fm() -> ModuleType:
    return pytest.importorskip("flow_matching.path.scheduler")


# ---------------------------------------------------------------------------------------------------- diffusers: tables

# abar: relative error of float32 betas and cumulative products against exact ones, as measured.
TABLES = [
    ("linear", {}, schedules.linear(), 4e-7),
    ("scaled_linear", {"beta_start": 0.00085, "beta_end": 0.012}, schedules.scaled_linear(), 1e-6),
    ("squaredcos_cap_v2", {}, schedules.cosine(), 1.4e-5),
    ("sigmoid", {}, schedules.sigmoid(), 1e-6),
    ("laplace", {}, schedules.laplace(compat=True), 2e-5),
]


@pytest.mark.parametrize(("name", "ends", "ours", "rtol"), TABLES, ids=[case[0] for case in TABLES])
def test_tables(diffusers, name, ends, ours, rtol):
    theirs = diffusers.DDPMScheduler(beta_schedule=name, **ends)
    close(ours.betas, theirs.betas, rtol=1e-6 if name != "squaredcos_cap_v2" else 1e-5, atol=1e-9)
    close(ours.alphas_cumprod, theirs.alphas_cumprod, rtol=rtol)


def test_exponential_table(diffusers):
    from diffusers.schedulers.scheduling_ddpm import betas_for_alpha_bar

    close(schedules.exponential().betas, betas_for_alpha_bar(1000, alpha_transform_type="exp"))


def test_laplace_takes_abar_where_theirs_takes_its_root(diffusers):
    """Their abar is sqrt(snr/(1 + snr)), which is the signal rate (arXiv 2407.03297): the log-SNR is not Laplace's."""
    theirs = diffusers.DDPMScheduler(beta_schedule="laplace").alphas_cumprod.double()
    log_snr = schedules.laplace_vp().log_snr(torch.arange(1, 1001).double() / 1000)
    close(schedules.laplace().alphas_cumprod, torch.sigmoid(log_snr), rtol=1e-12)
    start = math.sqrt(1 / (1 + 1e-6**0.5))  # they divide by the value at 0
    close(theirs[:-1], torch.sigmoid(log_snr).sqrt()[:-1] / start, rtol=2e-4)
    assert float((theirs - schedules.laplace().alphas_cumprod).abs().max()) > 0.2


@pytest.mark.parametrize("name", ["linear", "scaled_linear", "squaredcos_cap_v2"])
def test_zero_terminal_snr(diffusers, name):
    theirs = diffusers.DDIMScheduler(beta_schedule=name, rescale_betas_zero_snr=True)
    plain = diffusers.DDIMScheduler(beta_schedule=name)
    ours = schedules.zero_terminal_snr(schedules.from_alphas_cumprod(plain.alphas_cumprod))
    close(ours.alphas_cumprod, theirs.alphas_cumprod, rtol=2e-5, atol=1e-7)
    assert float(theirs.alphas_cumprod[-1]) == float(ours.alphas_cumprod[-1]) == 0
    # Where they divide by abar, they put 2^-24 in its place.
    assert float(diffusers.EulerDiscreteScheduler(rescale_betas_zero_snr=True).alphas_cumprod[-1]) == 2**-24


# -------------------------------------------------------------------------------------------------- diffusers: spacings


@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
@pytest.mark.parametrize("steps", [5, 30, 50])
def test_whole_times(diffusers, spacing, steps):
    for made in (diffusers.DDIMScheduler, diffusers.DDPMScheduler):
        theirs = made(timestep_spacing=spacing)
        theirs.set_timesteps(steps)
        assert grids.spaced_timesteps(1000, steps, spacing) == theirs.timesteps.tolist()
    # DPM-Solver's and UniPC's grids have one step more, and leave out its end (except for "trailing").
    more = 0 if spacing == "trailing" else 1
    for made in (diffusers.DPMSolverMultistepScheduler, diffusers.UniPCMultistepScheduler):
        theirs = made(timestep_spacing=spacing)
        theirs.set_timesteps(steps)
        want = grids.spaced_timesteps(1000, steps + more, spacing)[:steps]
        assert theirs.timesteps.tolist() == want


LEVELS = {"karras": "use_karras_sigmas", "exponential": "use_exponential_sigmas", "beta": "use_beta_sigmas"}


@pytest.mark.parametrize("spacing", LEVELS)
@pytest.mark.parametrize("made", ["Euler", "Heun", "DPMSolverMultistep", "UniPCMultistep"])
def test_noise_levels(diffusers, made, spacing):
    if spacing == "beta":
        pytest.importorskip("scipy")
    name = made + ("DiscreteScheduler" if made in ("Euler", "Heun") else "Scheduler")
    theirs = getattr(diffusers, name)(beta_schedule="linear", beta_start=1e-4, beta_end=0.02, **{LEVELS[spacing]: True})
    theirs.set_timesteps(12)
    table = schedules.from_alphas_cumprod(theirs.alphas_cumprod)
    want = theirs.sigmas.double()
    if made == "Heun":  # each level but the ends twice
        want = torch.cat([want[:1], want[1:-1:2], want[-1:]])
    # Their 1 - abar is float32: 1.7e-4 of it at t = 0, so sigma_min is taken from them.
    low, high = float(want[-2]), float(want[0])
    close(grids.levels(table, 12, spacing, sigma_min=low, sigma_max=high), want, rtol=2e-6)
    close(low, table.sigma_ve(0), rtol=2e-4)
    close(high, table.sigma_ve(999), rtol=2e-6)
    if made == "Euler":
        t = table.time_of_sigma(want[:-1].clamp(float(table.sigma_ve(0)), float(table.sigma_ve(999))))
        close(t, theirs.timesteps, rtol=1e-5, atol=2e-3)


def test_lu_lambdas_are_the_log_snr_spacing(diffusers):
    theirs = diffusers.DPMSolverMultistepScheduler(use_lu_lambdas=True)
    theirs.set_timesteps(12)
    want = theirs.sigmas.double()
    close(grids.exponential_sigmas(12, float(want[-2]), float(want[0])), want, rtol=2e-6)


def test_edm_levels(diffusers):
    theirs = diffusers.EDMEulerScheduler()
    theirs.set_timesteps(18)
    close(schedules.edm().sigmas(18), theirs.sigmas)
    theirs = diffusers.EDMEulerScheduler(sigma_schedule="exponential")
    theirs.set_timesteps(18)
    close(grids.exponential_sigmas(18, 0.002, 80.0), theirs.sigmas)


def test_k_diffusion_levels():
    kd = k_diffusion_oracle.sampling()
    close(grids.karras_sigmas(9, 0.1, 10.0), kd.get_sigmas_karras(9, 0.1, 10.0), rtol=2e-6)
    close(grids.exponential_sigmas(9, 0.1, 10.0), kd.get_sigmas_exponential(9, 0.1, 10.0))
    close(grids.polyexponential_sigmas(9, 0.1, 10.0, 2.0), kd.get_sigmas_polyexponential(9, 0.1, 10.0, 2.0), rtol=2e-6)
    close(grids.vp_sigmas(9), kd.get_sigmas_vp(9), rtol=3e-4)  # theirs is exp - 1 in float32


# ------------------------------------------------------------------------------------------------------ diffusers: flow


def flow_levels(
    diffusers: ModuleType, sigmas: np.ndarray | None, steps: int, mu: float | None, **config: object
) -> Tensor:
    theirs = diffusers.FlowMatchEulerDiscreteScheduler(**config)
    if sigmas is None:
        theirs.set_timesteps(steps)
    else:
        theirs.set_timesteps(sigmas=sigmas, mu=mu)
    return theirs.sigmas


@pytest.mark.parametrize(
    ("ours", "config", "mu"),
    [
        ({}, {}, None),
        ({"shift": 3.0}, {"shift": 3.0}, None),
        ({"mu": 0.8}, {"use_dynamic_shifting": True}, 0.8),
        ({"mu": 0.8, "kind": "linear"}, {"use_dynamic_shifting": True, "time_shift_type": "linear"}, 0.8),
        ({"shift": 3.0, "terminal": 0.02}, {"shift": 3.0, "shift_terminal": 0.02}, None),
    ],
)
def test_flow_shifts(diffusers, ours, config, mu):
    given = np.linspace(1.0, 1 / 7, 7)
    close(grids.flow_sigmas(7, **ours), flow_levels(diffusers, given, 7, mu, **config))


def test_their_default_flow_levels_are_shifted_twice(diffusers):
    """Their stored sigma_min and sigma_max are shifted already (issue 13243): ours are shifted once."""
    theirs = flow_levels(diffusers, None, 4, None, shift=3.0)
    close(theirs, [1, 0.8577, 0.6022, 0.0089, 0], rtol=1e-2)
    low = float(grids.shifted(torch.tensor(0.001, dtype=torch.float64), 3.0))
    close(grids.flow_sigmas(4, sigma_min=low, shift=3.0), theirs, rtol=1e-5)
    assert float(grids.flow_sigmas(4, sigma_min=0.001, shift=3.0)[3]) == pytest.approx(low)


def test_flow_velocity_has_the_other_sign_and_time(diffusers):
    theirs = diffusers.FlowMatchEulerDiscreteScheduler()
    theirs.set_timesteps(10)
    x0, eps = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(0)).unbind()
    sigma = theirs.sigmas[3]
    noisy = theirs.scale_noise(x0, theirs.timesteps[3:4], eps)
    flow = schedules.flow()
    close(noisy, flow.alpha(1 - float(sigma)) * x0 + flow.sigma(1 - float(sigma)) * eps, rtol=1e-5, atol=1e-6)


# ------------------------------------------------------------------------------------------- flow_matching and torchcfm


def test_flow_matching_paths(fm):
    """alpha, sigma and both derivatives; their time runs from noise to data for every path, ours for flows only."""
    t = torch.linspace(0.02, 0.98, 25, dtype=torch.float64)
    pairs = [
        (fm.CondOTScheduler(), schedules.flow(), False),
        (fm.CosineScheduler(), schedules.cosine_vp(), True),
        (fm.VPScheduler(beta_min=0.1, beta_max=20.0), schedules.vp(), True),
        (fm.LinearVPScheduler(), schedules.path(lambda t: t, lambda t: (1 - t**2).sqrt()), False),
        (fm.PolynomialConvexScheduler(n=3), schedules.path(lambda t: t**3, lambda t: 1 - t**3), False),
    ]
    for theirs, ours, reversed_time in pairs:
        out, at = theirs(t), 1 - t if reversed_time else t
        sign = -1.0 if reversed_time else 1.0
        close(ours.alpha(at), out.alpha_t, rtol=1e-9)
        close(ours.sigma(at), out.sigma_t, rtol=1e-9)
        close(sign * ours.alpha_dot(at), out.d_alpha_t, rtol=1e-9)
        close(sign * ours.sigma_dot(at), out.d_sigma_t, rtol=1e-9)


def test_flow_matching_times_of_a_ratio(fm):
    """Their snr_inverse takes alpha/sigma, ours the log of its square."""
    for theirs, ours in ((fm.CondOTScheduler(), schedules.flow()), (fm.CosineScheduler(), schedules.cosine_vp())):
        ratio = torch.tensor([0.1, 1.0, 7.0], dtype=torch.float64)
        t = ours.time_of_log_snr(2 * ratio.log())
        close(t if ours.data_end == 1 else 1 - t, theirs.snr_inverse(ratio), rtol=1e-9)


def test_torchcfm_paths():
    """x_t and u_t of its matchers from our alpha, sigma and velocity (their x0 is the noise, x1 the data)."""
    cfm = pytest.importorskip("torchcfm.conditional_flow_matching")
    generator = torch.Generator().manual_seed(1)
    noise, data = torch.randn(2, 6, 5, generator=generator, dtype=torch.float64).unbind()
    t = torch.linspace(0.05, 0.95, 6, dtype=torch.float64)

    def ours(schedule: schedules.Schedule, at: Tensor, sign: float) -> tuple[Tensor, Tensor]:
        rows = schedule.coefficients("velocity", at).unsqueeze(-1)
        s, n, u, v = rows.unbind(1)
        return s * data + n * noise, sign * (u * data + v * noise)

    x, u = ours(schedules.flow(), t, 1.0)
    _, x_t, u_t = cfm.ConditionalFlowMatcher(0.0).sample_location_and_conditional_flow(noise, data, t)
    close(x, x_t)
    close(u, u_t)
    x, u = ours(schedules.cosine_vp(), 1 - t, -1.0)
    _, x_t, u_t = cfm.VariancePreservingConditionalFlowMatcher(0.0).sample_location_and_conditional_flow(noise, data, t)
    close(x, x_t)
    close(u, u_t)
    # Their target matcher draws its own noise and returns it.
    matcher = cfm.TargetConditionalFlowMatcher(0.1)
    _, x_t, u_t, eps = matcher.sample_location_and_conditional_flow(noise, data, t, return_noise=True)
    rows = schedules.flow(0.1).coefficients("velocity", t).unsqueeze(-1)
    s, n, u, v = rows.unbind(1)
    close(s * data + n * eps, x_t)
    close(u * data + v * eps, u_t)
