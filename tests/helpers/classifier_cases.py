"""Schedules, exact classifiers and scores that the tests of classifier guidance share."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from diffkern import ops, schedules
from diffkern.schedules import predictions
from helpers.oracles import Gaussian

LINEAR, COSINE, FLOW, EDM = schedules.linear(), schedules.cosine(), schedules.flow(), schedules.edm()
SHAPE = (3, 2, 4, 4)
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
