"""The nearest point of a box with a given weighted mean: what makes a sample consistent and keeps it an image."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["nearest_with_mean"]

HALVINGS = 40
"""Of the interval of the multiplier: more than float32 has bits."""


def nearest_with_mean(x: Tensor, weights: Tensor, mean: Tensor, clip: float | None) -> Tensor:
    """argmin |x' - x|^2 with sum_k w_k x'_k = mean and |x'_k| <= clip, over the last dimension.

    x [..., K], weights [K], positive with the sum 1, mean [...]. Without a box x' = x + w (mean - w.x)/|w|^2; with one
    x' = clamp(x + lambda w), whose weighted mean rises with lambda, found by bisection. A mean outside of the box gives
    its nearest end.
    """
    free = x + weights * ((mean - (x * weights).sum(-1)) / weights.square().sum()).unsqueeze(-1)
    if clip is None:
        return free
    mean = mean.clamp(-clip, clip)
    reach = (x.abs().amax(-1) + clip) / weights.min()
    low, high = -reach, reach
    for _ in range(HALVINGS):
        middle = 0.5 * (low + high)
        below = ((x + weights * middle.unsqueeze(-1)).clamp(-clip, clip) * weights).sum(-1) < mean
        low, high = torch.where(below, middle, low), torch.where(below, high, middle)
    inside = free.abs().amax(-1, keepdim=True) <= clip  # where the closed form is exact
    return torch.where(inside, free, (x + weights * high.unsqueeze(-1)).clamp(-clip, clip))
