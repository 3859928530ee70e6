"""Flow matching: its paths, its minimiser, and the pairing of noise with data by optimal transport."""

from __future__ import annotations

import math
import sys

import pytest
import torch
from helpers.op_counter import CountOps
from helpers.oracles import Mixture
from torch import Tensor

import diffkern
from diffkern import ops, schedules, streams
from diffkern.objectives import losses
from diffkern.objectives.flow_matching import flow_matching_loss, marginal_prediction, ot_permutation, ot_seeds
from diffkern.schedules import Schedule
from diffkern.schedules.predictions import PREDICTIONS

SHAPE = (6, 2, 3)
TRIGONOMETRIC = schedules.path(lambda t: torch.sin(math.pi / 2 * t), lambda t: torch.cos(math.pi / 2 * t))
PATHS: dict[str, Schedule] = {
    "flow": schedules.flow(),
    "flow with sigma_min": schedules.flow(0.05),
    "trigonometric": TRIGONOMETRIC,
    "square": schedules.path(lambda t: t**2, lambda t: 1 - t**2),
    "vp": schedules.vp(),
    "ve": schedules.ve(),
    "linear": schedules.linear(),
}


def batch(seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def column(values: Tensor) -> Tensor:
    return values.reshape(-1, 1, 1)


def some_times(path: Schedule, n: int = SHAPE[0]) -> Tensor:
    share = torch.linspace(0.05, 0.95, n, dtype=torch.float64)
    return (share * path.T).long() if isinstance(path, schedules.DiscreteSchedule) else share


@pytest.mark.parametrize("name", PATHS)
def test_the_loss_is_the_error_against_the_conditional_field(name: str) -> None:
    """Both forms of lecture 003: alpha_dot z + sigma_dot eps, and (alpha_dot - sigma_dot/sigma alpha) z + ... x."""
    path, x1, seeds = PATHS[name], batch(), ops.seeds(0, SHAPE[0])
    t = some_times(path)
    eps = ops.randn(SHAPE, seeds, streams.TRAINING).double()
    alpha, sigma = column(path.alpha(t)), column(path.sigma(t))
    alpha_dot, sigma_dot = column(path.alpha_dot(t)), column(path.sigma_dot(t))
    x_t = alpha * x1 + sigma * eps
    field = (alpha_dot - sigma_dot / sigma * alpha) * x1 + sigma_dot / sigma * x_t
    torch.testing.assert_close(field, alpha_dot * x1 + sigma_dot * eps)
    got = flow_matching_loss(lambda x, _: x.sin(), x1, t, path, seeds=seeds, reduction="none")
    torch.testing.assert_close(got, (x_t.sin() - field).square().flatten(1).mean(1), rtol=1e-6, atol=0)


def test_optimal_transport_path_without_a_floor_is_rectified_flow() -> None:
    x1, seeds, t = batch(), ops.seeds(0, SHAPE[0]), some_times(schedules.flow())
    values = [
        flow_matching_loss(lambda x, _: x.sin(), x1, t, path, seeds=seeds, reduction="none")
        for path in (
            schedules.flow(0.0),
            schedules.rectified_flow(),
            schedules.path(lambda t: t, lambda t: 1 - t),
            None,
        )
    ]
    eps = ops.randn(SHAPE, seeds, streams.TRAINING).double()
    x_t = column(t) * x1 + (1 - column(t)) * eps
    want = (x_t.sin() - (x1 - eps)).square().flatten(1).mean(1)
    for value in values:
        torch.testing.assert_close(value, want, rtol=1e-6, atol=0)


def test_noise_may_be_any_other_samples() -> None:
    x0, x1, t = batch(1), batch(2).exp(), some_times(schedules.flow())
    seen: list[Tensor] = []

    def model(x: Tensor, time: Tensor) -> Tensor:
        seen.append(x)
        return torch.zeros_like(x)

    got = flow_matching_loss(model, x1, t, noise=x0)
    torch.testing.assert_close(seen[0], column(t) * x1 + (1 - column(t)) * x0)
    torch.testing.assert_close(got, (x1 - x0).square().mean())


def test_times_are_drawn_by_address_from_any_density() -> None:
    x1, seeds = batch(), ops.seeds(0, SHAPE[0])
    seen: list[Tensor] = []

    def model(x: Tensor, time: Tensor) -> Tensor:
        seen.append(time)
        return x

    for times in ("uniform", "uniform", "logit_normal", diffkern.objectives.time_sampling.Mode(0.5)):
        flow_matching_loss(model, x1, seeds=seeds, times=times)
    assert torch.equal(seen[0], seen[1])
    assert len({float(t[0]) for t in seen}) == 3
    torch.manual_seed(1)
    first = flow_matching_loss(lambda x, t: x, x1)
    torch.manual_seed(1)
    assert torch.equal(first, flow_matching_loss(lambda x, t: x, x1))


@pytest.mark.parametrize("name", PATHS)
def test_the_loss_is_two_fused_ops(name: str) -> None:
    path, x1, seeds = PATHS[name], batch(dtype=torch.float32), ops.seeds(0, SHAPE[0])
    scale = torch.ones((), requires_grad=True)
    for options in ({}, {"weight": "min_snr"}, {"target": "x0"}, {"weight": torch.ones_like, "target": "eps"}):
        if "weight" in options and callable(options["weight"]):
            options["weight"] = lambda log_snr, prediction: torch.ones_like(log_snr)
        with CountOps(SHAPE) as count:
            flow_matching_loss(lambda x, _: x * scale, x1, some_times(path), path, seeds=seeds, **options).backward()
        assert count.fused == {"noising": 1, "loss": 1}
        # the model's product with its scale, and its gradient's; the loss itself adds nothing of the data's size
        assert sum(count.large.values()) <= 2, count.large


# ------------------------------------------------------------------------------------------------- the minimiser


@pytest.mark.parametrize("name", PATHS)
def test_the_minimiser_is_the_marginal_field(name: str) -> None:
    """E (model - u) = 0 given x at the marginal field, so that the gradient vanishes, and the least value is known."""
    path, data, n = PATHS[name], Mixture(), 20_000
    x1 = data.sample((n, 1), torch.Generator().manual_seed(0))
    time = some_times(path, 3)[1]
    t = time.expand(n)
    alpha, sigma = float(path.alpha(time)), float(path.sigma(time))
    exact = lambda x, _: data.predict(path, "velocity", x, time)  # noqa: E731
    got = flow_matching_loss(exact, x1, t, path, seeds=ops.seeds(1, n), reduction="none")
    det = alpha * float(path.sigma_dot(time)) - sigma * float(path.alpha_dot(time))
    known = (det / sigma) ** 2 * data.mmse(alpha, sigma)
    assert abs(float(got.mean()) - known) < 5 * float(got.std()) / math.sqrt(n)

    away = torch.zeros(3, dtype=torch.float64, requires_grad=True)
    features = lambda x: torch.cat([torch.ones_like(x), x, x.sin()], 1)  # noqa: E731
    loss = flow_matching_loss(
        lambda x, t: exact(x, t) + (features(x) * away).sum(1, keepdim=True),
        x1,
        t,
        path,
        seeds=ops.seeds(1, n),
        reduction="none",
    )
    (gradient,) = torch.autograd.grad(loss.sum(), away)
    x_t = losses.noised(x1, t, path, "velocity", seeds=ops.seeds(1, n))
    spread = 2 * math.sqrt(known) * features(x_t).abs().amax(0)
    assert (gradient.abs() / n < 5 * spread / math.sqrt(n)).all()
    for direction in range(3):
        step = torch.zeros(3, dtype=torch.float64)
        step[direction] = 0.3
        worse = flow_matching_loss(
            lambda x, t, step=step: exact(x, t) + (features(x) * step).sum(1, keepdim=True),
            x1,
            t,
            path,
            seeds=ops.seeds(1, n),
        )
        assert worse > got.mean()


@pytest.mark.parametrize("prediction", ["velocity", "eps", "x0", "v", "score"])
def test_marginal_prediction_of_points_is_the_limit_of_a_mixture(prediction: str) -> None:
    assert prediction in PREDICTIONS
    points = torch.tensor([[-1.0], [0.8], [2.0]], dtype=torch.float64)
    shares = (0.2, 0.5, 0.3)
    narrow = Mixture(shares, tuple(points[:, 0].tolist()), (1e-9, 1e-9, 1e-9))
    x = torch.linspace(-3, 3, 6, dtype=torch.float64)[:, None]
    for path in PATHS.values():
        t = some_times(path)
        got = marginal_prediction(points, x, t, path, prediction, weights=torch.tensor(shares, dtype=torch.float64))
        torch.testing.assert_close(got, narrow.predict(path, prediction, x, t), rtol=1e-6, atol=1e-9)


def test_marginal_prediction_minimises_the_loss_on_its_points() -> None:
    """On a finite set the expectation over z is a sum: the conditional fields' average with weights p(z given x)."""
    path, points = schedules.flow(0.1), batch()
    x, t = batch(1), torch.tensor(0.4, dtype=torch.float64)
    alpha, sigma = path.alpha(t), path.sigma(t)
    conditional = [path.alpha_dot(t) * z + path.sigma_dot(t) * (x - alpha * z) / sigma for z in points]
    density = torch.stack([torch.exp(-((x - alpha * z) ** 2).flatten(1).sum(1) / (2 * sigma**2)) for z in points])
    want = sum(column(p) * u for p, u in zip(density / density.sum(0), conditional, strict=True))
    torch.testing.assert_close(marginal_prediction(points, x, t, path), want)


# -------------------------------------------------------------------------------------------- optimal transport


def brute_force(noise: Tensor, x1: Tensor) -> float:
    from itertools import permutations

    cost = torch.cdist(x1.flatten(1), noise.flatten(1)) ** 2
    return min(float(cost[range(len(p)), list(p)].sum()) for p in permutations(range(len(x1))))


def test_the_pairing_is_the_cheapest() -> None:
    pytest.importorskip("ot")
    for seed in range(5):
        noise, x1 = batch(seed), batch(seed + 10) * 2 + 1
        perm = ot_permutation(noise, x1)
        assert sorted(perm.tolist()) == list(range(SHAPE[0]))
        assert float((noise[perm] - x1).square().sum()) == pytest.approx(brute_force(noise, x1), rel=1e-9)
    # a shuffled copy is put back in order
    order = torch.randperm(200, generator=torch.Generator().manual_seed(0))
    x1 = torch.randn(200, 3, generator=torch.Generator().manual_seed(1))
    assert torch.equal(order[ot_permutation(x1[order], x1)], torch.arange(200))
    # equal samples: many optima, still a permutation
    assert sorted(ot_permutation(torch.zeros(5, 2), torch.zeros(5, 2)).tolist()) == list(range(5))
    assert ot_permutation(torch.zeros(0, 2), torch.zeros(0, 2)).tolist() == []


def test_coupling_permutes_the_seeds_so_that_nothing_is_stored() -> None:
    pytest.importorskip("ot")
    x1, seeds, t = batch(), ops.seeds(0, SHAPE[0]), some_times(schedules.flow())
    coupled = ot_seeds(x1, seeds)
    assert sorted(coupled.tolist()) == sorted(seeds.tolist())
    noise = ops.randn(SHAPE, seeds, streams.TRAINING, dtype=torch.float64)
    by_tensor = flow_matching_loss(lambda x, _: x, x1, t, noise=noise, coupling="ot")
    by_address = flow_matching_loss(lambda x, _: x, x1, t, seeds=seeds, coupling="ot")
    by_hand = flow_matching_loss(lambda x, _: x, x1, t, seeds=coupled)
    torch.testing.assert_close(by_address, by_tensor, rtol=1e-9, atol=0)
    assert torch.equal(by_address, by_hand)
    straight = lambda seeds: (ops.randn(SHAPE, seeds, streams.TRAINING).double() - x1).square().sum()  # noqa: E731
    assert straight(coupled) < straight(seeds)


def test_without_pot_the_sentence_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ot", None)
    with pytest.raises(
        ImportError, match=r"needs the package POT, which is not installed: pip install 'diffkern\[ot\]'"
    ):
        flow_matching_loss(lambda x, _: x, batch(), seeds=ops.seeds(0, SHAPE[0]), coupling="ot")


# --------------------------------------------------------------------------------------------------------- peers


def seen_by(path: Schedule, x1: Tensor, t: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
    """(x_t, target), as the fused ops make them."""
    x_t, target, _ = ops.noising(x1, path.coefficients("velocity", t), noise=noise, want_target=True)
    assert target is not None
    torch.testing.assert_close(losses.noised(x1, t, path, "velocity", noise=noise), x_t)
    assert losses.prediction_loss(target, x1, t, path, "velocity", noise=noise) < 1e-20
    return x_t, target


def test_torchcfm_makes_the_same_pairs() -> None:
    cfm = pytest.importorskip("torchcfm.conditional_flow_matching")
    x0, x1 = batch(1), batch(2)
    ours = {
        cfm.ConditionalFlowMatcher(sigma=0.0): schedules.flow(),
        cfm.VariancePreservingConditionalFlowMatcher(sigma=0.0): TRIGONOMETRIC,
    }
    for theirs, path in ours.items():
        t, x_t, u_t = theirs.sample_location_and_conditional_flow(x0, x1)
        got = seen_by(path, x1, t, x0)
        torch.testing.assert_close(got[0], x_t, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(got[1], u_t, rtol=1e-6, atol=1e-6)
    # theirs ignores x0 and draws eps afresh
    matcher = cfm.TargetConditionalFlowMatcher(sigma=0.1)
    t, x_t, u_t, eps = matcher.sample_location_and_conditional_flow(x0, x1, return_noise=True)
    got = seen_by(schedules.flow(0.1), x1, t, eps)
    torch.testing.assert_close(got[0], x_t, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(got[1], u_t, rtol=1e-5, atol=1e-6)  # theirs is divided by 1 - (1 - sigma) t


def test_torchcfm_finds_pairings_of_the_same_cost() -> None:
    pytest.importorskip("ot")
    transport = pytest.importorskip("torchcfm.optimal_transport")
    x0, x1 = batch(1).flatten(1), batch(2).flatten(1)
    plan = torch.from_numpy(transport.OTPlanSampler(method="exact").get_map(x0, x1))
    cost = torch.cdist(x1, x0) ** 2
    want = float((plan.T * cost).sum()) * len(x1)
    assert float((x0[ot_permutation(x0, x1)] - x1).square().sum()) == pytest.approx(want, rel=1e-6)


def test_flow_matching_makes_the_same_pairs() -> None:
    theirs = pytest.importorskip("flow_matching.path")
    from flow_matching.path import scheduler

    x0, x1, t = batch(1), batch(2), torch.linspace(0.02, 0.98, SHAPE[0], dtype=torch.float64)
    reversed_vp = schedules.vp()
    ours: dict[str, tuple[object, Schedule, float]] = {
        "CondOT": (scheduler.CondOTScheduler(), schedules.flow(), 1.0),
        "Polynomial": (
            scheduler.PolynomialConvexScheduler(n=2),
            schedules.path(lambda t: t**2, lambda t: 1 - t**2),
            1.0,
        ),
        "Cosine": (scheduler.CosineScheduler(), TRIGONOMETRIC, 1.0),
        "LinearVP": (
            scheduler.LinearVPScheduler(),
            schedules.path(lambda t: t, lambda t: (1 - t**2).clamp(min=0).sqrt()),
            1.0,
        ),
        "VP": (scheduler.VPScheduler(), reversed_vp, -1.0),  # their time runs from noise to data
    }
    for name, (their_scheduler, path, direction) in ours.items():
        sample = theirs.AffineProbPath(their_scheduler).sample(x_0=x0, x_1=x1, t=t)
        x_t, target = seen_by(path, x1, t if direction > 0 else 1 - t, x0)
        torch.testing.assert_close(x_t, sample.x_t, rtol=1e-6, atol=1e-8, msg=lambda m, n=name: f"{n}: {m}")
        torch.testing.assert_close(
            direction * target, sample.dx_t, rtol=1e-6, atol=1e-8, msg=lambda m, n=name: f"{n}: {m}"
        )


# ----------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (lambda x: flow_matching_loss(torch.add, x, torch.full((6,), 1.5)), r"t must lie in \[0, 1\].*got 1.5"),
        (lambda x: flow_matching_loss(torch.add, x, torch.zeros(3)), r"t must have shape \[\] or \[6\].*got \[3\]"),
        (
            lambda x: flow_matching_loss(torch.add, x, coupling="sinkhorn"),
            r"coupling must be one of independent, ot, got 'sinkhorn'",
        ),
        (lambda x: flow_matching_loss(torch.add, x, times="never"), r"time sampler must be one of .*, got 'never'"),
        (
            lambda x: flow_matching_loss(torch.add, x, schedule=schedules.edm()),
            r"needs a time of its own, and that of edm is sigma",
        ),
        (
            lambda x: ot_permutation(x, x[:3]),
            r"noise and x1 must have one shape \[B, ...\], got \[6, 2, 3\] and \[3, 2, 3\]",
        ),
        (
            lambda x: ot_seeds(x, ops.seeds(0, 4)),
            r"seeds must be an integer or int64 \[6\], got torch.int64 of shape \[4\]",
        ),
        (
            lambda x: marginal_prediction(x, x[:, 0], torch.tensor(0.5), schedules.flow()),
            r"data .* and x .* must have one sample shape, got \[6, 2, 3\] and \[6, 3\]",
        ),
        (
            lambda x: marginal_prediction(x, x, torch.zeros(2), schedules.flow()),
            r"t must have shape \[\] or \[6\].*got \[2\]",
        ),
        (
            lambda x: marginal_prediction(x, x, torch.tensor(1.0), schedules.flow()),
            r"sigma must be positive for a marginal prediction, got 0.0",
        ),
        (
            lambda x: marginal_prediction(x, x, torch.tensor(0.5), schedules.flow(), weights=torch.ones(2)),
            r"weights must have shape \[6\], got \[2\]",
        ),
    ],
)
def test_bad_input_is_one_sentence(call: object, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        call(torch.zeros(SHAPE))  # type: ignore[operator]


def test_a_coupling_of_what_is_not_finite_is_refused() -> None:
    pytest.importorskip("ot")
    with pytest.raises(ValueError, match="noise and x1 must be finite for an optimal-transport coupling"):
        ot_permutation(batch(), batch() / 0)
