"""Conditional and marginal probability paths of any schedule (lecture 003)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from diffkern import streams
from diffkern.draws import uniform_by_address
from diffkern.names import Prediction
from diffkern.objectives.losses import noised
from diffkern.objectives.marginals import log_joint, marginal_prediction
from diffkern.ops import Seeds, as_seeds
from diffkern.schedules import predictions
from diffkern.schedules.base import Schedule, Time, as_time
from diffkern.simulate._conditional_paths import same_shape, stored_noise
from diffkern.simulate._process import column


class GaussianPath:
    """The path of one data point z: p_t(x given z) = N(alpha_t z, sigma_t^2 I), sigma being lecture 003's beta.

    x and z are [B, ...], t is a number, [] or [B]. Time is the schedule's: the lecture's, noise at 0 and data at 1, is
    that of `flow()` or of `path(alpha, beta)`. Fields and densities need sigma > 0; results have the dtype of x.
    """

    def __init__(self, schedule: Schedule) -> None:
        self.schedule = schedule

    def sample(
        self,
        z: Tensor,
        t: Time,
        *,
        seeds: Seeds | None = None,
        noise: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """alpha z + sigma eps; eps by address (`seeds` [B], as `losses.noised`), given, or from torch's generator."""
        eps = stored_noise(z, seeds, noise, generator)
        return noised(z, as_time(t), self.schedule, seeds=seeds, noise=eps)

    def conditional(self, x: Tensor, z: Tensor, t: Time, prediction: Prediction) -> Tensor:
        """u z + v eps with eps = (x - alpha z)/sigma: any of `schedules.predictions` at x, given that the data is z."""
        same_shape(x, z)
        alpha, sigma = self._rates(x, t)
        u, v = (column(c, x) for c in predictions.target_coefficients(self.schedule, prediction, t))
        return u * z + v * ((x - alpha * z) / sigma)

    def vector_field(self, x: Tensor, z: Tensor, t: Time) -> Tensor:
        """u_t(x given z) = (alpha_dot - sigma_dot/sigma alpha) z + sigma_dot/sigma x, as alpha_dot z + sigma_dot eps.

        Lecture 003, which drops both dots in the last line of its loss.
        """
        return self.conditional(x, z, t, "velocity")

    def score(self, x: Tensor, z: Tensor, t: Time) -> Tensor:
        """d/dx ln p_t(x given z) = -(x - alpha z)/sigma^2."""
        return self.conditional(x, z, t, "score")

    def log_density(self, x: Tensor, z: Tensor, t: Time) -> Tensor:
        """ln p_t(x given z) in nats, [B] float64."""
        same_shape(x, z)
        wide = x.to(torch.float64)
        alpha, sigma = self._rates(wide, t)
        eps = ((wide - alpha * z) / sigma).flatten(1)
        return (-0.5 * eps.square() - 0.5 * math.log(2.0 * math.pi)).sum(1) - eps.shape[1] * sigma.flatten().log()

    def _rates(self, x: Tensor, t: Time) -> tuple[Tensor, Tensor]:
        sigma = self.schedule.sigma(t)
        if sigma.device.type == "cpu" and not bool((sigma > 0).all()):
            raise ValueError(f"sigma must be positive for a density or a field, got {sigma.min().item()}")
        return column(self.schedule.alpha(t), x), column(sigma, x)


class DataMarginal:
    """p_t(x) = sum_z p(z) p_t(x given z) over the N given points: what an infinitely long training would learn of them.

    The fields are those of the single points, weighted by the posterior over the points given x (lecture 003,
    "marginalization trick"; `flow_matching.marginal_prediction`), in float64 and with the largest exponent taken out:
    order B N D of work and memory. data is [N, ...]; `weights` [N] are p(z), in any scale, equal if not given.
    Results have the dtype of x. Use: `VectorField(marginal.vector_field)`, `ReverseSDE(schedule, marginal.score)`.
    """

    def __init__(self, schedule: Schedule, data: Tensor, weights: Tensor | None = None) -> None:
        if data.ndim == 0 or len(data) == 0 or not data.is_floating_point():
            raise ValueError(f"data must be floating-point points [N, ...], got {data.dtype} {list(data.shape)}")
        if weights is None:
            weights = torch.ones(len(data), dtype=torch.float64, device=data.device)
        weights = weights.to(data.device, torch.float64)
        if weights.shape != (len(data),) or not bool((weights >= 0).all()) or not 0 < float(weights.sum()) < math.inf:
            raise ValueError(f"weights must be {len(data)} numbers >= 0 with a positive sum, got {weights.tolist()}")
        self.schedule, self.data, self.weights = schedule, data, weights / weights.sum()
        self.path = GaussianPath(schedule)

    def draw(self, n: int, *, seeds: Seeds | None = None, generator: torch.Generator | None = None) -> Tensor:
        """n of the points by their weights, [n, ...]: by address (`seeds` [n], stream DATA) or from the generator."""
        if seeds is not None and generator is not None:
            raise ValueError("give seeds or generator, not both, got both")
        if seeds is not None:
            u = uniform_by_address(as_seeds(seeds, n, self.data.device), streams.DATA).to(self.data.device)
            index = torch.searchsorted(self.weights.cumsum(0), u, right=True).clamp(max=len(self.data) - 1)
        else:
            index = torch.multinomial(self.weights, n, True, generator=generator)
        return self.data[index]

    def sample(
        self, n: int, t: Time, *, seeds: Seeds | None = None, generator: torch.Generator | None = None
    ) -> Tensor:
        """n samples of p_t: a point, then its path."""
        points = self.draw(n, seeds=seeds, generator=generator)
        return self.path.sample(points, t, seeds=seeds, generator=generator)

    def vector_field(self, x: Tensor, t: Time) -> Tensor:
        """u_t(x) = E[u_t(x given z) given x]."""
        return self._mean(x, t, "velocity")

    def score(self, x: Tensor, t: Time) -> Tensor:
        """d/dx ln p_t(x) = E[d/dx ln p_t(x given z) given x]."""
        return self._mean(x, t, "score")

    def log_density(self, x: Tensor, t: Time) -> Tensor:
        """ln p_t(x) in nats, [B] float64."""
        return torch.logsumexp(log_joint(self.data, x, as_time(t), self.schedule, self.weights), 1)

    def _mean(self, x: Tensor, t: Time, prediction: Prediction) -> Tensor:
        weights = self.weights
        return marginal_prediction(self.data, x, as_time(t), self.schedule, prediction, weights).to(x.dtype)
