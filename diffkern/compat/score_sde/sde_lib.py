"""The SDEs of arXiv 2011.13456 (section 3.4, appendices B to E) with score_sde's interface.

    dx = f(x, t) dt + g(t) dw,    t from 0 (data) to T = 1 (noise)

Every method works in the dtype of ``t``, as score_sde's do: its images depend on the rounding of float32 (at t = 1e-3
the std of VP is off by up to 1.4e-4, that of sub-VP by 2.7e-4). `diffkern.schedules` has the same SDEs in float64
without cancellation: the ``schedule`` of each SDE here, which the ODE sampler and the likelihood integrate.
"""

from __future__ import annotations

import abc
import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from diffkern.compat.score_sde import _rows
from diffkern.schedules.makers import sub_vp, ve, vp

if TYPE_CHECKING:
    from diffkern.schedules.base import Schedule

__all__ = ["SDE", "VESDE", "VPSDE", "subVPSDE"]

Score = Callable[[Tensor, Tensor], Tensor]


class SDE(abc.ABC):
    """A diffusion process with a known perturbation kernel; times are [B], states [B, ...]."""

    def __init__(self, N: int) -> None:
        """``N``: number of discretisation steps."""
        super().__init__()
        self.N = N

    @property
    @abc.abstractmethod
    def T(self) -> float:
        """The time of the noise end."""

    @abc.abstractmethod
    def sde(self, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """(drift [B, ...], diffusion [B])."""

    @abc.abstractmethod
    def marginal_prob(self, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """(mean [B, ...], standard deviation [B]) of x_t given x_0 = x."""

    @abc.abstractmethod
    def prior_sampling(self, shape: Sequence[int]) -> Tensor:
        """A state at T, by `torch.randn` on the CPU."""

    @abc.abstractmethod
    def prior_logp(self, z: Tensor) -> Tensor:
        """ln density in nats, [B], of the state at T."""

    def discretize(self, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """(f [B, ...], G [B]) of x_{i+1} = x_i + f + G z; by default Euler and Maruyama's, f = drift/N."""
        dt = 1 / self.N
        drift, diffusion = self.sde(x, t)
        return drift * dt, diffusion * math.sqrt(dt)

    def reverse(self, score_fn: Score, probability_flow: bool = False) -> Any:
        """The reverse-time SDE, or with ``probability_flow`` its ODE: an SDE of the same class (`_Reverse`)."""
        if not callable(score_fn):
            raise ValueError(f"score_fn must be a function of (x, t), got {score_fn!r}")
        kind: type = _reverses.get(type(self)) or type("RSDE", (_Reverse, type(self)), {})
        _reverses[type(self)] = kind
        return kind(self, score_fn, probability_flow)


class _Reverse:
    """drift - c g^2 score and g, c = 1; of the ODE c = 1/2, and its noise is 0. Its drift is one fused op."""

    def __init__(self, forward: SDE, score_fn: Score, probability_flow: bool) -> None:
        self.__dict__.update(forward.__dict__)
        self.forward, self.score_fn, self.probability_flow = forward, score_fn, probability_flow

    @property
    def T(self) -> float:
        return self.forward.T

    def sde(self, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """(drift [B, ...], diffusion [B]) of the reverse process; its dt is negative."""
        return self._reversed("sde", x, t)

    def discretize(self, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """(f [B, ...], G [B]) of x_{i-1} = x_i - f + G z."""
        return self._reversed("discretize", x, t)

    def _reversed(self, method: str, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        if _rows.linear(self.forward, method):
            rate, g = _rows.rate(self.forward, method, t)
            drift = _rows.combined(x, t, self.score_fn, rate, self.pull * -(g.double() ** 2))
        else:
            drift, g = getattr(self.forward, method)(x, t)
            drift = drift - _rows.column(g, x) ** 2 * self.score_fn(x.clone(), t.clone()) * self.pull
        # Zeros, where score_sde's Euler-Maruyama predictor met a float 0 and raised TypeError.
        return drift, torch.zeros_like(g) if self.probability_flow else g

    @property
    def pull(self) -> float:
        """c."""
        return 0.5 if self.probability_flow else 1.0


_reverses: dict[type, type] = {}


def _normal_logp(z: Tensor, variance: float) -> Tensor:
    dims = z[0].numel()
    squares = z.reshape(z.shape[0], -1).square().sum(1)
    return -0.5 * dims * math.log(2 * math.pi * variance) - squares / (2 * variance)


class _LinearBeta(SDE):
    """beta(t) = beta_min + t (beta_max - beta_min), and N betas beta_i/N of its discretisation."""

    def __init__(self, beta_min: float = 0.1, beta_max: float = 20, N: int = 1000) -> None:
        super().__init__(N)
        self.beta_0, self.beta_1 = beta_min, beta_max
        self.discrete_betas = torch.linspace(beta_min / N, beta_max / N, N)
        self.alphas = 1.0 - self.discrete_betas

    @property
    def T(self) -> float:
        """1."""
        return 1

    def _beta(self, t: Tensor) -> Tensor:
        return self.beta_0 + t * (self.beta_1 - self.beta_0)

    def _log_mean(self, t: Tensor) -> Tensor:
        """-1/2 int_0^t beta."""
        return -0.25 * t**2 * (self.beta_1 - self.beta_0) - 0.5 * t * self.beta_0

    def prior_sampling(self, shape: Sequence[int]) -> Tensor:
        """Standard normals."""
        return torch.randn(*shape)

    def prior_logp(self, z: Tensor) -> Tensor:
        """ln N(z; 0, I)."""
        return _normal_logp(z, 1.0)


class VPSDE(_LinearBeta):
    """dx = -beta/2 x dt + sqrt(beta) dw (eq. 11); `discretize` is DDPM's chain, sqrt(1 - beta_i) x + sqrt(beta_i) z."""

    def __init__(self, beta_min: float = 0.1, beta_max: float = 20, N: int = 1000) -> None:
        super().__init__(beta_min, beta_max, N)
        self.alphas_cumprod = torch.cumprod(self.alphas, dim=0)
        self.sqrt_alphas_cumprod = torch.sqrt(self.alphas_cumprod)
        self.sqrt_1m_alphas_cumprod = torch.sqrt(1.0 - self.alphas_cumprod)

    @property
    def schedule(self) -> Schedule:
        """`diffkern.vp` with these betas."""
        return vp(self.beta_0, self.beta_1)

    def sde(self, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """(-beta/2 x, sqrt(beta))."""
        beta = self._beta(t)
        return -0.5 * _rows.column(beta, x) * x, beta.sqrt()

    def marginal_prob(self, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """(alpha x, sqrt(1 - alpha^2)), eq. 29."""
        log_mean = self._log_mean(t)
        return _rows.column(log_mean.exp(), x) * x, (1.0 - (2.0 * log_mean).exp()).sqrt()

    def discretize(self, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """((sqrt(1 - beta_i) - 1) x, sqrt(beta_i)), appendix E."""
        i = _rows.index(self, t)
        root = _rows.column(_rows.on_device(self, "alphas", x.device)[i].sqrt(), x)
        return root * x - x, _rows.on_device(self, "discrete_betas", x.device)[i].sqrt()


class subVPSDE(_LinearBeta):
    """dx = -beta/2 x dt + sqrt(beta (1 - e^{-2 int beta})) dw (eq. 14), discretised by Euler and Maruyama's rule.

    It has `discrete_betas` and `alphas`, for want of which score_sde's Langevin corrector raises AttributeError.
    """

    @property
    def schedule(self) -> Schedule:
        """`diffkern.sub_vp` with these betas."""
        return sub_vp(self.beta_0, self.beta_1)

    def sde(self, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """(-beta/2 x, sqrt(beta (1 - alpha^4)))."""
        beta = self._beta(t)
        discount = 1.0 - torch.exp(-2 * self.beta_0 * t - (self.beta_1 - self.beta_0) * t**2)
        return -0.5 * _rows.column(beta, x) * x, (beta * discount).sqrt()

    def marginal_prob(self, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """(alpha x, 1 - alpha^2)."""
        log_mean = self._log_mean(t)
        return _rows.column(log_mean.exp(), x) * x, 1.0 - (2.0 * log_mean).exp()


class VESDE(SDE):
    """dx = sigma sqrt(2 ln(sigma_max/sigma_min)) dw, sigma = sigma_min (sigma_max/sigma_min)^t (eq. 30).

    `discretize` is SMLD's chain over `discrete_sigmas`, N levels even in ln sigma.
    """

    def __init__(self, sigma_min: float = 0.01, sigma_max: float = 50, N: int = 1000) -> None:
        super().__init__(N)
        self.sigma_min, self.sigma_max = sigma_min, sigma_max
        self.discrete_sigmas = torch.exp(torch.linspace(math.log(sigma_min), math.log(sigma_max), N))

    @property
    def T(self) -> float:
        """1."""
        return 1

    @property
    def schedule(self) -> Schedule:
        """`diffkern.ve` with these levels."""
        return ve(self.sigma_min, self.sigma_max)

    def sde(self, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """(0, sigma sqrt(2 ln(sigma_max/sigma_min)))."""
        square = 2 * (math.log(self.sigma_max) - math.log(self.sigma_min))
        rate = torch.tensor(square, dtype=t.dtype, device="cpu").sqrt().item()  # rounded as t is
        return torch.zeros_like(x), self._sigma(t) * rate

    def _sigma(self, t: Tensor) -> Tensor:
        ratio: Tensor = (self.sigma_max / self.sigma_min) ** t
        return self.sigma_min * ratio

    def marginal_prob(self, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """(x, sigma)."""
        return x, self._sigma(t)

    def prior_sampling(self, shape: Sequence[int]) -> Tensor:
        """Normals of standard deviation sigma_max."""
        return torch.randn(*shape) * self.sigma_max

    def prior_logp(self, z: Tensor) -> Tensor:
        """ln N(z; 0, sigma_max^2 I)."""
        return _normal_logp(z, self.sigma_max**2)

    def discretize(self, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """(0, sqrt(sigma_i^2 - sigma_{i-1}^2)), sigma_{-1} = 0."""
        sigma, below = self.levels(t)
        return torch.zeros_like(x), (sigma**2 - below**2).sqrt()

    def levels(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """(sigma_i, sigma_{i-1}) on the device of t."""
        i = _rows.index(self, t)
        table = _rows.on_device(self, "discrete_sigmas", t.device)
        return table[i], torch.where(i == 0, 0.0, table[i - 1])


def unsupported(sde: object) -> NotImplementedError:
    """score_sde's error for an SDE that is none of these; its own classes are none of them, either."""
    kind = type(sde)
    return NotImplementedError(
        f"SDE class {kind.__name__} not yet supported. It is {kind.__module__}.{kind.__qualname__}: VPSDE, subVPSDE "
        f"and VESDE are those of {__name__}"
    )


_rows.KNOWN |= {
    getattr(kind, method)
    for kind in (SDE, VPSDE, subVPSDE, VESDE)
    for method in ("sde", "discretize", "marginal_prob", "reverse", "_beta", "_log_mean", "_sigma")
    if hasattr(kind, method)
}
