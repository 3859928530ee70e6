"""noise_path="brownian": one path a sample whatever the steps, strong convergence, nested intervals, refusals."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Callable

import numpy as np
import pytest
import torch
from helpers import k_diffusion_oracle
from helpers.oracles import Gaussian, run_plan
from helpers.suites import few
from torch import Tensor

from diffkern import brownian, ops, samplers, schedules, streams
from diffkern.plan import Plan
from diffkern.sampling import initial, sample

LINEAR, FLOW, EDM = schedules.linear(), schedules.flow(), schedules.edm()
VP, SUB_VP, VE = schedules.vp(), schedules.sub_vp(), schedules.ve(0.01, 20.0)
DATA = Gaussian(0.4, 0.6)
Make = Callable[..., Plan]


def levels(n: int) -> Tensor:
    """n even steps of ln sigma from 20 to 0.02."""
    return 20.0 * 1e-3 ** (torch.arange(n + 1, dtype=torch.float64) / n)


STRONG: dict[str, tuple[schedules.Schedule, Make]] = {
    "euler_ancestral": (EDM, lambda n, **o: samplers.euler_ancestral(EDM, sigmas=levels(n), **o)),
    "dpmpp_1s": (EDM, lambda n, **o: samplers.dpmpp_1s(EDM, sigmas=levels(n), eta=1.0, **o)),
    "dpmpp_2m_sde": (EDM, lambda n, **o: samplers.dpmpp_2m_sde(EDM, sigmas=levels(n), **o)),
    "dpmpp_3m_sde": (EDM, lambda n, **o: samplers.dpmpp_3m_sde(EDM, sigmas=levels(n), **o)),
    "dpmpp_sde": (EDM, lambda n, **o: samplers.dpmpp_sde(EDM, sigmas=levels(n), **o)),
    "euler_maruyama sub_vp": (SUB_VP, lambda n, **o: samplers.euler_maruyama(SUB_VP, n, **o)),
    "euler_maruyama ve": (VE, lambda n, **o: samplers.euler_maruyama(VE, n, **o)),
}
PLANS: dict[str, Plan] = {
    "dpmpp_2m_sde": samplers.dpmpp_2m_sde(LINEAR, 5, clip=1.5, noise_path="brownian"),
    "dpmpp_3m_sde": samplers.dpmpp_3m_sde(EDM, 6, eta=0.7, noise_path="brownian"),
    "dpmpp_sde": samplers.dpmpp_sde(LINEAR, 4, noise_path="brownian"),
    "euler_maruyama": samplers.euler_maruyama(SUB_VP, 6, noise_path="brownian"),
    "euler_maruyama table": samplers.euler_maruyama(LINEAR, 7, noise_path="brownian"),
    "euler_ancestral": samplers.euler_ancestral(LINEAR, 5, noise_path="brownian"),
    "euler_ancestral flow": samplers.euler_ancestral(FLOW, 5, noise_path="brownian"),
    "dpmpp_2m_sde flow": samplers.dpmpp_2m_sde(FLOW, 5, noise_path="brownian"),
}
SHAPE = (3, 2, 5, 4)
SEEDS = torch.tensor([11, -5, 2**62], dtype=torch.int64)


def run(plan: Plan, schedule: schedules.Schedule, shape: tuple[int, ...], seeds: Tensor) -> Tensor:
    """The plan with the exact model of the data, in float64."""
    network = DATA.model(schedule, plan.prediction)
    x = initial(plan, shape, seeds, torch.float64)
    return sample(lambda x, t: network(x, float(t[0])), x, plan, seeds=seeds)


def distances(make: Make, schedule: schedules.Schedule, counts: list[int], **options: str) -> list[float]:
    """Root mean squares of the difference between n and 2n steps with the same seeds."""
    seeds = ops.seeds(3, 4)
    ends = [run(make(n, **options), schedule, (4, 500), seeds) for n in counts]
    return [float((a - b).square().mean().sqrt()) for a, b in itertools.pairwise(ends)]


@pytest.mark.parametrize("name", few(STRONG, "euler_ancestral", "euler_maruyama sub_vp"))
def test_strong_order_is_one(name: str) -> None:
    """Path by path: the end moves by half as much with each doubling. Independent noise agrees in law alone."""
    schedule, make = STRONG[name]
    errors = distances(make, schedule, [32, 64, 128, 256], noise_path="brownian")
    order = float(np.mean(np.log2(np.array(errors[:-1]) / np.array(errors[1:]))))
    assert order == pytest.approx(1.0, abs=0.15), errors
    assert errors[-1] < 0.025
    apart = distances(make, schedule, [32, 64, 128], noise_path="independent")
    assert min(apart) > 0.5
    assert apart[-1] > 0.9 * apart[0]


@pytest.mark.full
def test_samplers_converge_to_one_path() -> None:
    """Euler-Maruyama and DPM-Solver++ integrate the same reverse SDE, and their noise is of the same path."""
    seeds, shape = ops.seeds(5, 4), (4, 500)
    gaps = []
    for n in (64, 128, 256):
        times = torch.tensor([1.0 - 0.9 * i / n for i in range(n + 1)], dtype=torch.float64)
        one = samplers.euler_maruyama(VP, timesteps=times, noise_path="brownian")
        # Drops the noise of its last step; so does this one then.
        two = samplers.dpmpp_2m_sde(VP, timesteps=times[:-1], noise_path="brownian")
        ends = []
        for plan in (one, two):
            network = DATA.model(VP, plan.prediction)
            x = initial(plan, shape, seeds, torch.float64)
            found = sample(lambda x, t, f=network: f(x, float(t[0])), x, plan, seeds=seeds, trajectory=True)
            ends.append(found.trajectory[n // 2])  # the same time in both, in the middle
        gaps.append(float((ends[0] - ends[1]).square().mean().sqrt()))
    assert gaps[0] > 1.7 * gaps[1] > 2.9 * gaps[2], gaps
    assert gaps[-1] < 0.02


def test_law_of_the_end() -> None:
    """Mean and deviation of the data, within 5 deviations of 20 000 draws and the bias of 64 steps."""
    for name in ("dpmpp_2m_sde", "dpmpp_sde"):
        schedule, make = STRONG[name]
        out = run(make(64, noise_path="brownian"), schedule, (8, 2500), ops.seeds(7, 8)).flatten()
        assert float(out.mean()) == pytest.approx(DATA.mean, abs=5 * 0.6 / math.sqrt(20_000))
        assert float(out.std()) == pytest.approx(DATA.std, abs=5 * 0.6 / math.sqrt(40_000) + 0.02)


@pytest.mark.parametrize("name", PLANS)
def test_rows_and_json(name: str) -> None:
    """A path where there is noise and nowhere else, rising; the plan comes back from JSON, and prints it."""
    plan = PLANS[name]
    for row in plan.rows:
        assert (row.path is not None) == row.draws
    found = [row.path for row in plan.rows if row.path is not None]
    assert found
    assert found == sorted(found)
    assert Plan.from_json(plan.to_json()) == plan
    assert "path 0." in str(plan) or "path 0.." in str(plan)


@pytest.mark.parametrize("name", PLANS)
def test_sampling_draws_the_increments(name: str) -> None:
    plan = PLANS[name]
    x = initial(plan, SHAPE, SEEDS, torch.float64)
    noises = [brownian.noise(SHAPE, SEEDS, *row.path, dtype=torch.float64) for row in plan.rows if row.path]

    def network(x: Tensor, t: Tensor | float) -> Tensor:
        time = torch.as_tensor(t).reshape(-1, *[1] * (x.ndim - 1)).to(x.dtype)
        return 0.6 * torch.tanh(x) - 0.05 * torch.sin(0.01 * time) * x + 0.1

    got = sample(network, x, plan, seeds=SEEDS)
    torch.testing.assert_close(got, run_plan(plan, network, x, noises), rtol=2e-6, atol=2e-6)
    assert torch.equal(sample(network, x, plan, noise=noises), got)
    for dtype in (torch.float32, torch.bfloat16):
        start = initial(plan, SHAPE, SEEDS, dtype)
        together = sample(network, start, plan, seeds=SEEDS)
        for b in range(SHAPE[0]):
            alone = sample(network, start[b : b + 1], plan, seeds=SEEDS[b : b + 1])
            assert torch.equal(alone, together[b : b + 1])


def test_independent_is_the_default() -> None:
    for make in (
        samplers.dpmpp_1s,
        samplers.dpmpp_2m_sde,
        samplers.dpmpp_3m_sde,
        samplers.dpmpp_sde,
        samplers.euler_maruyama,
        samplers.euler_ancestral,
    ):
        plan = make(LINEAR, 5)
        assert make(LINEAR, 5, noise_path="independent") == plan
        assert all(row.path is None for row in plan.rows)
        on_path = make(LINEAR, 5, noise_path="brownian")
        assert torch.equal(on_path.table, plan.table)  # the same law of each row's noise
        assert (on_path == plan) == plan.deterministic


def test_plans_of_the_same_levels_share_their_points() -> None:
    """n and 2n steps: every point of the coarse plan is one of the fine one, to the lattice; so across samplers."""
    times = [1.0 - 0.9 * i / 16 for i in range(17)]
    plans = [
        samplers.euler_maruyama(VP, timesteps=times[::2], noise_path="brownian"),
        samplers.euler_maruyama(VP, timesteps=times, noise_path="brownian"),
        samplers.dpmpp_3m_sde(VP, timesteps=times, noise_path="brownian"),
    ]
    lattice = 2**brownian.LEVELS
    points = [{round(t * lattice) for row in plan.rows if row.path for t in row.path} for plan in plans]
    assert len(points[1]) == 2 * len(points[0]) == 16
    assert points[0] <= points[1]
    assert points[1] <= points[2]


def test_nested_intervals_of_dpmpp_sde() -> None:
    """As k-diffusion: noise_sampler(sigma, sigma_mid) and then noise_sampler(sigma, sigma_next) of one tree."""
    plan = PLANS["dpmpp_sde"]
    steps = [tuple(plan.rows[i] for i in step) for step in plan.steps if len(step) == 2]
    assert len(steps) == 3
    for first, second in steps:
        assert first.path is not None
        assert second.path is not None
        assert first.path[0] == second.path[0]
        assert first.path[1] < second.path[1]
        z = [brownian.noise((4, 10_000), ops.seeds(0, 4), *p).double() for p in (first.path, second.path)]
        share = math.sqrt((first.path[1] - first.path[0]) / (second.path[1] - second.path[0]))
        assert 0.5 < share < 0.9
        assert float((z[0] * z[1]).mean()) == pytest.approx(share, abs=5 * math.sqrt(1 + share**2) / 200)
    for (_, before), (after, _) in itertools.pairwise(steps):
        assert before.path is not None
        assert after.path is not None
        assert before.path[1] == after.path[0]


@pytest.mark.parametrize("name", ["dpmpp_sde", "dpmpp_2m_sde", "dpmpp_3m_sde", "euler_ancestral"])
def test_k_diffusion_on_the_same_path(name: str) -> None:
    """Its own samplers, asking our path where they would ask their tree: noise_sampler(sigma, sigma_next)."""
    theirs = getattr(k_diffusion_oracle.sampling(), f"sample_{name}")
    sigmas, seeds, shape = torch.tensor([15.0, 7.0, 3.0, 1.0, 0.3, 0.1, 0.0], dtype=torch.float64), SEEDS, (3, 11)

    def noise(sigma: Tensor, sigma_next: Tensor) -> Tensor:
        s, t = (brownian.position(1.0, float(level)) for level in (sigma, sigma_next))
        return brownian.noise(shape, seeds, s, t, dtype=torch.float64)

    def model(x: Tensor, sigma: Tensor, **_: object) -> Tensor:
        s2 = sigma.double().reshape(-1, 1) ** 2
        return (0.4 * s2 + 0.36 * x) / (0.36 + s2)

    options = {"compat": True} if name == "dpmpp_3m_sde" else {}
    make = samplers.get_sampler(name)
    plan = make(EDM, sigmas=sigmas.tolist(), prediction="x0", noise_path="brownian", **options)
    x = initial(plan, shape, seeds, torch.float64)
    ours = sample(model, x, plan, seeds=seeds)
    torch.testing.assert_close(ours, theirs(model, x, sigmas, noise_sampler=noise, disable=True), rtol=1e-6, atol=1e-6)


def test_pure_noise_is_the_start_of_the_path() -> None:
    row = PLANS["dpmpp_2m_sde flow"].rows[0]
    assert row.path is not None
    assert row.path[0] == 0.0


def test_streams_of_the_path_are_its_own() -> None:
    for plan in PLANS.values():
        for row in plan.rows:
            if row.path is not None:
                chosen = brownian.increment(*row.path)[0]
                assert bool(((chosen >= streams.BROWNIAN) & (chosen < streams.BROWNIAN + (1 << streams.SHIFT))).all())


BAD = "noise_path='brownian' needs alpha/sigma to rise in every step with noise, by 2^-20 of the path at least, got the"


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (
            lambda: samplers.dpmpp_2m_sde(LINEAR, 5, noise_path="tree"),
            "noise_path must be 'independent' or 'brownian', got 'tree'",
        ),
        (
            lambda: samplers.euler_maruyama(VP, 5, noise_path=""),
            "noise_path must be 'independent' or 'brownian', got ''",
        ),
        (lambda: samplers.euler_ancestral(EDM, sigmas=[1.0, 1.0 - 1e-6, 0.5], noise_path="brownian"), BAD),
        (lambda: samplers.dpmpp_sde(EDM, sigmas=[1.0, 1.0 - 1e-6, 0.5], noise_path="brownian"), BAD),
    ],
)
def test_bad_input(call: Callable[[], Plan], sentence: str) -> None:
    with pytest.raises(ValueError, match=re.escape(sentence)):
        call()
