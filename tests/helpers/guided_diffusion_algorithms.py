"""The algorithms behind guided-diffusion in plain torch, our own transcription of the papers.

arXiv 2006.11239 (DDPM): algorithm 2, eq. 4 to 13. arXiv 2102.09672 (improved DDPM): eq. 15 and 16. arXiv 2010.02502
(DDIM): eq. 12 and its reverse. arXiv 2105.05233 (classifier guidance): algorithms 1 and 2.
t counts from 0 here, where the papers have t + 1. Coefficients are worked out in float64 and rounded to the state's
dtype.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

LEARNED = ("LEARNED", "LEARNED_RANGE")


class Chain:
    """The chain with these betas, for a model of this mean and variance."""

    def __init__(self, betas: Any, mean: str = "EPSILON", variance: str = "FIXED_SMALL") -> None:
        self.mean, self.kind = mean, variance
        self.beta = torch.as_tensor(betas, dtype=torch.float64)
        self.T = len(self.beta)
        self.abar = torch.cumprod(1 - self.beta, 0)
        self.before = torch.cat([torch.ones(1, dtype=torch.float64), self.abar[:-1]])
        self.after = torch.cat([self.abar[1:], torch.zeros(1, dtype=torch.float64)])
        self.beta_tilde = (1 - self.before) / (1 - self.abar) * self.beta
        # Its logarithm at the first step is that of the second.
        self.safe = torch.cat([self.beta_tilde[1:2], self.beta_tilde[1:]])

    def at(self, table: Tensor, t: Tensor, x: Tensor) -> Tensor:
        return table.to(t.device)[t].reshape(-1, *(1,) * (x.dim() - 1))

    @staticmethod
    def times(coefficient: Tensor, x: Tensor) -> Tensor:
        return coefficient.to(x.dtype) * x

    # ------------------------------------------------------------------------------------------- the model's step
    def noised(self, x0: Tensor, t: Tensor, eps: Tensor) -> Tensor:
        abar = self.at(self.abar, t, x0)
        return self.times(abar.sqrt(), x0) + self.times((1 - abar).sqrt(), eps)

    def posterior_mean(self, x0: Tensor, x: Tensor, t: Tensor) -> Tensor:
        abar, before, beta = (self.at(table, t, x) for table in (self.abar, self.before, self.beta))
        from_x = (1 - beta).sqrt() * (1 - before) / (1 - abar)
        return self.times(before.sqrt() * beta / (1 - abar), x0) + self.times(from_x, x)

    def x0(self, x: Tensor, m: Tensor, t: Tensor) -> Tensor:
        if self.mean == "START_X":
            return m
        abar = self.at(self.abar, t, x)
        if self.mean == "EPSILON":
            return self.times(1 / abar.sqrt(), x) - self.times((1 / abar - 1).sqrt(), m)
        before, beta = self.at(self.before, t, x), self.at(self.beta, t, x)
        scale = before.sqrt() * beta
        return self.times((1 - abar) / scale, m) - self.times((1 - beta).sqrt() * (1 - before) / scale, x)

    def log_variance(self, v: Tensor | None, t: Tensor, x: Tensor) -> Tensor:
        low, high = (self.at(table, t, x).log().to(x.dtype) for table in (self.safe, self.beta))
        if v is not None:
            share = (v + 1) / 2
            return v if self.kind == "LEARNED" else share * high + (1 - share) * low
        if self.kind == "FIXED_LARGE":
            high = self.at(torch.cat([self.safe[:1], self.beta[1:]]), t, x).log().to(x.dtype)
        return (low if self.kind == "FIXED_SMALL" else high).expand(x.shape)

    def variance(self, v: Tensor | None, t: Tensor, x: Tensor) -> Tensor:
        if self.kind == "FIXED_SMALL":
            return self.at(self.beta_tilde, t, x).to(x.dtype).expand(x.shape)
        return self.log_variance(v, t, x).exp()

    def call(
        self, model: Any, x: Tensor, t: Tensor, clip: bool, change: Callable[[Tensor], Tensor] | None
    ) -> tuple[Tensor, Tensor | None, Tensor]:
        """(x0, v, mean) from a call of the model."""
        m, v = model(x, t), None
        if self.kind in LEARNED:
            m, v = m.chunk(2, dim=1)
        x0 = self.x0(x, m, t)
        x0 = x0 if change is None else change(x0)
        x0 = x0.clamp(-1, 1) if clip else x0
        return x0, v, m if self.mean == "PREVIOUS_X" else self.posterior_mean(x0, x, t)

    def ddpm(
        self, model: Any, x: Tensor, t: Tensor, z: Tensor, clip: bool = True, change: Any = None, classifier: Any = None
    ) -> tuple[Tensor, Tensor]:
        """(x_{t-1}, x0): algorithm 2 of DDPM; with a classifier's gradient, algorithm 1 of classifier guidance."""
        x0, v, mean = self.call(model, x, t, clip, change)
        if classifier is not None:
            mean = mean + self.variance(v, t, x) * classifier(x, t)
        later = (t > 0).to(x.dtype).reshape(-1, *(1,) * (x.dim() - 1))
        return mean + later * (0.5 * self.log_variance(v, t, x)).exp() * z, x0

    # ------------------------------------------------------------------------------------------- DDIM
    def eps(self, x0: Tensor, x: Tensor, t: Tensor) -> Tensor:
        abar = self.at(self.abar, t, x)
        return self.times((1 - abar).rsqrt(), x) - self.times((1 / abar - 1).rsqrt(), x0)

    def ddim(
        self,
        model: Any,
        x: Tensor,
        t: Tensor,
        z: Tensor,
        clip: bool = True,
        change: Any = None,
        classifier: Any = None,
        eta: float = 0.0,
    ) -> tuple[Tensor, Tensor]:
        """(x_{t-1}, x0): eq. 12 of DDIM, eps of the clipped x0; with a gradient, algorithm 2 of classifier guidance."""
        x0 = self.call(model, x, t, clip, change)[0]
        eps = self.eps(x0, x, t)
        abar, before = self.at(self.abar, t, x), self.at(self.before, t, x)
        if classifier is not None:
            eps = eps - self.times((1 - abar).sqrt(), classifier(x, t))
            x0 = self.times(1 / abar.sqrt(), x) - self.times((1 / abar - 1).sqrt(), eps)
        sigma = eta * ((1 - before) / (1 - abar) * (1 - abar / before)).sqrt()
        along = (1 - before - sigma**2).sqrt()
        return self.times(before.sqrt(), x0) + self.times(along, eps) + self.times(sigma, z), x0

    def ddim_reverse(
        self, model: Any, x: Tensor, t: Tensor, clip: bool = True, change: Any = None
    ) -> tuple[Tensor, Tensor]:
        """(x_{t+1}, x0): the deterministic eq. 12 towards the next noisier level."""
        x0 = self.call(model, x, t, clip, change)[0]
        after = self.at(self.after, t, x)
        return self.times(after.sqrt(), x0) + self.times((1 - after).sqrt(), self.eps(x0, x, t)), x0

    # ------------------------------------------------------------------------------------------- training
    def bound(self, model: Any, x0: Tensor, x: Tensor, t: Tensor, clip: bool = False) -> Tensor:
        """L_t in bits, [B]: the KL of eq. 5, or at t = 0 the decoder of eq. 13 with an approximate distribution."""
        _, v, mean = self.call(model, x, t, clip, None)
        log_variance = self.log_variance(v, t, x)
        true, low = self.posterior_mean(x0, x, t), self.at(self.safe, t, x).log().to(x.dtype)
        kl = 0.5 * (log_variance - low - 1 + (low - log_variance).exp() + (mean - true) ** 2 / log_variance.exp())
        std = (0.5 * log_variance).exp()

        def cdf(y: Tensor) -> Tensor:
            return 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (y + 0.044715 * y**3)))

        upper, lower = cdf((x0 - mean + 1 / 255) / std), cdf((x0 - mean - 1 / 255) / std)
        mass = torch.where(x0 > 0.999, 1 - lower, torch.where(x0 < -0.999, upper, upper - lower))
        nats = torch.where(t.reshape(-1, *(1,) * (x.dim() - 1)) == 0, -mass.clamp(min=1e-12).log(), kl)
        return nats.flatten(1).mean(1) / math.log(2)

    def losses(self, model: Any, x0: Tensor, t: Tensor, eps: Tensor, kind: str) -> dict[str, Tensor]:
        """L_simple, L_vlb, and L_hybrid = L_simple + lambda L_vlb with the mean stopped (improved DDPM, eq. 16)."""
        x = self.noised(x0, t, eps)
        if kind.endswith("KL"):
            return {"loss": self.bound(model, x0, x, t) * (self.T if kind == "RESCALED_KL" else 1)}
        out = model(x, t)
        m = out.chunk(2, dim=1)[0] if self.kind in LEARNED else out
        target = {"EPSILON": eps, "START_X": x0, "PREVIOUS_X": self.posterior_mean(x0, x, t)}[self.mean]
        terms = {"mse": (m - target).square().flatten(1).mean(1)}
        terms["loss"] = terms["mse"]
        if self.kind in LEARNED:
            stopped = torch.cat([m.detach(), out.chunk(2, dim=1)[1]], 1)
            vb = self.bound(lambda *args: stopped, x0, x, t)
            terms["vb"] = vb * (self.T / 1000 if kind == "RESCALED_MSE" else 1)
            terms["loss"] = terms["mse"] + terms["vb"]
        return terms

    def prior(self, x0: Tensor) -> Tensor:
        """L_T in bits, [B]."""
        abar = self.abar[-1]
        return (0.5 * (abar * x0**2 - abar - torch.log1p(-abar))).flatten(1).mean(1) / math.log(2)
