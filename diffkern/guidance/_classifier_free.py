"""The ways to guide with conditions, each a `Guided`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from numbers import Real
from typing import Any, get_args

from torch import Tensor

from diffkern.checks import unknown
from diffkern.guidance._guided import Branch, Guided, Model, Weight
from diffkern.guidance._spans import time_span
from diffkern.names import GuidanceForm, Prediction
from diffkern.plan import Plan
from diffkern.schedules.base import Schedule

FORMS = get_args(GuidanceForm)


def classifier_free(
    model: Model,
    cond: Any,
    uncond: Any,
    weight: Weight,
    *,
    form: GuidanceForm = "scale",
    rescale: float = 0.0,
    interval: tuple[float, float] | None = None,
    sigma_interval: tuple[float, float] | None = None,
    plan: Plan | None = None,
    schedule: Schedule | None = None,
    prediction: Prediction | None = None,
    batched: bool = True,
    keywords: bool = False,
) -> Guided:
    """Classifier-free guidance: u + w (c - u), u = model(x, t, uncond), c = model(x, t, cond).

    Ho and Salimans, arXiv 2207.12598; lectures 000 and 002. With a prompt to stay away from as ``uncond`` it is the
    negative prompt. The weights of c and u add up to 1, so in every prediction (eps, x0, v, score, velocity, mu, edm)
    it is the same guided score s_u + w (s_c - s_u), that of p(x) p(y given x)^w.

    - ``cond``, ``uncond``: tensors with one entry a sample or a single one for all, or dicts, lists and tuples of
      them, nested; numbers, strings and None in them are passed on. They are put together for the batched call at
      the first use, and later changes in place are not seen: make a new guided model for new conditions. Those that
      require a gradient are put together at every call.
    - ``weight``: w, a number, one a sample (a tensor [B]), or a function of the model times t [B] that returns either.
      1 is the conditional model alone, 0 the unconditional one. ``form="paper"``: (1 + w) c - w u, whose w is one less
      (the original formulation, as diffusers calls it).
    - ``rescale``: phi in [0, 1] of arXiv 2305.08891, m (phi std(c)/std(m) + 1 - phi), std unbiased and per sample;
      0.7 is usual. Where std(m) is 0 nothing is rescaled.
    - ``interval`` = (start, stop), fractions of the steps of ``plan``: guided from step floor(start S) up to, without,
      step floor(stop S), else conditional. ``sigma_interval`` = (low, high): guided where low < sigma/alpha <= high in
      ``schedule``, whose model predicts ``prediction`` (the plan's, or the schedule's own) (arXiv 2404.07724). Where
      the whole batch is outside, the model is called with ``cond`` alone.
    - ``batched``: one call on [2B] inputs, [uncond | cond], else two calls (conditions of different lengths, memory).
    - ``keywords``: the conditions are dicts of keyword arguments, model(x, t, **cond).

    One fused op a call, with ``rescale`` two and two reductions. Raises ValueError, naming argument, rule and value,
    for what does not fit.
    """
    if form not in FORMS:
        raise ValueError(unknown("form", form, FORMS))
    return Guided(
        (Branch("uncond", model, uncond), Branch("cond", model, cond)),
        ((1, 0),),
        [("weight", weight if form == "scale" else _plus_one(weight))],
        kept=1,
        rescale=rescale,
        span=time_span(interval, sigma_interval, plan, schedule, prediction),
        batched=batched,
        keywords=keywords,
    )


def compose(
    model: Model,
    conds: Sequence[Any],
    uncond: Any,
    weights: Sequence[Weight],
    *,
    interval: tuple[float, float] | None = None,
    sigma_interval: tuple[float, float] | None = None,
    plan: Plan | None = None,
    schedule: Schedule | None = None,
    prediction: Prediction | None = None,
    batched: bool = True,
    keywords: bool = False,
) -> Guided:
    """Several conditions at once: u + sum_j w_j (c_j - u), a product of experts (Liu et al., arXiv 2206.01714).

    A condition with a negative weight is kept away from. ``conds`` and ``weights`` are lists of one length; the rest
    as in `classifier_free`, with one call on [(J + 1) B] inputs. Outside an interval all w_j are 1. Of learned
    variances the first condition's is kept. One fused op up to three conditions, one more for every four after that.
    """
    if not isinstance(conds, list | tuple) or not conds:
        raise ValueError(f"conds must be a list of at least one condition, got {type(conds).__name__}")
    if isinstance(weights, Tensor) or len(weights) != len(conds):
        got = f"{len(conds)} conditions and " + (
            f"a tensor {list(weights.shape)}" if isinstance(weights, Tensor) else f"{len(weights)} weights"
        )
        raise ValueError(f"weights must be a list with one weight a condition, got {got}")
    return Guided(
        [Branch("uncond", model, uncond), *(Branch(f"conds[{j}]", model, cond) for j, cond in enumerate(conds))],
        [(j + 1, 0) for j in range(len(conds))],
        [(f"weights[{j}]", weight) for j, weight in enumerate(weights)],
        kept=1,
        span=time_span(interval, sigma_interval, plan, schedule, prediction),
        batched=batched,
        keywords=keywords,
    )


def nested(
    model: Model,
    conds: Sequence[Any],
    weights: Sequence[Weight],
    *,
    rescale: float = 0.0,
    interval: tuple[float, float] | None = None,
    sigma_interval: tuple[float, float] | None = None,
    plan: Plan | None = None,
    schedule: Schedule | None = None,
    prediction: Prediction | None = None,
    batched: bool = True,
    keywords: bool = False,
) -> Guided:
    """Conditions that each add to the one before: m_0 + sum_j w_j (m_j - m_(j-1)), m_j = model(x, t, conds[j]).

    InstructPix2Pix (arXiv 2211.09800, eq. 3) is ``nested(model, [nothing, image, image_and_text], [1.5, 7.5])``; two
    conditions are `classifier_free`. Weights of 1 are the last condition alone; it is what an interval leaves outside,
    what a rescale takes its std from, and whose learned variance is kept. The rest as in `classifier_free`.
    """
    if not isinstance(conds, list | tuple) or len(conds) < 2:
        got = f"{len(conds)} of them" if isinstance(conds, list | tuple) else type(conds).__name__
        raise ValueError(f"conds must be a list of at least two conditions, from none to all, got {got}")
    if isinstance(weights, Tensor) or len(weights) != len(conds) - 1:
        got = f"a tensor {list(weights.shape)}" if isinstance(weights, Tensor) else f"{len(weights)} weights"
        raise ValueError(f"weights must be a list of {len(conds) - 1}, one a step between conditions, got {got}")
    if rescale and len(conds) > SINGLE_OP:
        raise ValueError(f"rescale works for up to {SINGLE_OP} conditions, got {len(conds)}")
    return Guided(
        [Branch(f"conds[{j}]", model, cond) for j, cond in enumerate(conds)],
        [(j + 1, j) for j in range(len(weights))],
        [(f"weights[{j}]", weight) for j, weight in enumerate(weights)],
        kept=len(conds) - 1,
        rescale=rescale,
        span=time_span(interval, sigma_interval, plan, schedule, prediction),
        batched=batched,
        keywords=keywords,
    )


SINGLE_OP = 5
"""As many conditions does one op combine: the first, and one a history."""


def autoguidance(
    model: Model,
    weak: Model,
    weight: Weight,
    *,
    rescale: float = 0.0,
    interval: tuple[float, float] | None = None,
    sigma_interval: tuple[float, float] | None = None,
    plan: Plan | None = None,
    schedule: Schedule | None = None,
    prediction: Prediction | None = None,
) -> Guided:
    """Guidance by a worse model of the same thing: m_weak + w (m - m_weak) (Karras et al., arXiv 2406.02507).

    Both are called as model(x, t, ...) with the arguments the guided model is given, such as the ``cond`` of `sample`.
    The rest as in `classifier_free`.
    """
    return Guided(
        (Branch("weak", weak, has_cond=False), Branch("model", model, has_cond=False)),
        ((1, 0),),
        [("weight", weight)],
        kept=1,
        rescale=rescale,
        span=time_span(interval, sigma_interval, plan, schedule, prediction),
    )


def interval_weights(
    plan: Plan,
    weight: float,
    *,
    interval: tuple[float, float] | None = None,
    sigma_interval: tuple[float, float] | None = None,
    schedule: Schedule | None = None,
) -> list[float]:
    """One weight a row for ``sample(..., guidance=)`` or `Plan.with_guidance`: ``weight`` inside the interval, else 1.

    The guidance that `sample` itself does inside its one op a step, in the same intervals as `classifier_free`.
    """
    span = time_span(interval, sigma_interval, plan, schedule, None)
    if span is None:
        raise ValueError("interval or sigma_interval must be given, got neither")
    return [float(weight) if span.holds(row.time) else 1.0 for row in plan.rows]


def _plus_one(weight: Weight) -> Weight:
    if callable(weight) and not isinstance(weight, Tensor):
        return _later(weight)
    return weight if isinstance(weight, bool) or not isinstance(weight, Real | Tensor) else 1.0 + weight


def _later(weight: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    return lambda t: 1.0 + weight(t)
