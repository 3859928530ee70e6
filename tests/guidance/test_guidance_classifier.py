"""Classifier guidance by score shift and by mean shift: closed forms, the published formulas, any classifier."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from helpers.op_counter import CountOps
from helpers.oracles import Gaussian
from torch import Tensor

from diffkern import guidance, ops, samplers, schedules
from diffkern.guidance import classifier_gradient, classifier_guided, log_prob_gradient, score_shift
from diffkern.sampling import initial, sample
from diffkern.schedules import predictions

LINEAR, COSINE, FLOW, EDM = schedules.linear(), schedules.cosine(), schedules.flow(), schedules.edm()
SHAPE = (3, 2, 4, 4)
SEEDS = torch.tensor([11, -5, 2**62], dtype=torch.int64)
CLASSES = (Gaussian(-0.9, 0.3), Gaussian(0.2, 0.6), Gaussian(0.8, 0.2))
WEIGHTS = torch.tensor([0.5, 0.2, 0.3], dtype=torch.float64)


def noise(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return ops.randn(shape, ops.seeds(seed, shape[0]), dtype=dtype)


def levels(schedule: Any, t: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    shape = (-1, *[1] * (x.ndim - 1))
    return schedule.alpha(t).reshape(shape), schedule.sigma(t).reshape(shape)


def classifier(schedule: Any) -> Any:
    """ln p(y, x_t) of Gaussian classes, all elements of a sample independent: the exact classifier's logits."""

    def logits(x: Tensor, t: Any) -> Tensor:
        alpha, sigma = levels(schedule, t, x)
        parts = []
        for weight, data in zip(WEIGHTS, CLASSES, strict=True):
            total = data.total(alpha, sigma)
            density = -0.5 * ((x - alpha * data.mean) ** 2 / total + total.log())
            parts.append(weight.log() + density.flatten(1).sum(1))
        return torch.stack(parts, 1)

    return logits


def scores(schedule: Any, x: Tensor, t: Any) -> list[Tensor]:
    """The score of each class."""
    alpha, sigma = levels(schedule, t, x)
    return [-(x - alpha * data.mean) / data.total(alpha, sigma) for data in CLASSES]


def mixture_score(schedule: Any, x: Tensor, t: Any) -> Tensor:
    share = classifier(schedule)(x, t).softmax(1)
    parts = torch.stack(scores(schedule, x, t), 1)
    return (share.reshape(*share.shape, *[1] * (x.ndim - 1)) * parts).sum(1)


def as_prediction(schedule: Any, prediction: str, score: Tensor, x: Tensor, t: Any) -> Tensor:
    """The prediction whose score is this, from the definitions."""
    alpha, sigma = levels(schedule, t, x)
    eps = -sigma * score
    x0 = (x - sigma * eps) / alpha
    shape = (-1, *[1] * (x.ndim - 1))
    u, v = (c.reshape(shape) for c in predictions.target_coefficients(schedule, prediction, t))
    return u * x0 + v * eps


# --- the score shift --------------------------------------------------------------------------------------------------

CASES = [
    *((COSINE, p, torch.tensor([900, 400, 30])) for p in ("eps", "x0", "v", "score", "velocity", "mu")),
    *((COSINE, p, torch.tensor([900.0, 400.25, 30.0])) for p in ("eps", "v", "velocity")),
    *((FLOW, p, torch.tensor([0.1, 0.5, 0.95], dtype=torch.float64)) for p in ("velocity", "eps", "x0", "score")),
    *((schedules.vp(), p, torch.tensor([0.9, 0.4, 0.02], dtype=torch.float64)) for p in ("eps", "v", "velocity")),
    *((schedules.sub_vp(), p, torch.tensor([0.9, 0.4, 0.1], dtype=torch.float64)) for p in ("eps", "score")),
    *((schedules.ve(), p, torch.tensor([0.9, 0.4, 0.1], dtype=torch.float64)) for p in ("score", "x0")),
    *((EDM, p, torch.tensor([20.0, 1.0, 0.1], dtype=torch.float64)) for p in ("x0", "eps", "edm")),
]


@pytest.mark.parametrize(("schedule", "prediction", "t"), CASES, ids=[f"{s.name}-{p}-{t.dtype}" for s, p, t in CASES])
@pytest.mark.parametrize("scale", [1.0, 2.5, torch.tensor([0.0, 1.0, 4.0])], ids=["1", "2.5", "each"])
def test_score_shift_is_the_guided_score(schedule: Any, prediction: str, t: Tensor, scale: Any) -> None:
    """score of p(x) p(y given x)^scale for mixtures of Gaussian classes; scale 1: the class itself."""
    x, y = noise(*SHAPE), torch.tensor([0, 2, 1])
    given, time = x, t
    if prediction == "edm":
        given, time = x * levels_of_input(t, x), schedule.model_time("edm", t)

    def model(x_in: Tensor, t_in: Tensor) -> Tensor:
        assert torch.equal(x_in, given)
        return as_prediction(schedule, prediction, mixture_score(schedule, x, t), x, t)

    guided = classifier_guided(model, classifier_gradient(classifier(schedule), y, scale), schedule, prediction)
    marginal, own = mixture_score(schedule, x, t), torch.stack(scores(schedule, x, t), 1)[torch.arange(3), y]
    factor = torch.as_tensor(scale, dtype=torch.float64).expand(3).reshape(3, 1, 1, 1)
    want = as_prediction(schedule, prediction, marginal + factor * (own - marginal), x, t)
    torch.testing.assert_close(guided(given, time), want, rtol=1e-7, atol=1e-9)


def levels_of_input(t: Tensor, x: Tensor) -> Tensor:
    return EDM.input_scale("edm", t).reshape(-1, *[1] * (x.ndim - 1))


@pytest.mark.parametrize("prediction", ["eps", "v", "velocity"])
def test_times_of_every_form(prediction: str) -> None:
    x, gradient = noise(*SHAPE), lambda x, t: torch.cos(x)
    for schedule, t in ((COSINE, 400), (schedules.vp(), 0.4)):
        guided = classifier_guided(lambda x, t: torch.sin(x), gradient, schedule, prediction)
        want = torch.sin(x) + score_shift(schedule, prediction, t) * torch.cos(x)
        dtype = torch.int64 if isinstance(t, int) else torch.float64
        for time in (torch.full(shape, t, dtype=dtype) for shape in ((), (3,), (1,))):
            torch.testing.assert_close(guided(x, time), want, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(guided(x, t), want, rtol=1e-6, atol=1e-6)


def test_a_subsequence_is_given_the_times_of_the_whole_table() -> None:
    kept = LINEAR.subsequence([3, 10, 200, 999])
    x, t = noise(*SHAPE), torch.tensor([999, 3, 200])
    for schedule in (kept, LINEAR.subsequence([3, 200, 999])):
        guided = classifier_guided(lambda x, t: 0 * x, lambda x, t: torch.ones_like(x), schedule, "eps")
        for time in (t, t.double()):
            want = -LINEAR.sigma(t).reshape(3, 1, 1, 1).expand(SHAPE)
            torch.testing.assert_close(guided(x, time), want)
    between = classifier_guided(lambda x, t: 0 * x, lambda x, t: torch.ones_like(x), kept, "eps")(x, 105.0)
    assert float(LINEAR.sigma(10)) < -float(between[0, 0, 0, 0]) < float(LINEAR.sigma(200))
    one = classifier_guided(lambda x, t: 0 * x, lambda x, t: torch.ones_like(x), LINEAR.subsequence([7]), "eps")
    torch.testing.assert_close(one(x, 7), -LINEAR.sigma(7).expand(SHAPE))
    with pytest.raises(ValueError, match=r"t must be times of linear\[4 of 1000\], got \[2, -1, 2\]"):
        classifier_guided(lambda x, t: 0 * x, lambda x, t: x, kept, "eps")(x, torch.tensor([200, 100, 200]))


def test_where_alpha_is_0() -> None:
    """Pure noise says nothing about y: not shifted, but eps and score, whose shift needs no alpha."""
    x = noise(*SHAPE)
    for schedule, t in ((FLOW, 0.0), (schedules.zero_terminal_snr(LINEAR), 999)):
        for prediction in ("v", "velocity", "x0"):
            if schedule is FLOW or prediction != "velocity":
                guided = classifier_guided(lambda x, t: 2 * x, lambda x, t: torch.cos(x), schedule, prediction)
                assert torch.equal(guided(x, t), 2 * x)
        torch.testing.assert_close(
            classifier_guided(lambda x, t: 2 * x, lambda x, t: torch.cos(x), schedule, "eps")(x, t),
            2 * x - torch.cos(x),
        )


def test_guided_diffusions_formulas() -> None:
    """condition_score and condition_mean of guided-diffusion, written out from the published algorithms."""
    x, y, t = noise(*SHAPE), torch.tensor([0, 2, 1]), torch.tensor([900, 400, 30])
    abar = COSINE.alphas_cumprod[t].reshape(3, 1, 1, 1)
    eps = as_prediction(COSINE, "eps", mixture_score(COSINE, x, t), x, t)
    leaf = x.clone().requires_grad_()
    chosen = classifier(COSINE)(leaf, t).log_softmax(-1)[range(3), y]
    (cond_fn,) = torch.autograd.grad(chosen.sum(), leaf)
    gradient = classifier_gradient(classifier(COSINE), y, 1.7)
    torch.testing.assert_close(gradient(x, t), 1.7 * cond_fn)
    want = eps - (1 - abar).sqrt() * 1.7 * cond_fn
    torch.testing.assert_close(classifier_guided(lambda x, t: eps, gradient, COSINE, "eps")(x, t), want)
    # the mean shift, through the loop: one DDPM step from each time
    for b, time in enumerate(t.tolist()):
        one = x[b : b + 1]
        plan = samplers.ddpm(COSINE, timesteps=[time, 0], variance="beta")
        x0 = (one - (1 - abar[b]).sqrt() * eps[b : b + 1]) / abar[b].sqrt()
        mean, _ = predictions.posterior(x0, one, time, COSINE, 0)
        variance = COSINE.beta(time, 0)
        z = noise(1, *SHAPE[1:], seed=4)
        given = classifier_gradient(classifier(COSINE), int(y[b]), 1.7)
        states = sample(
            lambda x, t, b=b: eps[b : b + 1], one, plan, noise=[z], mean_shift=given, trajectory=True
        ).trajectory
        want = mean + variance * 1.7 * cond_fn[b : b + 1] + variance.sqrt() * z
        torch.testing.assert_close(states[1], want)


# --- sampling ---------------------------------------------------------------------------------------------------------


def posterior_case(schedule: Any, y: float, tau: float) -> tuple[Any, Gaussian]:
    """Data N(0, 1) observed as y = x0 + tau z: (ln p(y given x_t), the exact posterior of x0)."""

    def log_prob(x: Tensor, t: Any) -> Tensor:
        alpha, sigma = levels(schedule, t.double(), x) if t.is_floating_point() else levels(schedule, t, x)
        total = alpha**2 + sigma**2
        mean, variance = alpha * x / total, sigma**2 / total + tau**2
        return (-0.5 * ((y - mean) ** 2 / variance)).flatten(1).sum(1)

    return log_prob, Gaussian(y / (1 + tau**2), tau / math.sqrt(1 + tau**2))


@pytest.mark.parametrize("name", ["ddim", "dpmpp_2m_v", "flow", "edm"])
def test_guided_samples_follow_the_posterior(name: str) -> None:
    """Any log p(y given x_t): the samples are the transport of their start to the exact posterior."""
    schedule, plan = {
        "ddim": (LINEAR, samplers.ddim(LINEAR, 400)),
        "dpmpp_2m_v": (LINEAR, samplers.dpmpp_2m(LINEAR, 50, spacing="log_snr", prediction="v")),
        "flow": (FLOW, samplers.heun(FLOW, 60)),
        "edm": (EDM, samplers.heun(EDM, 40)),
    }[name]
    data, (log_prob, posterior) = Gaussian(0.0, 1.0), posterior_case(schedule, 0.8, 0.6)
    exact = data.model(schedule, plan.prediction)
    guided = classifier_guided(
        lambda x, t: exact(x, float(t[0])), log_prob_gradient(log_prob), schedule, plan.prediction
    )
    x = initial(plan, SHAPE, SEEDS, torch.float64)
    first = FLOW.noise_end if name == "flow" else EDM.sigma_max if name == "edm" else plan.rows[0].time
    start = (float(schedule.alpha(first)), float(schedule.sigma(first)))
    got = sample(guided, x, plan)
    torch.testing.assert_close(got, posterior.ode(x, start, (1.0, 0.0)), rtol=0, atol=0.02)


def test_mean_shift_samples_the_class() -> None:
    """DDPM with the exact classifier's mean shift: the mean and the spread of the class, up to the step's error."""
    plan = samplers.ddpm(LINEAR, 80, spacing="log_snr", variance="beta")
    x = initial(plan, (1024, 1), 5, torch.float64)
    data = CLASSES[2]

    def model(x: Tensor, t: Tensor) -> Tensor:
        return as_prediction(LINEAR, "eps", mixture_score(LINEAR, x, t), x, t)

    got = sample(model, x, plan, seeds=5, mean_shift=classifier_gradient(classifier(LINEAR), 2))
    assert abs(float(got.mean()) - data.mean) < 0.05
    assert abs(float(got.std()) - data.std) < 0.05
    assert float(sample(model, x, plan, seeds=5).mean()) < 0.3


def test_after_classifier_free_guidance() -> None:
    """A guided model is a model: both kinds of guidance at once."""

    def net(x: Tensor, t: Any, c: Tensor) -> Tensor:
        return torch.tanh(x + c.reshape(-1, 1, 1, 1))

    x, t, c = noise(*SHAPE), torch.tensor([900, 400, 30]), torch.tensor([0.1, 0.5, -0.5], dtype=torch.float64)
    inner = guidance.classifier_free(net, c, 0 * c, 3.0)
    gradient = classifier_gradient(classifier(COSINE), 1)
    got = classifier_guided(inner, gradient, COSINE, "v")(x, t)
    shift = score_shift(COSINE, "v", t).reshape(3, 1, 1, 1)
    torch.testing.assert_close(got, inner(x, t) + shift * gradient(x, t))


# --- batches, learned variance, cost ----------------------------------------------------------------------------------


@pytest.mark.parametrize("t", [torch.tensor([900, 400, 30]), torch.tensor([900.5, 400.25, 30.0])], ids=["int", "float"])
def test_a_sample_does_not_depend_on_its_batch(t: Tensor) -> None:
    x = noise(*SHAPE, dtype=torch.float32)
    scale = torch.tensor([0.5, 1.0, 4.0])

    def guided(pick: Any) -> Any:
        gradient = log_prob_gradient(lambda x, t: torch.sin(x).flatten(1).sum(1), scale[pick])
        return classifier_guided(lambda x, t: torch.tanh(x), gradient, COSINE, "v")

    whole = guided(slice(None))(x, t)
    for pick in ([0], [1], [2], [2, 0], [1, 2]):
        assert torch.equal(guided(pick)(x[pick], t[pick]), whole[pick])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_learned_variances_are_left_alone(dtype: torch.dtype) -> None:
    x, t = noise(*SHAPE, dtype=dtype), torch.tensor([900, 400, 30])
    both = torch.cat([torch.sin(x), torch.cos(x)], 1)
    gradient = lambda x, t: torch.tanh(x)  # noqa: E731
    got = classifier_guided(lambda x, t: both, gradient, COSINE, "eps")(x, t)
    assert got.dtype == dtype
    assert torch.equal(got[:, 2:], both[:, 2:])
    assert torch.equal(got[:, :2], classifier_guided(lambda x, t: torch.sin(x), gradient, COSINE, "eps")(x, t))


@pytest.mark.parametrize("learned", [False, True])
@pytest.mark.parametrize("wide", [torch.float32, torch.float64])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_models_precision_is_not_that_of_a_16_bit_state(dtype: torch.dtype, wide: torch.dtype, learned: bool) -> None:
    x, t = noise(*SHAPE, dtype=dtype), torch.tensor([900, 400, 30])
    m = torch.sin(3 * x.to(wide)) + 1e-4
    model = (lambda x, t: torch.cat([m, m], 1)) if learned else lambda x, t: m
    got = classifier_guided(model, lambda x, t: torch.tanh(x), COSINE, "v")(x, t)[:, :2]
    assert got.dtype == wide
    shift = score_shift(COSINE, "v", t).reshape(3, 1, 1, 1)
    tolerance = 1e-6 if wide == torch.float32 else 1e-14
    torch.testing.assert_close(
        got.double(), m.double() + shift * torch.tanh(x).double(), rtol=tolerance, atol=tolerance
    )


def test_training_after_inference_mode() -> None:
    x, t = noise(*SHAPE), torch.tensor([900, 400, 30])
    scale = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)
    guided = classifier_guided(lambda x, t: scale * x, lambda x, t: torch.cos(x), COSINE, "v")
    with torch.inference_mode():
        want = guided(x, t)
    got = guided(x, t)
    torch.testing.assert_close(got.detach(), want.clone())
    (gradient,) = torch.autograd.grad(got.sum(), scale)
    torch.testing.assert_close(gradient, x.sum())


def test_one_op_a_call() -> None:
    x = noise(*SHAPE, dtype=torch.float32)
    for schedule, prediction, t, ops_ in (
        (COSINE, "v", torch.tensor([900, 400, 30]), 1),
        (FLOW, "velocity", torch.tensor([0.1, 0.4, 0.9]), 1),
        (EDM, "edm", torch.tensor([0.1, 0.4, 0.9]), 2),
    ):
        guided = classifier_guided(lambda x, t: x, lambda x, t: x, schedule, prediction)
        guided(x, t)
        with torch.no_grad(), CountOps(SHAPE) as count:
            guided(x, t)
        assert dict(count.fused) == {"step": ops_}
        assert not count.large


# --- gradients --------------------------------------------------------------------------------------------------------


class Net(torch.nn.Module):
    """A small classifier with parameters, dropout and normalisation."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(32, 16), torch.nn.SiLU())
        self.head = torch.nn.Linear(16, 5)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return self.head(self.layers(x) * (1 + 0.001 * t[:, None]))


def test_any_torch_classifier() -> None:
    torch.manual_seed(0)
    net, x, t = Net(), noise(*SHAPE, dtype=torch.float32), torch.tensor([900, 400, 30])
    y = torch.tensor([4, 0, 2])
    leaf = x.clone().requires_grad_()
    (want,) = torch.autograd.grad(-torch.nn.functional.cross_entropy(net(leaf, t), y, reduction="sum"), leaf)
    torch.testing.assert_close(classifier_gradient(net, y)(x, t), want)
    scale = torch.tensor([1.0, 2.0, 3.0])
    torch.testing.assert_close(classifier_gradient(net, y, scale)(x, t), want * scale.reshape(3, 1, 1, 1))
    torch.testing.assert_close(classifier_gradient(net, 4, 2)(x, t)[0], 2 * want[0])
    with torch.no_grad():
        torch.testing.assert_close(classifier_gradient(net, y)(x, t), want)
    with torch.inference_mode():
        inside = x + 0
        torch.testing.assert_close(classifier_gradient(net, y)(inside, t + 0), want)
    assert all(parameter.grad is None for parameter in net.parameters())
    assert not x.requires_grad


def test_classifiers_in_half_precision() -> None:
    """The log-probabilities of 16-bit logits are taken in float32: the gradient has one rounding, of the result."""
    x, t = 4 * noise(*SHAPE, dtype=torch.bfloat16), torch.tensor([900, 400, 30])
    got = classifier_gradient(lambda x, t: x.flatten(1)[:, :3], 1)(x, t)
    assert got.dtype == torch.bfloat16
    wide = classifier_gradient(lambda x, t: x.flatten(1)[:, :3], 1)(x.float(), t)
    torch.testing.assert_close(got, wide.to(torch.bfloat16), rtol=0, atol=0)


# --- bad input --------------------------------------------------------------------------------------------------------

X, T = noise(*SHAPE, dtype=torch.float32), torch.tensor([900, 400, 30])


def good(x: Tensor, t: Any) -> Tensor:
    return x.flatten(1)[:, :4]


def frozen(x: Tensor, t: Any) -> Tensor:
    with torch.no_grad():
        return good(x, t)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: classifier_gradient(frozen, 0)(X, T), r"classifier must be differentiable in x, got .* no_grad"),
        (lambda: classifier_gradient(lambda x, t: good(x, t).detach(), 0)(X, T), r"classifier must be differentiable"),
        (lambda: classifier_gradient(lambda x, t: torch.ones(3, 4, requires_grad=True), 0)(X, T), r"without a grad"),
        (lambda: classifier_gradient(good, 4)(X, T), r"y must be classes in 0..3, got 4"),
        (lambda: classifier_gradient(good, torch.tensor([0, -1, 2]))(X, T), r"y must be classes .* \[0, -1, 2\]"),
        (lambda: classifier_gradient(good, torch.tensor([0, 1]))(X, T), r"y must have one class a sample \(3\), got"),
        (lambda: classifier_gradient(good, torch.tensor([0.5])), r"y must be a class .* got torch.float32"),
        (lambda: classifier_gradient(good, "cat"), r"y must be a class or int64 \[B\], got str"),
        (lambda: classifier_gradient(good, True), r"y must be a class or int64 \[B\], got bool"),
        (lambda: classifier_gradient(good, 0, "2"), r"scale must be a finite number or one a sample \[B\], got '2'"),
        (lambda: classifier_gradient(good, 0, math.nan), r"scale must be a finite number .* got nan"),
        (lambda: classifier_gradient(good, 0, torch.ones(3, 1)), r"scale must be .* got torch.float32 \[3, 1\]"),
        (lambda: classifier_gradient(good, 0, torch.ones(2))(X, T), r"scale must have one entry a sample \(3\), got"),
        (lambda: classifier_gradient(lambda x, t: x, 0)(X, T), r"classifier must return logits of shape \[3, K\], got"),
        (lambda: classifier_gradient(lambda x, t: None, 0)(X, T), r"classifier must return logits .* got NoneType"),
        (lambda: log_prob_gradient(lambda x, t: x.sum())(X, T), r"log_prob must return one value a sample \[3\], got"),
        (lambda: log_prob_gradient(lambda x, t: 0.0)(X, T), r"log_prob must return one value a sample .* got float"),
        (lambda: classifier_guided(good, None, COSINE), r"gradient must be callable, got NoneType"),
        (lambda: classifier_guided(3, good, COSINE), r"model must be callable, got int"),
        (lambda: classifier_guided(good, good, COSINE, "noise"), r"prediction must be one of eps, .* got 'noise'"),
        (lambda: classifier_guided(good, good, FLOW, "mu"), r"prediction 'mu' needs a discrete schedule, got flow"),
        (lambda: classifier_guided(good, good, COSINE, "edm"), r"prediction 'edm' needs an EDM schedule, got cosine"),
        (lambda: classifier_guided(good, good, COSINE)(X, T), r"model must return .* \[3, 2, 4, 4\], got"),
        (lambda: classifier_guided(lambda x, t: x, good, COSINE)(X, T), r"gradient must return .* \[3, 2"),
        (lambda: classifier_guided(lambda x, t: x, lambda x, t: x, COSINE)(X, T + 500), r"t must be times of cosine"),
        (lambda: classifier_guided(lambda x, t: x, lambda x, t: x, COSINE)(X, T[:2] + 0.5), r"t must be a number"),
        (lambda: classifier_guided(lambda x, t: x, lambda x, t: x, COSINE)(X, T[:2]), r"t must be a number .*\[2\]"),
    ],
)  # fmt: skip
def test_bad_input(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()
