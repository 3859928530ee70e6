"""Classifier guidance: the gradient of log p(y given x_t) added to the score, or to the mean of a step."""

from __future__ import annotations

import math
from collections.abc import Callable
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from diffkern import ops
from diffkern.checks import must_return, returned, unwrapped
from diffkern.guidance._conditions import batch_times
from diffkern.guidance._guided import Model
from diffkern.guidance._spans import number
from diffkern.integers import as_integer
from diffkern.modes import neutral, readable
from diffkern.names import Prediction
from diffkern.plan import COLUMNS
from diffkern.schedules.base import Schedule
from diffkern.schedules.discrete import DiscreteSchedule
from diffkern.schedules.predictions import prediction_of, target_coefficients

Gradient = Callable[..., Tensor]
"""gradient(x, t) -> like x."""


def classifier_gradient(classifier: Model, y: Tensor | int, scale: float | Tensor = 1.0) -> Gradient:
    """fn(x, t) = scale grad_x log p(y given x_t), log p = log_softmax(classifier(x, t)) at y; shaped like x.

    Dhariwal and Nichol, arXiv 2105.05233, algorithm 1; lecture 002. ``classifier`` is any differentiable torch module
    or function that returns logits [B, K]; ``y`` a class or int64 [B]; ``scale`` a number or one a sample [B]. The
    result is what `classifier_guided` (score shift) and ``sample(mean_shift=)`` (mean shift) take. Works under
    no_grad and inference_mode. Raises ValueError if the logits do not depend on x differentiably.
    """
    if isinstance(y, Tensor):
        if y.ndim > 1 or y.is_floating_point() or y.dtype == torch.bool:
            raise ValueError(f"y must be a class or int64 [B], got {y.dtype} {list(y.shape)}")
    else:
        label_of_all = as_integer(y)
        if label_of_all is None:
            raise ValueError(f"y must be a class or int64 [B], got {type(y).__name__}")
        y = label_of_all

    def log_prob(x: Tensor, t: Any, *args: Any, **kwargs: Any) -> Tensor:
        batch = x.shape[0]
        logits = unwrapped(classifier(x, t, *args, **kwargs), "classifier", "logits")
        if logits.ndim != 2 or logits.shape[0] != batch:
            raise ValueError(must_return(logits, f"logits of shape [{batch}, K]", "classifier"))
        label = torch.as_tensor(y, dtype=torch.int64, device=logits.device)
        if label.ndim and label.shape[0] != batch:
            raise ValueError(f"y must have one class a sample ({batch}), got shape {list(label.shape)}")
        if readable(label) and not bool(((label >= 0) & (label < logits.shape[1])).all()):
            raise ValueError(f"y must be classes in 0..{logits.shape[1] - 1}, got {label.tolist()}")
        wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
        return wide.log_softmax(1).gather(1, label.expand(batch)[:, None])[:, 0]

    return _gradient(log_prob, scale, "classifier")


def log_prob_gradient(log_prob: Callable[..., Tensor], scale: float | Tensor = 1.0) -> Gradient:
    """fn(x, t) = scale grad_x log_prob(x, t) for any differentiable log_prob [B]: a regressor, CLIP, an energy."""
    return _gradient(log_prob, scale, "log_prob")


def _gradient(log_prob: Callable[..., Tensor], scale: float | Tensor, name: str) -> Gradient:
    if isinstance(scale, Tensor):
        if scale.ndim > 1 or not scale.is_floating_point():
            raise ValueError(f"scale must be a number or one a sample [B], got {scale.dtype} {list(scale.shape)}")
    elif isinstance(scale, bool) or not isinstance(scale, Real) or not math.isfinite(scale):
        raise ValueError(f"scale must be a finite number or one a sample [B], got {scale!r}")

    def gradient(x: Tensor, t: Any, *args: Any, **kwargs: Any) -> Tensor:
        if isinstance(scale, Tensor) and scale.ndim and scale.shape[0] != x.shape[0]:
            raise ValueError(f"scale must have one entry a sample ({x.shape[0]}), got shape {list(scale.shape)}")
        with torch.inference_mode(False), torch.enable_grad():
            x = (x.clone() if x.is_inference() else x.detach()).requires_grad_()
            t = t.clone() if isinstance(t, Tensor) and t.is_inference() else t
            value = log_prob(x, t, *args, **kwargs)
            if not isinstance(value, Tensor) or value.shape != x.shape[:1]:
                raise ValueError(must_return(value, f"one value a sample [{x.shape[0]}]", name))
            found = None
            if value.requires_grad:
                weighted = value * (scale.to(value) if isinstance(scale, Tensor) else scale)
                (found,) = torch.autograd.grad(weighted.sum(), x, allow_unused=True)
        if found is None:
            raise ValueError(
                f"{name} must be differentiable in x, got an output without a gradient in x "
                "(was it computed under no_grad, or detached?)"
            )
        return found

    return gradient


def classifier_guided(
    model: Model, gradient: Gradient, schedule: Schedule, prediction: Prediction | None = None
) -> ClassifierGuided:
    """Classifier guidance by score shift: the model whose score is that of ``model`` plus gradient(x_t, t).

    In eps, eps~ = eps - sigma gradient (Dhariwal and Nichol, arXiv 2105.05233, algorithm 2); in every ``prediction``
    m = u x0 + v eps (the schedule's own by default) of every schedule

        m~ = m - sigma (v - u sigma/alpha) gradient

    ``gradient(x_t, t)`` is that of `classifier_gradient` or `log_prob_gradient`, or yours, shaped like x; x_t =
    alpha x0 + sigma eps, as the model is given it. For the prediction ``edm``, whose model is given c_in x_t and
    c_noise, the gradient is given x_t and sigma. Where alpha is 0 (the start of a flow, a table of zero terminal SNR)
    x_t is noise that says nothing about y, and the score is not shifted there. One fused op a call (edm: two); the
    coefficients of whole times of a table are made once, those of others on the device at each call.
    """
    return ClassifierGuided(model, gradient, schedule, prediction_of(schedule, prediction))


class ClassifierGuided:
    """``guided(x, t)``: the model's prediction with its score shifted; see `classifier_guided`."""

    def __init__(self, model: Model, gradient: Gradient, schedule: Schedule, prediction: Prediction) -> None:
        for name, value in (("model", model), ("gradient", gradient)):
            if not callable(value):
                raise ValueError(f"{name} must be callable, got {type(value).__name__}")
        self.model, self.gradient, self.schedule = model, gradient, schedule
        self.prediction = prediction = prediction_of(schedule, prediction)
        if prediction == "mu" and not isinstance(schedule, DiscreteSchedule):
            raise ValueError(f"prediction 'mu' needs a discrete schedule, got {schedule.name}")
        if prediction == "edm":
            schedule.preconditioning(schedule.noise_end)  # an error for a schedule that has none
        self._tables: dict[str, Tensor] = {}

    def __call__(self, x: Tensor, t: Any, *args: Any, **kwargs: Any) -> Tensor:
        """The shifted prediction at x [B, ...] and time t, [B], [] or a number; more arguments go to the model."""
        t = batch_times(t, len(x))
        # Both may write into what they are given.
        m = unwrapped(self.model(x.clone(), t.clone() if isinstance(t, Tensor) else t, *args, **kwargs))
        learned = x.ndim > 1 and m.shape == (x.shape[0], 2 * x.shape[1], *x.shape[2:])
        m = m if learned else returned(m, x.shape)
        time = t if isinstance(t, Tensor) else number(t, x.device)
        time = self._time(time.to(x.device))
        if self.prediction == "edm":
            scale = 1.0 / self.schedule.input_scale("edm", time)
            clean = ops.step(x, None, table=_table("a", scale), index=_index(scale, x))[0]
            found = self.gradient(clean, time.to(t.dtype if isinstance(t, Tensor) else torch.float32))
        else:
            found = self.gradient(x, t.clone() if isinstance(t, Tensor) else t)
        found = returned(found, x.shape, "gradient")
        table, index = self._rows(time, x)
        first = m[:, : x.shape[1]] if learned else m
        found = found.to(torch.promote_types(m.dtype, found.dtype))  # the op's result has the dtype of its history
        shifted = ops.step(None, first, h0=found, table=table, index=index)[0].to(m.dtype)
        return torch.cat([shifted, m[:, x.shape[1] :]], 1) if learned else shifted

    def _time(self, t: Tensor) -> Tensor:
        """The schedule's time of a model time."""
        if self.prediction == "edm":
            return (4.0 * t.to(torch.float64)).exp()
        if not isinstance(self.schedule, DiscreteSchedule):
            return t
        kept = self.schedule.kept
        if len(kept) == int(kept[-1]) + 1:
            return t
        kept = kept.to(t.device)  # a subsequence's models are given the times of the whole table
        wide = t.to(torch.float64)
        index = (torch.searchsorted(kept, wide.contiguous(), right=True) - 1).clamp(0, len(kept) - 1)
        low, high = kept[index], kept[(index + 1).clamp(max=len(kept) - 1)]
        place = index + (wide - low) / (high - low).clamp(min=1)
        if t.is_floating_point():
            return place
        return torch.where(place == place.round(), place, -1.0).to(torch.int64)  # -1: no time of the subsequence

    def _rows(self, time: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        """(table, index) of the op that makes m + shift gradient."""
        if isinstance(self.schedule, DiscreteSchedule) and not time.is_floating_point():
            key = str(x.device)
            if key not in self._tables:
                with neutral():
                    shift = score_shift(self.schedule, self.prediction, torch.arange(self.schedule.T))
                    self._tables[key] = _table("e0", shift.to(x.device), d=1.0)
            ok = (time >= 0) & (time < self.schedule.T)
            if readable(time) and not bool(ok.all()):
                raise ValueError(f"t must be times of {self.schedule.name}, got {time.tolist()}")
            return self._tables[key], time
        shift = score_shift(self.schedule, self.prediction, time)
        return _table("e0", shift, d=1.0), _index(shift, x)


def score_shift(schedule: Schedule, prediction: Prediction, t: int | float | Tensor) -> Tensor:
    """-sigma (v - u sigma/alpha), float64 in the shape of t: d m/d score at fixed x of a prediction m = u x0 + v eps.

    0 where alpha is 0, unless u is 0 (eps, score), for which it has a value everywhere.
    """
    u, v = target_coefficients(schedule, prediction, t)
    alpha, sigma = schedule.alpha(t), schedule.sigma(t)
    shift = -sigma * torch.where(u == 0, v, v - u * sigma / alpha)
    return torch.where((alpha == 0) & (u != 0), 0.0, shift)


def _table(column: str, values: Tensor, **others: float) -> Tensor:
    """[n, 21] on the device of ``values`` [n] or []: a row a value, ``others`` in all rows."""
    values = values.reshape(-1)
    table = torch.zeros(len(values), len(COLUMNS), dtype=torch.float64, device=values.device)
    table[:, COLUMNS.index("clip")], table[:, COLUMNS.index("k")] = math.inf, 1.0
    for name, value in others.items():
        table[:, COLUMNS.index(name)] = value
    table[:, COLUMNS.index(column)] = values
    return table


def _index(values: Tensor, x: Tensor) -> Tensor:
    """Every sample's row of `_table`: its own, or the only one."""
    if values.ndim > 1 or (values.ndim == 1 and values.shape[0] != x.shape[0]):
        raise ValueError(f"t must be a number or one time a sample [{x.shape[0]}], got shape {list(values.shape)}")
    return (
        torch.zeros((), dtype=torch.int64, device=x.device)
        if values.ndim == 0
        else torch.arange(len(values), device=x.device)
    )
