"""Weightings: their published forms, both ends of the log-SNR, and one loss whatever the network predicts."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from diffkern import ops, schedules
from diffkern.objectives import losses, score_matching
from diffkern.objectives.time_sampling import TIME_SAMPLERS
from diffkern.objectives.weightings import (
    EDM,
    P2,
    VLB,
    WEIGHTINGS,
    MinSNR,
    SoftMinSNR,
    Uniform,
    UniformIn,
    Weighting,
    fold,
    get_weighting,
)
from diffkern.schedules import SCHEDULES, DiscreteSchedule, Schedule, predictions

LOG_SNR = torch.linspace(-20, 20, 41, dtype=torch.float64)
ENDS = torch.tensor([-math.inf, math.inf], dtype=torch.float64)
SHAPE = (5, 2, 3)


def times(schedule: Schedule) -> Tensor:
    """Five times without the ends, where predictions coincide or end (and cosine_arc has steps without noise)."""
    if isinstance(schedule, DiscreteSchedule):
        return torch.tensor([5, schedule.T // 5, schedule.T // 2, schedule.T - 200, schedule.T - 6])
    low, high = schedule.time_range
    return low + (high - low) * torch.tensor([0.01, 0.2, 0.5, 0.8, 0.99], dtype=torch.float64)


def predictions_of(schedule: Schedule) -> Iterator[str]:
    for prediction in predictions.PREDICTIONS:
        if prediction == "mu" and not isinstance(schedule, DiscreteSchedule):
            continue
        if prediction == "edm" and not isinstance(schedule, schedules.EDMSchedule):
            continue
        yield prediction


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_losses_in_every_prediction_agree_up_to_their_weight(schedule: str) -> None:
    """One estimate of x0, told as every prediction: every weighting gives the same loss for all of them."""
    path = SCHEDULES[schedule]()
    t, seeds = times(path), ops.seeds(3, SHAPE[0])
    x0 = ops.randn(SHAPE, ops.seeds(4, SHAPE[0]), dtype=torch.float64)
    x_t = losses.noised(x0, t, path, "x0", seeds=seeds)
    guess = 0.7 * x0 + 0.1 * x_t.tanh()
    for name in WEIGHTINGS:
        seen = {}
        for prediction in predictions_of(path):
            pred = predictions.convert(guess, x_t, t, path, "x0", prediction)
            target = "x0" if name == "uniform" else None
            seen[prediction] = losses.prediction_loss(
                pred, x0, t, path, prediction, target=target, weight=name, seeds=seeds, reduction="none"
            )
        for prediction, value in seen.items():
            torch.testing.assert_close(
                value, seen["x0"], rtol=1e-6, atol=0, msg=lambda m, p=(name, prediction): f"{p} {m}"
            )


@pytest.mark.parametrize("target", ["eps", "x0", "v", "score", "velocity", "mu"])
def test_the_loss_in_another_space_is_that_of_the_converted_prediction(target: str) -> None:
    path, seeds = schedules.cosine(), ops.seeds(3, SHAPE[0])
    t, x0 = times(path), ops.randn(SHAPE, ops.seeds(4, SHAPE[0]), dtype=torch.float64)
    x_t = losses.noised(x0, t, path, seeds=seeds)
    weight = torch.linspace(0.5, 2.0, path.T, dtype=torch.float64)
    for source in predictions_of(path):
        pred = x_t.sin()
        converted = predictions.convert(pred, x_t, t, path, source, target)
        for given in (None, weight, lambda log_snr, p: (2.0 if p == target else 5.0) + log_snr.tanh()):
            want = losses.prediction_loss(converted, x0, t, path, target, weight=given, seeds=seeds, reduction="none")
            got = losses.prediction_loss(
                pred, x0, t, path, source, target=target, weight=given, seeds=seeds, reduction="none"
            )
            torch.testing.assert_close(got, want, rtol=1e-8, atol=0)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_fold_is_the_ratio_of_determinants(schedule: str) -> None:
    path = SCHEDULES[schedule]()
    t = times(path)
    for source in predictions_of(path):
        for target in predictions_of(path):
            _, factor = predictions.between(path, source, target, t)
            torch.testing.assert_close(fold(path, source, target, t), factor**2, rtol=1e-8, atol=0)


def test_fold_where_alpha_or_sigma_is_0() -> None:
    path = schedules.flow()
    noise, data = torch.tensor(0.0), torch.tensor(1.0)
    assert float(fold(path, "eps", "score", noise)) == 1.0
    assert float(fold(path, "velocity", "x0", noise)) == 1.0
    assert float(fold(path, "velocity", "eps", noise)) == 0.0  # velocity tells everything, eps is seen in x_t
    assert float(fold(path, "x0", "velocity", data)) == math.inf
    assert float(fold(path, "eps", "x0", noise)) == math.inf


PUBLISHED = {
    "eps": lambda snr: (snr, 1.0 + 0 * snr, snr / (snr + 1)),
    "snr": lambda snr: (snr, 1.0 + 0 * snr, snr / (snr + 1)),
    "x0": lambda snr: (1.0 + 0 * snr, 1 / snr, 1 / (snr + 1)),
    "v": lambda snr: (snr + 1, (snr + 1) / snr, 1.0 + 0 * snr),
    "snr_plus_one": lambda snr: (snr + 1, (snr + 1) / snr, 1.0 + 0 * snr),
    "truncated_snr": lambda snr: (snr.clamp(min=1), snr.clamp(min=1) / snr, snr.clamp(min=1) / (snr + 1)),
    "min_snr": lambda snr: (snr.clamp(max=5), snr.clamp(max=5) / snr, snr.clamp(max=5) / (snr + 1)),
    "soft_min_snr": lambda snr: (1 / (1 / snr + 0.25), 1 / (1 + snr / 4), 1 / (1 / snr + 0.25) / (snr + 1)),
    "p2": lambda snr: (snr / (1 + snr), 1 / (1 + snr), snr / (1 + snr) ** 2),
    "edm": lambda snr: (snr + 4, 1 + 4 / snr, (snr + 4) / (snr + 1)),
    "likelihood": lambda snr: (snr, 1.0 + 0 * snr, snr / (snr + 1)),
    "vlb": lambda snr: (snr / 2, 0.5 + 0 * snr, snr / (snr + 1) / 2),
}


@pytest.mark.parametrize("name", sorted(WEIGHTINGS.keys() - {"uniform"}))
def test_published_forms_in_x0_eps_and_v(name: str) -> None:
    for prediction, want in zip(("x0", "eps", "v"), PUBLISHED[name](LOG_SNR.exp()), strict=True):
        got = WEIGHTINGS[name](LOG_SNR, prediction)
        assert got.dtype == torch.float64
        torch.testing.assert_close(got, want, rtol=1e-12, atol=0)
    torch.testing.assert_close(
        WEIGHTINGS[name](LOG_SNR, "score"), WEIGHTINGS[name](LOG_SNR) * torch.sigmoid(-LOG_SNR), rtol=1e-12, atol=0
    )


@pytest.mark.parametrize("gamma", [0.5, 1.0])
def test_other_constants(gamma: float) -> None:
    snr = LOG_SNR.exp()
    torch.testing.assert_close(P2(gamma=gamma, k=2.0)(LOG_SNR), 1 / (2 + snr) ** gamma, rtol=1e-12, atol=0)
    torch.testing.assert_close(MinSNR(gamma)(LOG_SNR, "x0"), snr.clamp(max=gamma), rtol=1e-12, atol=0)
    torch.testing.assert_close(SoftMinSNR(gamma)(LOG_SNR, "x0"), snr * gamma / (snr + gamma), rtol=1e-12, atol=0)
    torch.testing.assert_close(EDM(gamma)(LOG_SNR, "x0"), snr + 1 / gamma**2, rtol=1e-12, atol=0)


def test_both_ends_of_the_snr() -> None:
    """Nothing is 0/0: zero SNR left, clean data right. inf only where the weight itself grows without bound."""
    expected = {
        ("min_snr", "eps"): [1, 0],  # min(snr, gamma)/snr in other code: NaN, 0
        ("min_snr", "x0"): [0, 5],
        ("min_snr", "v"): [0, 0],
        ("soft_min_snr", "eps"): [1, 0],
        ("soft_min_snr", "x0"): [0, 4],
        ("soft_min_snr", "v"): [0, 0],
        ("p2", "eps"): [1, 0],
        ("p2", "x0"): [0, 1],
        ("p2", "v"): [0, 0],
        ("eps", "eps"): [1, 1],
        ("eps", "v"): [0, 1],
        ("x0", "x0"): [1, 1],
        ("x0", "v"): [1, 0],
        ("x0", "eps"): [math.inf, 0],
        ("snr", "x0"): [0, math.inf],
        ("v", "v"): [1, 1],
        ("truncated_snr", "v"): [1, 1],
        ("truncated_snr", "x0"): [1, math.inf],
        ("edm", "v"): [4, 1],
        ("edm", "x0"): [4, math.inf],
        ("uniform", "eps"): [1, 1],
        ("likelihood", "eps"): [1, 1],
    }
    for (name, prediction), want in expected.items():
        assert WEIGHTINGS[name](ENDS, prediction).tolist() == want, (name, prediction)
    for name, weighting in WEIGHTINGS.items():
        for prediction in ("eps", "x0", "v", "score"):
            assert not weighting(ENDS, prediction).isnan().any(), (name, prediction)
            assert not weighting(torch.tensor([-800.0, 800.0]), prediction).isnan().any(), (name, prediction)


def test_zero_terminal_snr_trains_with_min_snr() -> None:
    path = schedules.zero_terminal_snr(schedules.linear())
    t, x0, seeds = torch.tensor([999, 998, 0]), ops.randn([3, 4], ops.seeds(0, 3)), ops.seeds(1, 3)
    for prediction, want in (("eps", 1.0), ("v", 0.0), ("x0", 0.0)):
        pred = torch.zeros_like(x0, requires_grad=True)
        loss = losses.prediction_loss(pred, x0, t, path, prediction, weight="min_snr", seeds=seeds, reduction="none")
        plain = losses.prediction_loss(pred, x0, t, path, prediction, seeds=seeds, reduction="none")
        assert loss[0] == want * plain[0]
        loss.sum().backward()
        assert pred.grad is not None
        assert torch.isfinite(loss).all()
        assert torch.isfinite(pred.grad).all()


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_likelihood_is_g_squared_of_the_score(schedule: str) -> None:
    path = SCHEDULES[schedule]()
    t = times(path)
    weighting = WEIGHTINGS["likelihood"]
    torch.testing.assert_close(weighting.at(path, "score", t), path.diffusion_squared(t))
    if not isinstance(path, DiscreteSchedule):  # whose g^2 belongs to the chain, its log-SNR to the table
        torch.testing.assert_close(weighting.at(path, "eps", t), path.log_snr_dot(t).abs())
        torch.testing.assert_close(WEIGHTINGS["vlb"].at(path, "eps", t), path.log_snr_dot(t).abs() / 2)


def test_likelihood_is_finite_where_a_flow_starts() -> None:
    """At alpha = 0 g^2 is inf; the weight of a velocity is 0 there, not NaN."""
    t = torch.tensor([0.0, 1e-9], dtype=torch.float64)
    weight = WEIGHTINGS["likelihood"].at(schedules.flow(), "velocity", t)
    assert weight[0] == 0
    assert 0 < weight[1] < 1e-8


def test_vlb_is_the_kl_of_two_gaussians() -> None:
    """L_t of lecture 001 against the KL of posteriors that differ in their mean alone, and its form in snr and eps."""
    path, t = schedules.linear(50), torch.arange(1, 50)
    coef_x0, _, variance = path.posterior(t)
    for kind, var in (("beta_tilde", variance), ("beta", path.beta(t))):
        p, q = (torch.distributions.Normal(mean, var.sqrt()) for mean in (coef_x0 * 0.3, coef_x0 * 1.1))
        kl = torch.distributions.kl_divergence(q, p)
        torch.testing.assert_close(VLB(kind).at(path, "x0", t) * 0.8**2, kl)
        beta, alpha = path.beta(t), 1 - path.beta(t)
        eps = beta**2 / (2 * var * alpha * (1 - path.abar(t)))
        torch.testing.assert_close(VLB(kind).at(path, "eps", t), eps)
    torch.testing.assert_close(VLB().at(path, "x0", t), (path.snr(t - 1) - path.snr(t))[0:] / 2)
    zero = torch.tensor(0)
    torch.testing.assert_close(VLB().at(path, "mu", zero), 0.5 / path.posterior(1)[2])
    torch.testing.assert_close(VLB("beta").at(path, "mu", zero), 0.5 / path.beta(0))


def test_edm_weighting_is_1_for_the_edm_network() -> None:
    path = schedules.edm(sigma_data=0.7)
    sigma = torch.tensor([0.0, 0.002, 1.0, 80.0], dtype=torch.float64)
    torch.testing.assert_close(EDM(0.7).at(path, "edm", sigma), torch.ones(4, dtype=torch.float64))


def test_weight_by_name_object_function_and_table_agree() -> None:
    path, t = schedules.cosine(), torch.tensor([0, 10, 500, 990])
    x0, pred, seeds = ops.randn([4, 8], ops.seeds(0, 4)), ops.randn([4, 8], ops.seeds(1, 4)), ops.seeds(2, 4)
    table = MinSNR().at(path, "v", torch.arange(path.T))
    values = [
        losses.prediction_loss(pred, x0, t, path, "v", weight=weight, seeds=seeds)
        for weight in ("min_snr", MinSNR(5.0), lambda log_snr, p: MinSNR()(log_snr, p), table)
    ]
    for value in values[1:]:
        torch.testing.assert_close(value, values[0], rtol=1e-6, atol=0)


def test_a_users_weighting_is_asked_every_time() -> None:
    path, seeds, x0 = schedules.linear(), ops.seeds(0, 2), torch.zeros(2, 3)
    scale = [1.0]
    weight = lambda log_snr, prediction: torch.full_like(log_snr, scale[0])  # noqa: E731
    args = (x0, x0, torch.tensor([1, 2]), path)
    first = losses.prediction_loss(*args, weight=weight, seeds=seeds)
    scale[0] = 3.0
    torch.testing.assert_close(losses.prediction_loss(*args, weight=weight, seeds=seeds), 3 * first)


def test_continuous_schedules_take_one_weight_a_sample() -> None:
    path, x0, seeds = schedules.flow(), torch.zeros(3, 4), ops.seeds(0, 3)
    t, weight = torch.tensor([0.1, 0.5, 0.9]), torch.tensor([1.0, 2.0, 0.0])
    plain = losses.prediction_loss(x0, x0, t, path, "velocity", seeds=seeds, reduction="none")
    got = losses.prediction_loss(x0, x0, t, path, "velocity", weight=weight, seeds=seeds, reduction="none")
    torch.testing.assert_close(got, plain * weight)


def test_diffusers_min_snr_forms_and_velocity() -> None:
    """min(snr, gamma)/snr for eps and /(snr + 1) for v on diffusers' own table, where its snr is not 0."""
    diffusers = pytest.importorskip("diffusers")
    from diffusers.training_utils import compute_snr

    theirs = diffusers.DDPMScheduler(beta_schedule="squaredcos_cap_v2")
    theirs.alphas_cumprod = theirs.alphas_cumprod.double()
    path, t = schedules.from_alphas_cumprod(theirs.alphas_cumprod), torch.arange(0, 1000, 37)
    snr = compute_snr(theirs, t).double()
    clipped = snr.clamp(max=5.0)
    # their snr is rounded to float32 three times on its way
    torch.testing.assert_close(MinSNR().at(path, "eps", t), clipped / snr, rtol=1e-6, atol=0)
    torch.testing.assert_close(MinSNR().at(path, "v", t), clipped / (snr + 1), rtol=1e-6, atol=0)

    x0 = torch.randn(len(t), 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    noise = torch.randn(len(t), 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    velocity = theirs.get_velocity(x0, noise, t)
    assert losses.prediction_loss(velocity, x0, t, path, "v", noise=noise) < 1e-12
    zero = losses.prediction_loss(torch.zeros_like(x0), x0, t, path, "v", noise=noise, weight="min_snr")
    want = (clipped / (snr + 1) * velocity.square().mean(1)).mean()
    torch.testing.assert_close(zero, want, rtol=1e-6, atol=0)

    theirs = diffusers.DDPMScheduler(rescale_betas_zero_snr=True)
    snr = compute_snr(theirs, torch.tensor([999]))
    assert (snr.clamp(max=5.0) / snr).isnan().all()  # what the examples compute
    ours = schedules.from_alphas_cumprod(theirs.alphas_cumprod)
    assert float(MinSNR().at(ours, "eps", torch.tensor(999))) == 1.0


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (lambda: get_weighting("minsnr"), r"weight must be one of uniform, x0, .*, got 'minsnr'"),
        (lambda: MinSNR(0.0), r"gamma must be positive and finite, got 0.0"),
        (lambda: SoftMinSNR(math.inf), r"gamma must be positive and finite, got inf"),
        (lambda: P2(k=-1.0), r"k must be positive and finite, got -1.0"),
        (lambda: P2(gamma=-1.0), r"gamma must be finite and not negative, got -1.0"),
        (lambda: EDM(0.0), r"sigma_data must be positive and finite, got 0.0"),
        (lambda: VLB("gamma"), r"variance must be 'beta' or 'beta_tilde', got 'gamma'"),
        (lambda: UniformIn("velocity"), r"target must be eps or x0.*got 'velocity'"),
        (lambda: MinSNR()(0.0, "velocity"), r"the weight of prediction 'velocity' depends on the schedule: use at"),
        (lambda: MinSNR()(0.0, "epsilom"), r"prediction must be one of .*, got 'epsilom'"),
        (lambda: Uniform()(0.0, "epsilom"), r"prediction must be one of .*, got 'epsilom'"),
        (lambda: loss(weight=torch.ones(3)), r"weight must have shape \[1000\], got \[3\]"),
        (lambda: loss(weight=-torch.ones(1000)), r"weight must be finite and not negative, got weight\[0\] = -1.0"),
        (
            lambda: loss(weight=torch.full((1000,), torch.nan)),
            r"weight must be finite and not negative, got weight\[0\] = nan",
        ),
        (
            lambda: loss(weight=lambda log_snr, p: torch.ones(3)),
            r"weight\(log_snr, prediction\) must return one weight a log_snr, shape \[1000\], got \[3\]",
        ),
        (
            lambda: loss(schedules.zero_terminal_snr(schedules.linear()), t=999, weight="x0"),
            r"weight 'x0' must give prediction 'eps' a finite weight, got inf at t = 999",
        ),
        (
            lambda: loss(schedules.zero_terminal_snr(schedules.linear()), t=999, target="x0"),
            r"target 'x0' must give prediction 'eps' a finite weight, got inf at t = 999",
        ),
        (
            lambda: loss(schedules.flow(), t=0.0, target="x0", weight=torch.ones(2)),
            r"target 'x0' must give prediction 'eps' a finite weight, got inf at t = 0.0",
        ),
        (
            lambda: loss(weight=lambda log_snr, p: log_snr * torch.nan),
            r"weight 'custom' must give prediction 'eps' a finite weight, got nan at t = 5",
        ),
        (lambda: loss(target="epsilom"), r"prediction must be one of .*, got 'epsilom'"),
    ],
)
def test_bad_input_is_one_sentence(call: object, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        call()  # type: ignore[operator]


def loss(schedule: Schedule | None = None, t: float = 5, **options: object) -> Tensor:
    x0 = torch.zeros(2, 3)
    schedule = schedules.linear() if schedule is None else schedule
    return losses.prediction_loss(x0, x0, torch.full((2,), t), schedule, seeds=ops.seeds(0, 2), **options)  # type: ignore[arg-type]


def test_infinite_weights_do_not_disturb_other_times() -> None:
    path = schedules.zero_terminal_snr(schedules.linear())
    assert torch.isfinite(loss(path, t=998, weight="x0"))
    assert torch.isfinite(loss(path, t=998, target="x0"))


def test_every_weighting_has_its_name_and_is_never_negative() -> None:
    for weighting in WEIGHTINGS.values():
        assert isinstance(weighting, Weighting)
        assert get_weighting(weighting) is weighting
        for prediction in ("eps", "x0", "v", "score"):
            assert (weighting(LOG_SNR, prediction) >= 0).all()


def test_the_page_of_objectives_names_everything(root: Path) -> None:
    page = (root / "docs" / "objectives.md").read_text()
    names = [*WEIGHTINGS, *TIME_SAMPLERS, *score_matching.__all__, "flow_matching_loss", "edm_loss", "prediction_loss"]
    missing = [name for name in names if f"`{name}`" not in page]
    assert missing == ["projections"]  # what sliced score matching projects on is no objective
