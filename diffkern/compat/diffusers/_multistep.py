"""What the multistep drop-ins share: the step's index, and noising to the levels of the current timesteps."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from diffkern.compat.diffusers._engine import Fused, Hot, host


class FusedMultistep(Fused):
    """Schedulers that count their steps (``_step_index``) over a tensor ``sigmas`` [S + 1] on the CPU."""

    sigmas: Tensor
    begin_index: Any
    step_index: Any
    _step_index: Any
    _begin_index: Any
    model_outputs: list[Any]
    lower_order_nums: int
    convert_model_output: Any
    _sigma_to_alpha_sigma_t: Any

    def _init_step_index(self, timestep: Any) -> None:
        """The first step's index, from the host copy of the timesteps."""
        self._step_index = self._begin_index
        if self._begin_index is None:
            clock = self._dk_clock
            at = clock.position(timestep)
            if at is None and isinstance(timestep, Tensor) and timestep.numel() != 1:
                raise ValueError(
                    "timestep must be one for all samples, as the scheduler remembers earlier steps, "
                    f"got shape {list(timestep.shape)}"
                )
            # A run from the first timestep starts there (the original skips a level where it stands twice, and runs
            # past the end); from another one, by the original's rule.
            known = at is not None and (at == 0 or self._dk_exact)
            self._step_index = at if known else self._dk_index_of(clock.value(timestep))

    def _dk_index_of(self, value: Any) -> int:
        """The original's rule: the second of equal timesteps, the last step for one that is none of them."""
        found = self._dk_clock.positions.get(value, (len(self._dk_clock.times) - 1,))
        return found[1] if len(found) > 1 else found[0]

    def _dk_hot_value(self, key: Any) -> Any:
        """What the last step was run with, if nothing that it was made of has changed; else None."""
        hot, sigmas = self._dk_hot, self.sigmas
        if hot is None or hot.key != key or hot.sources[0] is not sigmas or hot.config is not self._internal_dict:
            return None
        return hot.value if sigmas._version == hot.version else None

    def _dk_warm(self, key: Any, value: Any) -> None:
        if not self.sigmas.is_inference():
            self._dk_hot = Hot(key, value, self._internal_dict, (self.sigmas,))

    @staticmethod
    def _dk_same(m: Tensor, x: Tensor, others: list[Any]) -> bool:
        """Whether the op can take the operands as they are: one dtype and shape, no gradient."""
        if m.dtype is not x.dtype or m.shape != x.shape or forward_ad._current_level >= 0:
            return False
        for t in others:
            if t is not None and t.dtype is not x.dtype:
                return False
        return not (torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (m, x, *others)))

    def add_noise(self, original_samples: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """alpha x + sigma noise in one op; coefficients in float32 whatever the samples' dtype."""
        x, sources = original_samples, (self.sigmas, self._dk_clock)
        if self._begin_index is not None:  # before the first step the level it starts at, later the level reached
            at = self._begin_index if self._step_index is None else self._step_index
            if x.shape[0] == 1 < timesteps.shape[0]:
                x = x.expand(timesteps.shape[0], *x.shape[1:])
            key = ("levels", self.config.get("use_flow_sigmas"))
            return self._dk_noised(x, noise, int(at), self._dk_levels, key, self.sigmas)
        scales = self._dk_cached(("by time", self._dk_exact), (*sources, self._internal_dict), self._dk_levels_by_time)
        if timesteps.is_floating_point():
            timesteps = torch.tensor([int(t) if t == int(t) else -1 for t in timesteps.tolist()])
        at = (
            timesteps.to(x.device).clamp(-1, len(scales) - 2) + 1
        )  # what is no timestep of a table reads row 0 or the last
        return self._dk_noised(x, noise, at, lambda: scales, ("times",), scales)

    def _dk_levels(self) -> Tensor:
        """(alpha, sigma) at each of the S + 1 levels, float64."""
        alpha, sigma = self._sigma_to_alpha_sigma_t(host(self.sigmas, exact=True))
        return torch.stack([alpha, sigma], 1)

    def _dk_levels_by_time(self) -> Tensor:
        """(alpha, sigma) by integer timestep + 1; row 0 and the last are those of values outside."""
        levels, times = self._dk_levels(), self._dk_clock.times
        most = max(int(max(times, default=0)) + 1, int(self.config.num_train_timesteps))
        if self._dk_exact and self.num_inference_steps is None:
            order = list(range(most))  # before set_timesteps the sigmas rise and the timesteps fall
        else:
            order = [self._dk_index_of(t) for t in range(most)]
        none = len(times) - 1
        return levels[[none, *order, none]].contiguous()
