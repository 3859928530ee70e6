"""Flow matching: losses of a velocity on any Gaussian path, the field they find, and minibatch optimal transport.

A path N(alpha_t z, sigma_t^2 I) (the lectures' beta_t is our sigma_t) carries noise to data z. Its conditional vector
field at x = alpha_t z + sigma_t eps is

    u_t(x given z) = (alpha_dot - sigma_dot/sigma alpha) z + sigma_dot/sigma x = alpha_dot z + sigma_dot eps

and the loss against it has the same gradient and minimiser as the one against the marginal field E[u given x] (lecture
003). Lecture 003 loses the two dots in the last line of its loss, |u_theta - (alpha z + beta eps)|^2; the target is
alpha_dot z + beta_dot eps. Time runs as the schedule's does: for `diffkern.flow` from noise (0) to data (1), as in
lectures 000 and 003, and for the diffusion paths from data to noise, where the velocity points to the noise.

    flow(sigma_min)      alpha = t, sigma = 1 - (1 - sigma_min) t: optimal transport (Lipman et al. 2023, 2210.02747)
    flow(0)              the same without a floor: rectified flow (Liu et al. 2023, 2209.03003)
"""

from __future__ import annotations

from typing import Any, get_args

from torch import Tensor

from diffkern.checks import unknown
from diffkern.draws import draw_seeds
from diffkern.names import Coupling, Prediction, Reduction, TimesName
from diffkern.objectives._time_sampler import TimeSampler
from diffkern.objectives.losses import Model, Weight, simple_loss
from diffkern.objectives.marginals import log_joint, marginal_prediction
from diffkern.objectives.time_sampling import get_time_sampler
from diffkern.objectives.transport import ot_permutation, ot_seeds
from diffkern.ops import Seeds, as_seeds
from diffkern.schedules.base import Schedule
from diffkern.schedules.makers import flow

__all__ = ["flow_matching_loss", "log_joint", "marginal_prediction", "ot_permutation", "ot_seeds"]

COUPLINGS = get_args(Coupling)


def flow_matching_loss(
    model: Model,
    x1: Tensor,
    t: Tensor | None = None,
    schedule: Schedule | None = None,
    *,
    times: TimesName | TimeSampler = "uniform",
    coupling: Coupling = "independent",
    target: Prediction | None = None,
    weight: Weight | None = None,
    seeds: Seeds | None = None,
    noise: Tensor | None = None,
    reduction: Reduction = "mean",
    **model_kwargs: Any,
) -> Tensor:
    """Conditional flow matching (Lipman et al. 2023, arXiv 2210.02747; lectures 000, 003).

        x_t = alpha_t x1 + sigma_t eps,    L = mean |model(x_t, t) - (alpha_dot_t x1 + sigma_dot_t eps)|^2

    x1 [B, ...] is the data, `schedule` any path (`flow()` if not given: x_t = t x1 + (1-t) eps, target x1 - eps). t
    [B] is drawn from `times` if not given: by address where `seeds` are, else from torch's generator. `noise` may be
    samples of any other distribution: the path then joins the pairs (noise[b], x1[b]), as rectified flow does.

    `coupling="ot"` pairs the batch's noise with its data by optimal transport first (`ot_seeds`, or `ot_permutation`
    for `noise`). `target`, `weight` and `reduction` are those of `prediction_loss`.
    """
    schedule = flow() if schedule is None else schedule
    if coupling not in COUPLINGS:
        raise ValueError(unknown("coupling", coupling, COUPLINGS))
    if seeds is not None:
        seeds = as_seeds(seeds, x1.shape[0], x1.device)
    if t is None:
        t = get_time_sampler(times).sample(x1.shape[0], schedule, seeds=seeds, device=x1.device)
    if seeds is None and noise is None:
        seeds = draw_seeds(x1.shape[0], device=x1.device)
    if coupling == "ot":
        if noise is not None:
            noise = noise[ot_permutation(noise, x1)]
        elif seeds is not None:
            seeds = ot_seeds(x1, seeds)
    return simple_loss(
        model,
        x1,
        t,
        schedule,
        "velocity",
        target=target,
        weight=weight,
        seeds=seeds,
        noise=noise,
        reduction=reduction,
        **model_kwargs,
    )
