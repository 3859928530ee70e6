"""The native ops as typed functions, their fake tensors and gradients: `randn`, `noise_sum`, `noising`, `loss`,
`variational`, `step`, `learned_step`, `step_logprob`, `attention`, `spatial_attention`, `quantile`,
`dynamic_threshold`, `moments`.

Every op runs on CPU and CUDA tensors, under torch.compile and torch.export. Dimension 0 is the batch. Tables of
coefficients are float64; arithmetic is float32 (float64 for float64 tensors) and rounds once, at the store.
Wrong input raises RuntimeError with one sentence that names the argument, the rule and the value.

Noise is an address: element i of a sample is a fixed function of (seed of the sample, stream, i), see `randn`.
"""

from __future__ import annotations

from diffkern.ops._attention import attention, spatial_attention
from diffkern.ops._bound_step import BoundStep, BoundStepOut, Stepped, bound_step, bound_step_out
from diffkern.ops._learned_step import learned_step, learned_step_out
from diffkern.ops._noise import noise_sum, noise_sum_out, randn, seeds
from diffkern.ops._statistics import dynamic_threshold, dynamic_threshold_out, moments, quantile
from diffkern.ops._step import step, step_out, step_raw
from diffkern.ops._step_logprob import step_logprob
from diffkern.ops._training import loss, noising, noising_out
from diffkern.ops._variational import VARIATIONAL_COLUMNS, variational
from diffkern.plan import LEARNED_COLUMNS

__all__ = [
    "LEARNED_COLUMNS",
    "VARIATIONAL_COLUMNS",
    "BoundStep",
    "BoundStepOut",
    "Stepped",
    "attention",
    "bound_step",
    "bound_step_out",
    "dynamic_threshold",
    "dynamic_threshold_out",
    "learned_step",
    "learned_step_out",
    "loss",
    "moments",
    "noise_sum",
    "noise_sum_out",
    "noising",
    "noising_out",
    "quantile",
    "randn",
    "seeds",
    "spatial_attention",
    "step",
    "step_logprob",
    "step_out",
    "step_raw",
    "variational",
]
