"""The native ops as typed functions, their fake tensors and gradients: `randn`, `noise_sum`, `noising`, `loss`,
`variational`, `step`, `learned_step`, `step_logprob`, `attention`, `spatial_attention`, `group_norm_act`,
`linear_rows`, `conv3x3`, `quantile`, `dynamic_threshold`, `moments`.

Every op runs on CPU and CUDA tensors (`conv3x3` on the CPU alone), under torch.compile and torch.export; those that
return new tensors (except `learned_step`) under torch.func's reverse mode and vmap. Dimension 0 is the batch. Tables of
coefficients are float64; arithmetic is float32 (float64 for float64 tensors) and rounds once, at the store.
Wrong input raises RuntimeError with one sentence that names the argument, the rule and the value.

Noise is an address: element i of a sample is a fixed function of (seed of the sample, stream, i), see `randn`.
"""

from __future__ import annotations

import torch

from diffkern import _load  # noqa: F401  (registers the ops, before the modules below speak of them)
from diffkern.ops import _training, _variational, _vmap
from diffkern.ops._attention import attention, spatial_attention
from diffkern.ops._bound_step import BoundStep as BoundStep
from diffkern.ops._bound_step import BoundStepOut as BoundStepOut
from diffkern.ops._bound_step import Stepped as Stepped
from diffkern.ops._bound_step import bound_step, bound_step_out
from diffkern.ops._conv3x3 import conv3x3, pack_conv3x3
from diffkern.ops._group_norm import group_norm_act
from diffkern.ops._learned_step import learned_step, learned_step_out
from diffkern.ops._linear_rows import linear_rows
from diffkern.ops._noise import noise_sum, noise_sum_out, randn
from diffkern.ops._seeds import Seeds as Seeds
from diffkern.ops._seeds import as_seeds as as_seeds
from diffkern.ops._seeds import seeds
from diffkern.ops._statistics import dynamic_threshold, dynamic_threshold_out, moments, quantile
from diffkern.ops._step import step, step_out
from diffkern.ops._step_logprob import step_logprob
from diffkern.ops._training import loss, noising, noising_out
from diffkern.ops._variational import HALF_BIN as HALF_BIN
from diffkern.ops._variational import VARIATIONAL_COLUMNS as VARIATIONAL_COLUMNS
from diffkern.ops._variational import variational
from diffkern.plan import LEARNED_COLUMNS as LEARNED_COLUMNS

for _name, _rule in _vmap.rules(weight=_training.WEIGHT, bound=_variational.WEIGHTS).items():
    torch.library.register_vmap(f"diffkern::{_name}", _rule)

__all__ = [
    "attention",
    "bound_step",
    "bound_step_out",
    "conv3x3",
    "dynamic_threshold",
    "dynamic_threshold_out",
    "group_norm_act",
    "learned_step",
    "learned_step_out",
    "linear_rows",
    "loss",
    "moments",
    "noise_sum",
    "noise_sum_out",
    "noising",
    "noising_out",
    "pack_conv3x3",
    "quantile",
    "randn",
    "seeds",
    "spatial_attention",
    "step",
    "step_logprob",
    "step_out",
    "variational",
]
