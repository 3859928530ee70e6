"""Weights of the training loss as functions of the log-SNR, for every prediction; used as ``weight=`` of the losses.

A network's error is the same error whatever it predicts: with det_P = alpha v - sigma u of `schedules.predictions`,

    |error in Q|^2 = (det_Q / det_P)^2 |error in P|^2,     |det|: eps alpha, x0 sigma, v alpha^2 + sigma^2, ...

so one weighting has one weight for every prediction, and the losses w_P |error in P|^2 are equal (`fold`). A weighting
is defined by the weight w of the x0 error at snr = alpha^2/sigma^2 = e^lambda, which also makes it blind to the scale
of x_t. In terms of a = sigmoid(lambda) and b = 1 - a (alpha^2 and sigma^2 where they sum to 1) the weight of the eps
error is w b/a and that of the v error w b. Each is written in a form that is right at both ends, where a or b is 0:
nothing is divided by the snr. Weights that truly grow without bound there (such as that of the x0 error of an eps
network at zero SNR) are inf, and a loss that meets one says so.

| name | w, weight of the x0 error | source |
|---|---|---|
| ``uniform`` | whatever gives the network's own prediction weight 1: L_simple for ``eps`` | arXiv 2006.11239, eq. 14 |
| ``x0`` | 1 | arXiv 2006.11239 |
| ``eps``, ``snr`` | snr | arXiv 2006.11239; 2202.00512, "SNR" |
| ``v``, ``snr_plus_one`` | snr + 1 | arXiv 2202.00512, "SNR+1" |
| ``truncated_snr`` | max(snr, 1) | arXiv 2202.00512, "truncated SNR" |
| ``min_snr`` | min(snr, gamma), gamma = 5 | arXiv 2303.09556 |
| ``soft_min_snr`` | snr gamma/(snr + gamma), gamma = 4 | arXiv 2401.11605 |
| ``p2`` | snr/(k + snr)^gamma, k = 1, gamma = 1 | arXiv 2204.00227 |
| ``edm`` | snr + 1/sigma_data^2, sigma_data = 0.5 | arXiv 2206.00364 |
| ``likelihood`` | snr g^2/sigma^2 (g^2 for ``score``) | arXiv 2101.09258 |
| ``vlb`` | (snr(t-1) - snr(t))/2; in continuous time snr g^2/(2 sigma^2) | arXiv 2107.00630; lecture 001, L_t |
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from diffkern.checks import unknown
from diffkern.names import Prediction, ReverseVariance
from diffkern.objectives._weighting import Forms, WeightFunction, Weighting, check_positive, fold, scale
from diffkern.schedules.base import Schedule, Time, as_float64, as_time, check_constants
from diffkern.schedules.discrete import DiscreteSchedule
from diffkern.schedules.predictions import check_prediction, prediction_of

__all__ = [
    "EDM",
    "P2",
    "VLB",
    "WEIGHTINGS",
    "Custom",
    "Likelihood",
    "MinSNR",
    "SNRPlusOne",
    "SoftMinSNR",
    "TruncatedSNR",
    "Uniform",
    "UniformIn",
    "Weighting",
    "fold",
    "get_weighting",
]


@dataclass(frozen=True)
class Uniform(Weighting):
    """1 for the network's own prediction, or for the `target` of the loss where one is given: L_simple."""

    name = "uniform"

    def forms(self, a: Tensor, b: Tensor) -> Forms:
        """1, 1, 1: not one loss in three forms, but each form's own."""
        del b
        one = torch.ones_like(a)
        return Forms(one, one, one)

    def __call__(self, log_snr: Time, prediction: Prediction = "eps") -> Tensor:
        """1."""
        check_prediction(prediction)
        return torch.ones_like(as_float64(log_snr))

    def at(self, schedule: Schedule, prediction: Prediction, t: Time, target: Prediction | None = None) -> Tensor:
        """`fold` of the target."""
        return fold(schedule, prediction, target or prediction, t)


@dataclass(frozen=True)
class UniformIn(Weighting):
    """The error in ``eps`` or ``x0``, unweighted, for a network that predicts anything."""

    target: str

    def __post_init__(self) -> None:
        if self.target not in ("eps", "x0"):
            raise ValueError(f"target must be eps or x0 (for others give the losses target=), got {self.target!r:.80}")

    @property
    def name(self) -> str:  # type: ignore[override]
        """The target."""
        return self.target

    def forms(self, a: Tensor, b: Tensor) -> Forms:
        """eps: w = snr. x0: w = 1."""
        one = torch.ones_like(a)
        return Forms(one, a / b, a) if self.target == "eps" else Forms(b / a, one, b)


@dataclass(frozen=True)
class SNRPlusOne(Weighting):
    """snr + 1, the error in v unweighted where alpha^2 + sigma^2 = 1 (arXiv 2202.00512)."""

    name = "snr_plus_one"

    def forms(self, a: Tensor, b: Tensor) -> Forms:
        """1/a, 1/b, 1."""
        return Forms(1.0 / a, 1.0 / b, torch.ones_like(a))


@dataclass(frozen=True)
class TruncatedSNR(Weighting):
    """max(snr, 1) (arXiv 2202.00512)."""

    name = "truncated_snr"

    def forms(self, a: Tensor, b: Tensor) -> Forms:
        """max(1, b/a), max(a/b, 1), max(a, b)."""
        return Forms((b / a).clamp(min=1.0), (a / b).clamp(min=1.0), torch.maximum(a, b))


@dataclass(frozen=True)
class MinSNR(Weighting):
    """min(snr, gamma): min(snr, gamma)/snr for eps, min(snr, gamma)/(snr + 1) for v (arXiv 2303.09556).

    Those quotients are 0/0 for eps at zero SNR, where other code gives NaN; the value is 1, as min(1, gamma/snr) shows.
    """

    gamma: float = 5.0
    name = "min_snr"

    def __post_init__(self) -> None:
        check_positive(gamma=self.gamma)

    def forms(self, a: Tensor, b: Tensor) -> Forms:
        """min(1, gamma b/a), min(a/b, gamma), min(a, gamma b)."""
        return Forms(
            (self.gamma * b / a).clamp(max=1.0), (a / b).clamp(max=self.gamma), torch.minimum(a, self.gamma * b)
        )


@dataclass(frozen=True)
class SoftMinSNR(Weighting):
    """1/(1/snr + 1/gamma), which bends where `MinSNR` breaks (arXiv 2401.11605: 1/(sigma^2 + sigma_data^2))."""

    gamma: float = 4.0
    name = "soft_min_snr"

    def __post_init__(self) -> None:
        check_positive(gamma=self.gamma)

    def forms(self, a: Tensor, b: Tensor) -> Forms:
        """gamma/(a + gamma b) times b, a, a b."""
        common = self.gamma / (a + self.gamma * b)
        return Forms(common * b, common * a, common * a * b)


@dataclass(frozen=True)
class P2(Weighting):
    """1/(k + snr)^gamma for eps: perception prioritised (Choi et al. 2022, arXiv 2204.00227)."""

    gamma: float = 1.0
    k: float = 1.0
    name = "p2"

    def __post_init__(self) -> None:
        check_positive(k=self.k)
        check_constants(gamma=self.gamma)
        if not 0.0 <= self.gamma < math.inf:
            raise ValueError(f"gamma must be finite and not negative, got {self.gamma}")

    def forms(self, a: Tensor, b: Tensor) -> Forms:
        """(b/(k b + a))^gamma times 1, a/b, a."""
        root = self.k * b + a
        common = root**-self.gamma
        return Forms(common * b**self.gamma, common * a * b ** (self.gamma - 1.0), common * a * b**self.gamma)


@dataclass(frozen=True)
class EDM(Weighting):
    """1/c_out^2 = snr + 1/sigma_data^2, sigma/alpha as EDM's sigma: 1 for its network (arXiv 2206.00364, table 1)."""

    sigma_data: float = 0.5
    name = "edm"

    def __post_init__(self) -> None:
        check_positive(sigma_data=self.sigma_data)

    def forms(self, a: Tensor, b: Tensor) -> Forms:
        """1 + b/(a sd^2), a/b + 1/sd^2, a + b/sd^2."""
        floor = 1.0 / self.sigma_data**2
        return Forms(1.0 + floor * b / a, a / b + floor, a + floor * b)


@dataclass(frozen=True)
class Likelihood(Weighting):
    """g(t)^2 for the score, g^2/sigma^2 = |d log_snr/dt| for eps: bounds the likelihood (Song et al. 2021, 2101.09258).

    Without a schedule the log-SNR itself is the time, where the weight of the eps error is 1.
    """

    name = "likelihood"

    def forms(self, a: Tensor, b: Tensor) -> Forms:
        """1, a/b, a: time measured in log-SNR."""
        return Forms(torch.ones_like(a), a / b, a)

    def at(self, schedule: Schedule, prediction: Prediction, t: Time, target: Prediction | None = None) -> Tensor:
        """g^2 (det_score / det_prediction)^2."""
        del target
        prediction = prediction_of(schedule, prediction)
        base, c = scale(schedule, prediction, t)
        alpha, sigma, g2 = schedule.alpha(t), schedule.sigma(t), schedule.diffusion_squared(t)
        if prediction == "score":
            return g2
        if base == "eps":
            weight = g2
        else:  # g^2 grows like 1/alpha where a path starts from pure noise; the product with alpha stays finite
            change = (alpha * schedule.sigma_dot(t) - sigma * schedule.alpha_dot(t)).abs()
            weight = torch.where(torch.isfinite(g2), g2 * alpha, 2.0 * sigma * change) * alpha
            weight = weight / c**2 / (sigma**2 if base else 1.0)
        return torch.where(sigma == 0, torch.inf, weight / sigma**2)


@dataclass(frozen=True)
class VLB(Weighting):
    """The weight of L_t in the variational bound, per element and in nats: |mean error|^2 / (2 variance).

    For a discrete schedule that is beta^2/(2 variance alpha_t (1 - abar_t)) in eps (arXiv 2006.11239, eq. 12;
    lectures 001, 002) and (snr(t-1) - snr(t))/2 in x0 for the variance ``beta_tilde``; the other choice is ``beta``.
    beta_tilde is 0 at t = 0, whose term L_0 is a decoder's: there it is that of t = 1, as the field clips it (beta if
    that is 0 as well). In continuous time it is half of `Likelihood` (Kingma et al. 2021, arXiv 2107.00630).
    """

    variance: ReverseVariance = "beta_tilde"
    name = "vlb"

    def __post_init__(self) -> None:
        if self.variance not in ("beta", "beta_tilde"):
            raise ValueError(f"variance must be 'beta' or 'beta_tilde', got {self.variance!r:.80}")

    def forms(self, a: Tensor, b: Tensor) -> Forms:
        """Half of `Likelihood`: time measured in log-SNR."""
        return Forms(*(0.5 * form for form in Likelihood().forms(a, b)))

    def at(self, schedule: Schedule, prediction: Prediction, t: Time, target: Prediction | None = None) -> Tensor:
        """coef_x0^2/(2 variance) for the x0 error, without the beta^2/beta of a step that adds no noise."""
        if not isinstance(schedule, DiscreteSchedule):
            return 0.5 * Likelihood().at(schedule, prediction, t)
        t = as_time(t)
        abar_t, abar_s, beta = schedule.abar(t), schedule.abar(t - 1), schedule.beta(t)
        weight = 0.5 * abar_s * beta / (1.0 - abar_t) ** 2
        if self.variance == "beta_tilde" and schedule.T > 1:
            first = schedule.posterior(torch.ones_like(t))[2]
            clipped = torch.where(first > 0, 0.5 / first, weight)
            weight = torch.where(t == 0, clipped, weight * (1.0 - abar_t) / (1.0 - abar_s))
        return weight * fold(schedule, prediction, "x0", t)


@dataclass(frozen=True)
class Custom(Weighting):
    """A user's function weight(log_snr, prediction) of the error in the space that the loss is measured in."""

    function: WeightFunction
    name = "custom"

    def forms(self, a: Tensor, b: Tensor) -> Forms:
        """The function at ln(a/b)."""
        log_snr = a.log() - b.log()
        return Forms(self(log_snr, "eps"), self(log_snr, "x0"), self(log_snr, "v"))

    def __call__(self, log_snr: Time, prediction: Prediction = "eps") -> Tensor:
        """The function's value, checked for its shape."""
        value = as_float64(log_snr)
        weight = as_float64(self.function(value, check_prediction(prediction)))
        if weight.shape != value.shape:
            raise ValueError(
                f"weight(log_snr, prediction) must return one weight a log_snr, shape {list(value.shape)}, "
                f"got {list(weight.shape)}"
            )
        return weight

    def at(self, schedule: Schedule, prediction: Prediction, t: Time, target: Prediction | None = None) -> Tensor:
        """The function for the target, folded to the prediction."""
        space = target or prediction
        return self(schedule.log_snr(t), space) * fold(schedule, prediction, space, t)


WEIGHTINGS: dict[str, Weighting] = {
    "uniform": Uniform(),
    "x0": UniformIn("x0"),
    "eps": UniformIn("eps"),
    "snr": UniformIn("eps"),
    "v": SNRPlusOne(),
    "snr_plus_one": SNRPlusOne(),
    "truncated_snr": TruncatedSNR(),
    "min_snr": MinSNR(),
    "soft_min_snr": SoftMinSNR(),
    "p2": P2(),
    "edm": EDM(),
    "likelihood": Likelihood(),
    "vlb": VLB(),
}
"""Every weighting by name, with its default constants."""


def get_weighting(weight: str | Weighting | WeightFunction) -> Weighting:
    """The weighting of that name, a `Weighting` itself, or `Custom` around a function; ValueError for other names."""
    if isinstance(weight, Weighting):
        return weight
    if isinstance(weight, str):
        if weight not in WEIGHTINGS:
            raise ValueError(unknown("weight", weight, WEIGHTINGS))
        return WEIGHTINGS[weight]
    return Custom(weight)
