"""The words that arguments take, as types, so that a type checker finds a typo before it runs."""

from __future__ import annotations

from typing import Literal

Prediction = Literal["eps", "x0", "v", "score", "velocity", "mu", "edm"]
"""What a network puts out: `diffkern.schedules.predictions`."""
Reduction = Literal["none", "mean", "sum"]
"""Of a loss over the batch."""
Spacing = Literal["leading", "trailing", "linspace", "karras", "log_snr", "exponential", "polyexponential", "beta"]
"""Of a sampler's steps: `diffkern.schedules.grids`."""
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
