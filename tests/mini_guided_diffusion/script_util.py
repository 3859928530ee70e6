"""Names held elsewhere than where they are made."""

from __future__ import annotations

import numpy as np

from . import gaussian_diffusion as gd
from .respace import SpacedDiffusion


def create_gaussian_diffusion(steps: int = 40, kept: int = 8, rescale_timesteps: bool = False) -> SpacedDiffusion:
    return SpacedDiffusion(
        use_timesteps=range(0, steps, steps // kept),
        betas=np.linspace(1e-3, 0.2, steps),
        model_mean_type=gd.ModelMeanType.EPSILON,
        model_var_type=gd.ModelVarType.FIXED_SMALL,
        loss_type=gd.LossType.MSE,
        rescale_timesteps=rescale_timesteps,
    )
