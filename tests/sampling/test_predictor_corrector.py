"""Predictor-corrector sampling: score_sde's formulas, moments known in closed form, batch invariance, op counts."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import pytest
import torch
from helpers.corrector_cases import EDM, FLOW, SCHEDULES, SEEDS, SHAPE, SUB_VP, VE, VP, VP_TABLE, N, draw, network
from helpers.oracles import Gaussian, run_plan
from helpers.suites import few
from torch import Tensor

import diffkern
from diffkern import ops, pc_plan, predictor_corrector, samplers, schedules, streams
from diffkern.sampling import initial, sample

DATA = Gaussian(0.4, 0.6)


def exact(schedule: schedules.Schedule, prediction: str | None = None) -> Callable[[Tensor, Tensor], Tensor]:
    """The perfect network of Gaussian data, in float64 arithmetic."""
    model = DATA.model(schedule, prediction or schedule.default_prediction)
    return lambda x, t: model(x.double(), float(t[0])).to(x.dtype)


# --- score_sde's formulas (arXiv 2011.13456, algorithms 2 to 5), transcribed --------------------------------------


def langevin_step(x, score, z, snr, alpha, std, kind, norm):
    """One corrector step."""
    if kind == "langevin":
        grad_norm = score.flatten(1).norm(dim=1)
        noise_norm = z.flatten(1).norm(dim=1)
        if norm == "batch":
            grad_norm, noise_norm = grad_norm.mean(), noise_norm.mean()
        size = (snr * noise_norm / grad_norm) ** 2 * 2 * alpha
    else:
        size = torch.tensor((snr * std) ** 2 * 2 * alpha, dtype=torch.float64)
    size = size.reshape(-1, 1, 1, 1)
    return x + size * score + torch.sqrt(size * 2) * z


def score_sde(kind, x, score, noises, predictor, corrector, n_steps, snr, norm):
    """Its pc_sampler, over the indices of its own tables, noise in the order it draws it; returns x_mean."""
    draws = iter(noises)
    betas = torch.linspace(0.1 / N, 20 / N, N, dtype=torch.float64)
    alphas_cumprod = torch.cumprod(1 - betas, 0)
    sigmas = torch.exp(torch.linspace(math.log(0.01), math.log(50), N, dtype=torch.float64))
    mean = x
    for i in reversed(range(N)):
        beta, adjacent = float(betas[i]), float(sigmas[i - 1]) if i else 0.0
        alpha, std = (1 - beta, float((1 - alphas_cumprod[i]).sqrt())) if kind == "vp" else (1.0, float(sigmas[i]))
        for _ in range(n_steps if corrector != "none" else 0):
            x = langevin_step(x, score(x, i), next(draws), snr, alpha, std, corrector, norm)
        if predictor == "none":
            mean = x
            continue
        z = next(draws)
        s = score(x, i)
        if predictor == "reverse_diffusion":
            f = math.sqrt(1 - beta) * x - x if kind == "vp" else 0.0
            g2 = beta if kind == "vp" else std**2 - adjacent**2
            mean = x - (f - g2 * s)
            x = mean + math.sqrt(g2) * z
        elif predictor == "ancestral" and kind == "vp":
            mean = (x + beta * s) / math.sqrt(1 - beta)
            x = mean + math.sqrt(beta) * z
        elif predictor == "ancestral":
            mean = x + s * (std**2 - adjacent**2)
            x = mean + math.sqrt(adjacent**2 * (std**2 - adjacent**2) / std**2) * z
        else:
            g = std * math.sqrt(2 * math.log(5000))
            mean = x + g**2 * s / N
            x = mean + g * math.sqrt(1 / N) * z
    return mean


def score_of(kind: str) -> Callable[[Tensor, int], Tensor]:
    """A score of x and the index of the level, elementwise."""

    def score(x: Tensor, i: int) -> Tensor:
        level = 1.0 if kind == "vp" else 0.05 + 3 * (i / N) ** 2
        return -(torch.tanh(x) + 0.05 * i / N) / level - 0.1 * x

    return score


PAIRS = [
    (kind, predictor, corrector)
    for kind in ("vp", "ve")
    for predictor in ("reverse_diffusion", "ancestral", "euler_maruyama", "none")
    for corrector in ("langevin", "ald", "none")
    if (predictor, corrector) != ("none", "none") and (kind, predictor) != ("vp", "euler_maruyama")
]


@pytest.mark.parametrize("norm", ["batch", "sample"])
@pytest.mark.parametrize(("kind", "predictor", "corrector"), PAIRS)
def test_score_sde(kind, predictor, corrector, norm):
    """The same noise gives the same samples, in float64 within its rounding; "sample" by the per-sample norms."""
    score = score_of(kind)
    n_steps = 2
    noises = draw(3 * N)
    x = draw(1, 8)[0] * (50.0 if kind == "ve" else 1.0)
    if kind == "vp":
        schedule, grid = VP_TABLE, {"steps": N}
        index = lambda t: int(t[0])  # noqa: E731
    else:
        schedule = VE
        grid = {"timesteps": torch.arange(N - 1, -1, -1, dtype=torch.float64) / (N - 1)}
        index = lambda t: round(float(t[0]) * (N - 1))  # noqa: E731
    given = {"dt": 1.0 / N} if predictor == "euler_maruyama" else {}
    got = predictor_corrector(
        lambda x, t: score(x, index(t)), x, schedule, **grid, predictor=predictor, corrector=corrector,
        corrector_steps=n_steps, snr=0.16, norm=norm, prediction="score", noise=noises, **given,
    )  # fmt: skip
    want = score_sde(kind, x, score, noises, predictor, corrector, n_steps, 0.16, norm)
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12 * float(want.abs().max()))


def test_score_sde_euler_maruyama_of_vp():
    """Their step of 1/N, at times that are not 1/N apart."""
    times = torch.linspace(1.0, 1e-3, N, dtype=torch.float64)
    noises, x = draw(N), draw(1, 8)[0]
    score = lambda x, t: -torch.tanh(x) - 0.3 * float(t) * x  # noqa: E731
    want, mean = x, x
    for t, z in zip(times.tolist(), noises, strict=True):
        beta = 0.1 + t * 19.9
        mean = want - (-0.5 * beta * want - beta * score(want, torch.tensor(t).float())) / N
        want = mean + math.sqrt(beta / N) * z
    got = predictor_corrector(
        lambda x, t: score(x, t[0]), x, VP, timesteps=times, predictor="euler_maruyama", corrector="none", dt=1 / N,
        prediction="score", noise=noises,
    )  # fmt: skip
    torch.testing.assert_close(got, mean, rtol=1e-12, atol=1e-12)


# --- closed forms ----------------------------------------------------------------------------------------------------


def affine_moments(made, model: Callable[..., Tensor], variance: float) -> tuple[float, float]:
    """Mean and variance at the end of a plan, from N(0, variance), for a model affine in x."""
    mean = 0.0
    probe = torch.tensor([0.0, 1.0], dtype=torch.float64)
    for i, row in enumerate(made.rows):
        at = run_plan(made, model, probe, [torch.zeros_like(probe)] * row.draws, range(i, i + 1))
        slope, offset = float(at[1] - at[0]), float(at[0])
        mean, variance = offset + slope * mean, slope**2 * variance + row.g**2
    return mean, variance


GAUSSIAN = itertools.product(SCHEDULES, ["reverse_diffusion", "ancestral", "euler_maruyama"], ["ald", "none"])
QUICK = (  # every schedule, every predictor with and without a corrector
    *("linear ancestral ald", "vp reverse_diffusion none", "sub_vp euler_maruyama none"),
    *("ve ancestral none", "edm reverse_diffusion ald", "flow euler_maruyama ald"),
)


@pytest.mark.parametrize(
    ("schedule", "predictor", "corrector"), few(GAUSSIAN, *QUICK, name=lambda case: " ".join([case[0].name, *case[1:]]))
)
def test_gaussian_data(schedule, predictor, corrector):
    """Mean and variance of the output tend to the data's, at order one of the steps; ald keeps the marginals."""

    def grid(n: int) -> dict[str, object]:
        if schedule is FLOW:
            return {"timesteps": torch.linspace(0.02, 0.999, n, dtype=torch.float64)}
        if isinstance(schedule, schedules.DiscreteSchedule):
            return {"timesteps": torch.linspace(999, 0, n).round()}
        return {"steps": n}

    errors = []
    for n in (100, 400):
        made = pc_plan(schedule, **grid(n), predictor=predictor, corrector=corrector, snr=0.1)
        model = DATA.model(schedule, made.prediction)
        level = made.init_scale
        if schedule is FLOW:
            level = math.hypot(0.02 * DATA.std, float(FLOW.sigma(0.02)))
        mean, variance = affine_moments(made, model, level**2)
        errors.append(abs(mean - DATA.mean) + abs(math.sqrt(variance) - DATA.std))
    assert errors[-1] < 0.06, errors
    assert errors[-1] < errors[0] or errors[-1] < 2e-3, errors


@pytest.mark.parametrize("schedule", few([schedules.linear(), VE, SUB_VP, EDM], "sub_vp", name=lambda s: s.name))
def test_langevin_keeps_gaussian_data(schedule):
    """The norm-ratio corrector, by moments over 40 000 elements, whose standard error is 0.003; the rest is bias."""
    n, count = 200, 20_000
    x = initial(samplers.euler_maruyama(schedule, n), (2, count), 5, torch.float64)
    got = predictor_corrector(exact(schedule), x, schedule, n, seeds=7, snr=0.1)
    assert float(got.mean()) == pytest.approx(DATA.mean, abs=0.03)
    assert float(got.std()) == pytest.approx(DATA.std, abs=0.03)


def test_corrector_moves_towards_the_marginal():
    """Many correctors at one level: from a wrong spread to N(alpha mean, alpha^2 std^2 + sigma^2)."""
    t = 0.3
    x = 3.0 * ops.randn((2, 20_000), ops.seeds(1, 2), streams.INITIAL, dtype=torch.float64)
    got = predictor_corrector(exact(VP), x, VP, timesteps=[t], predictor="none", corrector_steps=600, snr=0.16, seeds=3)
    alpha, sigma = float(VP.alpha(t)), float(VP.sigma(t))
    assert float(got.mean()) == pytest.approx(alpha * DATA.mean, abs=0.02)
    assert float(got.std()) == pytest.approx(math.hypot(alpha * DATA.std, sigma), rel=0.03)


# --- identities ------------------------------------------------------------------------------------------------------


def test_annealed_langevin_identity():
    """ald alone on VE is annealed Langevin with step_size = snr^2 sigma_last^2 2, row for row."""
    times = torch.linspace(1, 0, 6, dtype=torch.float64)
    mine = pc_plan(VE, timesteps=times, predictor="none", corrector="ald", corrector_steps=4, snr=0.1)
    size = 2 * (0.1 * float(VE.sigma(0.0))) ** 2
    theirs = samplers.annealed_langevin(VE, timesteps=times, each=4, step_size=size)
    assert len(mine.rows) == len(theirs.rows) == 24
    torch.testing.assert_close(mine.table, theirs.table, rtol=1e-13, atol=1e-13)


def test_a_predictor_alone_is_the_samplers():
    """ancestral with beta is DDPM with beta; Euler-Maruyama without corrector the sampler of that name, but its end."""
    table = schedules.linear(T=50)
    one, two = pc_plan(table, 50, predictor="ancestral", corrector="none"), samplers.ddpm(table, variance="beta")
    x = draw(1)[0]
    noises = draw(49, 4)
    torch.testing.assert_close(
        run_plan(one, network, x, noises), run_plan(two, network, x, noises), rtol=1e-10, atol=1e-10
    )
    tilde = pc_plan(table, 50, predictor="ancestral", corrector="none", variance="beta_tilde")
    other = samplers.ddpm(table, variance="beta_tilde")
    torch.testing.assert_close(
        run_plan(tilde, network, x, noises), run_plan(other, network, x, noises), rtol=1e-10, atol=1e-10
    )
    times = [0.9, 0.6, 0.3]
    em = samplers.euler_maruyama(VP, timesteps=[*times, 0.0])
    mine = pc_plan(VP, timesteps=times, predictor="euler_maruyama", corrector="none")
    assert mine.table[:, :17].tolist() == em.table[:, :17].tolist()


@pytest.mark.parametrize("corrector", ["ald", "none"])
def test_a_plan_run_by_sample_is_the_same(corrector):
    x = initial(samplers.euler_maruyama(VP, 9), SHAPE, SEEDS)
    made = pc_plan(VP, 9, corrector=corrector)
    got = predictor_corrector(network, x, VP, 9, corrector=corrector, seeds=SEEDS)
    assert torch.equal(got, sample(network, x, made, seeds=SEEDS))
    assert diffkern.Plan.from_json(made.to_json()) == made


def test_a_sample_without_a_score_stays():
    """A zero score has no ratio of norms: no step, instead of 0 times infinity."""
    x = draw(1)[0]
    got = predictor_corrector(
        lambda x, t: torch.zeros_like(x), x, VE, timesteps=[0.5], predictor="none", prediction="score", seeds=1
    )
    assert torch.equal(got, x)


def test_a_nan_stays_in_its_sample():
    x = draw(1)[0]

    def model(x: Tensor, t: Tensor) -> Tensor:
        m = network(x, t)
        m[1, 0, 0, 0] = math.nan
        return m

    got = predictor_corrector(model, x, VP, timesteps=[0.5], predictor="none", seeds=SEEDS)
    assert got.isnan().nonzero().tolist() == [[1, 0, 0, 0]]


def test_where_the_model_says_nothing_about_the_score():
    """A flow at t = 0: x is noise there, whatever the velocity; the corrector's size is 0 with r."""
    x = draw(1)[0]
    got = predictor_corrector(network, x, FLOW, 5, predictor="reverse_diffusion", seeds=1)
    assert torch.isfinite(got).all()
