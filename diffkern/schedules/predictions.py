"""What a network predicts, and every conversion between predictions.

A noisy sample is x = alpha x0 + sigma eps. Each prediction is a fixed mixture of the same two unknowns,

    target = u x0 + v eps

so one 2x2 system, with determinant alpha v - sigma u, turns any prediction into any other. Coefficients are float64.

| prediction | u | v | schedules | source |
|---|---|---|---|---|
| ``eps`` | 0 | 1 | all | arXiv 2006.11239; lectures 000, 001, 002 |
| ``x0`` | 1 | 0 | all | arXiv 2006.11239; lecture 001 |
| ``v`` | -sigma | alpha | all | arXiv 2202.00512 |
| ``score`` | 0 | -1/sigma | all | arXiv 2011.13456; lectures 000, 001, 003: the conditional score of q(x_t given x0) |
| ``velocity`` | d alpha/dt | d sigma/dt | all | arXiv 2210.02747; lectures 000, 003 |
| ``mu`` | c0 + ct alpha | ct sigma | discrete | lectures 000, 001, 002: posterior mean c0 x0 + ct x_t, t -> t-1 |
| ``edm`` | (1 - c_skip)/c_out | -c_skip sigma/c_out | EDM | arXiv 2206.00364: the preconditioned network's F |

Another library's name is taken too where it means one thing (`checks.PREDICTIONS_ELSEWHERE`: "epsilon", "v_prediction"
...), in any case and with - or a space for _; kept and printed is the one above. On an EDM schedule "epsilon" and
"v_prediction" are refused, as diffusers' EDM schedulers mean F and -F by them, and everywhere "flow_prediction", which
is eps - x0, the opposite of ``velocity`` on `flow`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, TypeVar, cast, get_args

import torch
from torch import Tensor

from diffkern.checks import EDM_ELSEWHERE, PREDICTIONS_ELSEWHERE, PREDICTIONS_OF_TWO_MEANINGS, unknown, word
from diffkern.modes import readable
from diffkern.names import Prediction

if TYPE_CHECKING:
    from diffkern.schedules.base import Schedule, Time
    from diffkern.schedules.discrete import DiscreteSchedule

Number = TypeVar("Number", float, Tensor)

PREDICTIONS = get_args(Prediction)


def check_prediction(prediction: str) -> Prediction:
    """The prediction of that name, ours or another library's (see the module's docstring).

    Raises ValueError with the known names for any other, and with the reason for one of two meanings.
    """
    if prediction in PREDICTIONS:
        return cast(Prediction, prediction)
    found = word(prediction, PREDICTIONS, PREDICTIONS_ELSEWHERE)
    if found is None:
        why = PREDICTIONS_OF_TWO_MEANINGS.get(word(prediction, PREDICTIONS_OF_TWO_MEANINGS) or "")
        if why is not None:
            raise ValueError(f"prediction must be one of {', '.join(PREDICTIONS)}, got {prediction!r}, {why}")
        raise ValueError(unknown("prediction", prediction, PREDICTIONS))
    return cast(Prediction, found)


def prediction_of(schedule: Schedule, prediction: str | None) -> Prediction:
    """`check_prediction` on a schedule, whose default None is.

    Raises ValueError also for names that mean something else on an EDM schedule in the library that they are from.
    """
    if prediction is None:
        return check_prediction(schedule.default_prediction)
    if prediction in PREDICTIONS:
        return cast(Prediction, prediction)
    elsewhere = word(prediction, EDM_ELSEWHERE) if schedule.default_prediction == "edm" else None
    if elsewhere is not None:
        ours = check_prediction(prediction)
        raise ValueError(
            f"prediction must be {ours!r} or 'edm' on an EDM schedule, got {prediction!r}: {ours!r} is that of x0 "
            f"+ sigma eps, 'edm' the preconditioned network of arXiv 2206.00364, {EDM_ELSEWHERE[elsewhere]}"
        )
    return check_prediction(prediction)


def with_predictions(data: Any, *fields: str) -> Any:
    """An object of JSON with the predictions in these ``fields`` by their names here; anything else as it is."""
    if not isinstance(data, Mapping):
        return data
    found = {name: word(data.get(name), PREDICTIONS, PREDICTIONS_ELSEWHERE) for name in fields}
    return {**data, **{name: value for name, value in found.items() if value is not None}}


def target_coefficients(schedule: Schedule, prediction: Prediction, t: Time) -> tuple[Tensor, Tensor]:
    """(u, v), float64 in the shape of ``t``: the prediction's target is u x0 + v eps (table in the module's docstring).

    Raises ValueError for an unknown prediction, a prediction that the schedule does not have, a time outside the
    schedule, and ``score`` where sigma is 0.
    """
    _, _, u, v = mixtures(schedule, prediction, t)
    return u, v


def mixtures(schedule: Schedule, prediction: Prediction, t: Time) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(alpha, sigma, u, v), float64 in the shape of ``t``: x = alpha x0 + sigma eps, and `target_coefficients`."""
    prediction = prediction_of(schedule, prediction)
    alpha, sigma = schedule.alpha(t), schedule.sigma(t)
    if prediction == "eps":
        return alpha, sigma, torch.zeros_like(alpha), torch.ones_like(alpha)
    if prediction == "x0":
        return alpha, sigma, torch.ones_like(alpha), torch.zeros_like(alpha)
    if prediction == "v":
        return alpha, sigma, -sigma, alpha
    if prediction == "score":
        if readable(sigma) and bool((sigma == 0).any()):
            raise ValueError(
                "prediction 'score' is -eps/sigma and has no value where sigma is 0: "
                f"{schedule.name}, t={_first(t, sigma == 0)}; take another prediction, or times without this one"
            )
        return alpha, sigma, torch.zeros_like(alpha), -1.0 / sigma
    if prediction == "velocity":
        return alpha, sigma, schedule.alpha_dot(t), schedule.sigma_dot(t)
    if prediction == "mu":
        coef_x0, coef_xt = schedule.posterior_mean_coefficients(t)
        return alpha, sigma, coef_x0 + coef_xt * alpha, coef_xt * sigma
    c_skip, c_out, _, _ = schedule.preconditioning(t)
    return alpha, sigma, (1.0 - c_skip) / c_out, -c_skip * sigma / c_out


def to_x0_eps(schedule: Schedule, prediction: Prediction, t: Time) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(p, q, P, Q), float64 in the shape of ``t``: x0 = p x + q m and eps = P x + Q m for the model output m at x.

    With det = alpha v - sigma u: p = v/det, q = -sigma/det, P = -u/det, Q = alpha/det.
    Raises ValueError where det is 0, because there the prediction says nothing about x0 (``eps`` at alpha = 0, such as
    the first time of a flow or the last of a zero-terminal-SNR table) or nothing about eps (``x0`` at sigma = 0).
    """
    alpha, sigma, u, v = mixtures(schedule, prediction, t)
    _check_det(alpha * v - sigma * u, schedule, prediction, t)
    return solve(alpha, sigma, u, v)


def solve(alpha: Number, sigma: Number, u: Number, v: Number) -> tuple[Number, Number, Number, Number]:
    """(p, q, P, Q) of `to_x0_eps` from x = alpha x0 + sigma eps and m = u x0 + v eps, all tensors or all floats."""
    det = alpha * v - sigma * u
    # "+ 0.0" turns -0.0 into 0.0, so that tables print and compare without surprises.
    return v / det + 0.0, -sigma / det + 0.0, -u / det + 0.0, alpha / det + 0.0


def estimates(alpha: Tensor, sigma: Tensor, u: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(p, q, P, Q) as `solve`, with NaN where the prediction does not determine them, and the limits where x does.

    Where sigma is 0, x0 = x/alpha; where alpha is 0, eps = x/sigma: also where det is 0, or infinite.
    """
    det = alpha * v - sigma * u
    lost = (det == 0) | ~det.isfinite()
    p, q, P, Q = solve(alpha, sigma, u, v)
    data, noise = lost & (sigma == 0), lost & (alpha == 0)
    nan = torch.full_like(det, torch.nan)
    p = torch.where(lost, torch.where(data, 1.0 / alpha, nan), p)
    q = torch.where(lost, torch.where(data, 0.0, nan), q)
    P = torch.where(lost, torch.where(noise, 1.0 / sigma, nan), P)
    Q = torch.where(lost, torch.where(noise, 0.0, nan), Q)
    return p, q, P, Q


def between(schedule: Schedule, source: Prediction, target: Prediction, t: Time) -> tuple[Tensor, Tensor]:
    """(cx, cm), float64 in the shape of ``t``: the ``target`` prediction is cx x + cm m for a ``source`` output m.

    Proportional predictions (``eps`` and ``score``) convert at every time; all others need det != 0, see `to_x0_eps`.
    """
    source, target = prediction_of(schedule, source), prediction_of(schedule, target)
    alpha, sigma, u, v = mixtures(schedule, source, t)
    u2, v2 = target_coefficients(schedule, target, t)
    if {source, target} == {"eps", "score"}:
        return torch.zeros_like(alpha), v2 / v
    det = alpha * v - sigma * u
    _check_det(det, schedule, source, t)
    return (u2 * v - v2 * u) / det + 0.0, (alpha * v2 - sigma * u2) / det + 0.0


def convert(m: Tensor, x: Tensor, t: Time, schedule: Schedule, source: Prediction, target: Prediction) -> Tensor:
    """Turn the model output ``m``, a ``source`` prediction at the noisy ``x`` and time ``t``, into a ``target`` one.

    ``m`` and ``x`` have one shape [B, ...]; ``t`` is a number or a tensor [B] (one time a sample). The result has the
    dtype of ``m``; arithmetic is float32 for 16-bit tensors, otherwise in their own dtype. ``source == target`` returns
    ``m`` itself. Raises ValueError for unequal shapes, a ``t`` of wrong length, and what `between` refuses.
    """
    source, target = prediction_of(schedule, source), prediction_of(schedule, target)
    if m.shape != x.shape:
        raise ValueError(f"m and x must have one shape, got {tuple(m.shape)} and {tuple(x.shape)}")
    if source == target:
        return m
    cx, cm = between(schedule, source, target, t)
    work = torch.promote_types(torch.promote_types(m.dtype, x.dtype), torch.float32)
    a, b = per_sample(cx, x, work), per_sample(cm, x, work)
    return (a * x.to(work) + b * m.to(work)).to(m.dtype)


def posterior(
    x0: Tensor, x: Tensor, t: Time, schedule: DiscreteSchedule, s: Time | None = None
) -> tuple[Tensor, Tensor]:
    """Mean [B, ...] and variance (beta-tilde, float64, shape of ``t``) of q(x_s given x_t, x0), s = t-1 by default.

    mean = sqrt(abar_s) beta/(1-abar_t) x0 + sqrt(abar_t/abar_s) (1-abar_s)/(1-abar_t) x_t, beta = 1 - abar_t/abar_s
    (arXiv 2006.11239, eq. 7; lectures 000, 001, 002). The mean has the dtype of ``x``.
    """
    if x0.shape != x.shape:
        raise ValueError(f"x0 and x must have one shape, got {tuple(x0.shape)} and {tuple(x.shape)}")
    coef_x0, coef_xt, variance = schedule.posterior(t, s)
    work = torch.promote_types(torch.promote_types(x0.dtype, x.dtype), torch.float32)
    mean = per_sample(coef_x0, x, work) * x0.to(work) + per_sample(coef_xt, x, work) * x.to(work)
    return mean.to(x.dtype), variance


def bridge(alpha: Tensor, sigma: Tensor, to_alpha: Tensor, to_sigma: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(coef_x0, coef_xt, beta_tilde, beta) of a reverse step between two levels of any path; tables: their `posterior`.

    q(x_s given x_t, x0) = N(coef_x0 x0 + coef_xt x_t, beta_tilde I), q(x_t given x_s) = N(alpha_t/alpha_s x_s, beta I).
    With r = alpha_t sigma_s/(alpha_s sigma_t): coef_x0 = alpha_s (1 - r^2), coef_xt = r sigma_s/sigma_t, beta_tilde =
    sigma_s^2 (1 - r^2), beta = sigma_t^2 (1 - r^2).
    """
    r = alpha * to_sigma / (to_alpha * sigma)
    left = ((1.0 - r) * (1.0 + r)).clamp(min=0.0)
    return to_alpha * left, r * to_sigma / sigma, to_sigma**2 * left, sigma**2 * left


def per_sample(coefficient: Tensor, x: Tensor, dtype: torch.dtype) -> Tensor:
    """Coefficients [] or [B] shaped to multiply x [B, ...]."""
    c = coefficient.to(device=x.device, dtype=dtype)
    if c.ndim == 0:
        return c
    if c.ndim != 1 or x.ndim == 0 or c.shape[0] != x.shape[0]:
        batch = x.shape[0] if x.ndim else 1
        raise ValueError(f"t must be a number or one time a sample, shape [{batch}], got shape {list(c.shape)}")
    return c.reshape(-1, *([1] * (x.ndim - 1)))


def _check_det(det: Tensor, schedule: Schedule, prediction: str, t: Time) -> None:
    # On a device the check would wait for it; there the result is inf or NaN, as for a time outside the table.
    if readable(det) and bool((det == 0).any()):
        raise ValueError(
            f"prediction {prediction!r} does not determine x0 and eps where alpha v - sigma u is 0: "
            f"{schedule.name}, t={_first(t, det == 0)}; take a prediction that does, or times without this one"
        )


def _first(t: Time, bad: Tensor) -> str:
    """The first of the times that are bad."""
    return str(t[bad.reshape(t.shape)].flatten()[0].item() if isinstance(t, Tensor) else t)
