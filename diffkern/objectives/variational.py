"""The variational bound L_vlb = L_T + sum_t L_t + L_0 in bits per dimension, learned variances and the hybrid loss.

    seeds = draw_seeds(len(x0))
    x_t = noised(x0, t, schedule, seeds=seeds)
    loss = hybrid_loss(model(x_t, t), x0, t, schedule, seeds=seeds)      # model puts out [B, 2C, ...]

    L_T = KL(q(x_T | x0) || N(0, I))                                     `prior_bits`
    L_t = KL(q(x_{t-1} | x_t, x0) || p(x_{t-1} | x_t)),  t > 0           `vlb_loss`, `hybrid_loss`, `bits_per_dim`
    L_0 = -ln P(bin of x0 | N(mean, variance)),  t = 0                   `decoder_bits`, and the three above

Data are uint8 images scaled by x / 127.5 - 1, so bins are 2/255 wide, the first and the last of them open; bits are
those of the integers, and no dequantisation is needed. Ho et al. 2020 (arXiv 2006.11239), eq. 5 to 13; Nichol and
Dhariwal 2021 (arXiv 2102.09672), eq. 15 and 16; lectures 000, 001, 002. The index t here is the papers' t - 1.

A learned variance is exp(v ln beta_t + (1 - v) ln beta_tilde_t) with v = (w + 1) / 2 of the network's second half of
channels w. Lecture 002 writes v for the output itself, in [0, 1]; the networks of the paper put out w in [-1, 1].
beta_tilde_0 is 0; where its logarithm is needed, beta_tilde_1 stands for it, as in the paper's code.
A step that adds no noise, between equal levels of a table (`cosine_arc` has some at both bounds), is the identity for q
and p alike: its L_t is 0, and the bound is that of the table without the repeated level.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from diffkern import ops, streams
from diffkern.checks import unwrapped
from diffkern.modes import kept
from diffkern.names import LearnedVariance, Prediction, Reduction
from diffkern.ops import HALF_BIN, VARIATIONAL_COLUMNS, Seeds
from diffkern.progress import progress_bar
from diffkern.schedules import predictions
from diffkern.schedules.base import check_constants
from diffkern.schedules.discrete import DiscreteSchedule

__all__ = [
    "BitsPerDim",
    "bits_per_dim",
    "decoder_bits",
    "hybrid_loss",
    "learned_log_variance",
    "log_variances",
    "prior_bits",
    "variational_table",
    "vlb_loss",
]

Variance = LearnedVariance | float
Model = Callable[..., Tensor]


def log_variances(schedule: DiscreteSchedule) -> tuple[Tensor, Tensor]:
    """(ln beta_tilde, ln beta), float64 [T]: the bounds of a learned variance; both -inf where a step adds no noise.

    Entry 0 of the first is that of t = 1, or of the first t > 0 that adds noise; ln beta_0 if none does.
    """
    t = torch.arange(schedule.T, device="cpu")
    lower, upper = schedule.posterior(t)[2].clone(), schedule.betas
    later = lower[1:][lower[1:] > 0]
    lower[0] = later[0] if len(later) else upper[0]
    return lower.log(), upper.log()


def _span(lower: Tensor, upper: Tensor) -> Tensor:
    """upper - lower of `log_variances`; 0 where both are -inf."""
    return torch.where(upper.isinf(), 0.0, upper - lower)


def learned_log_variance(w: Tensor, t: Tensor, schedule: DiscreteSchedule) -> Tensor:
    """ln of the learned variance for the network's output w in [-1, 1], [B, ...]; t [B] or [].

    v ln beta_t + (1 - v) ln beta_tilde_t, v = (w + 1) / 2; -inf where the step adds no noise. arXiv 2102.09672, eq. 15;
    lecture 002.
    """
    lower, upper = (
        bound.to(w.device)[t].to(torch.promote_types(w.dtype, torch.float32)) for bound in log_variances(schedule)
    )
    lower, upper = (bound.reshape(-1, *(1,) * (w.dim() - 1)) for bound in (lower, upper))
    return lower + _span(lower, upper) * (w + 1) / 2


def variational_table(
    schedule: DiscreteSchedule,
    prediction: Prediction = "eps",
    variance: Variance = "learned",
    *,
    clip: float = math.inf,
    half_bin: float = HALF_BIN,
    simple_weight: float = 0.0,
    vlb_weight: float = 1.0,
    mean_gradient: bool = True,
) -> Tensor:
    """Rows of the op `variational` for t = 0..T-1, float64 [T, 12] (`ops.VARIATIONAL_COLUMNS`).

    prediction: eps, x0, v, score, velocity or mu. variance: "beta", "beta_tilde", "learned", or a number v in [0, 1]
    for exp(v ln beta + (1 - v) ln beta_tilde). clip bounds the x0 that follows from the prediction.
    """
    check_constants(variance=variance, clip=clip, simple_weight=simple_weight, vlb_weight=vlb_weight)
    if not clip > 0:
        raise ValueError(f"clip must be positive (inf: no clipping), got {clip}")
    if not half_bin > 0:
        raise ValueError(f"half_bin must be positive, got {half_bin}")
    t = torch.arange(schedule.T, device="cpu")
    u, v = predictions.target_coefficients(schedule, prediction, t)
    lower, upper = log_variances(schedule)
    span = _span(lower, upper)
    zero = torch.zeros_like(lower)
    # A step without noise has no bound, and needs no x0 (which velocity and mu do not determine there).
    noisy = upper.isfinite()
    q = zero.clone()
    q[noisy] = predictions.to_x0_eps(schedule, prediction, t[noisy])[1]
    if variance == "learned":
        r0, r1 = span / 2, span / 2
    else:
        r0, r1 = _fraction(variance) * span, zero
        r0[0] = 0.0  # the paper's code has beta_tilde_1 here for every fixed variance
    coef_x0 = schedule.posterior(t)[0]
    inv_std = zero.clone()
    inv_std[0] = torch.exp(-lower[0] / 2)
    columns = {
        "u": u,
        "v": v,
        "q": q,
        "clip": zero + clip,
        "k2": torch.where(noisy, coef_x0**2 * torch.exp(-lower), 0.0),
        "r0": r0,
        "r1": r1,
        "inv_std": inv_std,
        "bin": zero + half_bin,
        "w_squares": zero + simple_weight,
        "w_bound": zero + vlb_weight,
        "w_mean": zero + float(mean_gradient),
    }
    return torch.stack([columns[name] for name in VARIATIONAL_COLUMNS], dim=1)


def _fraction(variance: Variance) -> float:
    names = {"beta": 1.0, "beta_tilde": 0.0}
    if isinstance(variance, str):
        if variance in names:
            return names[variance]
    elif 0.0 <= variance <= 1.0:
        return float(variance)
    raise ValueError(f"variance must be 'beta', 'beta_tilde', 'learned' or a number in [0, 1], got {variance!r}")


@kept(64)
def _table(
    schedule: DiscreteSchedule,
    prediction: Prediction,
    variance: Variance,
    clip: float,
    simple_weight: float,
    vlb_weight: float,
    mean_gradient: bool,
    device: torch.device,
) -> Tensor:
    return variational_table(
        schedule,
        prediction,
        variance,
        clip=clip,
        simple_weight=simple_weight,
        vlb_weight=vlb_weight,
        mean_gradient=mean_gradient,
    ).to(device)


def _check_discrete(schedule: DiscreteSchedule) -> None:
    if not isinstance(schedule, DiscreteSchedule):
        raise ValueError(f"schedule must be discrete for a variational bound, got {schedule!r}")


def _check(pred: Tensor, x0: Tensor, t: Tensor, schedule: DiscreteSchedule, variance: Variance) -> None:
    _check_discrete(schedule)
    if t.is_floating_point() or t.dim() > 1 or (t.dim() == 1 and len(t) != len(x0)):
        raise ValueError(
            f"t must be integers of shape [] or [{len(x0)}] (one time a sample), got {t.dtype} {list(t.shape)}"
        )
    learned = variance == "learned"
    shape = [x0.shape[0], 2 * x0.shape[1], *x0.shape[2:]] if learned and x0.dim() > 1 else list(x0.shape)
    if list(pred.shape) != shape:
        kind = "a learned variance (mean and variance as halves of the channels)" if learned else "a fixed variance"
        raise ValueError(f"pred must have shape {shape} for {kind}, got {list(pred.shape)}")


def hybrid_loss(
    pred: Tensor,
    x0: Tensor,
    t: Tensor,
    schedule: DiscreteSchedule,
    prediction: Prediction = "eps",
    *,
    seeds: Seeds | None = None,
    noise: Tensor | None = None,
    stream: int = streams.TRAINING,
    vlb_weight: float = 1e-3,
    reduction: Reduction = "mean",
) -> Tensor:
    """L_simple + vlb_weight T L_t for a network that puts out [B, 2C, ...] = (prediction, w), fused with its gradient.

    For uniform t, T L_t estimates sum_t L_t in bits per dimension. The mean inside L_t is held constant (its gradient
    stopped), so L_vlb trains the variance only. vlb_weight 0.001 is the paper's lambda (guided-diffusion's
    RESCALED_MSE). The eps is that of `noised` at the same seeds and stream. arXiv 2102.09672, eq. 16; lecture 002.
    """
    _check(pred, x0, t, schedule, "learned")
    check_constants(vlb_weight=vlb_weight)
    table = _table(schedule, prediction, "learned", math.inf, 1.0, vlb_weight * schedule.T, False, x0.device)
    return ops.variational(
        pred, x0, table, t.to(x0.device), seeds=seeds, noise=noise, stream=stream, reduction=reduction
    )[0]


def vlb_loss(
    pred: Tensor,
    x0: Tensor,
    t: Tensor,
    schedule: DiscreteSchedule,
    prediction: Prediction = "eps",
    *,
    variance: Variance = "learned",
    seeds: Seeds | None = None,
    noise: Tensor | None = None,
    stream: int = streams.TRAINING,
    reduction: Reduction = "mean",
) -> Tensor:
    """T L_t in bits per dimension: for uniform t an unbiased estimate of L_vlb - L_T, differentiable in pred.

    pred is [B, 2C, ...] for variance "learned", else [B, C, ...] (see `variational_table`). For t drawn with other
    probabilities p_t multiply by 1 / (T p_t). arXiv 2006.11239, eq. 5; lectures 000, 001, 002.
    """
    _check(pred, x0, t, schedule, variance)
    check_constants(variance=variance)
    table = _table(schedule, prediction, variance, math.inf, 0.0, float(schedule.T), True, x0.device)
    return ops.variational(
        pred, x0, table, t.to(x0.device), seeds=seeds, noise=noise, stream=stream, reduction=reduction
    )[0]


def prior_bits(x0: Tensor, schedule: DiscreteSchedule) -> Tensor:
    """L_T in bits per dimension, float64 [B]: KL(N(alpha x0, sigma^2) || N(0, 1)) at the last t. arXiv 2006.11239."""
    alpha, sigma = _last_rates(schedule)
    squares = x0.to(torch.float64).square().reshape(len(x0), -1).mean(1)
    return 0.5 * (sigma**2 - 1.0 - math.log(sigma**2) + alpha**2 * squares) / math.log(2)


@kept(64)
def _last_rates(schedule: DiscreteSchedule) -> tuple[float, float]:
    return float(schedule.alpha(schedule.T - 1)), float(schedule.sigma(schedule.T - 1))


def decoder_bits(x0: Tensor, mean: Tensor, std: float, half_bin: float = HALF_BIN) -> Tensor:
    """-log2 P(bin of x0 | N(mean, std^2)) averaged over the dimensions, [B]; differentiable in mean.

    The bin of x0 in (-1, 1) is [x0 - half_bin, x0 + half_bin]; the first reaches to -inf and the last to inf.
    arXiv 2006.11239, eq. 13; lecture 000.
    """
    check_constants(std=std, half_bin=half_bin)
    if not std > 0:
        raise ValueError(f"std must be positive, got {std}")
    row = {"u": 1.0, "q": 1.0, "clip": math.inf, "inv_std": 1.0 / std, "bin": half_bin, "w_bound": 1.0, "w_mean": 1.0}
    table = torch.tensor([[row.get(name, 0.0) for name in VARIATIONAL_COLUMNS]], dtype=torch.float64, device=x0.device)
    return ops.variational(mean, x0, table, noise=x0, reduction="none")[0]


class BitsPerDim(NamedTuple):
    """A variational bound, in bits per dimension; float64."""

    total: Tensor
    """[B]: prior + the sum of terms."""
    prior: Tensor
    """[B]: L_T."""
    terms: Tensor
    """[B, T]: L_t at column t; column 0 is the decoder's L_0."""
    mse: Tensor
    """[B, T]: mean squared error of the prediction."""


@torch.no_grad()
def bits_per_dim(
    model: Model,
    x0: Tensor,
    schedule: DiscreteSchedule,
    prediction: Prediction = "eps",
    *,
    seeds: Seeds,
    variance: Variance = "beta_tilde",
    clip: float = 1.0,
    progress: bool | str = False,
    **model_kwargs: object,
) -> BitsPerDim:
    """The whole bound of each sample: T calls ``model(x_t, t, **model_kwargs)``, t int64 [B], each with fresh noise.

    x0 [B, C, ...] in [-1, 1]; the noise of step t is that of the sample's seed on stream TRAINING + t, so a result does
    not depend on the batch. `progress`: a bar over t, or its label. `clip` bounds the predicted x0 (inf: not
    at all), as samplers do. arXiv 2006.11239, eq. 5; arXiv 2102.09672; lectures 000, 001, 002.
    """
    _check_discrete(schedule)
    table = _table(schedule, prediction, variance, clip, 1.0, 1.0, True, x0.device)
    terms, errors = [], []
    seeds = ops.as_seeds(seeds, len(x0), x0.device)
    bar = progress_bar(progress, "bits_per_dim", schedule.T)
    for t in range(schedule.T):
        index, stream = torch.full((len(x0),), t, dtype=torch.int64, device=x0.device), streams.TRAINING + t
        x_t = ops.noising(x0, schedule.table(prediction, x0.device), index, seeds=seeds, stream=stream)[0]
        pred = unwrapped(model(x_t, index, **model_kwargs))
        _check(pred, x0, index, schedule, variance)
        means = ops.variational(pred, x0, table, index, seeds=seeds, stream=stream, reduction="none")[1].double()
        errors.append(means[:, 0])
        terms.append(means[:, 1])
        if bar is not None:
            bar.update()
    if bar is not None:
        bar.close()
    prior, bounds = prior_bits(x0, schedule), torch.stack(terms, dim=1)
    return BitsPerDim(prior + bounds.sum(1), prior, bounds, torch.stack(errors, dim=1))
