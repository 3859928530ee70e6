"""Drop-ins whose rows belong to training timesteps: x = sqrt(abar) x0 + sqrt(1 - abar) eps, one row a timestep."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from diffkern import ops, streams
from diffkern.compat.diffusers._engine import Fused, Hot, column, host

EPS_AT_PURE_NOISE = 2.0**-24
"""abar in place of 0 where the model predicts eps: the value that diffusers' other schedulers write there."""


class FusedTimes(Fused):
    """The choice of the row where rows belong to training timesteps."""

    alphas_cumprod: Tensor

    def _dk_row(self, timestep: Any, device: torch.device) -> tuple[int, Tensor | None]:
        """(row, None), or (0, index) where every sample has a timestep of its own."""
        clock = self._dk_clock
        at = clock.position(timestep)
        if at is None and isinstance(timestep, Tensor) and timestep.numel() > 1:
            return 0, timestep.to(device)
        t = clock.times[at] if at is not None else clock.value(timestep)
        if not (isinstance(t, int) and 0 <= t < self.alphas_cumprod.size(0)):
            self.alphas_cumprod[timestep]  # the original's exception, where it has one
            raise IndexError(f"timestep must be an integer in 0..{self.alphas_cumprod.size(0) - 1}, got {timestep!r}")
        return t, None

    def _dk_quick(self, m: Tensor, timestep: Any, x: Tensor, key: Any, end: Tensor) -> tuple[Any, ...] | None:
        """(x', x0, ...) of a step without noise whose table is at hand, for operands with nothing to convert; None
        where anything is new: then the long way runs. ``end``: the level beyond the table, one of its sources."""
        hot = self._dk_hot
        if hot is None or hot.key != key or hot.config is not self._internal_dict:
            return None
        times, abar, last = hot.sources
        if (
            times is not self.timesteps
            or abar is not self.alphas_cumprod
            or last is not end
            or times._version + abar._version + last._version != hot.version
            or type(timestep) is not Tensor
            or timestep.dtype is not times.dtype
            or timestep.dim()
            or x.dtype is not m.dtype
            or x.shape != m.shape
            or (torch.is_grad_enabled() and (x.requires_grad or m.requires_grad))
            or forward_ad._current_level >= 0
        ):
            return None
        at, off = divmod(timestep.data_ptr() - hot.start, hot.stride)
        if off or not 0 <= at < len(hot.times):
            return None
        none = None
        found: tuple[Any, ...] = ops.step_raw(
            x, m, none, none, none, none, none, hot.value, hot.times[at], none, none, none, none, none, True, False,
            0, none,
        )  # fmt: skip
        return found

    def _dk_warm(self, key: Any, table: Tensor, end: Tensor) -> None:
        """Keeps the table of a step for `_dk_quick`."""
        clock, sources = self._dk_clock, (self.timesteps, self.alphas_cumprod, end)
        times = clock.times or [-1]
        fits = not clock.dtype.is_floating_point and min(times) >= 0 and max(times) < table.shape[0]
        if fits and not any(source.is_inference() for source in sources):
            self._dk_hot = Hot(key, table, self._internal_dict, sources, clock)

    def _dk_streams(self, table: Tensor) -> None:
        """Noise by address: the step's number is the stream's, so that `plan` draws the same; off the grid, beyond."""
        rows = len(table)
        stream = column(table, "stream")
        stream[:] = streams.STEP + rows + torch.arange(rows, dtype=torch.float64)
        for t, positions in self._dk_clock.positions.items():
            if 0 <= t < rows:
                stream[int(t)] = streams.STEP + positions[0]


class FusedVP(FusedTimes):
    """`add_noise` and `get_velocity` as well."""

    def add_noise(self, original_samples: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """sqrt(abar) x + sqrt(1 - abar) noise in one op; coefficients in float32 whatever the samples' dtype."""
        return self._dk_noised(original_samples, noise, timesteps, self._dk_scales, ("add",), self.alphas_cumprod)

    def get_velocity(self, sample: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """sqrt(abar) noise - sqrt(1 - abar) sample in one op."""

        def scales() -> Tensor:
            s, n = self._dk_scales().unbind(1)
            return torch.stack([-n, s], 1)

        return self._dk_noised(sample, noise, timesteps, scales, ("velocity",), self.alphas_cumprod)

    def _dk_scales(self) -> Tensor:
        """(sqrt(abar), sqrt(1 - abar)), [T, 2]."""
        abar = host(self.alphas_cumprod, exact=True)
        return torch.stack([abar.sqrt(), (1 - abar).sqrt()], 1)


def to_x0(prediction: str, abar: Tensor) -> tuple[Tensor, Tensor]:
    """(p, q) of x0 = p x + q m, float64, from the original's float32 roots. ``abar`` float32 or float64, [n]."""
    alpha, sigma = (abar**0.5).double(), ((1 - abar) ** 0.5).double()
    if prediction == "epsilon":
        alpha = torch.where(abar == 0, torch.tensor(EPS_AT_PURE_NOISE**0.5, dtype=torch.float64), alpha)
        return 1 / alpha, -sigma / alpha
    if prediction == "sample":
        return torch.zeros_like(alpha), torch.ones_like(alpha)
    return alpha, -sigma
