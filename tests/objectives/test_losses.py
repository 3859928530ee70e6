"""Training losses: against their formulas written out in plain torch, and against known expected values."""

from __future__ import annotations

import math

import pytest
import torch
from helpers.op_counter import CountOps
from helpers.oracles import Mixture
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

import diffkern
from diffkern import ops, reference, schedules, streams
from diffkern.objectives import losses
from diffkern.objectives.time_sampling import get_time_sampler
from diffkern.objectives.weightings import WEIGHTINGS
from diffkern.schedules import SCHEDULES, Schedule, predictions

PREDICTIONS = ["eps", "x0", "v", "score", "velocity"]
SHAPE = (6, 3, 5, 7)


def data(seed: int = 0) -> Tensor:
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(seed))


def per_sample(values: Tensor) -> Tensor:
    return values.reshape(-1, 1, 1, 1)


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize(
    "schedule", [schedules.linear(), schedules.cosine(), schedules.cosine_arc(), schedules.flow(0.01)]
)
def test_simple_loss_is_the_formula(schedule: Schedule, prediction: str) -> None:
    x0, seeds = data(), ops.seeds(1, SHAPE[0])
    if isinstance(schedule, schedules.DiscreteSchedule):
        t = torch.tensor([0, 1, 17, 500, 998, 999])
    else:
        t = torch.tensor([0.0, 0.1, 0.3, 0.5, 0.9, 0.99], dtype=torch.float64)
    eps = reference.randn(SHAPE, seeds, streams.TRAINING)
    alpha, sigma = per_sample(schedule.alpha(t)), per_sample(schedule.sigma(t))
    targets = {
        "eps": eps,
        "x0": x0.double(),
        "v": alpha * eps - sigma * x0,
        "score": -eps / sigma,
        "velocity": per_sample(schedule.alpha_dot(t)) * x0 + per_sample(schedule.sigma_dot(t)) * eps,
    }
    seen: list[Tensor] = []

    def model(x: Tensor, time: Tensor) -> Tensor:
        seen.append(x)
        return 0.3 * x

    got = losses.simple_loss(model, x0, t, schedule, prediction, seeds=seeds, reduction="none")
    x_t = alpha * x0 + sigma * eps
    torch.testing.assert_close(seen[0].double(), x_t, rtol=1e-6, atol=2e-6)
    want = ((0.3 * x_t - targets[prediction]) ** 2).flatten(1).mean(1)
    torch.testing.assert_close(got.double(), want, rtol=2e-6, atol=1e-6)


def test_seeds_and_the_same_noise_as_a_tensor_agree() -> None:
    x0, seeds, t = data(), ops.seeds(5, SHAPE[0]), torch.arange(SHAPE[0])
    schedule = schedules.linear()
    noise = ops.randn(SHAPE, seeds, streams.TRAINING)
    by_address = losses.simple_loss(lambda x, _: x.sin(), x0, t, schedule, seeds=seeds)
    by_tensor = losses.simple_loss(lambda x, _: x.sin(), x0, t, schedule, noise=noise)
    assert torch.equal(by_address, by_tensor)


def test_weights_and_reductions() -> None:
    schedule, x0, t, seeds = (
        schedules.linear(),
        data(),
        torch.tensor([0, 10, 20, 500, 998, 999]),
        ops.seeds(2, SHAPE[0]),
    )
    pred = data(1)
    weight = torch.linspace(0.5, 3.0, schedule.T, dtype=torch.float64)
    plain = losses.prediction_loss(pred, x0, t, schedule, seeds=seeds, reduction="none")
    weighted = losses.prediction_loss(pred, x0, t, schedule, seeds=seeds, weight=weight, reduction="none")
    torch.testing.assert_close(weighted.double(), plain.double() * weight[t], rtol=1e-6, atol=0)
    for reduction, value in (("mean", weighted.mean()), ("sum", weighted.sum())):
        got = losses.prediction_loss(pred, x0, t, schedule, seeds=seeds, weight=weight, reduction=reduction)
        torch.testing.assert_close(got, value, rtol=1e-6, atol=0)


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_gradient_of_the_prediction(prediction: str) -> None:
    schedule, x0, seeds = schedules.cosine(), data(), ops.seeds(3, SHAPE[0])
    t = torch.tensor([0, 1, 17, 500, 700, 900])
    pred = data(1).requires_grad_()
    losses.prediction_loss(pred, x0, t, schedule, prediction, seeds=seeds).backward()
    table = schedule.table(prediction)[t]
    u, v = per_sample(table[:, 2]), per_sample(table[:, 3])
    target = u * x0 + v * reference.randn(SHAPE, seeds, streams.TRAINING)
    want = 2 * (pred.detach() - target) / pred.numel()
    assert pred.grad is not None
    torch.testing.assert_close(pred.grad.double(), want, rtol=2e-6, atol=1e-7)


def test_flow_matching_is_the_optimal_transport_path() -> None:
    sigma_min, x1, seeds = 0.05, data(), ops.seeds(4, SHAPE[0])
    t = torch.linspace(0, 1, SHAPE[0], dtype=torch.float64)
    eps = reference.randn(SHAPE, seeds, streams.TRAINING)
    x_t = per_sample(t) * x1 + (1 - (1 - sigma_min) * per_sample(t)) * eps
    got = diffkern.flow_matching_loss(lambda x, time: x * 0.5, x1, t, schedules.flow(sigma_min), seeds=seeds)
    want = ((0.5 * x_t - (x1 - (1 - sigma_min) * eps)) ** 2).mean()
    torch.testing.assert_close(got.double(), want, rtol=2e-6, atol=0)


def test_edm_loss_is_equation_8() -> None:
    """lambda |D(x0 + sigma eps) - x0|^2 with D from the raw network, lambda = (sigma^2 + sd^2) / (sigma sd)^2."""
    x0, seeds, sd = data(), ops.seeds(6, SHAPE[0]), 0.5
    sigma = torch.tensor([0.002, 0.01, 0.3, 1.0, 10.0, 80.0], dtype=torch.float64)
    eps = reference.randn(SHAPE, seeds, streams.TRAINING)

    def network(x: Tensor, c_noise: Tensor) -> Tensor:
        torch.testing.assert_close(c_noise.double(), sigma.log() / 4, rtol=1e-6, atol=1e-7)
        return (1.7 * x).sin()

    got = losses.edm_loss(network, x0, sigma, seeds=seeds, reduction="none")
    s = per_sample(sigma)
    x = x0 + s * eps
    root = (s**2 + sd**2).sqrt()
    denoised = sd**2 / root**2 * x + s * sd / root * (1.7 * x / root).sin()
    weight = (sigma**2 + sd**2) / (sigma * sd) ** 2
    want = weight * ((denoised - x0) ** 2).flatten(1).mean(1)
    torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=0)


def test_the_exact_model_reaches_the_known_loss() -> None:
    """For data N(0, 1) and any VP schedule E|eps - E[eps | x_t]|^2 = alpha^2: the best possible L_simple."""
    schedule, n = schedules.linear(), 200_000
    for time in (50, 300, 700):
        t = torch.full((n,), time)
        x0 = ops.randn([n, 1], ops.seeds(11, n))
        alpha, sigma = float(schedule.alpha(time)), float(schedule.sigma(time))
        got = losses.simple_loss(lambda x, _, s=sigma: s * x, x0, t, schedule, seeds=ops.seeds(12, n), reduction="none")
        assert abs(got.mean().item() - alpha**2) < 5 * got.std().item() / math.sqrt(n)


@pytest.mark.parametrize("name", SCHEDULES)
def test_exact_models_of_a_mixture_reach_the_known_loss(name: str) -> None:
    """On every schedule and for every prediction, E loss = (det/sigma)^2 E|x0 - E[x0 given x]|^2."""
    schedule, n, mixture = SCHEDULES[name](), 4000, Mixture()
    x0 = mixture.sample((n, 1), torch.Generator().manual_seed(0))
    discrete = isinstance(schedule, schedules.DiscreteSchedule)
    low, high = (0, schedule.T - 1) if discrete else schedule.time_range
    time = torch.tensor(500 if discrete else 0.8 if name == "edm" else low + 0.4 * (high - low), dtype=torch.float64)
    time = time.long() if discrete else time
    alpha, sigma = float(schedule.alpha(time)), float(schedule.sigma(time))
    for prediction in PREDICTIONS + ["mu"] * discrete + ["edm"] * (name == "edm"):
        u, v = (float(c) for c in predictions.target_coefficients(schedule, prediction, time))
        known = ((alpha * v - sigma * u) / sigma) ** 2 * mixture.mmse(alpha, sigma)
        scale = float(schedule.input_scale(prediction, time))
        got = losses.simple_loss(
            lambda x, _, p=prediction, k=scale: mixture.predict(schedule, p, x / k, time),
            x0,
            time.expand(n),
            schedule,
            prediction,
            seeds=ops.seeds(1, n),
            reduction="none",
        )
        assert abs(float(got.mean()) - known) < 5 * float(got.std()) / math.sqrt(n), prediction


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("schedule", [schedules.linear(), schedules.vp(), schedules.flow()])
def test_every_weighted_loss_is_two_fused_ops(schedule: Schedule, prediction: str) -> None:
    """One pass makes x_t, one value and gradient; beside them nothing as large as the data, whatever the weighting."""
    x0, seeds = data(), ops.seeds(0, SHAPE[0])
    t = torch.full((SHAPE[0],), 300 if isinstance(schedule, schedules.DiscreteSchedule) else 0.3)
    pred = data(1).requires_grad_()
    for target in (None, "x0", "eps"):
        for weight in (None, *WEIGHTINGS):
            with CountOps(SHAPE) as count:
                losses.simple_loss(
                    lambda x, _: pred, x0, t, schedule, prediction, target=target, weight=weight, seeds=seeds
                ).backward()
            assert count.fused == {"noising": 1, "loss": 1}
            # the gradient's way into pred.grad: a clone the first time, a sum from then on
            assert sum(count.large.values()) <= 1, count.large


@pytest.mark.full
def test_losses_of_continuous_paths_stay_on_their_device() -> None:
    """On fake CUDA tensors, which refuse to mix devices and to be read: no copy to the host, no wait for the device."""
    paths = [schedules.vp(), schedules.sub_vp(), schedules.ve(), schedules.flow(0.1), schedules.edm()]
    with FakeTensorMode():
        x0 = torch.zeros(4, 3, device="cuda")
        seeds = torch.zeros(4, dtype=torch.int64, device="cuda")
        t = torch.zeros(4, dtype=torch.float64, device="cuda")
        for schedule in paths:
            for weight in (None, *WEIGHTINGS, lambda log_snr, prediction: log_snr.exp(), t):
                for target in (None, "x0"):
                    loss = losses.simple_loss(
                        lambda x, _: x, x0, t, schedule, "v", target=target, weight=weight, seeds=seeds
                    )
                    assert loss.device.type == "cuda"
            for name in () if schedule.name == "edm" else ("uniform", "stratified", "logit_normal", "mode", "cosmap"):
                sampler = get_time_sampler(name)
                drawn = sampler.sample(4, schedule, seeds=seeds)
                assert sampler.weights(drawn, schedule).device.type == "cuda"


def test_a_sample_does_not_know_its_neighbours() -> None:
    schedule, x0, seeds = schedules.linear(), data(), ops.seeds(8, SHAPE[0])
    t = torch.tensor([3, 1, 4, 1, 5, 9])
    whole = losses.prediction_loss(data(1), x0, t, schedule, seeds=seeds, reduction="none")
    for b in range(SHAPE[0]):
        part = slice(b, b + 1)
        alone = losses.prediction_loss(data(1)[part], x0[part], t[part], schedule, seeds=seeds[part], reduction="none")
        assert torch.equal(alone, whole[part])


def test_training_repeats_under_a_seeded_generator() -> None:
    draws = [losses.draw_seeds(4, torch.Generator().manual_seed(7)) for _ in range(2)]
    assert torch.equal(*draws)
    assert draws[0].dtype == torch.int64
    assert len(draws[0].unique()) == 4


def test_condition_dropout_has_its_probability_and_is_an_address() -> None:
    seeds = ops.seeds(0, 100_000)
    cond = torch.arange(100_000)
    dropped = losses.drop_condition(cond, -1, 0.2, seeds)
    share = (dropped == -1).double().mean().item()
    assert abs(share - 0.2) < 5 * math.sqrt(0.2 * 0.8 / 100_000)
    assert torch.equal(losses.drop_condition(cond[500:600], -1, 0.2, seeds[500:600]), dropped[500:600])
    assert torch.equal(losses.drop_condition(cond, -1, 0.0, seeds), cond)
    assert (losses.drop_condition(cond, -1, 1.0, seeds) == -1).all()
    null, every = torch.tensor([1, 0, 0]), torch.full((4, 3), 2)
    assert torch.equal(losses.drop_condition(every, null, 1.0, 0), null.expand(4, 3))
    assert torch.equal(losses.drop_condition(every, every + 1, 1.0, 0), every + 1)  # one of each sample
    for wrong in (torch.arange(3), torch.arange(4), torch.zeros(3, 4, dtype=torch.int64)):
        with pytest.raises(ValueError, match=r"cond must have the shape \['B', 3\] of its null, got \[[34]"):
            losses.drop_condition(wrong, null, 0.5, 0)


def test_uniform_times() -> None:
    t = losses.uniform_times(1000, schedules.linear(T=10))
    assert t.dtype == torch.int64
    assert set(t.tolist()) == set(range(10))
    for schedule in (schedules.flow(), schedules.vp(), schedules.ve()):
        t = losses.uniform_times(1000, schedule)
        low, high = schedule.time_range
        assert t.dtype == torch.float64
        assert low <= t.min() < low + 0.01 * (high - low)
        assert high - 0.01 * (high - low) < t.max() <= high


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (
            lambda x, s: losses.noised(x, torch.zeros(3, dtype=torch.int64), s, seeds=ops.seeds(0, 6)),
            r"t must have shape \[\] or \[6\].*got \[3\]",
        ),
        (
            lambda x, s: losses.noised(x, torch.zeros(6), s, seeds=ops.seeds(0, 6)),
            r"t must be an integer index.*float32",
        ),
        (
            lambda x, s: losses.noised(x, torch.full((6,), 1000), s, seeds=ops.seeds(0, 6)),
            r"index must be in \[0, 1000\).*got 1000",
        ),
        (
            lambda x, s: losses.noised(x, torch.zeros(6).long(), s, "epsilom", seeds=ops.seeds(0, 6)),
            r"prediction must be one of .*, got 'epsilom'",
        ),
        (lambda x, s: losses.noised(x, torch.zeros(6).long(), s), r"seeds .* or noise .* must be given, got neither"),
        (
            lambda x, s: losses.prediction_loss(
                x, x, torch.zeros(6).long(), s, seeds=ops.seeds(0, 6), weight=torch.ones(3)
            ),
            r"weight must have shape \[1000\], got \[3\]",
        ),
        (
            lambda x, s: losses.prediction_loss(x, x, torch.zeros(6).long(), s, seeds=ops.seeds(0, 6), reduction="avg"),
            r"reduction must be one of none, mean, sum, got 'avg'",
        ),
        (
            lambda x, s: losses.uniform_times(4, diffkern.edm()),
            r"time sampler .uniform. needs a time of its own.*edm is sigma",
        ),
        (lambda x, s: losses.edm_loss(lambda x, c: x, x, P_std=0.0), r"P_std must be positive, got 0.0"),
        (
            lambda x, s: losses.drop_condition(torch.arange(6), 0, 1.5, ops.seeds(0, 6)),
            r"p must be in \[0, 1\], got 1.5",
        ),
        (
            lambda x, s: diffkern.flow_matching_loss(lambda x, c: x, x, torch.full((6,), 1.5)),
            r"t must lie in \[0, 1\].*1.5|t must .*got 1.5",
        ),
    ],
)
def test_bad_input_is_one_sentence(call: object, sentence: str) -> None:
    with pytest.raises((ValueError, RuntimeError), match=sentence):
        call(data(), schedules.linear())  # type: ignore[operator]


def test_a_loss_and_noising_ask_a_path_for_each_of_its_rates_once() -> None:
    asked = []

    def rate(name: str, value: Tensor) -> Tensor:
        asked.append(name)
        return value

    path = diffkern.path(lambda t: rate("alpha", t), lambda t: rate("beta", 1.0 - t))
    x0, t = data(), torch.full((SHAPE[0],), 0.25)
    asked.clear()
    loss = diffkern.prediction_loss(torch.zeros_like(x0), x0, t, path, "v", noise=torch.zeros_like(x0))
    assert sorted(asked) == ["alpha", "beta"]
    assert float(loss) == pytest.approx(0.75**2 * float((x0.double() ** 2).mean()))
    diffkern.noised(x0, t, path, "v", noise=x0)
    assert sorted(asked) == ["alpha", "alpha", "beta", "beta"]


@pytest.mark.parametrize("t", [torch.tensor([True] * SHAPE[0]), torch.full((SHAPE[0],), 0.5 + 0.5j)])
def test_times_that_are_no_numbers_are_refused_by_losses_and_noising(t: Tensor) -> None:
    x0 = data()
    rule = f"t must be a number or a tensor of numbers, got dtype {t.dtype}"
    with pytest.raises(ValueError, match=rule):
        diffkern.prediction_loss(x0, x0, t, schedules.flow(), noise=x0)
    with pytest.raises(ValueError, match=rule):
        diffkern.noised(x0, t, schedules.flow(), noise=x0)
