"""Time samplers: their densities are those of their draws, on every axis, and runs repeat."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from diffkern import ops, schedules
from diffkern.objectives import losses
from diffkern.objectives.time_sampling import (
    TIME_SAMPLERS,
    CosMap,
    LogitNormal,
    LogNormal,
    LossSecondMoment,
    Mode,
    TimeSampler,
    Uniform,
    get_time_sampler,
    stratified,
)
from diffkern.schedules import DiscreteSchedule, EDMSchedule, Schedule

SAMPLERS: dict[str, TimeSampler] = {
    "uniform": Uniform(),
    "uniform part": Uniform(0.2, 0.7),
    "stratified": stratified(),
    "logit_normal": LogitNormal(),
    "logit_normal data": LogitNormal(-0.7, 0.6),
    "mode": Mode(),
    "mode ends": Mode(-0.8),
    "cosmap": CosMap(),
    "log_normal": LogNormal(),
    "log_normal wide": LogNormal(0.5, 2.0, stratified=True),
}
PATHS: dict[str, Schedule] = {
    "linear": schedules.linear(12),
    "zero terminal snr": schedules.zero_terminal_snr(schedules.linear(12, 0.01, 0.3)),
    "flow": schedules.flow(),
    "vp": schedules.vp(),
    "ve": schedules.ve(),
    "edm": schedules.edm(),
}
GRID = torch.linspace(0.001, 0.999, 999, dtype=torch.float64)
N = 20_000


def on(sampler: TimeSampler, path: Schedule) -> bool:
    """Whether the sampler has times on this schedule: EDM's time is sigma, which only log_normal knows."""
    return not isinstance(path, EDMSchedule) or isinstance(sampler, LogNormal)


def kolmogorov(u: Tensor) -> float:
    """sqrt(n) times the largest distance between the distribution of u and the uniform one."""
    n = len(u)
    u = u.sort().values
    steps = torch.arange(n + 1, dtype=torch.float64) / n
    return math.sqrt(n) * float(torch.maximum((u - steps[:-1]).abs(), (steps[1:] - u).abs()).max())


@pytest.mark.parametrize("name", SAMPLERS)
def test_cdf_inverts_quantile_and_pdf_is_its_slope(name: str) -> None:
    sampler = SAMPLERS[name]
    x = sampler.quantile(GRID)
    torch.testing.assert_close(sampler.cdf(x), GRID, rtol=0, atol=1e-12)
    u = GRID.clone().requires_grad_()
    (slope,) = torch.autograd.grad(sampler.quantile(u).sum(), u)
    torch.testing.assert_close(sampler.pdf(x), 1 / slope, rtol=1e-8, atol=0)


@pytest.mark.parametrize("name", [name for name in SAMPLERS if "log_normal" not in name])
def test_densities_on_the_unit_interval_integrate_to_1(name: str) -> None:
    sampler = SAMPLERS[name]
    x = (torch.arange(10_000, dtype=torch.float64) + 0.5) / 10_000
    torch.testing.assert_close(sampler.density(x).mean().item(), 1.0, rtol=0, atol=1e-5)
    ends = torch.tensor([0.0, 1.0], dtype=torch.float64)
    assert not sampler.density(ends).isnan().any()
    assert sampler.cdf(ends).tolist() == [0.0, 1.0]


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize("address", [False, True], ids=["generator", "address"])
def test_draws_have_the_density(name: str, path: str, address: bool) -> None:
    sampler, schedule = SAMPLERS[name], PATHS[path]
    if not on(sampler, schedule):
        with pytest.raises(ValueError, match="needs a time of its own, and that of edm is sigma"):
            sampler.sample(4, schedule)
        return
    options = {"seeds": ops.seeds(1, N)} if address else {"generator": torch.Generator().manual_seed(1)}
    t = sampler.sample(N, schedule, **options)  # type: ignore[arg-type]
    assert t.shape == (N,)
    if isinstance(schedule, DiscreteSchedule):
        assert t.dtype == torch.int64
        p = sampler.density(torch.arange(schedule.T), schedule)
        torch.testing.assert_close(float(p.sum()), 1.0, rtol=1e-12, atol=0)
        share = torch.bincount(t, minlength=schedule.T) / N
        assert ((share - p).abs() <= 5 * (p * (1 - p) / N).sqrt() + 1e-12).all()
    else:
        # The density, integrated numerically along the schedule's own time, turns the draws into uniform numbers.
        assert t.dtype == torch.float64
        low, high = (0.0, 1e4) if isinstance(schedule, EDMSchedule) else schedule.time_range
        bend = 5 if isinstance(schedule, EDMSchedule) else 1
        edges = low + (high - low) * torch.linspace(0, 1, 10_001, dtype=torch.float64) ** bend
        p = sampler.density(edges, schedule)
        mass = torch.cat([p.new_zeros(1), torch.cumulative_trapezoid(p, edges)])
        assert abs(float(mass[-1]) - 1.0) < 5e-3
        at = torch.searchsorted(edges, t).clamp(1, len(edges) - 1)
        part = (t - edges[at - 1]) / (edges[at] - edges[at - 1])
        assert kolmogorov(torch.lerp(mass[at - 1], mass[at], part)) < 1.95 + 5e-3 * math.sqrt(N)  # 0.1 % by chance


@pytest.mark.parametrize("path", ["linear", "flow", "vp"])
@pytest.mark.parametrize("name", ["uniform", "logit_normal data", "mode", "cosmap", "log_normal"])
def test_weights_bring_back_the_expectation_under_uniform_times(name: str, path: str) -> None:
    sampler, schedule = SAMPLERS[name], PATHS[path]
    # A stratified draw of p is a quadrature, so that little noise remains; bounded values, thin tails left out.
    u = (torch.arange(N, dtype=torch.float64) + 0.5) / N
    t = sampler.times(u, schedule)
    if isinstance(schedule, DiscreteSchedule):
        every = torch.arange(schedule.T)
        p, weight = sampler.density(every, schedule), sampler.weights(every, schedule)
        torch.testing.assert_close((p * weight * every**2).sum(), every.double().square().mean(), rtol=1e-12, atol=0)
        return
    low, high = schedule.time_range
    t = t.clamp(low, high)
    inside = lambda t: torch.exp(-(((t - 0.5) / 0.1) ** 2))  # noqa: E731
    got = (sampler.weights(t, schedule) * inside(t)).mean()
    want = inside(torch.linspace(low, high, N, dtype=torch.float64)).mean()
    torch.testing.assert_close(got, want, rtol=5e-3, atol=0)


def test_axis_runs_from_data_to_noise() -> None:
    """A sampler that leans to the data draws higher signal-to-noise ratios, whichever way time runs."""
    u = (torch.arange(1000, dtype=torch.float64) + 0.5) / 1000
    for path in (schedules.linear(), schedules.flow(), schedules.vp(), schedules.ve()):
        data, noise = (path.log_snr(LogitNormal(mean).times(u, path)).clamp(-50, 50).mean() for mean in (-1.0, 1.0))
        assert data > noise


def test_discrete_uniform_is_exact() -> None:
    path = schedules.linear(10)
    assert Uniform().density(torch.arange(10), path).tolist() == pytest.approx([0.1] * 10, abs=1e-15)
    assert (Uniform().weights(torch.arange(10), path) - 1).abs().max() < 1e-12
    t = stratified().sample(10, path, generator=torch.Generator().manual_seed(0))
    assert sorted(t.tolist()) == list(range(10))


@pytest.mark.parametrize("address", [False, True], ids=["generator", "address"])
@pytest.mark.parametrize("name", ["uniform", "logit_normal", "log_normal"])
def test_stratified_draws_hit_every_stratum_once(name: str, address: bool) -> None:
    for permute in (True, False):
        sampler = get_time_sampler(name, stratified=True, permute=permute)
        options = {"seeds": ops.seeds(5, 64)} if address else {"generator": torch.Generator().manual_seed(5)}
        u = sampler.cdf(sampler.sample(64, **options))  # type: ignore[arg-type]
        assert sorted((u * 64).floor().tolist()) == list(range(64))
        # one offset: all of them lie at the same place of their stratum
        place = u * 64 - (u * 64).floor()
        assert place.max() - place.min() < 1e-9
        assert torch.equal(u, u.sort().values) == (not permute)


def test_runs_repeat() -> None:
    path, seeds = schedules.flow(), ops.seeds(7, 16)
    for name in TIME_SAMPLERS:
        if name == "loss_second_moment":
            continue
        sampler = get_time_sampler(name)
        by_generator = [sampler.sample(16, path, generator=torch.Generator().manual_seed(2)) for _ in range(2)]
        assert torch.equal(*by_generator)
        assert torch.equal(sampler.sample(16, path, seeds=seeds), sampler.sample(16, path, seeds=seeds))
        assert not torch.equal(sampler.sample(16, path, seeds=seeds), sampler.sample(16, path, seeds=ops.seeds(8, 16)))


def test_by_address_a_sample_does_not_know_its_neighbours() -> None:
    seeds = ops.seeds(7, 16)
    for name in ("uniform", "logit_normal", "mode", "cosmap", "log_normal"):
        sampler = get_time_sampler(name)
        whole = sampler.sample(16, seeds=seeds)
        assert torch.equal(sampler.sample(4, seeds=seeds[6:10]), whole[6:10])


def test_edm_loss_draws_its_sigma_by_address() -> None:
    x0, seeds = torch.zeros(4, 3), ops.seeds(0, 4)
    seen: list[Tensor] = []

    def network(x: Tensor, c_noise: Tensor) -> Tensor:
        seen.append(c_noise)
        return x

    for _ in range(2):
        losses.edm_loss(network, x0, seeds=seeds)
    assert torch.equal(seen[0], seen[1])
    torch.testing.assert_close(
        (4 * seen[0].double()).exp(), LogNormal(-1.2, 1.2).sample(4, seeds=seeds), rtol=1e-5, atol=0
    )


def test_diffusers_draws_the_same_times() -> None:
    pytest.importorskip("diffusers")
    from diffusers.training_utils import compute_density_for_timestep_sampling, compute_loss_weighting_for_sd3

    make = lambda: torch.Generator().manual_seed(3)  # noqa: E731
    for scale in (1.29, -0.5):
        theirs = compute_density_for_timestep_sampling("mode", 500, mode_scale=scale, generator=make())
        u = torch.rand(500, generator=make())
        torch.testing.assert_close(Mode(scale).quantile(1 - u.double()), theirs.double(), rtol=1e-6, atol=1e-6)
    theirs = compute_density_for_timestep_sampling("logit_normal", 500, 0.3, 0.8, generator=make())
    z = torch.normal(mean=0.3, std=0.8, size=(500,), generator=make())
    u = torch.special.ndtr((z.double() - 0.3) / 0.8)
    torch.testing.assert_close(LogitNormal(0.3, 0.8).quantile(u), theirs.double(), rtol=1e-6, atol=0)
    sigmas = torch.rand(500, generator=make(), dtype=torch.float64)
    torch.testing.assert_close(
        CosMap().density(sigmas), compute_loss_weighting_for_sd3("cosmap", sigmas), rtol=1e-12, atol=0
    )


# --------------------------------------------------------------------------------------------- importance resampling


def test_loss_second_moment_is_uniform_until_warm_then_the_root_of_the_mean_square() -> None:
    sampler = LossSecondMoment(4, history=3, uniform_share=0.1)
    torch.testing.assert_close(sampler.probabilities(), torch.full((4,), 0.25, dtype=torch.float64))
    last = {0: [1.0, 1.0, 1.0], 1: [2.0, 0.0, 1.0], 2: [0.5, 0.25, 4.0], 3: [0.0, 0.0, 0.0]}
    for i in range(3):
        sampler.update(torch.tensor([3]), torch.tensor([100.0]))  # pushed out again below
        assert not sampler.warm
        sampler.update(torch.arange(3), torch.tensor([last[t][i] for t in range(3)]))
    assert sampler.warm
    # duplicates in one batch, more of them than the history holds
    sampler.update(torch.tensor([3, 3, 3, 3, 3]), torch.tensor([9.0, 9.0, 0.0, 0.0, 0.0]))
    size = torch.tensor([math.sqrt(sum(x * x for x in last[t]) / 3) for t in range(4)], dtype=torch.float64)
    want = 0.9 * size / size.sum() + 0.1 / 4
    torch.testing.assert_close(sampler.probabilities(), want, rtol=1e-12, atol=0)
    torch.testing.assert_close(sampler.weights(torch.arange(4)), 1 / (4 * want), rtol=1e-12, atol=0)
    assert float(sampler.probabilities().sum()) == pytest.approx(1.0, abs=1e-15)


def test_loss_second_moment_keeps_the_last_losses_in_any_split_of_the_updates() -> None:
    generator = torch.Generator().manual_seed(0)
    t = torch.randint(0, 5, (200,), generator=generator)
    values = torch.rand(200, generator=generator)
    whole, parts = LossSecondMoment(5, history=4), LossSecondMoment(5, history=4)
    whole.update(t, values)
    for i in range(0, 200, 7):
        parts.update(t[i : i + 7], values[i : i + 7])
    torch.testing.assert_close(whole.probabilities(), parts.probabilities(), rtol=1e-12, atol=0)
    last = torch.stack([values[t == k][-4:].double().square().mean().sqrt() for k in range(5)])
    torch.testing.assert_close(whole.probabilities(), 0.999 * last / last.sum() + 0.001 / 5, rtol=1e-6, atol=0)


@pytest.mark.parametrize("address", [False, True], ids=["generator", "address"])
def test_loss_second_moment_draws_and_weights(address: bool) -> None:
    path = schedules.linear(6)
    sampler = LossSecondMoment(6, history=1)
    sampler.update(torch.arange(6), torch.tensor([5.0, 1.0, 0.2, 0.2, 1.0, 3.0]))
    options = {"seeds": ops.seeds(1, N)} if address else {"generator": torch.Generator().manual_seed(1)}
    t = sampler.sample(N, path, **options)  # type: ignore[arg-type]
    p = sampler.density(torch.arange(6), path)
    share = torch.bincount(t, minlength=6) / N
    assert ((share - p).abs() <= 5 * (p * (1 - p) / N).sqrt()).all()
    # the estimate of the mean over uniform times is unbiased, and of lower variance for losses of this size
    size = torch.tensor([5.0, 1.0, 0.2, 0.2, 1.0, 3.0])
    weighted = sampler.weights(t) * size[t]
    assert abs(float(weighted.mean() - size.mean())) < 5 * float(weighted.std()) / math.sqrt(N)
    assert weighted.std() < 0.1 * size[torch.randint(0, 6, (N,))].std()


def test_loss_second_moment_state_comes_back() -> None:
    sampler, other = LossSecondMoment(3, history=2), LossSecondMoment(3, history=2)
    sampler.update(torch.tensor([0, 1, 2, 2, 1, 0, 0]), torch.arange(7.0))
    other.load_state_dict(sampler.state_dict())
    assert torch.equal(other.probabilities(), sampler.probabilities())
    for one in (sampler, other):
        one.update(torch.tensor([1]), torch.tensor([50.0]))
    assert torch.equal(other.probabilities(), sampler.probabilities())
    with pytest.raises(ValueError, match=r"state\['losses'\] must have shape \[3, 5\], got shape \[3, 2\]"):
        LossSecondMoment(3, history=5).load_state_dict(sampler.state_dict())
    with pytest.raises(ValueError, match=r"state\['counts'\] must have shape \[3\], got nothing"):
        other.load_state_dict({"losses": torch.zeros(3, 2)})


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (lambda: get_time_sampler("lognormal"), r"time sampler must be one of uniform, .*, got 'lognormal'"),
        (lambda: get_time_sampler(Uniform(), low=0.5), r"constants must go with a name, got a sampler and low"),
        (lambda: Uniform(0.5, 0.5), r"low and high must be 0 <= low < high <= 1, got 0.5 and 0.5"),
        (lambda: LogitNormal(0.0, 0.0), r"std must be positive and finite, got 0.0"),
        (lambda: LogNormal(math.nan), r"mean must be finite, got nan"),
        (lambda: Mode(2.0), r"scale must lie in \[-1, 2/\(pi - 2\)\], got 2.0"),
        (lambda: Uniform().sample(-1), r"n must be an integer of at least 0, got -1"),
        (
            lambda: Uniform().sample(3, seeds=ops.seeds(0, 4)),
            r"seeds must be an integer or int64 \[3\], got torch.int64 of shape \[4\]",
        ),
        (
            lambda: Uniform().sample(3, seeds=ops.seeds(0, 3), generator=torch.Generator()),
            r"seeds or generator must be given, not both",
        ),
        (lambda: CosMap().density(torch.tensor([0.5, 1.5])), r"t must lie in \[0, 1\] .*got 1.5"),
        (lambda: CosMap().density(torch.tensor([1.5]), schedules.flow()), r"t must lie in \[0, 1\].*flow, got 1.5"),
        (lambda: LogNormal().density(torch.tensor([-0.5])), r"t must be a noise level >= 0, got -0.5"),
        (lambda: LogNormal().density(torch.tensor([2.0]), schedules.vp()), r"t must lie in \[0.001, 1\].*got 2.0"),
        (
            lambda: Uniform().density(torch.tensor([10]), schedules.linear(10)),
            r"t must be an integer in 0..9 \(T = 10\), got 10",
        ),
        (
            lambda: Uniform().density(torch.tensor([1.0]), schedules.linear(10)),
            r"t must be an integer index for the schedule linear, got dtype torch.float32",
        ),
        (lambda: LossSecondMoment(0), r"T must be an integer of at least 1, got 0"),
        (lambda: LossSecondMoment(history=1.5), r"history must be an integer of at least 1, got 1.5"),
        (lambda: LossSecondMoment(uniform_share=0.0), r"uniform_share must lie in \(0, 1\], got 0.0"),
        (
            lambda: LossSecondMoment(10).sample(3, schedules.linear(11)),
            r"schedule must be discrete with T = 10 for loss_second_moment",
        ),
        (
            lambda: LossSecondMoment(10).update(torch.zeros(3).long(), torch.zeros(2)),
            r"losses must have the shape of t, \[B\], got \[2\] and \[3\]",
        ),
        (
            lambda: LossSecondMoment(10).update(torch.tensor([10]), torch.zeros(1)),
            r"t must be an integer in 0..9 \(T = 10\), got 10",
        ),
        (lambda: LossSecondMoment(10).update(torch.zeros(1), torch.zeros(1)), r"t must be an integer index, got dtype"),
        (
            lambda: LossSecondMoment(10).update(torch.tensor([1]), torch.tensor([math.inf])),
            r"losses must be finite, got inf",
        ),
    ],
)
def test_bad_input_is_one_sentence(call: object, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        call()  # type: ignore[operator]
