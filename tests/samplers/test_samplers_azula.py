"""azula's samplers on the same model and noise: deterministic and stochastic steps between any two levels."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from diffkern import samplers, schedules
from diffkern.plan import Plan
from diffkern.sampling import Model, sample

pytest.importorskip("azula", reason="azula is not installed (pip install --no-deps azula einops)")

from azula.denoise import Denoiser, DiracPosterior
from azula.noise import CosineSchedule, VESchedule
from azula.sample import DDIMSampler, DDPMSampler, EulerSampler, HeunSampler, zABSampler

STEPS = 7
SHAPE = (3, 2, 5, 4)


class Estimate(Denoiser):
    """A smooth elementwise estimate of x0 at the level alpha x0 + sigma eps."""

    def __init__(self, schedule: object) -> None:
        super().__init__()
        self.schedule = schedule

    def forward(self, x_t: Tensor, t: Tensor) -> DiracPosterior:
        alpha, sigma = self.schedule(t)
        return DiracPosterior(estimate(x_t, alpha, sigma))


def estimate(x: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
    return torch.tanh(alpha * x / (alpha**2 + sigma**2)) + 0.1 * sigma / (1 + sigma)


def start() -> Tensor:
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def on_levels(sigmas: list[float]) -> Model:
    """The estimate as a model of x and sigma, at the float64 level nearest to the float32 time."""

    def model(x: Tensor, t: Tensor) -> Tensor:
        sigma = torch.tensor(min(sigmas, key=lambda level: abs(level - float(t[0]))), dtype=torch.float64)
        return estimate(x, torch.ones_like(sigma), sigma)

    return model


def theirs(make: type, schedule: object, x: Tensor, **options: object) -> Tensor:
    torch.manual_seed(5)
    sampler = make(Estimate(schedule), steps=STEPS, silent=True, dtype=torch.float64, **options)
    return sampler(x)


def noise(plan: Plan) -> list[Tensor]:
    """What azula draws in those steps: one tensor each, used or not."""
    torch.manual_seed(5)
    drawn = [torch.randn(SHAPE, dtype=torch.float64) for _ in range(STEPS)]
    return [z for z, row in zip(drawn, plan.rows, strict=True) if row.draws]


PAIRS = {
    "euler": (samplers.euler, {}, EulerSampler, {}),
    "ddpm": (samplers.euler_ancestral, {"eta": 1.0}, DDPMSampler, {}),
    "ddim": (samplers.euler_ancestral, {"eta": 0.0}, DDIMSampler, {"eta": 0.0}),
    "ddim, noise": (samplers.euler_ancestral, {"eta": 0.6}, DDIMSampler, {"eta": 0.36}),
    "Adams-Bashforth 2": (samplers.lms, {"order": 2}, zABSampler, {"order": 2}),
    "Adams-Bashforth 3": (samplers.lms, {"order": 3}, zABSampler, {"order": 3}),
}


@pytest.mark.parametrize("name", PAIRS)
def test_variance_exploding(name):
    """azula's eta is under the root: its eta is the square of ours."""
    make, options, sampler, given = PAIRS[name]
    schedule = VESchedule(0.02, 80.0)
    times = torch.linspace(1.0, 0.0, STEPS + 1, dtype=torch.float64)
    sigmas = schedule.sigma(times).tolist()
    plan = make(schedules.edm(), sigmas=sigmas, prediction="x0", **options)
    x = 80.0 * start()

    got = sample(on_levels(sigmas), x, plan, noise=noise(plan))
    torch.testing.assert_close(got, theirs(sampler, schedule, x, **given), rtol=1e-10, atol=1e-10)


def test_heun_up_to_the_last_step():
    """Whose corrector azula takes at the end as well."""
    schedule = VESchedule(0.02, 80.0)
    sigmas = schedule.sigma(torch.linspace(1.0, 0.0, STEPS + 1, dtype=torch.float64)).tolist()
    x = 80.0 * start()

    plan = samplers.heun(schedules.edm(), sigmas=sigmas, prediction="x0")
    got = sample(on_levels(sigmas), x, plan, trajectory=True).trajectory[-2]
    stop = 1.0 / STEPS  # the same grid without its last step
    sampler = HeunSampler(Estimate(schedule), start=1.0, stop=stop, steps=STEPS - 1, silent=True, dtype=torch.float64)
    torch.testing.assert_close(got, sampler(x), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(("name", "eta"), [("dpmpp_1s", 0.0), ("euler_ancestral", 0.0), ("euler_ancestral", 1.0)])
def test_variance_preserving(name, eta):
    """The cosine path in its own state; the model is given azula's own rates, as our times are float32."""
    schedule = CosineSchedule()
    times = torch.linspace(1.0, 0.0, STEPS + 1, dtype=torch.float64)
    alpha, sigma = (rate(times) for rate in (schedule.alpha, schedule.sigma))
    path = schedules.path(schedule.alpha, schedule.sigma)
    plan = samplers.get_sampler(name)(path, timesteps=times.tolist(), prediction="x0", eta=eta)
    calls = iter(range(STEPS))

    def model(x: Tensor, t: Tensor) -> Tensor:
        i = next(calls)
        assert abs(float(t[0]) - float(times[i])) < 1e-6
        return estimate(x, alpha[i], sigma[i])

    x = start()
    got = sample(model, x, plan, noise=noise(plan))
    torch.testing.assert_close(got, theirs(DDIMSampler, schedule, x, eta=eta), rtol=1e-9, atol=1e-9)
