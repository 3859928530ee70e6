"""Classifier guidance in use: sampling, batches, learned variances, cost, gradients, bad input."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from helpers.classifier_cases import (
    CLASSES,
    COSINE,
    EDM,
    FLOW,
    LINEAR,
    SHAPE,
    as_prediction,
    classifier,
    levels,
    mixture_score,
    noise,
)
from helpers.op_counter import CountOps
from helpers.oracles import Gaussian
from torch import Tensor

from diffkern import guidance, samplers
from diffkern.guidance import classifier_gradient, classifier_guided, log_prob_gradient, score_shift
from diffkern.sampling import initial, sample

SEEDS = torch.tensor([11, -5, 2**62], dtype=torch.int64)


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
        assert count.large == {"clone": 1}  # the model's own


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
        (lambda: classifier_gradient(lambda x, t: None, 0)(X, T), r"classifier must return a tensor, got NoneType"),
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
