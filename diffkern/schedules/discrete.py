"""Schedules given by a table of alphas_cumprod; reached through `diffkern.schedules`."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import cast

import torch
from torch import Tensor

from diffkern.modes import fakes, neutral, neutrally, readable, untraced
from diffkern.names import Prediction, ReverseVariance
from diffkern.schedules.base import (
    Schedule,
    Time,
    as_float64,
    as_log_snr,
    as_time,
    check_constants,
    check_log_snrs,
    check_times,
)
from diffkern.schedules.predictions import prediction_of

__all__ = ["DiscreteSchedule"]


class DiscreteSchedule(Schedule):
    """A table of T noise levels, given by its alphas_cumprod (abar): alpha = sqrt(abar_t), sigma = sqrt(1 - abar_t).

    abar must be finite, in (0, 1), and must not increase with t; the last entry may be 0 (zero terminal SNR).
    Integer times index the table. Fractional times interpolate sigma/alpha linearly, as samplers in sigma do.
    """

    time_eps = 1.0
    """Clean data is at -1, the first trained level at 0."""

    def __init__(self, alphas_cumprod: Tensor | Iterable[float], name: str = "discrete") -> None:
        self.name = name
        with neutral():
            self._set(float64_vector("alphas_cumprod", alphas_cumprod))

    def _set(self, table: Tensor) -> None:
        last = len(table) - 1
        bad = ~((table > 0) & (table < 1))
        bad[last] = not 0 <= float(table[last]) < 1
        if bool(bad.any()):
            i = int(bad.nonzero()[0])
            raise ValueError(
                f"alphas_cumprod must lie in (0, 1), or be 0 at the last t, got alphas_cumprod[{i}] = {float(table[i])}"
            )
        if bool((table[1:] > table[:-1]).any()):
            i = int((table[1:] > table[:-1]).nonzero()[0])
            raise ValueError(
                "alphas_cumprod must not increase with t, "
                f"got alphas_cumprod[{i}] = {float(table[i])} and alphas_cumprod[{i + 1}] = {float(table[i + 1])}"
            )
        self._abar = torch.cat([torch.ones(1, dtype=torch.float64), table])  # entry t + 1, so that t = -1 is clean data
        self._ratio = ((1.0 - self._abar) / self._abar).sqrt()
        self._betas = (self._abar[:-1] - self._abar[1:]) / self._abar[:-1]
        self._kept: Tensor | None = None
        self._hash = hash((len(table), float(table[0]), float(table[-1])))
        self._cache: dict[tuple[str, str, object], Tensor] = {}
        self.noise_end, self.data_end = float(last), -1.0

    @property
    def T(self) -> int:
        """Number of noise levels."""
        return len(self._betas)

    @property
    def betas(self) -> Tensor:
        """beta_t = 1 - abar_t/abar_{t-1}, [T] float64 (a copy)."""
        return self._betas.clone()

    @property
    def alphas(self) -> Tensor:
        """alpha_t = 1 - beta_t of the papers, [T] float64; not the signal rate, which is the method `alpha`."""
        return 1.0 - self._betas

    @property
    def alphas_cumprod(self) -> Tensor:
        """abar_t, [T] float64 (a copy)."""
        return self._abar[1:].clone()

    @property
    def kept(self) -> Tensor:
        """The time that a network knows each level by, [T] int64: 0..T-1, or what `subsequence` kept of them."""
        return torch.arange(self.T, device="cpu") if self._kept is None else self._kept.clone()

    @neutrally
    def subsequence(self, times: Tensor | Iterable[int]) -> DiscreteSchedule:
        """The schedule of the levels ``times`` alone, rising or falling integers in 0..T-1, numbered 0..len-1 anew.

        Its betas are 1 - abar_i/abar_(the kept one before), so that its chain has the marginals of this one at the
        kept times. `model_time` and `kept` give the numbers that the network was trained with.
        arXiv 2010.02502, section 4.2; arXiv 2102.09672, section 4; lecture 002.
        """
        listed = times.tolist() if isinstance(times, Tensor) else list(times)
        for t in listed:
            if t != int(t) or not 0 <= t < self.T:
                raise ValueError(f"times must be integers in 0..{self.T - 1} (T = {self.T}), got {t}")
        rising = sorted(set(listed))
        if not rising or listed not in (rising, rising[::-1]):
            raise ValueError(f"times must rise or fall strictly and hold at least one, got {listed}")
        rising = [int(t) for t in rising]
        chosen = DiscreteSchedule(self._abar[1:][rising], f"{self.name}[{len(rising)} of {self.T}]")
        chosen._kept = self.kept[rising]
        return chosen

    def known_by(self, times: Iterable[int]) -> DiscreteSchedule:
        """The same levels for a network that knows them by ``times``, rising integers from 0 up, one a level."""
        listed = list(times)
        whole = all(isinstance(t, int) and not isinstance(t, bool) for t in listed)
        if not whole or len(listed) != self.T or listed != sorted(set(listed)) or listed[0] < 0:
            raise ValueError(f"kept must be {self.T} rising integers from 0 up, one a level, got {listed!r:.80}")
        same = DiscreteSchedule(self._abar[1:], self.name)
        same._kept = torch.tensor(listed, dtype=torch.int64)
        return same

    def model_time(self, prediction: Prediction, t: Time) -> Tensor:
        """``t`` itself; of a `subsequence`, the kept time, linear between whole t."""
        del prediction
        t = as_time(t)
        if self._kept is None:
            return t
        if not t.is_floating_point():
            ok = check_times((t >= 0) & (t < self.T), t, f"be an integer in 0..{self.T - 1} (T = {self.T})")
            picked = self._on("kept", t.device).take(t.clamp(0, self.T - 1))
            return torch.where(ok, picked, -1)
        ok = check_times((t >= 0) & (t <= self.T - 1), t, f"lie in [0, {self.T - 1}] (T = {self.T})")
        kept, low = self._on("kept", t.device), torch.where(ok, t, 0.0).floor()
        here, above = (kept.take((low.to(torch.int64) + i).clamp(max=self.T - 1)) for i in (0, 1))
        return torch.where(ok, here + (t - low) * (above - here), torch.nan)

    def __eq__(self, other: object) -> bool:
        if self is other:
            return True
        if not isinstance(other, DiscreteSchedule) or self._hash != other._hash:
            return False
        with neutral():  # what is kept is looked up by it, while torch.export traces too
            return torch.equal(self._abar, other._abar) and torch.equal(self.kept, other.kept)

    def __hash__(self) -> int:
        return self._hash

    def __repr__(self) -> str:
        return f"DiscreteSchedule({self.name}, T={self.T}, alphas_cumprod {self._abar[1]:.6g} .. {self._abar[-1]:.6g})"

    def _on(self, key: str, device: torch.device) -> Tensor:
        """The levels of that name on a device, copied once."""
        return _kept_on(self, key, str(device))

    def _gather(self, key: str, t: Tensor, first: int) -> Tensor:
        """The levels of that name at t - first for integer t in first..T-1; NaN outside, or an error on the CPU."""
        ok = check_times((t >= first) & (t < self.T), t, f"be an integer in {first}..{self.T - 1} (T = {self.T})")
        picked = self._on(key, t.device).take((t - first).clamp(0, self.T - 1 - first))
        return torch.where(ok, picked, torch.nan)

    def abar(self, t: Time) -> Tensor:
        """alphas_cumprod at ``t``: 1 at t = -1; at fractional t from sigma/alpha interpolated linearly."""
        t = as_time(t)
        if not t.is_floating_point():
            return self._gather("abar", t, -1)
        ok = check_times((t >= -1) & (t <= self.T - 1), t, f"lie in [-1, {self.T - 1}] (T = {self.T})")
        low = torch.where(ok, t, -1.0).floor()
        index = low.to(torch.int64)
        exact = self._gather("abar", index, -1)
        here = self._gather("ratio", index, -1)
        above = self._gather("ratio", (index + 1).clamp(max=self.T - 1), -1)
        between = here + (t - low) * (above - here)
        return torch.where(ok, torch.where(t == low, exact, 1.0 / (1.0 + between**2)), torch.nan)

    def alpha(self, t: Time) -> Tensor:
        """sqrt(abar_t)."""
        return self.abar(t).sqrt()

    def sigma(self, t: Time) -> Tensor:
        """sqrt(1 - abar_t)."""
        return (1.0 - self.abar(t)).sqrt()

    def alpha_dot(self, t: Time) -> Tensor:
        """alpha `drift`, time in steps."""
        return self.drift(t) * self.alpha(t)

    def sigma_dot(self, t: Time) -> Tensor:
        """-drift alpha^2/sigma, from sigma^2 = 1 - alpha^2."""
        return -self.drift(t) * self.abar(t) / self.sigma(t)

    def drift(self, t: Time) -> Tensor:
        """f of dx = f x dt + g dw, time in steps, where g^2 = -2 f because alpha^2 + sigma^2 = 1.

        At whole t in 0..T-1, -beta_t/2: the VP SDE that the chain with these betas is a discretisation of (arXiv
        2011.13456, section 3.4; lecture 001). At fractional t, the derivative of the interpolation that `abar` uses:
        -(r dr/dt) alpha^2 with r = sigma/alpha linear in t, whose integral from one whole t to the next is exactly the
        table's. There is none in the last step of a table that ends on zero SNR, where r is infinite.
        """
        t = as_time(t)
        if not t.is_floating_point():
            return -0.5 * self._gather("betas", t, 0)
        ok = check_times((t > -1) & (t <= self.T - 1), t, f"lie in (-1, {self.T - 1}] (T = {self.T})")
        t = torch.where(ok, t, 0.0)
        low = t.floor()
        index = low.to(torch.int64)
        here = self._gather("ratio", index, -1)
        rise = self._gather("ratio", (index + 1).clamp(max=self.T - 1), -1) - here
        check_times(~torch.isinf(rise) | (t == low), t, f"lie outside ({self.T - 2}, {self.T - 1}), as abar ends at 0")
        between = here + (t - low) * rise
        whole = -0.5 * self._on("betas", t.device).take(index.clamp(min=0))
        slope = torch.where(torch.isinf(rise), torch.nan, -between * rise / (1.0 + between**2))
        return torch.where(ok, torch.where((t == low) & (index >= 0), whole, slope), torch.nan)

    def diffusion_squared(self, t: Time) -> Tensor:
        """g^2 = -2 f, time in steps: beta_t at whole t (see `drift`)."""
        return -2.0 * self.drift(t)

    @property
    def prior_std(self) -> float:
        """1: unit-variance data keep their variance."""
        return 1.0

    def log_snr(self, t: Time) -> Tensor:
        """ln abar_t - ln(1 - abar_t)."""
        abar = self.abar(t)
        return abar.log() - torch.log1p(-abar)

    def _pair(self, t: Time, s: Time | None) -> tuple[Tensor, Tensor]:
        """abar at t and at s (t - 1 by default), with -1 <= s < t checked."""
        t = as_time(t)
        s = t - 1 if s is None else as_time(s).to(t.device)
        if readable(t) and not bool((s < t).all()):
            raise ValueError(f"s must be less than t, got s={s.tolist()} and t={t.tolist()}")
        return self.abar(t), self.abar(s)

    def beta(self, t: Time, s: Time | None = None) -> Tensor:
        """1 - abar_t/abar_s, the variance of q(x_t given x_s); s = t - 1 by default, where it is beta_t."""
        abar_t, abar_s = self._pair(t, s)
        return (abar_s - abar_t) / abar_s

    def posterior(self, t: Time, s: Time | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """(coef_x0, coef_xt, beta_tilde) of q(x_s given x_t, x0) = N(coef_x0 x0 + coef_xt x_t, beta_tilde I), s < t.

        coef_x0 = sqrt(abar_s) beta/(1-abar_t), coef_xt = sqrt(abar_t/abar_s) (1-abar_s)/(1-abar_t),
        beta_tilde = (1-abar_s)/(1-abar_t) beta with beta = 1 - abar_t/abar_s and s = t - 1 by default.
        arXiv 2006.11239, eq. 6 and 7; lectures 000, 001, 002.
        """
        abar_t, abar_s = self._pair(t, s)
        beta = (abar_s - abar_t) / abar_s
        ratio = (1.0 - abar_s) / (1.0 - abar_t)
        return abar_s.sqrt() * beta / (1.0 - abar_t), (abar_t / abar_s).sqrt() * ratio, ratio * beta

    def posterior_mean_coefficients(self, t: Time) -> tuple[Tensor, Tensor]:
        """(coef_x0, coef_xt) of the single step t -> t-1."""
        return self.posterior(t)[:2]

    def variance(self, t: Time, s: Time | None = None, kind: ReverseVariance | float = "beta_tilde") -> Tensor:
        """Variance of the reverse step t -> s: ``"beta"``, ``"beta_tilde"``, or a number v in [0, 1] between them.

        A number mixes the logarithms, exp(v ln beta + (1-v) ln beta_tilde): arXiv 2102.09672, eq. 15; lecture
        002 (the paper's networks put out 2v - 1). It is 0 where beta_tilde is 0 and v < 1.
        """
        return mixed_variance(self.beta(t, s), self.posterior(t, s)[2], kind)

    def table(self, prediction: Prediction, device: torch.device | str = "cpu") -> Tensor:
        """`coefficients` of t = 0..T-1, [T, 4] float64, made once a prediction and device; do not write into it."""
        return _kept_on(self, "table:" + prediction_of(self, prediction), str(device))

    def step_table(self) -> Tensor:
        """Rows (s, n, 0, 1), [T, 4], of the single step q(x_t given x_{t-1}) = N(sqrt(1-beta_t) x_{t-1}, beta_t I)."""
        zero = torch.zeros_like(self._betas)
        return torch.stack([(1.0 - self._betas).sqrt(), self._betas.sqrt(), zero, zero + 1.0], dim=-1)

    def renoise_coefficients(self, s: Time, t: Time) -> Tensor:
        """Rows (s, n, 0, 1), [..., 4], that take x_s on to x_t, s < t.

        x_t = sqrt(abar_t/abar_s) x_s + sqrt(1 - abar_t/abar_s) eps; s = -1 is clean data.
        """
        abar_t, abar_s = self._pair(t, s)
        zero = torch.zeros_like(abar_t)
        return torch.stack([(abar_t / abar_s).sqrt(), ((abar_s - abar_t) / abar_s).sqrt(), zero, zero + 1.0], dim=-1)

    def sigma_ve(self, t: Time) -> Tensor:
        """sigma/alpha, the noise level of the variance-exploding state x/alpha; linear between integer t."""
        abar = self.abar(t)
        return ((1.0 - abar) / abar).sqrt()

    def time_of_log_snr(self, log_snr: Time) -> Tensor:
        """The fractional time in [-1, T-1] whose `log_snr` is the value given: +inf is clean data, t = -1.

        The exact inverse: sigma/alpha is linear between whole t. (`time_of_sigma` is linear in its logarithm there, as
        other libraries are, and agrees at whole t.) Of equal levels the one nearest to the noise end.
        """
        value = as_log_snr(log_snr)
        levels = self._on("ratio", value.device)
        ok = check_log_snrs(value, -2.0 * levels[-1].log(), math.inf)
        sigma = torch.minimum((-0.5 * value).exp(), levels[-1])
        index = torch.searchsorted(levels, sigma.contiguous(), right=True).clamp(1, self.T)
        here, span = levels[index - 1], levels[index] - levels[index - 1]
        part = torch.where(span > 0, (sigma - here) / span, 1.0)
        # Below an infinite last level there is no between: only the level itself is there.
        part = torch.where(torch.isinf(span), torch.isinf(sigma).to(torch.float64), part)
        return torch.where(ok, (index - 2) + part, torch.nan)

    def time_of_sigma(self, sigma: Time) -> Tensor:
        """The fractional time whose sigma_ve is ``sigma``, by interpolation in ln sigma.

        ``sigma`` must lie within the table's levels sigma_ve(0)..sigma_ve(T-1) up to a relative 1e-6.
        """
        sigma = as_float64(sigma)
        levels = self._ratio[1:]
        low, high = float(levels[0]), float(levels[-1])
        bad = ~((sigma >= low * (1 - 1e-6)) & (sigma <= high * (1 + 1e-6)))
        if bool(bad.any()):
            raise ValueError(
                f"sigma must lie in the schedule's range [{low:.6g}, {high:.6g}], got {float(sigma[bad].flatten()[0])}"
            )
        if self.T == 1:
            return torch.zeros_like(sigma)
        logs, value = levels.log(), sigma.clamp(low, high).log()
        index = torch.searchsorted(logs, value, right=True).clamp(1, self.T - 1)
        here, above = logs[index - 1], logs[index]
        span = above - here
        part = torch.where(span > 0, (value - here) / span, 0.0)
        return (index - 1) + torch.where(torch.isinf(above), 0.0, part)


def mixed_variance(beta: Tensor, beta_tilde: Tensor, kind: ReverseVariance | float) -> Tensor:
    """`DiscreteSchedule.variance` of a reverse step from its two bounds."""
    if isinstance(kind, str) and kind in ("beta", "beta_tilde"):
        return beta if kind == "beta" else beta_tilde
    if isinstance(kind, str) or not 0.0 <= kind <= 1.0:
        raise ValueError(f"variance must be 'beta', 'beta_tilde' or a number in [0, 1], got {kind!r}")
    v = float(kind)
    return beta**v * beta_tilde ** (1.0 - v)


@untraced
def _kept_on(schedule: DiscreteSchedule, key: str, device: str) -> Tensor:
    """A table of the schedule on a device, made there once."""
    mode = fakes(device)
    found = schedule._cache.get((key, device, mode))
    if found is None:
        kind, _, prediction = key.partition(":")
        with neutral():
            levels = torch.arange(schedule.T)
            values = (
                schedule.coefficients(cast(Prediction, prediction), levels)
                if kind == "table"
                else getattr(schedule, f"_{kind}")
            )
            found = values.to(device) if mode is None else values
        if mode is not None:
            found = values.to(device)
        schedule._cache[key, device, mode] = found
    return found


def float64_vector(argument: str, values: Tensor | Iterable[float]) -> Tensor:
    check_constants(**{argument: values})
    tensor = as_float64(values if isinstance(values, Tensor) else list(values))
    tensor = tensor.detach().to("cpu").clone()
    if tensor.ndim != 1 or tensor.numel() == 0:
        raise ValueError(f"{argument} must be a non-empty list of numbers, got shape {list(tensor.shape)}")
    if not bool(torch.isfinite(tensor).all()):
        i = int((~torch.isfinite(tensor)).nonzero()[0])
        raise ValueError(f"{argument} must be finite, got {argument}[{i}] = {float(tensor[i])}")
    return tensor
