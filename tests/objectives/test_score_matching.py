"""Score matching: every objective is smallest at the true score, with the value that the theory gives."""

from __future__ import annotations

import math

import pytest
import torch
from helpers.op_counter import CountOps
from helpers.oracles import Mixture
from torch import Tensor, nn

from diffkern import ops, schedules, streams
from diffkern.objectives import losses
from diffkern.objectives.score_matching import (
    denoising_score_matching_loss,
    geometric_sigmas,
    implicit_score_matching_loss,
    ncsn_loss,
    projections,
    sliced_score_matching_loss,
)
from diffkern.schedules import SCHEDULES, DiscreteSchedule

DATA = Mixture()
ONE, ZERO = torch.tensor(1.0, dtype=torch.float64), torch.tensor(0.0, dtype=torch.float64)
# A fine grid [N, 1] with quadrature weights p(x) dx: expectations over the data, exact to rounding.
GRID = torch.linspace(-6, 8, 8_001, dtype=torch.float64)[:, None]
MASS = DATA.log_density(ONE, ZERO, GRID)[:, 0].exp() * float(GRID[1, 0] - GRID[0, 0])


def true_score(x: Tensor) -> Tensor:
    return DATA.score(ONE, ZERO, x)


def network(D: int, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(D, 16), nn.Tanh(), nn.Linear(16, D)).double()


OBJECTIVES = {
    "implicit": lambda score: implicit_score_matching_loss(score, GRID, reduction="none"),
    "sliced": lambda score: sliced_score_matching_loss(
        score, GRID, seeds=ops.seeds(0, len(GRID)), variance_reduced=False, reduction="none"
    ),
    "sliced, variance reduced": lambda score: sliced_score_matching_loss(
        score, GRID, seeds=ops.seeds(0, len(GRID)), reduction="none"
    ),
}


@pytest.mark.parametrize("name", OBJECTIVES)
def test_value_at_the_true_score_and_around_it(name: str) -> None:
    """E loss = 1/2 E|s - true|^2 - 1/2 E|true|^2. In one dimension a Rademacher projection is exact."""
    least = -0.5 * float((MASS * true_score(GRID)[:, 0] ** 2).sum())
    for size in (0.0, 0.1, -0.1, 1.0):
        for change in (torch.sin, torch.ones_like, lambda x: x):
            loss = OBJECTIVES[name](lambda x, c=change, s=size: true_score(x) + s * c(x)).detach()
            value = float((MASS * loss).sum())
            want = least + 0.5 * size**2 * float((MASS * change(GRID)[:, 0] ** 2).sum())
            assert value == pytest.approx(want, abs=1e-9)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_gradient_is_zero_at_the_true_score(name: str) -> None:
    away = torch.zeros(3, dtype=torch.float64, requires_grad=True)
    value = OBJECTIVES[name](lambda x: true_score(x) + away[0] + away[1] * x + away[2] * x.sin())
    (at_truth,) = torch.autograd.grad((MASS * value).sum(), away)
    assert at_truth.abs().max() < 1e-9
    value = OBJECTIVES[name](lambda x: true_score(x) + 0.1 + away[0])
    (elsewhere,) = torch.autograd.grad((MASS * value).sum(), away)
    torch.testing.assert_close(float(elsewhere[0]), 0.1, rtol=1e-9, atol=0)


def test_implicit_is_the_trace_and_half_the_square() -> None:
    """tr(ds/dx) + 1/2 |s|^2 (lecture 001 prints |1/2 grad s|^2), with the trace from torch's own Jacobian."""
    net, x = network(5), torch.randn(4, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    got = implicit_score_matching_loss(net, x, reduction="none")
    for b in range(4):
        jacobian = torch.func.jacrev(net)(x[b])
        torch.testing.assert_close(got[b], jacobian.trace() + 0.5 * net(x[b]).square().sum())
    torch.testing.assert_close(implicit_score_matching_loss(net, x), got.mean())
    torch.testing.assert_close(implicit_score_matching_loss(net, x, reduction="sum"), got.sum())
    # s = -x in D dimensions: -D + |x|^2/2
    normal = implicit_score_matching_loss(lambda x: -x, x, reduction="none")
    torch.testing.assert_close(normal, x.square().sum(1) / 2 - 5)


def test_shapes_and_times_reach_the_score() -> None:
    x, t = torch.randn(3, 2, 2, 2, generator=torch.Generator().manual_seed(0)), torch.tensor([0.1, 0.2, 0.3])
    scale = lambda t: t.reshape(-1, 1, 1, 1)  # noqa: E731
    want = (-8 * t + 0.5 * (scale(t) * x).square().flatten(1).sum(1)).float()
    torch.testing.assert_close(implicit_score_matching_loss(lambda x, t: -scale(t) * x, x, t, reduction="none"), want)
    got = sliced_score_matching_loss(
        lambda x, t, twice: -scale(t) * x * twice / 2, x, t, twice=2.0, seeds=ops.seeds(0, 3), reduction="none"
    )
    torch.testing.assert_close(got, want)  # a Rademacher projection of a diagonal Jacobian is exact


@pytest.mark.parametrize("projection", ["rademacher", "gaussian"])
@pytest.mark.parametrize("variance_reduced", [False, True])
def test_sliced_has_the_expectation_of_implicit(projection: str, variance_reduced: bool) -> None:
    net, n = network(4), 20_000
    x = torch.randn(1, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(2)).expand(n, 4)
    values = sliced_score_matching_loss(
        net, x, seeds=ops.seeds(3, n), projection=projection, variance_reduced=variance_reduced, reduction="none"
    ).detach()
    want = implicit_score_matching_loss(net, x[:1]).detach()
    assert abs(float(values.mean() - want)) < 5 * float(values.std()) / math.sqrt(n)
    assert values.std() > 0.01  # or the line above says nothing


def test_more_projections_are_their_mean() -> None:
    net, seeds = network(3), ops.seeds(1, 5)
    x = torch.randn(5, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    whole = sliced_score_matching_loss(net, x, n_projections=3, seeds=seeds, reduction="none")
    s, want = net(x), 0.0
    for k in range(3):
        v = projections(x.shape, seeds, k, dtype=torch.float64)
        vjv = torch.stack([v[b] @ torch.func.jacrev(net)(x[b]) @ v[b] for b in range(5)])
        want = want + (vjv + 0.5 * s.square().sum(1)) / 3
    torch.testing.assert_close(whole, want)


def test_projections_are_addresses() -> None:
    seeds = ops.seeds(0, 1000)
    sign = projections((1000, 3), seeds)
    assert set(sign.unique().tolist()) == {-1.0, 1.0}
    assert abs(float(sign.mean())) < 5 / math.sqrt(3000)
    gauss = projections((1000, 3), seeds, 2, "gaussian")
    assert torch.equal(gauss, ops.randn((1000, 3), seeds, streams.HUTCHINSON + 2))
    assert torch.equal(projections((10, 3), seeds[40:50]), sign[40:50])
    net = network(3)
    x = torch.randn(1000, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    whole = sliced_score_matching_loss(net, x, seeds=seeds, reduction="none")
    part = sliced_score_matching_loss(net, x[40:50], seeds=seeds[40:50], reduction="none")
    torch.testing.assert_close(part, whole[40:50], rtol=1e-12, atol=1e-12)


def test_they_train_and_they_evaluate_without_gradients() -> None:
    x = torch.randn(6, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for loss in (implicit_score_matching_loss, sliced_score_matching_loss):
        net = network(3)
        options = {"seeds": ops.seeds(0, 6)} if loss is sliced_score_matching_loss else {}
        value = loss(net, x, **options)
        value.backward()
        numeric = []
        for step in (1e-6, -1e-6):
            with torch.no_grad():
                net[0].weight[1, 2] += step
                numeric.append(loss(net, x, **options))
                net[0].weight[1, 2] -= step
        assert not numeric[0].requires_grad
        assert float((numeric[0] - numeric[1]) / 2e-6) == pytest.approx(float(net[0].weight.grad[1, 2]), rel=1e-5)
        assert not x.requires_grad


# ------------------------------------------------------------------------------------------------------- denoising


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_lambda_sigma_squared_is_the_eps_loss(schedule: str) -> None:
    path, seeds = SCHEDULES[schedule](), ops.seeds(0, 5)
    x0 = ops.randn([5, 4], ops.seeds(1, 5), dtype=torch.float64)
    low, high = (0, path.T - 1) if isinstance(path, DiscreteSchedule) else path.time_range
    share = torch.tensor([0.01, 0.1, 0.5, 0.9, 1.0], dtype=torch.float64)
    t = low + (high - low) * (share if path.direction > 0 else 1 - share)
    t = t.round().long() if isinstance(path, DiscreteSchedule) else t
    sigma = path.sigma(t)[:, None]

    def eps(x: Tensor, time: Tensor) -> Tensor:
        return (0.9 * x).sin()

    got = denoising_score_matching_loss(lambda x, t: -eps(x, t) / sigma, x0, t, path, seeds=seeds, reduction="none")
    want = losses.simple_loss(eps, x0, t, path, "eps", seeds=seeds, reduction="none")
    torch.testing.assert_close(got, want, rtol=1e-6, atol=0)


def test_ncsn_is_the_eps_loss_of_its_noise_levels() -> None:
    sigmas, seeds, x0 = geometric_sigmas(10, 0.01, 50.0), ops.seeds(0, 10), ops.randn([10, 3], ops.seeds(1, 10))
    index = torch.arange(10)
    eps = ops.randn([10, 3], seeds, streams.TRAINING)
    seen: list[Tensor] = []

    def score(x: Tensor, sigma: Tensor) -> Tensor:
        seen.extend([x, sigma])
        return -x.sin() / sigma[:, None]

    got = ncsn_loss(score, x0, sigmas, index, seeds=seeds, reduction="none")
    torch.testing.assert_close(seen[1].double(), sigmas, rtol=1e-7, atol=0)
    torch.testing.assert_close(seen[0].double(), x0.double() + sigmas[:, None] * eps, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(got, (seen[0].sin() - eps).square().mean(1), rtol=1e-5, atol=0)


@pytest.mark.parametrize("ends", [(0.01, 50.0), (50.0, 0.01)])
def test_geometric_sigmas(ends: tuple[float, float]) -> None:
    sigmas = geometric_sigmas(10, *ends)
    want = [ends[0] * (ends[1] / ends[0]) ** (i / 9) for i in range(10)]
    torch.testing.assert_close(sigmas, torch.tensor(want, dtype=torch.float64), rtol=1e-12, atol=0)


def test_ncsn_draws_its_levels_by_address_and_evenly() -> None:
    n, sigmas = 5000, geometric_sigmas(5, 1.0, 16.0)
    seen: list[Tensor] = []

    def score(x: Tensor, sigma: Tensor) -> Tensor:
        seen.append(sigma)
        return x

    for seeds in (ops.seeds(0, n), ops.seeds(0, n), None):
        ncsn_loss(score, torch.zeros(n, 1), sigmas, seeds=seeds)
    assert torch.equal(seen[0], seen[1])
    assert not torch.equal(seen[0], seen[2])
    for drawn in (seen[0], seen[2]):
        counts = torch.stack([(drawn == sigma).sum() for sigma in sigmas.float()])
        assert counts.sum() == n
        assert ((counts / n - 0.2).abs() < 5 * math.sqrt(0.16 / n)).all()


@pytest.mark.parametrize("sigma", [1e-3, 1e-6, 1e-12])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_small_sigma_is_stable(sigma: float, dtype: torch.dtype) -> None:
    """Nothing is divided by sigma^2: value and gradient keep their relative accuracy however small sigma is."""
    seeds = ops.seeds(0, 2)
    x0 = torch.zeros(2, 50, dtype=dtype)
    eps = ops.randn([2, 50], seeds, streams.TRAINING).double()
    level, index = torch.tensor([sigma]), torch.zeros(2, dtype=torch.int64)
    scale = torch.ones((), dtype=dtype, requires_grad=True)
    loss = ncsn_loss(lambda x, s: -0.5 * scale * x / sigma**2, x0, level, index, seeds=seeds)
    loss.backward()
    want = (0.5 * eps).square().mean()
    rtol = 1e-5 if dtype == torch.float32 else 1e-6  # sigma is rounded to float32 by torch.tensor above
    torch.testing.assert_close(loss.double(), want, rtol=rtol, atol=0)
    assert scale.grad is not None
    torch.testing.assert_close(scale.grad.double(), -2 * want, rtol=rtol, atol=0)


def test_exact_scores_reach_the_known_loss_and_their_gradient_vanishes() -> None:
    """E sigma^2 |s + eps/sigma|^2 = (alpha/sigma)^2 mmse at the true score; the loss grows by lambda E|change|^2."""
    n = 20_000
    x0 = DATA.sample((n, 1), torch.Generator().manual_seed(0))
    for path, time in (
        (schedules.vp(), 0.3),
        (schedules.edm(), 0.7),
        (schedules.linear(), 200),
        (schedules.flow(), 0.6),
    ):
        t = torch.full((n,), time)
        alpha, sigma = float(path.alpha(t[:1])), float(path.sigma(t[:1]))
        exact = denoising_score_matching_loss(
            lambda x, _, p=path, t=t: DATA.predict(p, "score", x, t[0]),
            x0,
            t,
            path,
            seeds=ops.seeds(1, n),
            reduction="none",
        )
        known = (alpha / sigma) ** 2 * DATA.mmse(alpha, sigma)
        assert abs(float(exact.mean()) - known) < 5 * float(exact.std()) / math.sqrt(n)
        other = denoising_score_matching_loss(
            lambda x, _, p=path, t=t: DATA.predict(p, "score", x, t[0]) + 0.3 * x.cos(),
            x0,
            t,
            path,
            seeds=ops.seeds(1, n),
            reduction="none",
        )
        x_t = losses.noised(x0, t, path, "score", seeds=ops.seeds(1, n))
        change = other - exact - sigma**2 * 0.09 * x_t.cos().square()[:, 0]  # what is left has mean 0
        assert abs(float(change.mean())) < 5 * float(change.std()) / math.sqrt(n)
        assert other.mean() > exact.mean()


def test_other_weights_and_drawn_times() -> None:
    path, x0, seeds = schedules.vp(), torch.zeros(4, 3, dtype=torch.float64), ops.seeds(0, 4)
    t = torch.tensor([0.01, 0.3, 0.6, 1.0], dtype=torch.float64)
    zero = lambda x, t: torch.zeros_like(x)  # noqa: E731
    plain = denoising_score_matching_loss(zero, x0, t, path, weight="uniform", seeds=seeds, reduction="none")
    for weight, factor in (("likelihood", path.diffusion_squared(t)), ("eps", path.sigma(t) ** 2)):
        got = denoising_score_matching_loss(zero, x0, t, path, weight=weight, seeds=seeds, reduction="none")
        torch.testing.assert_close(got, plain * factor, rtol=1e-9, atol=0)
    drawn = [denoising_score_matching_loss(zero, x0, None, path, times="logit_normal", seeds=seeds) for _ in range(2)]
    assert torch.equal(*drawn)


def test_denoising_losses_are_two_fused_ops() -> None:
    x0, seeds, net = torch.zeros(4, 3), ops.seeds(0, 4), network(3).float()
    calls = {
        "denoising": lambda: denoising_score_matching_loss(
            lambda x, t: net(x), x0, torch.full((4,), 0.5), schedules.vp(), seeds=seeds
        ),
        "ncsn": lambda: ncsn_loss(lambda x, t: net(x), x0, geometric_sigmas(4, 1, 2), torch.arange(4), seeds=seeds),
    }
    for name, call in calls.items():
        with CountOps(x0.shape) as count:
            call().backward()
        assert count.fused == {"noising": 1, "loss": 1}, name


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (
            lambda x: implicit_score_matching_loss(lambda x: torch.zeros_like(x), x),
            r"score must be differentiable in x, got an output without a gradient in x",
        ),
        (
            lambda x: sliced_score_matching_loss(lambda x: x.detach() * torch.ones(3, requires_grad=True), x),
            r"score must be differentiable in x, got an output without a gradient in x",
        ),
        (
            lambda x: implicit_score_matching_loss(lambda x: x[:, :1], x),
            r"score must return the shape of x, \[4, 3\], got \[4, 1\]",
        ),
        (
            lambda x: implicit_score_matching_loss(torch.sin, x[:, 0]),
            r"x must be floating-point samples \[B, ...\], got torch.float32 \[4\]",
        ),
        (lambda x: implicit_score_matching_loss(torch.sin, x.long()), r"x must be floating-point samples.*int64"),
        (
            lambda x: implicit_score_matching_loss(torch.sin, x, reduction="avg"),
            r"reduction must be one of none, mean, sum, got 'avg'",
        ),
        (
            lambda x: sliced_score_matching_loss(torch.sin, x, n_projections=0),
            r"n_projections must be an integer of at least 1, got 0",
        ),
        (
            lambda x: sliced_score_matching_loss(torch.sin, x, projection="sphere"),
            r"projection must be one of rademacher, gaussian, got 'sphere'",
        ),
        (lambda x: geometric_sigmas(1, 0.1, 1.0), r"L must be an integer of at least 2, got 1"),
        (
            lambda x: geometric_sigmas(5, 0.0, 1.0),
            r"sigma_min and sigma_max must be 0 < sigma_min <= sigma_max, got 0.0 and 1.0",
        ),
        (
            lambda x: ncsn_loss(torch.add, x, torch.tensor([1.0, 0.0])),
            r"sigmas must be positive and finite, got sigmas\[1\] = 0.0",
        ),
        (
            lambda x: ncsn_loss(torch.add, x, torch.ones(2, 2)),
            r"sigmas must be a non-empty list of noise levels, got shape \[2, 2\]",
        ),
        (
            lambda x: ncsn_loss(torch.add, x, torch.ones(2), torch.tensor([0, 1, 2, 0])),
            r"index must lie in 0..1 \(L = 2\), got 2",
        ),
        (
            lambda x: ncsn_loss(torch.add, x, torch.ones(2), torch.tensor([0])),
            r"index must be integers of shape \[4\], got torch.int64 \[1\]",
        ),
        (
            lambda x: denoising_score_matching_loss(torch.add, x, torch.zeros(4), schedules.vp()),
            r"prediction 'score' is -eps/sigma and has no value where sigma is 0",
        ),
        (
            lambda x: denoising_score_matching_loss(torch.add, x, torch.full((4,), 1.5), schedules.vp()),
            r"t must lie in \[0, 1\].*got 1.5",
        ),
        (
            lambda x: denoising_score_matching_loss(torch.add, x, None, schedules.vp(), times="never"),
            r"time sampler must be one of .*, got 'never'",
        ),
    ],
)
def test_bad_input_is_one_sentence(call: object, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        call(torch.zeros(4, 3))  # type: ignore[operator]
