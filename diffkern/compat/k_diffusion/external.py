"""Wrappers that make other projects' networks denoisers D(x, sigma), as k-diffusion has them.

`VDenoiser`: v on the time of a cosine; `DiscreteEpsDDPMDenoiser`, `OpenAIDenoiser`, `CompVisDenoiser`: eps on
a table; `DiscreteVDDPMDenoiser`, `CompVisVDenoiser`: v on a table. All see x/sqrt(sigma^2 + 1), x = x0 + sigma eps.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from diffkern.compat.k_diffusion.layers import combined, edm_loss, edm_scalings, scaled, wide
from diffkern.compat.k_diffusion.utils import append_zero


class VDenoiser(nn.Module):
    """A network v(x, t) with t = 2/pi atan(sigma) (v-diffusion); D = c_skip x + c_out v with c_out < 0."""

    def __init__(self, inner_model: nn.Module) -> None:
        super().__init__()
        self.inner_model = inner_model
        self.sigma_data = 1.0

    def get_scalings(self, sigma: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(c_skip, c_out, c_in)."""
        c_skip, c_out, c_in = edm_scalings(sigma, self.sigma_data)
        return c_skip, -c_out, c_in

    def sigma_to_t(self, sigma: Tensor) -> Tensor:
        """2/pi atan(sigma), in [0, 1)."""
        return sigma.atan() / math.pi * 2

    def t_to_sigma(self, t: Tensor) -> Tensor:
        """tan(pi t/2)."""
        return (t * math.pi / 2).tan()

    def loss(self, input: Tensor, noise: Tensor, sigma: Tensor, **kwargs: Any) -> Tensor:
        """mean (v - target)^2, [B]."""
        t = self.sigma_to_t(sigma)
        return edm_loss(lambda x: self.inner_model(x, t, **kwargs), input, noise, sigma, self.sigma_data, sign=-1.0)

    def forward(self, input: Tensor, sigma: Tensor, **kwargs: Any) -> Tensor:
        """The denoised estimate."""
        c_skip, c_out, c_in = self.get_scalings(wide(sigma))
        return combined(input, c_skip, self.inner_model(scaled(input, c_in), self.sigma_to_t(sigma), **kwargs), c_out)


class DiscreteSchedule(nn.Module):
    """Times of a table of rising noise levels ``sigmas`` [T]; between them ln sigma is linear in the time.

    ``quantize``: `sigma_to_t` gives the nearest whole time in ln sigma (int64), else a fractional one.
    """

    sigmas: Tensor
    log_sigmas: Tensor

    def __init__(self, sigmas: Tensor, quantize: bool) -> None:
        super().__init__()
        self.register_buffer("sigmas", sigmas)
        self.register_buffer("log_sigmas", sigmas.log())
        self.quantize = quantize

    @property
    def sigma_min(self) -> Tensor:
        """The table's first level."""
        return self.sigmas[0]

    @property
    def sigma_max(self) -> Tensor:
        """The table's last level."""
        return self.sigmas[-1]

    def get_sigmas(self, n: int | None = None) -> Tensor:
        """The levels of n times evenly from T - 1 to 0, and 0; the whole table without n."""
        if n is None:
            return append_zero(self.sigmas.flip(0))
        t = torch.linspace(len(self.sigmas) - 1, 0, n, device=self.sigmas.device)
        return append_zero(self.t_to_sigma(t))

    def sigma_to_t(self, sigma: Tensor, quantize: bool | None = None) -> Tensor:
        """The times of the levels, of any shape; ends of the table beyond it."""
        at = sigma.log().to(self.log_sigmas.dtype)
        last = len(self.log_sigmas) - 1
        below = (torch.searchsorted(self.log_sigmas, at.contiguous(), right=True) - 1).clamp(0, max(last - 1, 0))
        above = (below + 1).clamp(max=last)
        low, high = self.log_sigmas[below], self.log_sigmas[above]
        if self.quantize if quantize is None else quantize:
            return torch.where((at - low).abs() <= (high - at).abs(), below, above)
        w = ((at - low) / (high - low)).clamp(0, 1)
        return (1 - w) * below + w * above

    def t_to_sigma(self, t: Tensor) -> Tensor:
        """The levels at times in [0, T - 1], fractional ones allowed."""
        t = t.float()
        below, above, w = t.floor().long(), t.ceil().long(), t.frac()
        return ((1 - w) * self.log_sigmas[below] + w * self.log_sigmas[above]).exp()


class DiscreteEpsDDPMDenoiser(DiscreteSchedule):
    """A network eps(x, t) on the table of ``alphas_cumprod``: D = x - sigma eps(x/sqrt(sigma^2 + 1), t)."""

    def __init__(self, model: nn.Module, alphas_cumprod: Tensor, quantize: bool) -> None:
        super().__init__(((1 - alphas_cumprod) / alphas_cumprod) ** 0.5, quantize)
        self.inner_model = model
        self.sigma_data = 1.0

    def get_scalings(self, sigma: Tensor) -> tuple[Tensor, Tensor]:
        """(c_out, c_in)."""
        return -sigma, edm_scalings(sigma, self.sigma_data)[2]

    def get_eps(self, *args: Any, **kwargs: Any) -> Tensor:
        """What the network says eps is."""
        eps: Tensor = self.inner_model(*args, **kwargs)
        return eps

    def loss(self, input: Tensor, noise: Tensor, sigma: Tensor, **kwargs: Any) -> Tensor:
        """mean (eps - noise)^2, [B]."""
        t = self.sigma_to_t(sigma)
        return edm_loss(lambda x: self.get_eps(x, t, **kwargs), input, noise, sigma, self.sigma_data, prediction="eps")

    def forward(self, input: Tensor, sigma: Tensor, **kwargs: Any) -> Tensor:
        """The denoised estimate."""
        c_out, c_in = self.get_scalings(wide(sigma))
        return combined(input, None, self.get_eps(scaled(input, c_in), self.sigma_to_t(sigma), **kwargs), c_out)


class OpenAIDenoiser(DiscreteEpsDDPMDenoiser):
    """guided-diffusion's networks; ``has_learned_sigmas``: the second half of the channels is left out."""

    def __init__(
        self,
        model: nn.Module,
        diffusion: Any,
        quantize: bool = False,
        has_learned_sigmas: bool = True,
        device: torch.device | str = "cpu",
    ) -> None:
        table = torch.as_tensor(diffusion.alphas_cumprod, device=device, dtype=torch.float32)
        super().__init__(model, table, quantize=quantize)
        self.has_learned_sigmas = has_learned_sigmas

    def get_eps(self, *args: Any, **kwargs: Any) -> Tensor:
        """The first half of the channels where there are two."""
        out: Tensor = self.inner_model(*args, **kwargs)
        return out.chunk(2, dim=1)[0] if self.has_learned_sigmas else out


class CompVisDenoiser(DiscreteEpsDDPMDenoiser):
    """latent-diffusion's models, which have ``alphas_cumprod`` and ``apply_model``."""

    def __init__(self, model: Any, quantize: bool = False, device: torch.device | str = "cpu") -> None:
        super().__init__(model, model.alphas_cumprod, quantize=quantize)

    def get_eps(self, *args: Any, **kwargs: Any) -> Tensor:
        """``apply_model``'s output."""
        eps: Tensor = self.inner_model.apply_model(*args, **kwargs)  # type: ignore[operator]
        return eps


class DiscreteVDDPMDenoiser(DiscreteSchedule):
    """A network v(x, t) on the table of ``alphas_cumprod``."""

    def __init__(self, model: nn.Module, alphas_cumprod: Tensor, quantize: bool) -> None:
        super().__init__(((1 - alphas_cumprod) / alphas_cumprod) ** 0.5, quantize)
        self.inner_model = model
        self.sigma_data = 1.0

    def get_scalings(self, sigma: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(c_skip, c_out, c_in)."""
        c_skip, c_out, c_in = edm_scalings(sigma, self.sigma_data)
        return c_skip, -c_out, c_in

    def get_v(self, *args: Any, **kwargs: Any) -> Tensor:
        """What the network says v is."""
        v: Tensor = self.inner_model(*args, **kwargs)
        return v

    def loss(self, input: Tensor, noise: Tensor, sigma: Tensor, **kwargs: Any) -> Tensor:
        """mean (v - target)^2, [B]."""
        t = self.sigma_to_t(sigma)
        return edm_loss(lambda x: self.get_v(x, t, **kwargs), input, noise, sigma, self.sigma_data, sign=-1.0)

    def forward(self, input: Tensor, sigma: Tensor, **kwargs: Any) -> Tensor:
        """The denoised estimate."""
        c_skip, c_out, c_in = self.get_scalings(wide(sigma))
        return combined(input, c_skip, self.get_v(scaled(input, c_in), self.sigma_to_t(sigma), **kwargs), c_out)


class CompVisVDenoiser(DiscreteVDDPMDenoiser):
    """latent-diffusion's models that return v."""

    def __init__(self, model: Any, quantize: bool = False, device: torch.device | str = "cpu") -> None:
        super().__init__(model, model.alphas_cumprod, quantize=quantize)

    def get_v(self, x: Tensor, t: Tensor, cond: Any, **kwargs: Any) -> Tensor:
        """``apply_model``'s output."""
        v: Tensor = self.inner_model.apply_model(x, t, cond)  # type: ignore[operator]
        return v
