"""Adversarial losses of logits, penalties of a discriminator's gradient, and the weight of an adversarial term.

A generator turns noise z into samples G(z), a discriminator gives each sample a logit l = C(x), D = sigmoid(l) being
the probability that it is real (Goodfellow et al. 2014, arXiv 1406.2661; lecture 000). Both losses are minimised:

| kind | discriminator | generator | source |
|---|---|---|---|
| `minimax` | -log D(x) - log(1 - D(G)) | log(1 - D(G)) | arXiv 1406.2661, eq. 1 |
| `non_saturating` | the same | -log D(G) | arXiv 1406.2661, section 3 |
| `hinge` | max(0, 1 - C(x)) + max(0, 1 + C(G)) | -C(G) | arXiv 1705.02894; 1802.05957, eq. 16 and 17 |
| `least_squares` | (C(x) - 1)^2 / 2 + C(G)^2 / 2 | (C(G) - 1)^2 / 2 | arXiv 1611.04076, eq. 9 |
| `wasserstein` | C(G) - C(x) | -C(G) | arXiv 1701.07875; 1704.00028 |
| `relativistic` | -log sigmoid(C(x) - C(G)) | -log sigmoid(C(G) - C(x)) | arXiv 1807.00734, RSGAN |

    fake = generator(z)
    discriminator_loss(discriminator(x0), discriminator(fake.detach()), "hinge").backward()
    generator_loss(discriminator(fake), "hinge").backward()

The discriminator's loss is the sum of its two terms (code that follows VQGAN takes half of it). What each is minimised
by is `optimal_logits`. `wasserstein` needs a discriminator of bounded slope: `gradient_penalty`, or spectral norm.
`relativistic` compares the j-th real with the j-th generated sample; the paper's averages over the batch would make a
sample's loss depend on the others of its process.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, get_args

import torch
from torch import Tensor
from torch.nn import functional as F

from diffkern import streams
from diffkern.checks import need_tensor, unknown, unwrapped
from diffkern.draws import draw_seeds, uniform_by_address
from diffkern.integers import integer
from diffkern.names import AdversarialName, GradientPenalty, Reduction
from diffkern.objectives._collapse import CollapseWatch
from diffkern.objectives._optimal import (
    Saturation,
    jensen_shannon,
    optimal_discriminator,
    optimal_logits,
    saturation,
)
from diffkern.objectives.reduction import reduced
from diffkern.ops import Seeds, as_seeds

__all__ = [
    "ADVERSARIAL",
    "CollapseWatch",
    "Saturation",
    "adaptive_weight",
    "discriminator_loss",
    "generator_loss",
    "gradient_penalty",
    "jensen_shannon",
    "optimal_discriminator",
    "optimal_logits",
    "r1_penalty",
    "r2_penalty",
    "ratio_of_norms",
    "saturation",
    "slope_penalty",
    "started",
]

ADVERSARIAL: tuple[AdversarialName, ...] = get_args(AdversarialName)
"""The names that ``kind`` takes."""

Discriminator = Callable[[Tensor], Any]

# ------------------------------------------------------------------------------------------------------------ losses


def discriminator_loss(
    real: Tensor, fake: Tensor, kind: AdversarialName = "non_saturating", reduction: Reduction = "mean"
) -> Tensor:
    """The discriminator's loss of the logits of real and of generated samples, both [B, ...]: see the module's table.

    Logits of any shape: one a sample [B], or a map of them [B, 1, h, w] as of a PatchGAN; a sample's loss is the mean
    over its own, in float32 (float64 for float64). `reduction`: "none" [B], "mean", "sum". Computed from logits:
    nothing overflows where D rounds to 0 or 1. ValueError for shapes that differ and for unknown names.
    """
    real, fake = _logits("real", real), _logits("fake", fake)
    _check_alike(real, fake)
    if kind in ("minimax", "non_saturating"):
        loss = F.softplus(-real) + F.softplus(fake)
    elif kind == "hinge":
        loss = F.relu(1.0 - real) + F.relu(1.0 + fake)
    elif kind == "least_squares":
        loss = 0.5 * (real - 1.0).square() + 0.5 * fake.square()
    elif kind == "wasserstein":
        loss = fake - real
    elif kind == "relativistic":
        loss = F.softplus(fake - real)
    else:
        raise ValueError(unknown("kind", kind, ADVERSARIAL))
    return reduced(_mean_of_each(loss), reduction)


def generator_loss(
    fake: Tensor,
    kind: AdversarialName = "non_saturating",
    real: Tensor | None = None,
    reduction: Reduction = "mean",
) -> Tensor:
    """The generator's loss of the logits of generated samples [B, ...]: see the module's table.

    `real`: the logits of real samples, which `relativistic` compares with; other kinds do not look at them. Everything
    else as for `discriminator_loss`. The gradient of `minimax` vanishes where the discriminator is sure (D near 0),
    that of `non_saturating` does not: `saturation` (lecture 000).
    """
    fake = _logits("fake", fake)
    if kind == "minimax":
        loss = -F.softplus(fake)
    elif kind == "non_saturating":
        loss = F.softplus(-fake)
    elif kind in ("hinge", "wasserstein"):
        loss = -fake
    elif kind == "least_squares":
        loss = 0.5 * (fake - 1.0).square()
    elif kind == "relativistic":
        if real is None:
            raise ValueError("real must be given where kind is 'relativistic', got None")
        real = _logits("real", real)
        _check_alike(real, fake)
        loss = F.softplus(real - fake)
    else:
        raise ValueError(unknown("kind", kind, ADVERSARIAL))
    return reduced(_mean_of_each(loss), reduction)


# --------------------------------------------------------------------------------------------------------- penalties


def gradient_penalty(
    discriminator: Discriminator,
    real: Tensor,
    fake: Tensor,
    *,
    seeds: Seeds | None = None,
    target: float = 1.0,
    reduction: Reduction = "mean",
) -> Tensor:
    """(|grad_x C(x)| - target)^2 at x = u real + (1 - u) fake, u uniform in [0, 1], one a sample (arXiv 1704.00028).

    The penalty that holds a `wasserstein` discriminator's slope near 1, weighted there with 10; target 0 pulls it to
    none. real and fake [B, ...] are samples, of which gradients do not flow back; ``discriminator(x)`` gives logits
    [B, ...], of which a sample's gradient is that of their mean. It has to treat each sample alone, as the paper says:
    batch normalisation does not. u is drawn by address from `seeds` (stream ADVERSARIAL + 2), fresh ones from torch's
    generator if None. Differentiable in the discriminator's parameters; "none" gives [B].
    """
    for name, value in (("real", real), ("fake", fake)):
        _check_samples(name, value)
    if real.shape != fake.shape:
        raise ValueError(f"fake must have the shape of real, {list(real.shape)}, got {list(fake.shape)}")
    batch = real.shape[0]
    seeds = draw_seeds(batch, device=real.device) if seeds is None else as_seeds(seeds, batch, real.device)
    u = uniform_by_address(seeds, streams.ADVERSARIAL + 2).to(real.dtype).reshape(-1, *[1] * (real.dim() - 1))
    gradient = _slope(discriminator, torch.lerp(fake.detach(), real.detach(), u))
    norm = torch.linalg.vector_norm(gradient, dim=1)  # whose gradient at 0 torch takes as 0
    return reduced(_kept((norm - target).square()), reduction)


def r1_penalty(discriminator: Discriminator, real: Tensor, *, reduction: Reduction = "mean") -> Tensor:
    """|grad_x C(x)|^2 / 2 at real samples [B, ...] (Mescheder et al. 2018, arXiv 1801.04406: R1 without gamma).

    With its weight gamma training converges locally to the real distribution, which no penalty does not. Arguments and
    gradients as for `gradient_penalty`.
    """
    return _zero_centred(discriminator, "real", real, reduction)


def r2_penalty(discriminator: Discriminator, fake: Tensor, *, reduction: Reduction = "mean") -> Tensor:
    """`r1_penalty` at generated samples (arXiv 1801.04406: R2); none of it flows to the generator."""
    return _zero_centred(discriminator, "fake", fake, reduction)


def slope_penalty(
    kind: GradientPenalty, discriminator: Discriminator, real: Tensor, fake: Tensor, seeds: Seeds
) -> Tensor:
    """The penalty of that name, [B]: "gradient", "r1", "r2", or "r1_r2", the sum of the two."""
    if kind == "gradient":
        return gradient_penalty(discriminator, real, fake, seeds=seeds, reduction="none")
    found = [r1_penalty(discriminator, real, reduction="none")] if kind in ("r1", "r1_r2") else []
    found += [r2_penalty(discriminator, fake, reduction="none")] if kind in ("r2", "r1_r2") else []
    return torch.stack(found).sum(0)


def _zero_centred(discriminator: Discriminator, name: str, x: Tensor, reduction: Reduction) -> Tensor:
    _check_samples(name, x)
    return reduced(_kept(0.5 * _slope(discriminator, x).square().sum(1)), reduction)


def _slope(discriminator: Discriminator, x: Tensor) -> Tensor:
    """grad_x of each sample's mean logit, [B, elements] in at least float32; itself differentiable if that is on."""
    keep = torch.is_grad_enabled()
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        logits = unwrapped(discriminator(x), "discriminator")
        if logits.dim() == 0 or logits.shape[0] != x.shape[0]:
            raise ValueError(f"discriminator must return logits [{x.shape[0]}, ...], got shape {list(logits.shape)}")
        total = _mean_of_each(logits).sum()
        gradient = None
        if total.requires_grad:
            (gradient,) = torch.autograd.grad(total, x, create_graph=keep, allow_unused=True)
        if gradient is None:
            raise ValueError("discriminator must be differentiable in x, got logits without a gradient in x")
        gradient = gradient.flatten(1)
        return gradient.to(torch.promote_types(gradient.dtype, torch.float32))


def _kept(penalty: Tensor) -> Tensor:
    """Without a graph where the caller records none."""
    return penalty if torch.is_grad_enabled() else penalty.detach()


# ------------------------------------------------------------------------------------------- weight of one of the terms


def adaptive_weight(
    reconstruction: Tensor,
    adversarial: Tensor,
    last_layer: Tensor,
    most: float = 1e4,
    *,
    pooled: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """|grad reconstruction| / (|grad adversarial| + 1e-4), at most `most`: what the adversarial term is multiplied by.

    Gradients of the two losses (numbers that the caller goes on with: their graphs are kept) in `last_layer`, the
    weight of the decoder's last layer, so that both terms push it equally hard (Esser et al. 2021, arXiv 2012.09841,
    eq. 7; 2112.10752). A number without a gradient; multiply by `started` for the start step. `pooled` is called with
    each gradient before its norm is taken: the mean over all processes makes the weight that of the whole batch.
    ValueError where a loss is not a number or does not depend on the layer.
    """
    gradients = []
    for name, loss in (("reconstruction", reconstruction), ("adversarial", adversarial)):
        need_tensor(name, loss)
        if loss.dim() != 0:
            raise ValueError(f"{name} must be one number, the loss of the batch, got shape {list(loss.shape)}")
        gradient = None
        if loss.requires_grad and last_layer.requires_grad:
            (gradient,) = torch.autograd.grad(loss, last_layer, retain_graph=True, allow_unused=True)
        if gradient is None:
            raise ValueError(f"{name} must depend on last_layer, got a loss without a gradient there")
        gradients.append(gradient.detach() if pooled is None else pooled(gradient.detach()))
    return ratio_of_norms(gradients[0], gradients[1], most)


def ratio_of_norms(reconstruction: Tensor, adversarial: Tensor, most: float = 1e4) -> Tensor:
    """|reconstruction| / (|adversarial| + 1e-4) of two gradients that are at hand, in [0, most], detached."""
    if not most > 0.0:
        raise ValueError(f"most must be positive, got {most}")
    above, below = (torch.linalg.vector_norm(g.detach().float()) for g in (reconstruction, adversarial))
    return (above / (below + 1e-4)).clamp(0.0, most)


def started(step: int, start: int, weight: float = 1.0) -> float:
    """`weight` from the step `start` on, 0 before: a reconstruction is learned first (arXiv 2012.09841)."""
    return weight if integer("step", step, 0) >= integer("start", start, 0) else 0.0


# ------------------------------------------------------------------------------------------------------------ checks


def _logits(name: str, value: Tensor) -> Tensor:
    """In at least float32; ValueError unless floating-point and [B, ...]."""
    need_tensor(name, value)
    if value.dim() == 0 or not value.is_floating_point():
        raise ValueError(f"{name} must be floating-point logits [B, ...], got {value.dtype} {list(value.shape)}")
    return value.to(torch.promote_types(value.dtype, torch.float32))


def _check_alike(real: Tensor, fake: Tensor) -> None:
    if real.shape != fake.shape:
        raise ValueError(f"fake must have the shape of real, {list(real.shape)}, got {list(fake.shape)}")


def _check_samples(name: str, value: Tensor) -> None:
    need_tensor(name, value)
    if value.dim() < 2 or not value.is_floating_point():
        raise ValueError(f"{name} must be floating-point samples [B, ...], got {value.dtype} {list(value.shape)}")


def _mean_of_each(values: Tensor) -> Tensor:
    return values if values.dim() == 1 else values.flatten(1).mean(1)
