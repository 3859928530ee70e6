"""The interface of a noise schedule; `diffkern.schedules` is the public door, with the table of time conventions."""

from __future__ import annotations

import json
import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from typing_extensions import Self

from diffkern.modes import readable
from diffkern.names import Prediction
from diffkern.records import parse, shown

Time = int | float | Tensor


def check_constants(**values: object) -> None:
    """Raise ValueError for what is a constant here and requires a gradient, which would be lost in silence."""
    for argument, value in values.items():
        if isinstance(value, Tensor) and value.requires_grad:
            raise ValueError(
                f"{argument} must be a constant, got a tensor that requires grad: detach it (a learned schedule is a "
                "diffkern.path of functions that hold parameters, a learned weight a tensor or a function)"
            )


def number(argument: str, value: object) -> float:
    """A constant as a float; raises ValueError for what is no number that float64 holds."""
    try:
        if not isinstance(value, str | bytes):
            return float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError, OverflowError, RuntimeError):
        pass
    raise ValueError(f"{argument} must be a number that float64 holds, got {shown(value)}")


def as_time(t: Time) -> Tensor:
    """``t`` as a tensor: int64 stays int64, other integers become int64, everything else float64. Numbers: CPU."""
    tensor = t if isinstance(t, Tensor) else torch.as_tensor(t, device="cpu")
    if tensor.is_complex() or tensor.dtype == torch.bool:
        raise ValueError(f"t must be a number or a tensor of numbers, got dtype {tensor.dtype}")
    # Not through `tensor`: a Python float would have been rounded to float32.
    return as_float64(t) if tensor.is_floating_point() else tensor.to(torch.int64)


def as_float64(values: Time | Sequence[float]) -> Tensor:
    """``values`` as float64: a tensor where it is, numbers on the CPU, whatever the default device."""
    if isinstance(values, Tensor):
        return values.to(torch.float64)
    return torch.as_tensor(values, dtype=torch.float64, device="cpu")


def check_times(ok: Tensor, t: Tensor, rule: str) -> Tensor:
    """``ok`` itself; raises the rule with the first offending value if ``t`` can be looked at: `modes.readable`."""
    if readable(t) and not bool(ok.all()):
        raise ValueError(f"t must {rule}, got {t[~ok].flatten()[0].item()}")
    return ok


def times_within(t: Time, lowest: float, highest: float, rule: str) -> Tensor:
    """A float64 copy of ``t``; outside [lowest, highest] it raises as `check_times` does, or is NaN."""
    times = t if isinstance(t, Tensor) and t.dtype is torch.float64 else as_time(t).to(torch.float64)
    if readable(times) and times.numel() > 0:  # two numbers say it of all times, in a quarter of the time of a mask
        low, high = torch.aminmax(times.detach() if times.requires_grad else times)
        if lowest <= low.item() and high.item() <= highest:  # both are NaN where a time is
            return times.clone()
    return torch.where(check_times((times >= lowest) & (times <= highest), times, rule), times, torch.nan)


def need_schedule(schedule: object) -> None:
    """Raise ValueError unless it is a schedule."""
    if isinstance(schedule, Schedule):
        return
    hint = ""
    if isinstance(schedule, str):
        hint = f": diffkern.{schedule}() makes one" if schedule.isidentifier() else ""
    elif isinstance(schedule, Tensor):
        hint = ": are the arguments in another order?"
    elif callable(schedule):
        hint = ": call it, as in diffkern.linear()"
    raise ValueError(f"schedule must be a diffkern Schedule, got {type(schedule).__name__}{hint}")


def as_log_snr(log_snr: Time) -> Tensor:
    """``log_snr`` as a float64 tensor; NaN on the CPU raises ValueError."""
    value = as_float64(log_snr)
    if readable(value) and bool(value.isnan().any()):
        raise ValueError("log_snr must be a number, got nan")
    return value


def check_log_snrs(value: Tensor, lowest: Tensor | float, highest: Tensor | float) -> Tensor:
    """Where ``value`` lies in the range, up to rounding; raises ValueError with the first that does not on the CPU."""
    slack = 1e-9 * (1.0 + torch.where(value.isinf(), 0.0, value.abs()))
    ok = (value >= lowest - slack) & (value <= highest + slack)
    if readable(value) and not bool(ok.all()):
        raise ValueError(
            f"log_snr must lie in the schedule's range [{float(lowest):.6g}, {float(highest):.6g}], "
            f"got {value[~ok].flatten()[0].item():.6g}"
        )
    return ok


def check_sigmas(sigma: Tensor) -> None:
    """Raise ValueError on the CPU unless every noise level is a number >= 0."""
    if readable(sigma) and not bool((sigma >= 0).all()):
        raise ValueError(f"sigma must be a noise level >= 0, got {sigma[~(sigma >= 0)].flatten()[0].item()}")


class Schedule(ABC):
    """A path of marginals x_t = alpha(t) x0 + sigma(t) eps, discrete or continuous; the module's table says what t is.

    The SDE that generates the marginals runs in noising time: dx = f x dtau + g dw, where tau grows from data to noise
    at the speed of t. For a time that runs from data to noise tau is t; for a flow, whose time runs from noise (0) to
    data (1), tau is 1 - t. In terms of `direction`, +1 or -1, dtau = direction dt, and

        f = direction d ln(alpha)/dt          (`drift`, <= 0 wherever the signal shrinks)
        g^2 = d sigma^2/dtau - 2 f sigma^2 = -direction sigma^2 d log_snr/dt          (`diffusion`, `diffusion_squared`)

    so that for every path, with the score s of its marginals (arXiv 2011.13456, 2107.00630; lectures 001, 003):

        reverse SDE, dtau < 0:         dx = (f x - g^2 s) dtau + g dw
        probability-flow ODE:          dx = (f x - g^2/2 s) dtau
        the same with any churn c >= 0, dtau < 0: dx = (f x - (g^2 + c^2)/2 s) dtau + c dw

    Lecture 001 prints the probability-flow ODE once without the 1/2 and once with f = -beta/2 that lacks its x, and its
    split of the reverse SDE into ODE and Langevin part leaves out the sqrt(beta) dw of the latter; the forms above and
    that lecture's Euler step are right. (Its product for abar_t runs to t, where it prints T.)
    """

    def __new__(cls, *args: object, **kwargs: object) -> Self:
        """Parameters are numbers; only functions (`path`) may hold some that are learned."""
        check_constants(**{f"argument {i + 1} of {cls.__name__}": value for i, value in enumerate(args)}, **kwargs)
        return super().__new__(cls)

    name: str
    default_prediction: Prediction = "eps"
    noise_end: float
    """The time at which a sampler starts."""
    data_end: float
    """The time at which a sampler ends."""
    time_eps: float = 0.0
    """How far from ``data_end`` training and samplers of the score stay, where sigma -> 0 makes 1/sigma useless."""

    def to_dict(self) -> dict[str, Any]:
        """The schedule as plain data for JSON; ValueError with the remedy for one that is made of functions."""
        from diffkern.schedules.stored import to_dict  # which knows every kind of schedule

        return to_dict(self)

    @staticmethod
    def from_dict(data: object) -> Schedule:
        """The schedule that `to_dict` wrote, equal to it; ValueError naming the field for anything else."""
        from diffkern.schedules.stored import from_dict

        return from_dict(data)

    def to_json(self) -> str:
        """`to_dict` as text."""
        return json.dumps(self.to_dict(), allow_nan=False)

    @staticmethod
    def from_json(text: str) -> Schedule:
        """The schedule that `to_json` wrote."""
        return Schedule.from_dict(parse(text, "JSON", "schedule"))

    @abstractmethod
    def alpha(self, t: Time) -> Tensor:
        """Signal rate."""

    @abstractmethod
    def sigma(self, t: Time) -> Tensor:
        """Noise rate."""

    @abstractmethod
    def alpha_dot(self, t: Time) -> Tensor:
        """d alpha / dt."""

    @abstractmethod
    def sigma_dot(self, t: Time) -> Tensor:
        """d sigma / dt."""

    def signal_rate(self, t: Time) -> Tensor:
        """Lecture 000's name of `alpha`."""
        return self.alpha(t)

    def noise_rate(self, t: Time) -> Tensor:
        """Lecture 000's name of `sigma`."""
        return self.sigma(t)

    @property
    def direction(self) -> float:
        """+1 if t runs from data to noise, -1 if it runs from noise to data."""
        return math.copysign(1.0, self.noise_end - self.data_end)

    @property
    def time_range(self) -> tuple[float, float]:
        """(lowest, highest) time that has a level for training: both ends, the data end moved inside by `time_eps`."""
        ends = self.noise_end, self.data_end + self.direction * self.time_eps
        return min(ends), max(ends)

    def snr(self, t: Time) -> Tensor:
        """Signal-to-noise ratio (alpha/sigma)^2; inf where sigma is 0."""
        return (self.alpha(t) / self.sigma(t)) ** 2

    def log_snr(self, t: Time) -> Tensor:
        """lambda = ln snr = 2 (ln alpha - ln sigma); +inf where sigma is 0, -inf where alpha is 0.

        The papers on DPM-Solver call half of it lambda.
        """
        return 2.0 * (self.alpha(t).log() - self.sigma(t).log())

    def log_snr_dot(self, t: Time) -> Tensor:
        """d log_snr / dt = 2 (alpha_dot/alpha - sigma_dot/sigma); infinite where alpha or sigma is 0."""
        alpha, sigma = self.alpha(t), self.sigma(t)
        slope = 2.0 * (self.alpha_dot(t) / alpha - self.sigma_dot(t) / sigma)
        return torch.where((alpha == 0) | (sigma == 0), -self.direction * math.inf, slope)

    def time_of_log_snr(self, log_snr: Time) -> Tensor:
        """The time t whose `log_snr` is the value given, float64 in its shape: the inverse, between the two ends.

        +inf is the data end where sigma is 0 there, -inf the noise end where alpha is 0 there. Here by bisection, as
        far as float64 goes (``t`` within some 1e-16); schedules with a closed form use it. A value that the schedule
        does not reach raises ValueError on the CPU and gives NaN on a device, as times outside do.
        """
        value = as_log_snr(log_snr)
        ends = torch.tensor([self.data_end, self.noise_end], dtype=torch.float64, device=value.device)
        highest, lowest = self.log_snr(ends).unbind()
        ok = check_log_snrs(value, lowest, highest)
        above, below = ends[0].expand(value.shape), ends[1].expand(value.shape)
        for _ in range(100):
            middle = 0.5 * (above + below)
            high = self.log_snr(middle) > value
            above, below = torch.where(high, middle, above), torch.where(high, below, middle)
        t = torch.where(value >= highest, ends[0], torch.where(value <= lowest, ends[1], 0.5 * (above + below)))
        return torch.where(ok, t, torch.nan)

    def sigma_ve(self, t: Time) -> Tensor:
        """sigma/alpha, the noise level of the variance-exploding state x/alpha: exp(-log_snr/2)."""
        return self.sigma(t) / self.alpha(t)

    def time_of_sigma(self, sigma: Time) -> Tensor:
        """The time whose `sigma_ve` is ``sigma``, for grids of noise levels: `time_of_log_snr` of -2 ln sigma."""
        levels = as_float64(sigma)
        check_sigmas(levels)
        return self.time_of_log_snr(-2.0 * levels.log())

    def drift(self, t: Time) -> Tensor:
        """f of the SDE dx = f x dtau + g dw in noising time (see the class): direction alpha_dot/alpha.

        -inf where alpha is 0.
        """
        alpha = self.alpha(t)
        return torch.where(alpha == 0, -math.inf, self.direction * self.alpha_dot(t) / alpha)

    def diffusion_squared(self, t: Time) -> Tensor:
        """g^2 of the SDE: 2 direction sigma (alpha sigma_dot - sigma alpha_dot)/alpha; inf where alpha is 0.

        The form has no difference of large numbers where sigma is small, and no 0/0 where sigma is 0 and its slope
        finite. Schedules whose sigma starts like sqrt(t) have a form of their own.
        """
        alpha, sigma = self.alpha(t), self.sigma(t)
        turn = alpha * self.sigma_dot(t) - sigma * self.alpha_dot(t)
        return torch.where(alpha == 0, math.inf, 2.0 * self.direction * sigma * turn / alpha)

    def diffusion(self, t: Time) -> Tensor:
        """g of the SDE dx = f x dtau + g dw in noising time: the root of `diffusion_squared`."""
        return self.diffusion_squared(t).sqrt()

    def marginal_std(self, t: Time, data_std: float = 0.0) -> Tensor:
        """sqrt(alpha^2 data_std^2 + sigma^2): standard deviation of x_t given x0 (0), or for data of that std."""
        return self.sigma(t) if data_std == 0 else torch.hypot(self.alpha(t) * data_std, self.sigma(t))

    @property
    def prior_std(self) -> float:
        """Standard deviation of the Gaussian that a sampler starts from: sigma at the noise end."""
        return float(self.sigma(self.noise_end))

    def prior_log_density(self, x: Tensor) -> Tensor:
        """ln N(x; 0, prior_std^2 I) in nats, summed over all but the first dimension: [B] float64 from x [B, ...]."""
        if x.ndim == 0:
            raise ValueError("x must have a batch dimension, got shape []")
        z = x.reshape(x.shape[0], -1).to(torch.float64) / self.prior_std
        return -0.5 * (z * z).sum(1) - z.shape[1] * (0.5 * math.log(2.0 * math.pi) + math.log(self.prior_std))

    def coefficients(self, prediction: Prediction, t: Time) -> Tensor:
        """Rows for the noising op, [..., 4] float64: (s, n, u, v) with x_t = s x0 + n eps and target = u x0 + v eps."""
        from diffkern.schedules import predictions  # which imports of schedules as arguments

        return torch.stack(predictions.mixtures(self, prediction, t), dim=-1)

    def model_time(self, prediction: Prediction, t: Time) -> Tensor:
        """The time a network for this prediction is given: ``t`` itself, c_noise for ``edm``."""
        del prediction
        return as_time(t)

    def input_scale(self, prediction: Prediction, t: Time) -> Tensor:
        """What x_t is multiplied by before the network sees it: 1, or c_in for ``edm``."""
        del prediction
        return torch.ones_like(as_time(t), dtype=torch.float64)

    def posterior_mean_coefficients(self, t: Time) -> tuple[Tensor, Tensor]:
        """(c0, ct) of the posterior mean c0 x0 + ct x_t, for the prediction ``mu``; discrete schedules only."""
        del t
        raise ValueError(f"prediction 'mu' needs a discrete schedule, got {self.name}")

    def preconditioning(self, t: Time) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """(c_skip, c_out, c_in, c_noise), for the prediction ``edm``; EDM schedules only."""
        del t
        raise ValueError(f"prediction 'edm' needs an EDM schedule, got {self.name}")


class UnitTime(Schedule):
    """A schedule of t in [0, 1], by default with data at 0 and noise at 1."""

    noise_end = 1.0
    data_end = 0.0

    def _times(self, t: Time) -> Tensor:
        ends = "0 is data, 1 is noise" if self.data_end == 0 else "0 is noise, 1 is data"
        return times_within(t, 0.0, 1.0, f"lie in [0, 1] ({ends})")

    def _log_snrs(self, log_snr: Time, lowest: float = -math.inf, highest: float = math.inf) -> Tensor:
        """``log_snr`` as a tensor, checked: NaN outside the range on a device, and moved onto it where it rounds."""
        value = as_log_snr(log_snr)
        return torch.where(check_log_snrs(value, lowest, highest), value.clamp(lowest, highest), torch.nan)


class VariancePreserving(UnitTime):
    """alpha^2 + sigma^2 = 1, so that g^2 = -2 f and unit-variance data keep their variance."""

    time_eps = 1e-3

    def beta(self, t: Time) -> Tensor:
        """beta(t) of the SDE dx = -beta/2 x dt + sqrt(beta) dw."""
        return self.diffusion_squared(t)

    def diffusion_squared(self, t: Time) -> Tensor:
        """-2 f."""
        return -2.0 * self.drift(t)

    @property
    def prior_std(self) -> float:
        """1: unit-variance data keep their variance."""
        return 1.0


class LogSNRDefined(VariancePreserving):
    """A variance-preserving path given by its log-SNR: alpha^2 = sigmoid(log_snr), sigma^2 = sigmoid(-log_snr).

    The log-SNR is finite at both ends, so alpha and sigma are never 0 (arXiv 2107.00630, section 3).
    """

    time_eps = 0.0

    @abstractmethod
    def log_snr(self, t: Time) -> Tensor:
        """What defines the schedule."""

    @abstractmethod
    def log_snr_dot(self, t: Time) -> Tensor:
        """d log_snr/dt."""

    def alpha(self, t: Time) -> Tensor:
        """sqrt(sigmoid(log_snr))."""
        return torch.sigmoid(self.log_snr(t)).sqrt()

    def sigma(self, t: Time) -> Tensor:
        """sqrt(sigmoid(-log_snr))."""
        return torch.sigmoid(-self.log_snr(t)).sqrt()

    def alpha_dot(self, t: Time) -> Tensor:
        """alpha sigma^2 log_snr_dot/2."""
        return 0.5 * self.alpha(t) * self.sigma(t) ** 2 * self.log_snr_dot(t)

    def sigma_dot(self, t: Time) -> Tensor:
        """-sigma alpha^2 log_snr_dot/2."""
        return -0.5 * self.sigma(t) * self.alpha(t) ** 2 * self.log_snr_dot(t)

    def drift(self, t: Time) -> Tensor:
        """sigma^2 log_snr_dot/2, in noising time."""
        return 0.5 * self.direction * self.sigma(t) ** 2 * self.log_snr_dot(t)

    def sigma_ve(self, t: Time) -> Tensor:
        """e^(-log_snr/2)."""
        return (-0.5 * self.log_snr(t)).exp()
