"""A diffusion over some of the times of another."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from .gaussian_diffusion import GaussianDiffusion


class SpacedDiffusion(GaussianDiffusion):
    def __init__(self, use_timesteps: Any, **kwargs: Any) -> None:
        self.use_timesteps = set(use_timesteps)
        self.original_num_steps = len(kwargs["betas"])
        self.timestep_map = sorted(self.use_timesteps)
        abar = GaussianDiffusion(**kwargs).alphas_cumprod[self.timestep_map]
        super().__init__(**{**kwargs, "betas": 1 - abar / np.append(1.0, abar[:-1])})

    def p_mean_variance(self, model: Any, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        return super().p_mean_variance(self._wrap_model(model), *args, **kwargs)

    def condition_mean(self, cond_fn: Any, *args: Any, **kwargs: Any) -> Tensor:
        return super().condition_mean(self._wrap_model(cond_fn), *args, **kwargs)

    def _wrap_model(self, model: Any) -> Any:
        if isinstance(model, _WrappedModel):
            return model
        return _WrappedModel(model, self.timestep_map, self.rescale_timesteps, self.original_num_steps)

    def _scale_timesteps(self, t: Tensor) -> Tensor:
        return t


class _WrappedModel:
    def __init__(self, model: Any, timestep_map: Any, rescale_timesteps: bool, original_num_steps: int) -> None:
        self.model, self.timestep_map = model, timestep_map
        self.rescale_timesteps, self.original_num_steps = rescale_timesteps, original_num_steps

    def __call__(self, x: Tensor, ts: Tensor, **kwargs: Any) -> Tensor:
        t = torch.tensor(self.timestep_map)[ts]
        t = t.float() * (1000 / self.original_num_steps) if self.rescale_timesteps else t
        return self.model(x, t, **kwargs)  # type: ignore[no-any-return]
