"""k-diffusion's formulas, transcribed and held in float64, against ours on the same model and noise."""

from __future__ import annotations

import math

import pytest
import torch
from helpers.oracles import run_plan
from helpers.peer_runs import model
from torch import Tensor

from diffkern import samplers, schedules
from diffkern.plan import Plan

pytestmark = pytest.mark.filterwarnings("ignore")  # diffusers and its imports warn


# --- k-diffusion's formulas (docs of its sampling.py), transcribed and held in float64 --------------------------------


def kd_denoiser(x: Tensor, sigma: float) -> Tensor:
    """x0 of the same eps, on EDM's schedule."""
    return x - sigma * model(x / math.sqrt(1 + sigma**2), 100 * math.log1p(sigma))


def edm_model(x: Tensor, t: float) -> Tensor:
    return kd_denoiser(x, float(t))


KD_SIGMAS = [*schedules.karras_sigmas(9, 0.03, 15.0).tolist()]


def kd_dpmpp_2m(x, sigmas):
    old = None
    for i in range(len(sigmas) - 1):
        s, after = sigmas[i], sigmas[i + 1]
        d = kd_denoiser(x, s)
        h = math.inf if after == 0 else math.log(s / after)
        if old is None or after == 0:
            x = (after / s) * x - math.expm1(-h) * d
        else:
            r = math.log(sigmas[i - 1] / s) / h
            x = (after / s) * x - math.expm1(-h) * ((1 + 1 / (2 * r)) * d - (1 / (2 * r)) * old)
        old = d
    return x


def kd_dpmpp_2m_sde(x, sigmas, noises, eta, solver):
    old, last = None, None
    for i in range(len(sigmas) - 1):
        s, after = sigmas[i], sigmas[i + 1]
        d = kd_denoiser(x, s)
        if after == 0:
            return d
        h = math.log(s / after)
        e = eta * h
        x = after / s * math.exp(-e) * x - math.expm1(-h - e) * d
        if old is not None:
            r = last / h
            factor = {"heun": -math.expm1(-h - e) / (-h - e) + 1, "midpoint": -0.5 * math.expm1(-h - e)}[solver]
            x = x + factor * (1 / r) * (d - old)
        if eta:
            x = x + noises[i] * after * math.sqrt(-math.expm1(-2 * e))
        old, last = d, h
    return x


def kd_dpmpp_3m_sde(x, sigmas, noises, eta):
    d1 = d2 = h1 = h2 = None
    for i in range(len(sigmas) - 1):
        s, after = sigmas[i], sigmas[i + 1]
        d = kd_denoiser(x, s)
        if after == 0:
            return d
        h = math.log(s / after)
        he = h * (eta + 1)
        x = math.exp(-he) * x - math.expm1(-he) * d
        phi2 = math.expm1(-he) / he + 1
        if h2 is not None:
            r0, r1 = h1 / h, h2 / h
            a, b = (d - d1) / r0, (d1 - d2) / r1
            x = x + phi2 * (a + (a - b) * r0 / (r0 + r1)) - (phi2 / he - 0.5) * (a - b) / (r0 + r1)
        elif h1 is not None:
            x = x + phi2 * (d - d1) / (h1 / h)
        if eta:
            x = x + noises[i] * after * math.sqrt(-math.expm1(-2 * h * eta))
        d1, d2, h1, h2 = d, d1, h, h1
    return x


def kd_dpmpp_sde(x, sigmas, noises):
    draws = iter(noises)
    for i in range(len(sigmas) - 1):
        s, after = sigmas[i], sigmas[i + 1]
        d = kd_denoiser(x, s)
        if after == 0:
            return d
        middle = math.sqrt(s * after)

        def jump(x, d, to, z, s=s):
            up = math.sqrt(to**2 * (s**2 - to**2) / s**2)
            down = math.sqrt(to**2 - up**2)
            return down / s * x - math.expm1(math.log(down / s)) * d + up * z

        d_mid = kd_denoiser(jump(x, d, middle, next(draws)), middle)
        x = jump(x, d_mid, after, next(draws))
    return x


def kd_heun_churn(x, sigmas, noises, churn, low, high, s_noise):
    """``x`` before the first noise; noises one a step."""
    for i in range(len(sigmas) - 1):
        gamma = min(churn / (len(sigmas) - 1), 2**0.5 - 1) if low <= sigmas[i] <= high else 0.0
        hat = sigmas[i] * (gamma + 1)
        x = x + noises[i] * s_noise * math.sqrt(hat**2 - sigmas[i] ** 2)
        d = (x - kd_denoiser(x, hat)) / hat
        dt = sigmas[i + 1] - hat
        if sigmas[i + 1] == 0:
            x = x + d * dt
        else:
            two = x + d * dt
            x = x + 0.5 * dt * (d + (two - kd_denoiser(two, sigmas[i + 1])) / sigmas[i + 1])
    return x


def kd_dpm_2(x, sigmas, noises, churn):
    for i in range(len(sigmas) - 1):
        gamma = min(churn / (len(sigmas) - 1), 2**0.5 - 1)
        hat = sigmas[i] * (gamma + 1)
        x = x + noises[i] * math.sqrt(hat**2 - sigmas[i] ** 2)
        d = (x - kd_denoiser(x, hat)) / hat
        if sigmas[i + 1] == 0:
            x = x + d * (sigmas[i + 1] - hat)
        else:
            middle = math.exp(0.5 * (math.log(hat) + math.log(sigmas[i + 1])))
            two = x + d * (middle - hat)
            x = x + (two - kd_denoiser(two, middle)) / middle * (sigmas[i + 1] - hat)
    return x


def kd_levels(sigma, to, eta):
    up = min(to, eta * math.sqrt(to**2 * (sigma**2 - to**2) / sigma**2))
    return math.sqrt(to**2 - up**2), up


def kd_dpm_2_ancestral(x, sigmas, noises, eta, s_noise):
    for i in range(len(sigmas) - 1):
        down, up = kd_levels(sigmas[i], sigmas[i + 1], eta)
        d = (x - kd_denoiser(x, sigmas[i])) / sigmas[i]
        if down == 0:
            x = x + d * (down - sigmas[i])
        else:
            middle = math.exp(0.5 * (math.log(sigmas[i]) + math.log(down)))
            two = x + d * (middle - sigmas[i])
            x = x + (two - kd_denoiser(two, middle)) / middle * (down - sigmas[i]) + noises[i] * s_noise * up
    return x


def kd_dpmpp_2s_ancestral(x, sigmas, noises, eta, s_noise):
    for i in range(len(sigmas) - 1):
        down, up = kd_levels(sigmas[i], sigmas[i + 1], eta)
        denoised = kd_denoiser(x, sigmas[i])
        if down == 0:
            x = x + (x - denoised) / sigmas[i] * (down - sigmas[i])
        else:
            t, t_next = -math.log(sigmas[i]), -math.log(down)
            h = t_next - t
            s = t + 0.5 * h
            two = math.exp(-s) / math.exp(-t) * x - math.expm1(-h * 0.5) * denoised
            x = math.exp(-t_next) / math.exp(-t) * x - math.expm1(-h) * kd_denoiser(two, math.exp(-s))
        if sigmas[i + 1] > 0:
            x = x + noises[i] * s_noise * up
    return x


def kd_run(plan: Plan, x: Tensor, noises: list[Tensor] | None = None) -> Tensor:
    return run_plan(plan, edm_model, x, noises or [])


def kd_setup() -> tuple[Tensor, list[Tensor]]:
    generator = torch.Generator().manual_seed(3)
    x = 15.0 * torch.randn(7, generator=generator, dtype=torch.float64)
    return x, [torch.randn(7, generator=generator, dtype=torch.float64) for _ in range(40)]


def near(got: Tensor, want: Tensor) -> None:
    torch.testing.assert_close(got, want, rtol=1e-11, atol=1e-11)


EDM = schedules.edm()


def test_kdiffusion_dpmpp_2m():
    x, _ = kd_setup()
    near(kd_run(samplers.dpmpp_2m(EDM, sigmas=KD_SIGMAS, prediction="x0"), x), kd_dpmpp_2m(x, KD_SIGMAS))


@pytest.mark.parametrize("eta", [0.0, 0.6, 1.0])
@pytest.mark.parametrize("solver", ["midpoint", "heun"])
def test_kdiffusion_dpmpp_2m_sde(eta, solver):
    x, noises = kd_setup()
    plan = samplers.dpmpp_2m_sde(EDM, sigmas=KD_SIGMAS, prediction="x0", eta=eta, solver=solver)
    near(kd_run(plan, x, noises), kd_dpmpp_2m_sde(x, KD_SIGMAS, noises, eta, solver))


@pytest.mark.parametrize("eta", [0.0, 0.6, 1.0])
def test_kdiffusion_dpmpp_3m_sde(eta):
    x, noises = kd_setup()
    plan = samplers.dpmpp_3m_sde(EDM, sigmas=KD_SIGMAS, prediction="x0", eta=eta, compat=True)
    near(kd_run(plan, x, noises), kd_dpmpp_3m_sde(x, KD_SIGMAS, noises, eta))


def test_kdiffusion_dpmpp_sde():
    x, noises = kd_setup()
    plan = samplers.dpmpp_sde(EDM, sigmas=KD_SIGMAS, prediction="x0")
    near(kd_run(plan, x, noises), kd_dpmpp_sde(x, KD_SIGMAS, noises))


@pytest.mark.parametrize("limits", [(0.0, math.inf), (0.1, 5.0)])
def test_kdiffusion_churn(limits):
    """Our start already holds the first step's noise; the plan's own draws are those of the later steps."""
    x, noises = kd_setup()
    plan = samplers.heun(EDM, sigmas=KD_SIGMAS, prediction="x0", churn=3.0, churn_range=limits, churn_noise=1.003)
    want = kd_heun_churn(x, KD_SIGMAS, noises, 3.0, *limits, 1.003)
    gamma = 3.0 / 9 if limits[1] == math.inf else 0.0
    begin = x + noises[0] * 1.003 * KD_SIGMAS[0] * math.sqrt((1 + gamma) ** 2 - 1)
    inside = [z for z, s in zip(noises[1:], KD_SIGMAS[1:-1], strict=False) if limits[0] <= s <= limits[1]]
    near(kd_run(plan, begin, inside), want)
    assert plan.init_scale == pytest.approx(15.0 * math.sqrt(1 + 1.003**2 * ((1 + gamma) ** 2 - 1)))
    assert samplers.euler(EDM, 5, churn=0.0) == samplers.euler(EDM, 5)


@pytest.mark.parametrize("churn", [0.0, 3.0])
def test_kdiffusion_dpm_2(churn):
    x, noises = kd_setup()
    plan = samplers.dpm_2(EDM, sigmas=KD_SIGMAS, prediction="x0", churn=churn)
    gamma = churn / 9
    begin = x + noises[0] * KD_SIGMAS[0] * math.sqrt((1 + gamma) ** 2 - 1)
    near(kd_run(plan, begin, noises[1:]), kd_dpm_2(x, KD_SIGMAS, noises, churn))


@pytest.mark.parametrize("eta", [0.0, 0.6, 1.0])
@pytest.mark.parametrize(
    ("sampler", "theirs"),
    [(samplers.dpm_2_ancestral, kd_dpm_2_ancestral), (samplers.dpmpp_2s_ancestral, kd_dpmpp_2s_ancestral)],
)
def test_kdiffusion_two_stages_ancestral(sampler, theirs, eta):
    x, noises = kd_setup()
    plan = sampler(EDM, sigmas=KD_SIGMAS, prediction="x0", eta=eta, noise=1.003)
    near(kd_run(plan, x, noises), theirs(x, KD_SIGMAS, noises, eta, 1.003))
