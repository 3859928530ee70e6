"""The words that arguments take, as types, so that a type checker finds a typo before it runs.

The types know each word by one name. What else is taken for it at run time is in `diffkern.checks`. A string that is
known at run time only, as from a command line, becomes what a typed argument takes by `samplers.get_sampler`,
`schedules.predictions.check_prediction`, `objectives.weightings.get_weighting` and
`objectives.time_sampling.get_time_sampler`.
"""

from __future__ import annotations

from typing import Literal

Prediction = Literal["eps", "x0", "v", "score", "velocity", "mu", "edm"]
"""What a network puts out: `diffkern.schedules.predictions`."""
SamplerName = Literal[
    "ddpm",
    "ddim",
    "euler",
    "heun",
    "midpoint",
    "rk4",
    "rk4_38",
    "lms",
    "deis",
    "euler_ancestral",
    "dpmpp_1s",
    "dpmpp_2s",
    "dpmpp_2m",
    "dpmpp_3m",
    "dpmpp_2m_sde",
    "dpmpp_3m_sde",
    "dpmpp_sde",
    "dpm_2",
    "dpm_2_ancestral",
    "dpmpp_2s_ancestral",
    "unipc",
    "euler_maruyama",
    "flow_sde",
    "langevin",
    "annealed_langevin",
    "ddim_inversion",
    "repaint",
]
"""What makes a plan: `diffkern.samplers`."""
WeightingName = Literal[
    "uniform",
    "x0",
    "eps",
    "snr",
    "v",
    "snr_plus_one",
    "truncated_snr",
    "min_snr",
    "soft_min_snr",
    "p2",
    "edm",
    "likelihood",
    "vlb",
]
"""What a loss is weighted by: `diffkern.objectives.weightings`."""
TimesName = Literal["uniform", "stratified", "logit_normal", "mode", "cosmap", "log_normal", "loss_second_moment"]
"""How training times are drawn: `diffkern.objectives.time_sampling`."""
AdversarialName = Literal["minimax", "non_saturating", "hinge", "least_squares", "wasserstein", "relativistic"]
"""What generator and discriminator play for: `diffkern.objectives.adversarial`."""
GradientPenalty = Literal["gradient", "r1", "r2", "r1_r2"]
"""What holds a discriminator's slope: `diffkern.gan.GAN`."""
DegradationName = Literal["super_resolution", "inpainting", "colourisation", "deblurring"]
"""What is taken from an image: `diffkern.degradations`."""
Reduction = Literal["none", "mean", "sum"]
"""Of a loss over the batch."""
Activation = Literal["silu"]
"""What follows a group normalisation or goes before a linear layer, where something does."""
TableSpacing = Literal["leading", "trailing", "linspace"]
"""Of whole times of a table: `diffkern.schedules.grids.spaced_timesteps`."""
LevelSpacing = Literal["karras", "log_snr", "exponential", "polyexponential", "beta"]
"""Of noise levels: `diffkern.schedules.grids.levels`."""
Spacing = Literal[TableSpacing, LevelSpacing]
"""Of a sampler's steps, of either kind: `diffkern.schedules.grids`."""
ShiftKind = Literal["exponential", "linear"]
"""What mu says of a flow's shift."""
ReverseVariance = Literal["beta", "beta_tilde"]
"""Of a reverse step: its upper and its lower bound."""
LearnedVariance = Literal[ReverseVariance, "learned"]
"""The same, or what the network says of it."""
Crop = Literal["center", "random"]
"""Where an image that is longer than wide is cut to a square."""
NoisePath = Literal["independent", "brownian"]
"""Where a sampler's noise comes from: an address a step, or one Brownian path a sample."""
MultistepSolver = Literal["midpoint", "heun"]
"""The second-order terms of DPM-Solver++'s SDE."""
UniPCVariant = Literal["bh1", "bh2"]
EpsFrom = Literal["model", "x0"]
"""Which eps points DDIM's direction."""
GuidanceForm = Literal["scale", "paper"]
"""Whether the conditional model alone has the weight 1 or 0."""
HeadOrder = Literal["new", "legacy", "edm"]
"""How q, k, v and the heads lie in the channels of `ops.spatial_attention`."""
Attention = Literal["diffkern", "torch"]
"""Whose kernels a block's attention runs in."""
Precision = Literal["exact", "fast"]
"""Of a convolution's products: `ops.conv3x3`."""
TimeDtype = Literal["int64", "float32"]
"""Of the times that a plan gives the model."""
Coupling = Literal["independent", "ot"]
"""How flow matching pairs noise with data."""
Projection = Literal["rademacher", "gaussian"]
"""The random directions of trace estimates."""
Divergence = Literal["exact", "hutchinson"]
"""How a likelihood takes the divergence of a drift."""
Solver = Literal["euler", "midpoint", "heun", "rk4", "rk4_38", "rk45"]
"""How a likelihood solves its ODE."""
Norm = Literal["sample", "batch"]
"""Whose norms decide a step."""
Corrector = Literal["langevin", "ald", "none"]
Predictor = Literal["reverse_diffusion", "ancestral", "euler_maruyama", "none"]
OdeSolver = Literal["device", "scipy"]
"""Where the drop-in for score_sde solves its ODE: in our solver on the device, or in scipy as the original."""
Rng = Literal["torch", "counter"]
"""Where the noise of a drop-in for diffusers comes from: torch's generator, as the original's, or addresses."""
