"""Classifier guidance by score shift and by mean shift: closed forms, the published formulas, any classifier."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers.classifier_cases import (
    COSINE,
    EDM,
    FLOW,
    LINEAR,
    SHAPE,
    as_prediction,
    classifier,
    mixture_score,
    noise,
    scores,
)
from torch import Tensor

from diffkern import samplers, schedules
from diffkern.guidance import classifier_gradient, classifier_guided, score_shift
from diffkern.sampling import sample
from diffkern.schedules import predictions

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
