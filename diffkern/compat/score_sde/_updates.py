"""Predictors and correctors of arXiv 2011.13456 (algorithms 2 to 5, appendices E to G), each update one fused op."""

from __future__ import annotations

import abc
from typing import Any, TypeVar

import torch
from torch import Tensor

from diffkern.compat.score_sde import _rows
from diffkern.compat.score_sde.sde_lib import VESDE, VPSDE, subVPSDE, unsupported
from diffkern.modes import neutral

Kind = TypeVar("Kind", bound=type)
Pair = tuple[Tensor, Tensor]
_PREDICTORS: dict[str, type] = {}
_CORRECTORS: dict[str, type] = {}


def _register(known: dict[str, type], cls: Any, name: str | None) -> Any:
    def add(cls: Kind) -> Kind:
        own = cls.__name__ if name is None else name
        if own in known:
            raise ValueError(f"Already registered model with name: {own}")
        known[own] = cls
        return cls

    return add if cls is None else add(cls)


def register_predictor(cls: Any = None, *, name: str | None = None) -> Any:
    """Decorator: makes a predictor known by ``name``, or by its class's name. ValueError if there is one."""
    return _register(_PREDICTORS, cls, name)


def register_corrector(cls: Any = None, *, name: str | None = None) -> Any:
    """Decorator: makes a corrector known by ``name``, or by its class's name. ValueError if there is one."""
    return _register(_CORRECTORS, cls, name)


def get_predictor(name: str) -> Any:
    """The class registered by that name; KeyError otherwise."""
    return _PREDICTORS[name]


def get_corrector(name: str) -> Any:
    """The class registered by that name; KeyError otherwise."""
    return _CORRECTORS[name]


# ---------------------------------------------------------------------------------------------------------- predictors
class Predictor(abc.ABC):
    """A step of the reverse process at time t."""

    draws_first = False
    """Whether noise is drawn before the score is evaluated."""

    def __init__(self, sde: Any, score_fn: Any, probability_flow: bool = False) -> None:
        super().__init__()
        self.sde, self.score_fn = sde, score_fn
        self.rsde = sde.reverse(score_fn, probability_flow)

    @abc.abstractmethod
    def update_fn(self, x: Tensor, t: Tensor) -> Pair:
        """(x', mean of x') of the state x [B, ...] at the times t [B]."""


class LinearPredictor(Predictor):
    """Predictors whose update is mean = keep x + pull score, x' = mean + std z."""

    needs: str | None = None
    """The method of the SDE that must be linear."""

    def update_fn(self, x: Tensor, t: Tensor) -> Pair:
        """(x', mean of x') of the state x [B, ...] at the times t [B], by one op."""
        _rows.check_state(self.sde, x, t)
        z = torch.randn_like(x) if self.draws_first else None
        if not self.fits():
            return self.plain(x, t, z)
        m, scale = _rows.evaluate(self.score_fn, x, t)
        z = torch.randn_like(x) if z is None else z
        return _rows.moved(x, m, _rows.triple(self.coefficients(t), scale), z, t.dtype)

    def fits(self) -> bool:
        """Whether `coefficients` describe the update for this SDE."""
        return self.needs is None or _rows.linear(self.sde, self.needs)

    @abc.abstractmethod
    def coefficients(self, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(keep, pull, std), each [n], at the times t [n]."""

    def plain(self, x: Tensor, t: Tensor, z: Tensor | None) -> Pair:
        """The update for an SDE of any form, in plain torch."""
        raise NotImplementedError


@register_predictor(name="euler_maruyama")
class EulerMaruyamaPredictor(LinearPredictor):
    """x' = x + (f - c g^2 score) dt + g sqrt(-dt) z, dt = -1/N; c and g of `SDE.reverse` (algorithm of section 4.1)."""

    draws_first = True
    needs = "sde"

    def coefficients(self, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(1 - f/N, c g^2/N, g/sqrt(N))."""
        rate, g = (values.double() for values in _rows.rate(self.sde, "sde", t))
        h = 1.0 / self.rsde.N
        noise = 0.0 if self.rsde.probability_flow else h**0.5
        return 1.0 - rate * h, self.rsde.pull * h * g**2, g * noise

    def plain(self, x: Tensor, t: Tensor, z: Tensor | None) -> Pair:
        """The same with the drift of the SDE."""
        assert z is not None
        h = 1.0 / self.rsde.N
        drift, diffusion = self.rsde.sde(x, t)
        mean = x - drift * h
        return mean + _rows.column(diffusion, x) * h**0.5 * z, mean


@register_predictor(name="reverse_diffusion")
class ReverseDiffusionPredictor(LinearPredictor):
    """x' = x - f_i + c G_i^2 score + G_i z (algorithm 1's discretisation run backwards, appendix E)."""

    needs = "discretize"

    def coefficients(self, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(1 - f, c G^2, G)."""
        rate, g = (values.double() for values in _rows.rate(self.sde, "discretize", t))
        return 1.0 - rate, self.rsde.pull * g**2, g * (0.0 if self.rsde.probability_flow else 1.0)

    def plain(self, x: Tensor, t: Tensor, z: Tensor | None) -> Pair:
        """The same with the SDE's own discretisation."""
        f, g = self.rsde.discretize(x, t)
        mean = x - f
        return mean + _rows.column(g, x) * torch.randn_like(x), mean


@register_predictor(name="ancestral_sampling")
class AncestralSamplingPredictor(LinearPredictor):
    """The posterior of the discrete chain (appendix F): DDPM's with variance beta for VP, SMLD's for VE."""

    def __init__(self, sde: Any, score_fn: Any, probability_flow: bool = False) -> None:
        super().__init__(sde, score_fn, probability_flow)
        if not isinstance(sde, VPSDE | VESDE):
            raise unsupported(sde)
        if probability_flow:
            raise AssertionError("Probability flow not supported by ancestral sampling")

    def coefficients(self, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """VP: (1/sqrt(1 - beta), beta/sqrt(1 - beta), sqrt(beta)); VE: (1, v, sigma' sqrt(v)/sigma), v = sigma^2 -
        sigma'^2 with the next lower level sigma'."""
        if isinstance(self.sde, VESDE):
            sigma, below = (level.double() for level in self.sde.levels(t))
            v = sigma**2 - below**2
            return torch.ones_like(v), v, below * v.sqrt() / sigma
        beta = _rows.on_device(self.sde, "discrete_betas", t.device)[_rows.index(self.sde, t)].double()
        root = (1.0 - beta).sqrt()
        return 1.0 / root, beta / root, beta.sqrt()


@register_predictor(name="none")
class NonePredictor(Predictor):
    """No step."""

    def __init__(self, sde: Any, score_fn: Any, probability_flow: bool = False) -> None:
        pass

    def update_fn(self, x: Tensor, t: Tensor) -> Pair:
        """(x, x)."""
        return x, x


# ---------------------------------------------------------------------------------------------------------- correctors
class Corrector(abc.ABC):
    """``n_steps`` steps at one noise level."""

    def __init__(self, sde: Any, score_fn: Any, snr: float, n_steps: int) -> None:
        super().__init__()
        self.sde, self.score_fn, self.snr, self.n_steps = sde, score_fn, snr, n_steps

    @abc.abstractmethod
    def update_fn(self, x: Tensor, t: Tensor) -> Pair:
        """(x', mean of x') of the state x [B, ...] at the times t [B]."""


class Langevin(Corrector):
    """x' = x + e score + sqrt(2 e) z."""

    def __init__(self, sde: Any, score_fn: Any, snr: float, n_steps: int) -> None:
        super().__init__(sde, score_fn, snr, n_steps)
        if not isinstance(sde, VPSDE | VESDE | subVPSDE):
            raise unsupported(sde)

    def update_fn(self, x: Tensor, t: Tensor) -> Pair:
        """(x', mean of x') after ``n_steps`` steps, each one op and what its step size takes."""
        _rows.check_state(self.sde, x, t)
        pair = x, x
        scale: Tensor | None = None
        sizes: tuple[Tensor, Tensor, Tensor] | None = None
        for _ in range(self.n_steps):
            m, scale = _rows.evaluate(self.score_fn, pair[0], t)
            z = torch.randn_like(pair[0])
            sizes = self.coefficients(t, x) if sizes is None else sizes
            triples = self.scaled(_rows.triple(sizes, scale), m, z, None if scale is None else scale.abs())
            pair = _rows.moved(pair[0], m, triples, z, t.dtype)
        return pair

    @abc.abstractmethod
    def coefficients(self, t: Tensor, x: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """(1, e, sqrt(2 e)), each [n], at the times t [n]; of langevin for a ratio of norms of 1.

        ``x`` [n, ...]: the states there, for an SDE of the user's own.
        """

    def scaled(self, triples: Tensor, m: Tensor, z: Tensor, sizes: Tensor | None) -> Tensor:
        """The coefficients with what only score and noise can tell; ``sizes`` [B] times norm(m) is the score's."""
        return triples

    def _alpha(self, t: Tensor) -> Tensor:
        """1 - beta_i; 1 for VE."""
        if isinstance(self.sde, VESDE):
            return torch.ones_like(t)
        return _rows.on_device(self.sde, "alphas", t.device)[_rows.index(self.sde, t)]


@register_corrector(name="langevin")
class LangevinCorrector(Langevin):
    """e = 2 alpha_i (snr norm(z)/norm(score))^2, the norms averaged over the batch (algorithms 4 and 5).

    No step where the score is 0 everywhere: there the ratio of score_sde is infinite and its state NaN. A NaN in the
    score goes into the state with the score itself.
    """

    def coefficients(self, t: Tensor, x: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """(1, 2 alpha snr^2, 2 snr sqrt(alpha))."""
        e = 2.0 * self.snr**2 * self._alpha(t).double()
        return torch.ones_like(e), e, (2.0 * e).sqrt()

    def scaled(self, triples: Tensor, m: Tensor, z: Tensor, sizes: Tensor | None) -> Tensor:
        """(1, e r^2, sqrt(2 e) r), r the ratio of the norms."""
        kind = torch.float64 if torch.float64 in (m.dtype, z.dtype) else torch.float32
        scores, draws = (torch.linalg.vector_norm(v.flatten(1), dim=1, dtype=kind) for v in (m, z))
        if sizes is not None:
            scores = scores * sizes
        r = (draws.sum(0, keepdim=True) / scores.sum(0, keepdim=True)).nan_to_num(nan=1.0, posinf=0.0)
        return triples * r.pow(_rows.COPIES.on(POWERS, triples.device))


with neutral():
    POWERS = torch.tensor([0.0, 2.0, 1.0], dtype=torch.float64)
"""Of the ratio of the norms in (keep, pull, std)."""


@register_corrector(name="ald")
class AnnealedLangevinDynamics(Langevin):
    """e = 2 alpha_i (snr std(t))^2: annealed Langevin dynamics of SMLD."""

    def coefficients(self, t: Tensor, x: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """(1, e, sqrt(2 e))."""
        std = _rows.std(self.sde, t, x).double()
        e = 2.0 * self._alpha(t).double() * (self.snr * std) ** 2
        return torch.ones_like(e), e, (2.0 * e).sqrt()


@register_corrector(name="none")
class NoneCorrector(Corrector):
    """No step."""

    def __init__(self, sde: Any, score_fn: Any, snr: float, n_steps: int) -> None:
        pass

    def update_fn(self, x: Tensor, t: Tensor) -> Pair:
        """(x, x)."""
        return x, x
