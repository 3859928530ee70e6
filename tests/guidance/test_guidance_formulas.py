"""Guided outputs: their formulas, weights and rescale, and what guidance does to data known in closed form."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers.guidance_cases import (
    COSINE,
    EDM,
    FLOW,
    LINEAR,
    SEEDS,
    SHAPE,
    C,
    Calls,
    T,
    U,
    X,
    column,
    label,
    net,
    noise,
    rescale_noise_cfg,
)
from helpers.oracles import Gaussian
from helpers.tolerances import STATE_DTYPES, check
from torch import Tensor

from diffkern import samplers
from diffkern.guidance import autoguidance, classifier_free, compose, nested
from diffkern.plan import Plan
from diffkern.sampling import initial, sample
from diffkern.schedules import predictions

# --- formulas ---------------------------------------------------------------------------------------------------------


def fixed(*outputs: Tensor) -> Any:
    """A model whose prediction for the integer condition j is outputs[j]."""

    def model(x: Tensor, t: Any, j: Tensor) -> Tensor:
        return torch.cat([outputs[int(part[0])] for part in j.split(len(outputs[0]))])

    return model


def outputs(n: int, near: bool, dtype: torch.dtype) -> list[Tensor]:
    """Predictions that differ as if untrained, or by little, as those of a trained network do."""
    first = noise(*SHAPE, seed=1)
    return [
        (first + 0.03 * noise(*SHAPE, seed=2 + j) if near else noise(*SHAPE, seed=2 + j)).to(dtype) for j in range(n)
    ]


def combined(parts: list[Tensor], pairs: list[tuple[int, int]], weights: list[float]) -> Tensor:
    m = parts[0]
    for (a, b), w in zip(pairs, weights, strict=True):
        m = m + w * (parts[a] - parts[b])
    return m


WEIGHTS = [7.5, -1.3, 0.7, 2.0, 1.1, 0.4, 3.0, -2.0]


@pytest.mark.parametrize("near", [False, True], ids=["apart", "near"])
@pytest.mark.parametrize("dtype", STATE_DTYPES)
@pytest.mark.parametrize("kind", ["compose", "nested"])
@pytest.mark.parametrize("n", range(1, 9))
def test_error_against_float64(kind: str, n: int, dtype: torch.dtype, near: bool) -> None:
    """At most twice the error of plain torch in the same dtype, plus one rounding."""
    parts, weights = outputs(n + 1, near, dtype), WEIGHTS[:n]
    model = fixed(*parts)
    if kind == "compose":
        pairs = [(j + 1, 0) for j in range(n)]
        guided = compose(model, [label(j + 1) for j in range(n)], label(0), weights)
    else:
        pairs = [(j + 1, j) for j in range(n)]
        guided = nested(model, [label(j) for j in range(n + 1)], weights)
    exact = combined([part.double() for part in parts], pairs, weights)
    check(guided(X.to(dtype), 5), exact, combined(parts, pairs, weights), f"{kind} {n} {dtype}")


def test_two_conditions_are_classifier_free() -> None:
    want = classifier_free(net, C, U, 4.0)(X, T)
    assert torch.equal(compose(net, [C], U, [4.0])(X, T), want)
    assert torch.equal(nested(net, [U, C], [4.0])(X, T), want)
    assert torch.equal(classifier_free(net, C, U, 3.0, form="paper")(X, T), want)
    assert torch.equal(autoguidance(lambda x, t: net(x, t, C), lambda x, t: net(x, t, U), 4.0)(X, T), want)
    torch.testing.assert_close(want, 4 * net(X, T, C) - 3 * net(X, T, U))


def test_negative_prompts() -> None:
    """As uncond, or as a condition of negative weight."""
    bad = torch.tensor([0.9, 0.9, 0.9])
    u, c, n = net(X, T, U), net(X, T, C), net(X, T, bad)
    torch.testing.assert_close(classifier_free(net, C, bad, 4.0)(X, T), n + 4 * (c - n))
    torch.testing.assert_close(compose(net, [C, bad], U, [4.0, -1.5])(X, T), u + 4 * (c - u) - 1.5 * (n - u))


def test_instruct_pix2pix() -> None:
    """Equation 3 of arXiv 2211.09800."""
    image, both = torch.tensor([0.5, 0.6, 0.7]), torch.tensor([-1.0, 1.0, 2.0])
    e0, ei, eit = net(X, T, U), net(X, T, image), net(X, T, both)
    model = Calls()
    got = nested(model, [U, image, both], [1.5, 7.5])(X, T)
    torch.testing.assert_close(got, e0 + 1.5 * (ei - e0) + 7.5 * (eit - ei))
    assert model.sizes == [9]


def test_a_sum_that_is_one_branch_calls_it_alone() -> None:
    for weight, cond in ((1.0, C), (0.0, U), (1, C)):
        model = Calls()
        assert torch.equal(classifier_free(model, C, U, weight)(X, T), net(X, T, cond))
        assert model.sizes == [3]
    model = Calls()
    assert torch.equal(nested(model, [U, C, 2 * C], [1.0, 1.0])(X, T), net(X, T, 2 * C))
    assert torch.equal(nested(model, [U, C, 2 * C], [1.0, 0.0])(X, T), net(X, T, C))
    assert torch.equal(compose(model, [C, 2 * C], U, [0.0, 1.0])(X, T), net(X, T, 2 * C))
    assert model.sizes == [3, 3, 3]
    model = Calls()
    torch.testing.assert_close(
        compose(model, [C, 2 * C], U, [0.0, 2.0])(X, T), net(X, T, U) + 2 * (net(X, T, 2 * C) - net(X, T, U))
    )
    assert model.sizes in ([6], [9])


def test_a_guided_model_says_what_it_is() -> None:
    guided = classifier_free(net, C, U, 4.0, rescale=0.7, interval=(0.2, 0.8), plan=samplers.ddim(LINEAR, 10))
    assert repr(guided) == "Guided(uncond + 4.0 (cond - uncond), rescale=0.7, 101 <= t <= 700)"
    assert repr(nested(net, [U, C, U], [1.5, C])) == (
        "Guided(conds[0] + 1.5 (conds[1] - conds[0]) + weights[1] (conds[2] - conds[1]))"
    )


@pytest.mark.parametrize("dtype", STATE_DTYPES)
@pytest.mark.parametrize("phi", [0.3, 0.7, 1.0])
def test_rescale(phi: float, dtype: torch.dtype) -> None:
    u, c = outputs(2, False, dtype)

    def plain(u: Tensor, c: Tensor) -> Tensor:
        return rescale_noise_cfg(u + 6.0 * (c - u), c, phi)

    got = classifier_free(fixed(u, c), label(1), label(0), 6.0, rescale=phi)(X.to(dtype), 5)
    assert got.dtype == dtype
    check(got, plain(u.double(), c.double()), plain(u, c), f"rescale {dtype}")
    if phi == 1.0 and dtype == torch.float64:
        torch.testing.assert_close(got.flatten(1).std(1), c.flatten(1).std(1))
    torch.testing.assert_close(nested(fixed(u, c), [label(0), label(1)], [6.0], rescale=phi)(X.to(dtype), 5), got)


@pytest.mark.parametrize("form", ["scale", "paper"])
def test_diffusers_guider(form: str) -> None:
    """Both forms, the rescaling and the interval in steps of diffusers' ClassifierFreeGuidance, at every step."""
    guiders = pytest.importorskip("diffusers.guiders")
    guider = guiders.ClassifierFreeGuidance(
        guidance_scale=6.0, guidance_rescale=0.7, use_original_formulation=form == "paper", start=0.2, stop=0.8
    )
    plan = samplers.ddim(LINEAR, 13)
    guided = classifier_free(net, C, U, 6.0, form=form, rescale=0.7, interval=(0.2, 0.8), plan=plan)
    for step, row in enumerate(plan.rows):
        t = torch.full((3,), int(row.time))
        guider.set_state(step, 13, t)
        want = guider.forward(net(X, t, C), net(X, t, U) if guider.num_conditions == 2 else None).pred
        torch.testing.assert_close(guided(X, t), want, rtol=2e-6, atol=2e-6)


def test_rescale_of_nested_conditions() -> None:
    """To the std of the last condition, every term of the sum scaled."""
    parts = outputs(4, False, torch.float64)
    got = nested(fixed(*parts), [label(j) for j in range(4)], [1.5, 7.5, -2.0], rescale=0.7)(X.double(), 5)
    m = combined(parts, [(1, 0), (2, 1), (3, 2)], [1.5, 7.5, -2.0])
    torch.testing.assert_close(got, rescale_noise_cfg(m, parts[3], 0.7))


def test_rescale_where_nothing_varies() -> None:
    got = classifier_free(lambda x, t, c: 0 * x, C, U, 3.0, rescale=1.0)(X, T)
    assert torch.equal(got, torch.zeros_like(X))
    assert torch.equal(classifier_free(net, C, U, 1.0, rescale=0.7)(X, T), net(X, T, C))


# --- closed forms -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prediction", predictions.PREDICTIONS)
def test_guidance_is_of_the_score_in_every_prediction(prediction: str) -> None:
    """Two Gaussian classes: the guided score is s_u + w (s_c - s_u) whatever the model predicts."""
    schedule = EDM if prediction == "edm" else COSINE
    t: Any = 1.7 if prediction == "edm" else 400
    none, one = Gaussian(0.2, 0.9), Gaussian(-0.6, 0.4)
    x = noise(2, 3, 8, dtype=torch.float64)

    def model(x: Tensor, t: Any, y: Tensor) -> Tensor:
        u, c = (data.predict(schedule, prediction, x, t) for data in (none, one))
        return torch.where(column(y, x) == 1, c, u)

    got = classifier_free(model, torch.ones(2), torch.zeros(2), 3.0)(x, t)
    score = none.predict(schedule, "score", x, t)
    score = score + 3.0 * (one.predict(schedule, "score", x, t) - score)
    torch.testing.assert_close(predictions.convert(got, x, t, schedule, prediction, "score"), score)


@pytest.mark.parametrize("name", ["ddim", "dpmpp_2m", "flow"])
def test_guided_samples_of_gaussian_classes(name: str) -> None:
    """Classes of one width: the guided score is that of the Gaussian at u + w (c - u), and so are the samples."""
    schedule = FLOW if name == "flow" else LINEAR
    plan: Plan = {
        "ddim": samplers.ddim(LINEAR, 500),
        "dpmpp_2m": samplers.dpmpp_2m(LINEAR, 60, spacing="log_snr"),
        "flow": samplers.heun(FLOW, 60),
    }[name]
    means, width = (-0.3, 0.4), 0.5

    def model(x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        at = float(t[0]) if t.is_floating_point() else int(t[0])
        u, c = (Gaussian(mean, width).predict(schedule, plan.prediction, x, at) for mean in means)
        return torch.where(column(y, x) == 1, c, u)

    x = initial(plan, SHAPE, SEEDS, torch.float64)
    got = sample(classifier_free(model, torch.ones(3), torch.zeros(3), 2.5), x, plan)
    first = plan.rows[0].time
    start = (float(schedule.alpha(first)), float(schedule.sigma(first)))
    want = Gaussian(means[0] + 2.5 * (means[1] - means[0]), width).ode(x, start, (1.0, 0.0))
    torch.testing.assert_close(got, want, rtol=0, atol=0.02)
