"""guided-diffusion's diffusion on fused ops; needs torch alone (docs/compat-guided-diffusion.md).

    from diffkern.compat.guided_diffusion import SpacedDiffusion, space_timesteps, get_named_beta_schedule
    from diffkern.compat.guided_diffusion import patch; patch()  # or: an imported guided_diffusion runs on this

Names, signatures, dictionaries and tables are those of OpenAI's guided_diffusion.
"""

from typing import TYPE_CHECKING

from diffkern.compat.kit.lazy import lazily

if TYPE_CHECKING:
    from diffkern.compat.guided_diffusion.gaussian_diffusion import (
        GaussianDiffusion,
        LossType,
        ModelMeanType,
        ModelVarType,
        betas_for_alpha_bar,
        get_named_beta_schedule,
    )
    from diffkern.compat.guided_diffusion.losses import discretized_gaussian_log_likelihood, normal_kl
    from diffkern.compat.guided_diffusion.nn import mean_flat, timestep_embedding
    from diffkern.compat.guided_diffusion.patching import Change, Report, patch, unpatch
    from diffkern.compat.guided_diffusion.respace import SpacedDiffusion, space_timesteps
    from diffkern.compat.guided_diffusion.unet import QKVAttention, QKVAttentionLegacy

__all__ = [
    "Change",
    "GaussianDiffusion",
    "LossType",
    "ModelMeanType",
    "ModelVarType",
    "QKVAttention",
    "QKVAttentionLegacy",
    "Report",
    "SpacedDiffusion",
    "betas_for_alpha_bar",
    "discretized_gaussian_log_likelihood",
    "get_named_beta_schedule",
    "mean_flat",
    "normal_kl",
    "patch",
    "space_timesteps",
    "timestep_embedding",
    "unpatch",
]

__getattr__, __dir__ = lazily(__name__, ("gaussian_diffusion", "respace", "losses", "nn", "unet", "patching"), __all__)
