"""Score matching: denoising (continuous, and NCSN's ladder of noise), implicit with the exact trace, and sliced.

`score(x, t)` is any callable that returns s, shaped like x. Which losses need what, and how they are scaled:

| loss | data | value |
|---|---|---|
| `denoising_score_matching_loss` | noised by a schedule | lambda (s + eps/sigma)^2, the mean over elements |
| `ncsn_loss` | noised, sigma_1..sigma_L | sigma^2 (s + eps/sigma)^2, the mean over elements |
| `implicit_score_matching_loss` | as they are | tr(ds/dx) + s.s/2, the sum over elements |
| `sliced_score_matching_loss` | as they are | v.(ds/dx) v + (v.s)^2/2, or + s.s/2: the sum over elements |

All have the true score as their minimiser: E implicit = E sliced = 1/2 E|s - grad ln p|^2 - 1/2 E|grad ln p|^2, and a
denoising loss does it with the score of the noised data (Hyvarinen 2005; Vincent 2011; Song et al. 2019, 1905.07088).

Errata of the lectures: 001 prints the implicit loss as tr(grad s) + |1/2 grad s|^2 (and, a line before, grad ln p_theta
for that of the data); it is tr(grad s) + 1/2 |s|^2. 003 notes that |s + eps/sigma|^2 is unstable for small sigma:
multiply by sigma^2, as the default weight here does.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from diffkern.checks import unwrapped
from diffkern.draws import draw_seeds, projections
from diffkern.integers import integer
from diffkern.modes import readable
from diffkern.names import Projection, Reduction, TimesName
from diffkern.objectives._time_sampler import TimeSampler
from diffkern.objectives.losses import Weight, simple_loss
from diffkern.objectives.reduction import reduced
from diffkern.objectives.time_sampling import get_time_sampler
from diffkern.objectives.weightings import UniformIn
from diffkern.ops import Seeds, as_seeds
from diffkern.schedules.base import Schedule, as_float64
from diffkern.schedules.makers import edm
from diffkern.schedules.spacings import exponential_sigmas

__all__ = [
    "denoising_score_matching_loss",
    "geometric_sigmas",
    "implicit_score_matching_loss",
    "ncsn_loss",
    "projections",
    "sliced_score_matching_loss",
]

Score = Callable[..., Tensor]
SIGMA_SQUARED = UniformIn("eps")
"""lambda = sigma^2 of the score's error: the error of sigma s as a prediction of -eps."""


def denoising_score_matching_loss(
    score: Score,
    x0: Tensor,
    t: Tensor | None,
    schedule: Schedule,
    *,
    times: TimesName | TimeSampler = "uniform",
    weight: Weight = SIGMA_SQUARED,
    seeds: Seeds | None = None,
    noise: Tensor | None = None,
    reduction: Reduction = "mean",
    **model_kwargs: Any,
) -> Tensor:
    """lambda(t) mean |score(x_t, t) + eps/sigma_t|^2: the score of q(x_t given x0) is -eps/sigma (lectures 001, 003).

    x0 [B, ...]; t [B], or None to draw it from `times` (by address where `seeds` are). `weight` is lambda: sigma^2 by
    default, for which the loss equals L_simple of eps = -sigma s; ``"likelihood"`` is g(t)^2 (arXiv 2101.09258); any
    other of `prediction_loss`. Nothing is divided by sigma^2: s is compared with -eps/sigma and the square multiplied
    by lambda, which holds for sigma down to 1e-15 in float32. sigma_t = 0, where there is no score, is an error.
    """
    if t is None:
        t = get_time_sampler(times).sample(x0.shape[0], schedule, seeds=seeds, device=x0.device)
    return simple_loss(
        score, x0, t, schedule, "score", weight=weight, seeds=seeds, noise=noise, reduction=reduction, **model_kwargs
    )


def geometric_sigmas(L: int, sigma_1: float, sigma_L: float) -> Tensor:
    """sigma_i = sigma_1 (sigma_L/sigma_1)^((i-1)/(L-1)), i = 1..L, float64 (arXiv 1907.05600; lecture 001).

    Rising or falling: the lecture counts from the smallest, the paper from the largest.
    """
    L = integer("L", L, 2)
    sigmas = exponential_sigmas(L, min(sigma_1, sigma_L), max(sigma_1, sigma_L))[:-1]
    return sigmas if sigma_1 > sigma_L else sigmas.flip(0)


def ncsn_loss(
    score: Score,
    x0: Tensor,
    sigmas: Tensor,
    index: Tensor | None = None,
    *,
    weight: Weight = SIGMA_SQUARED,
    seeds: Seeds | None = None,
    noise: Tensor | None = None,
    reduction: Reduction = "mean",
    **model_kwargs: Any,
) -> Tensor:
    """Noise-conditional score matching (Song and Ermon 2019, arXiv 1907.05600, eq. 5 and 6; lecture 001).

        x = x0 + sigma_i eps,    L = lambda(sigma_i) mean |score(x, sigma_i) + eps/sigma_i|^2

    sigmas [L] are the noise levels (`geometric_sigmas`), index [B] int64 the level of each sample, drawn uniformly if
    not given: by address where `seeds` are. lambda(sigma) = sigma^2 by default: |sigma s + eps|^2, the eps loss of
    eps = -sigma s, of the same size for every level. The paper sums over elements and halves; here it is the mean. The
    score is called with sigma_i, [B] float32.
    """
    sigmas = as_float64(sigmas)
    if sigmas.ndim != 1 or len(sigmas) == 0:
        raise ValueError(f"sigmas must be a non-empty list of noise levels, got shape {list(sigmas.shape)}")
    if readable(sigmas) and not bool((torch.isfinite(sigmas) & (sigmas > 0)).all()):
        i = int((~(torch.isfinite(sigmas) & (sigmas > 0))).nonzero()[0])
        raise ValueError(f"sigmas must be positive and finite, got sigmas[{i}] = {float(sigmas[i])}")
    batch = x0.shape[0]
    if index is None:
        share = get_time_sampler("uniform").sample(batch, seeds=seeds, device=x0.device)
        index = (share * len(sigmas)).long().clamp(max=len(sigmas) - 1)
    if index.is_floating_point() or index.shape != (batch,):
        raise ValueError(f"index must be integers of shape [{batch}], got {index.dtype} {list(index.shape)}")
    if readable(index) and not bool(((index >= 0) & (index < len(sigmas))).all()):
        bad = index[(index < 0) | (index >= len(sigmas))][0].item()
        raise ValueError(f"index must lie in 0..{len(sigmas) - 1} (L = {len(sigmas)}), got {bad}")
    sigma = sigmas.to(x0.device)[index.to(x0.device)]
    return simple_loss(
        score, x0, sigma, edm(), "score", weight=weight, seeds=seeds, noise=noise, reduction=reduction, **model_kwargs
    )


def implicit_score_matching_loss(
    score: Score, x: Tensor, t: Tensor | None = None, *, reduction: Reduction = "mean", **model_kwargs: Any
) -> Tensor:
    """tr(ds/dx) + 1/2 |s|^2 with the exact trace, D backward passes for D elements a sample: for small D.

    Hyvarinen 2005; lecture 001, which prints the second term as |1/2 grad s|^2. x [B, ...] are samples of the density
    whose score is wanted, ``score(x)`` or ``score(x, t)`` treats each alone. "none" gives [B]; float32, float64 for
    float64 x. Differentiable in x, t and what the score depends on. NotImplementedError under torch.export with
    ``strict=True``, which cannot follow a gradient inside of a program.
    """

    def loss_of(s: Tensor, pulled: Callable[[Tensor], Tensor], seeds: Tensor | None) -> Tensor:
        loss = 0.5 * s.square().sum(1)
        for d in range(s.shape[1]):
            along_d = torch.zeros_like(s)
            along_d[:, d] = 1.0
            loss = loss + pulled(along_d)[:, d]
        return loss

    return reduced(_differentiated(loss_of, score, x, t, None, model_kwargs), reduction)


def sliced_score_matching_loss(
    score: Score,
    x: Tensor,
    t: Tensor | None = None,
    *,
    n_projections: int = 1,
    variance_reduced: bool = True,
    projection: Projection = "rademacher",
    seeds: Seeds | None = None,
    reduction: Reduction = "mean",
    **model_kwargs: Any,
) -> Tensor:
    """v (ds/dx) v + 1/2 (v s)^2, or + 1/2 |s|^2 if `variance_reduced`, averaged over `n_projections` random v.

    Song et al. 2019 (arXiv 1905.07088, eq. 8 and section 3.2); lecture 001. E[v v^T] = I, so that the expectation is
    `implicit_score_matching_loss` at the cost of one backward pass a projection. The v are `projections` of the
    samples' `seeds`, fresh ones from torch's generator if not given. Everything else as there.
    """
    n_projections = integer("n_projections", n_projections)
    seeds = draw_seeds(x.shape[0], device=x.device) if seeds is None else as_seeds(seeds, x.shape[0], x.device)

    def loss_of(s: Tensor, pulled: Callable[[Tensor], Tensor], seeds: Tensor) -> Tensor:
        loss = 0.5 * s.square().sum(1) if variance_reduced else torch.zeros_like(s[:, 0])
        for k in range(n_projections):
            v = projections(x.shape, seeds, k, projection, s.dtype).flatten(1)
            along = (s * v).sum(1)
            term = (pulled(v) * v).sum(1)
            loss = loss + (term if variance_reduced else term + 0.5 * along.square()) / n_projections
        return loss

    return reduced(_differentiated(loss_of, score, x, t, seeds, model_kwargs), reduction)


def _differentiated(
    loss_of: Callable[..., Tensor],
    score: Score,
    x: Tensor,
    t: Tensor | None,
    seeds: Tensor | None,
    more: dict[str, Any],
) -> Tensor:
    """``loss_of`` of what `_score` returns, and of seeds, [B]; itself differentiable where gradients are recorded."""
    keep = torch.is_grad_enabled()

    def whole(x: Tensor, t: Tensor | None, seeds: Tensor | None, more: dict[str, Any]) -> Tensor:
        with torch.enable_grad():
            loss = loss_of(*_score(score, x, t, more, keep), seeds)
        return loss if keep else loss.detach()

    if not torch.compiler.is_exporting():
        return whole(x, t, seeds, more)
    if torch.compiler.is_dynamo_compiling():
        raise NotImplementedError(
            "score matching takes a gradient inside of the program, which torch.export follows with strict=False "
            "(its default), got strict=True"
        )
    # torch.export records calls of torch's functions, and a gradient makes none: what it does is recorded here, one
    # level below, and done again for torch.export. All that may have sizes of the batch is an argument.
    from torch.fx.experimental.proxy_tensor import make_fx
    from torch.utils._python_dispatch import _disable_current_modes

    with _disable_current_modes():
        graph = make_fx(whole)(x, t, seeds, more)
    found: Tensor = graph(x, t, seeds, more)
    return found


def _score(
    score: Score, x: Tensor, t: Tensor | None, model_kwargs: dict[str, Any], keep: bool
) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """s as [B, D] in at least float32, and v -> v (ds/dx), both [B, D]; `keep`: itself differentiable."""
    if x.ndim < 2 or not x.is_floating_point():
        raise ValueError(f"x must be floating-point samples [B, ...], got {x.dtype} {list(x.shape)}")

    def at(x: Tensor) -> Tensor:
        s = unwrapped(score(x, **model_kwargs) if t is None else score(x, t, **model_kwargs), "score")
        if s.shape != x.shape:
            raise ValueError(f"score must return the shape of x, {list(x.shape)}, got {list(s.shape)}")
        return s.flatten(1).to(torch.promote_types(s.dtype, torch.float32))

    learned = x.requires_grad and keep
    if torch.compiler.is_dynamo_compiling():  # which traces this form of it
        s, pull, *_ = torch.func.vjp(at, x if learned else x.detach())
        return s, lambda v: pull(v)[0].flatten(1).to(s.dtype)
    x = x if learned else x.detach().requires_grad_()
    s = at(x)
    return s, lambda v: _gradient(s, x, v, keep)


def _gradient(s: Tensor, x: Tensor, v: Tensor, keep: bool) -> Tensor:
    gradient = None
    if s.requires_grad:
        (gradient,) = torch.autograd.grad(s, x, v, create_graph=keep, retain_graph=True, allow_unused=True)
    if gradient is None:
        raise ValueError("score must be differentiable in x, got an output without a gradient in x")
    return gradient.flatten(1).to(s.dtype)
