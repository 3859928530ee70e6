"""What a weighting is: one loss in the forms of every prediction. `diffkern.objectives.weightings` has the formulas."""

from __future__ import annotations

import json
import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from diffkern.names import Prediction
from diffkern.records import parse
from diffkern.schedules.base import Schedule, Time, as_float64, check_constants
from diffkern.schedules.predictions import check_prediction, mixtures, prediction_of

WeightFunction = Callable[[Tensor, str], Tensor]
"""weight(log_snr, prediction): float64 weights, shaped like log_snr, of the squared error of that prediction."""


def check_positive(**values: float) -> None:
    """Raise ValueError unless every constant is positive and finite."""
    check_constants(**values)
    for argument, value in values.items():
        if not 0.0 < value < math.inf:
            raise ValueError(f"{argument} must be positive and finite, got {value}")


class Forms(NamedTuple):
    """One weighting as weights of the errors in eps, in x0, and in v where alpha^2 + sigma^2 = 1."""

    eps: Tensor
    x0: Tensor
    v: Tensor


class Weighting(ABC):
    """lambda(log_snr, prediction): what the squared error of a network's own prediction is multiplied by."""

    name: str

    def to_dict(self) -> dict[str, Any]:
        """Kind and constants as plain data for JSON; ValueError with the remedy for a user's function."""
        from diffkern.objectives.stored import weighting_to_dict  # which knows every kind

        return weighting_to_dict(self)

    @staticmethod
    def from_dict(data: object) -> Weighting:
        """What `to_dict` wrote, equal to it; ValueError naming the field for anything else."""
        from diffkern.objectives.stored import weighting_from_dict

        return weighting_from_dict(data)

    def to_json(self) -> str:
        """`to_dict` as text."""
        return json.dumps(self.to_dict(), allow_nan=False)

    @staticmethod
    def from_json(text: str) -> Weighting:
        """What `to_json` wrote."""
        return Weighting.from_dict(parse(text, "JSON", "weight"))

    @abstractmethod
    def forms(self, a: Tensor, b: Tensor) -> Forms:
        """The weights at snr = a/b, a + b = 1, each in a form that holds at a = 0 and at b = 0."""

    def __call__(self, log_snr: Time, prediction: Prediction = "eps") -> Tensor:
        """Weight, float64 in the shape of `log_snr` (-inf and +inf included), where alpha^2 + sigma^2 = 1.

        For ``eps``, ``x0``, ``v`` and ``score``; the other predictions depend on more of a schedule than its SNR: `at`.
        """
        value = as_float64(log_snr)
        a, b = torch.sigmoid(value), torch.sigmoid(-value)
        forms = self.forms(a, b)
        prediction = check_prediction(prediction)
        if prediction == "score":
            return forms.eps * b
        if prediction not in Forms._fields:
            raise ValueError(f"the weight of prediction {prediction!r} depends on the schedule: use at(schedule, ...)")
        return {"eps": forms.eps, "x0": forms.x0, "v": forms.v}[prediction]

    def at(self, schedule: Schedule, prediction: Prediction, t: Time, target: Prediction | None = None) -> Tensor:
        """Weight of the squared error of `prediction` at the times `t`, float64 in the shape of `t`.

        `target` is where the loss is measured; it changes nothing but for ``uniform`` and for functions.
        """
        del target
        log_snr = schedule.log_snr(t)
        return in_prediction(self.forms(torch.sigmoid(log_snr), torch.sigmoid(-log_snr)), schedule, prediction, t)


def scale(schedule: Schedule, prediction: Prediction, t: Time) -> tuple[str, Tensor]:
    """(base, c): the error of the prediction is c times that of eps or of x0, or (base "") c is |det| itself.

    Apart from the base, so that eps and score (both blind where alpha is 0) still compare there, as do x0 and mu.
    """
    prediction = prediction_of(schedule, prediction)
    if prediction in ("eps", "x0"):
        return prediction, torch.ones_like(schedule.alpha(t))
    if prediction == "score":
        return "eps", 1.0 / schedule.sigma(t)
    if prediction == "mu":
        return "x0", schedule.posterior_mean_coefficients(t)[0]
    if prediction == "edm":  # sigma/c_out = 1/sqrt(c_skip), which is also right at sigma = 0
        return "", schedule.preconditioning(t)[0].rsqrt()
    alpha, sigma, u, v = mixtures(schedule, prediction, t)
    return "", (alpha * v - sigma * u).abs()


def in_prediction(forms: Forms, schedule: Schedule, prediction: Prediction, t: Time) -> Tensor:
    """The weight of the error of ``prediction``."""
    base, c = scale(schedule, prediction, t)
    if base:
        return (forms.eps if base == "eps" else forms.x0) / c**2
    return forms.v * (schedule.alpha(t) ** 2 + schedule.sigma(t) ** 2) / c**2


def fold(schedule: Schedule, prediction: Prediction, target: Prediction, t: Time) -> Tensor:
    """(det_target / det_prediction)^2, float64: |error in target|^2 for an error of 1 in the network's prediction.

    inf where the prediction does not determine the target (``eps`` to ``x0`` where alpha is 0).
    """
    prediction, target = prediction_of(schedule, prediction), prediction_of(schedule, target)
    if prediction == target:
        return torch.ones_like(schedule.alpha(t))
    source, sink = scale(schedule, prediction, t), scale(schedule, target, t)
    rates = {"eps": schedule.alpha(t), "x0": schedule.sigma(t), "": torch.ones_like(schedule.alpha(t))}
    same = torch.ones_like(rates[""])
    rate = same if source[0] == sink[0] else rates[sink[0]] / rates[source[0]]
    return (sink[1] / source[1] * rate) ** 2
