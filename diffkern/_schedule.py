"""The interface of a noise schedule; `diffkern.schedules` is the public door, with the table of time conventions."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from diffkern import predictions

Time = int | float | Tensor


def as_time(t: Time) -> Tensor:
    """``t`` as a tensor: int64 stays int64, other integers become int64, everything else float64."""
    tensor = t if isinstance(t, Tensor) else torch.as_tensor(t)
    if tensor.is_complex() or tensor.dtype == torch.bool:
        raise ValueError(f"t must be a number or a tensor of numbers, got dtype {tensor.dtype}")
    if tensor.is_floating_point():
        # Not through `tensor`: a Python float would have been rounded to float32.
        return torch.as_tensor(t, dtype=torch.float64)
    return tensor.to(torch.int64)


def check_times(ok: Tensor, t: Tensor, rule: str) -> Tensor:
    """``ok`` itself; raises the rule with the first offending value if ``t`` is on the CPU."""
    if t.device.type == "cpu" and not bool(ok.all()):
        raise ValueError(f"t must {rule}, got {t[~ok].flatten()[0].item()}")
    return ok


class Schedule(ABC):
    """What samplers, losses and conversions need to know about a schedule; see the module's table."""

    name: str
    default_prediction: str = "eps"
    noise_end: float
    """The time at which a sampler starts."""
    data_end: float
    """The time at which a sampler ends."""

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

    def snr(self, t: Time) -> Tensor:
        """Signal-to-noise ratio (alpha/sigma)^2; inf where sigma is 0."""
        return (self.alpha(t) / self.sigma(t)) ** 2

    def log_snr(self, t: Time) -> Tensor:
        """ln snr = 2 (ln alpha - ln sigma); +inf where sigma is 0, -inf where alpha is 0."""
        return 2.0 * (self.alpha(t).log() - self.sigma(t).log())

    def coefficients(self, prediction: str, t: Time) -> Tensor:
        """Rows for the noising op, [..., 4] float64: (s, n, u, v) with x_t = s x0 + n eps and target = u x0 + v eps."""
        u, v = predictions.target_coefficients(self, prediction, t)
        return torch.stack([self.alpha(t), self.sigma(t), u, v], dim=-1)

    def model_time(self, prediction: str, t: Time) -> Tensor:
        """The time a network for this prediction is given: ``t`` itself, c_noise for ``edm``."""
        del prediction
        return as_time(t)

    def input_scale(self, prediction: str, t: Time) -> Tensor:
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
