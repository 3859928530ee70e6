"""diffkern: the inner loops of diffusion and flow-matching models, fast, exact and reproducible, in PyTorch.

    schedule = diffkern.linear()
    x = diffkern.initial(plan := diffkern.ddim(schedule, 50), (16, 3, 64, 64), seeds=0)
    images = diffkern.sample(model, x, plan, seeds=0)

Native ops: `ops`. Schedules, prediction conversions and posteriors: `schedules`, `predictions`; step spacings: `grids`.
Samplers as data: `plan`, `samplers`; running them: `sampling`. Training: `losses`, `variational`, `flow_matching`,
`score_matching`, with `weightings` and `time_sampling`. Attention blocks and the demo's UNet: `nn`.
Processes and probability paths: `simulate`, `brownian`; exact densities: `likelihood`.
Guided models: `guidance`.
"""

from diffkern import (
    brownian,
    flow_matching,
    grids,
    guidance,
    likelihood,
    losses,
    ops,
    plan,
    predictions,
    reference,
    samplers,
    sampling,
    schedules,
    score_matching,
    simulate,
    streams,
    time_sampling,
    variational,
    weightings,
)
from diffkern._load import build_info, cuda_status
from diffkern.flow_matching import flow_matching_loss
from diffkern.likelihood import log_likelihood
from diffkern.losses import draw_seeds, edm_loss, noised, prediction_loss, simple_loss
from diffkern.ops import attention, loss, noising, randn, seeds, spatial_attention, step, step_out
from diffkern.plan import Plan, Row
from diffkern.predictions import convert
from diffkern.samplers import ddim, ddpm, euler, get_sampler, heun
from diffkern.sampling import Sampled, initial, sample
from diffkern.schedules import (
    cosine,
    cosine_arc,
    edm,
    flow,
    from_alphas_cumprod,
    from_betas,
    linear,
    path,
    rectified_flow,
    scaled_linear,
    sub_vp,
    ve,
    vp,
    zero_terminal_snr,
)
from diffkern.variational import bits_per_dim, hybrid_loss, vlb_loss

__version__ = "0.1.0"

__all__ = [
    "Plan",
    "Row",
    "Sampled",
    "attention",
    "bits_per_dim",
    "brownian",
    "build_info",
    "convert",
    "cosine",
    "cosine_arc",
    "cuda_status",
    "ddim",
    "ddpm",
    "draw_seeds",
    "edm",
    "edm_loss",
    "euler",
    "flow",
    "flow_matching",
    "flow_matching_loss",
    "from_alphas_cumprod",
    "from_betas",
    "get_sampler",
    "grids",
    "guidance",
    "heun",
    "hybrid_loss",
    "initial",
    "likelihood",
    "linear",
    "log_likelihood",
    "loss",
    "losses",
    "noised",
    "noising",
    "ops",
    "path",
    "plan",
    "prediction_loss",
    "predictions",
    "randn",
    "rectified_flow",
    "reference",
    "sample",
    "samplers",
    "sampling",
    "scaled_linear",
    "schedules",
    "score_matching",
    "seeds",
    "simple_loss",
    "simulate",
    "spatial_attention",
    "step",
    "step_out",
    "streams",
    "sub_vp",
    "time_sampling",
    "variational",
    "ve",
    "vlb_loss",
    "vp",
    "weightings",
    "zero_terminal_snr",
]
