"""Sampling: runs a plan (`sample`), and samplers whose steps depend on the sample.

| | |
|---|---|
| `sample`, `initial` | a plan of `diffkern.samplers`, from noise or from the middle |
| `transition_logprob` | the log-density of one step of a plan |
| `predictor_corrector`, `pc_plan` | predictor-corrector; its rows alone as a plan |
| `rk45` | the probability-flow ODE by Dormand-Prince, a step size for each sample |
"""

from diffkern.ops import Seeds
from diffkern.sampling._predictor_corrector import pc_plan, predictor_corrector
from diffkern.sampling.adaptive import rk45
from diffkern.sampling.options import Model, Sampled, Shift, StepInfo
from diffkern.sampling.runner import initial, sample, transition_logprob

__all__ = [
    "Model",
    "Sampled",
    "Seeds",
    "Shift",
    "StepInfo",
    "initial",
    "pc_plan",
    "predictor_corrector",
    "rk45",
    "sample",
    "transition_logprob",
]
