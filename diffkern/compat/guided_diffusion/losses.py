"""Kullback-Leibler divergence of two Gaussians and the likelihood of a bin, as elementwise formulas.

The training losses are fused and come here for the decoder's term alone (docs/compat-guided-diffusion.md).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from diffkern.ops import HALF_BIN

__all__ = ["approx_standard_normal_cdf", "discretized_gaussian_log_likelihood", "normal_kl"]

SMALLEST = 1e-12
"""The least probability whose logarithm is taken."""
EDGE = 0.999
"""Data beyond it lie in the outermost bins."""


def normal_kl(mean1: Tensor | float, logvar1: Tensor | float, mean2: Tensor | float, logvar2: Tensor | float) -> Tensor:
    """KL(N(mean1, e^logvar1) || N(mean2, e^logvar2)) in nats, elementwise; the arguments broadcast.

    (logvar2 - logvar1 - 1 + e^(logvar1 - logvar2) + (mean1 - mean2)^2 e^-logvar2) / 2
    """
    like = next((t for t in (mean1, logvar1, mean2, logvar2) if isinstance(t, Tensor)), None)
    if like is None:
        raise AssertionError("one of mean1, logvar1, mean2 and logvar2 must be a tensor, got four numbers")
    first, second = (t if isinstance(t, Tensor) else torch.full_like(like, t) for t in (logvar1, logvar2))
    gap = first - second
    return (torch.expm1(gap) - gap + (mean1 - mean2) ** 2 * torch.exp(-second)) / 2


def approx_standard_normal_cdf(x: Tensor) -> Tensor:
    """(1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3))) / 2: the normal distribution within 2e-4."""
    return (1.0 + torch.tanh(math.sqrt(2.0 / math.pi) * (x + 0.044715 * x**3))) / 2


def discretized_gaussian_log_likelihood(x: Tensor, *, means: Tensor, log_scales: Tensor) -> Tensor:
    """ln P(bin of x | N(means, e^(2 log_scales))) in nats, elementwise; the three have one shape.

    x is 8-bit data scaled to [-1, 1]; its bin is [x - 1/255, x + 1/255], the first and the last of [-1, 1] open. By
    `approx_standard_normal_cdf` and not below ln 1e-12; `objectives.variational.decoder_bits` has the exact one.
    arXiv 2006.11239, eq. 13.
    """
    if not x.shape == means.shape == log_scales.shape:
        shapes = f"{list(x.shape)}, {list(means.shape)} and {list(log_scales.shape)}"
        raise AssertionError(f"x, means and log_scales must have one shape, got {shapes}")
    c, scale = x - means, torch.exp(-log_scales)
    below = approx_standard_normal_cdf(scale * (c + HALF_BIN))
    until = approx_standard_normal_cdf(scale * (c - HALF_BIN))
    inner = torch.log((below - until).clamp(min=SMALLEST))
    first, last = torch.log(below.clamp(min=SMALLEST)), torch.log((1.0 - until).clamp(min=SMALLEST))
    return torch.where(x < -EDGE, first, torch.where(x > EDGE, last, inner))
