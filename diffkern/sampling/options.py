"""What the sampling loops are given and give back: their arguments by name and type, a callback's view, the result.

The defaults stand in the signatures of `sample` and `predictor_corrector`, whose docstrings explain the arguments.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, TypedDict

import torch
from torch import Tensor

from diffkern.names import Corrector, Norm, Prediction, Predictor, ReverseVariance, Spacing
from diffkern.ops import Seeds

if TYPE_CHECKING:
    from diffkern.schedules.timesteps import Numbers

Model = Callable[..., Tensor]
Shift = Callable[[Tensor, Tensor], Tensor]


class StepInfo(TypedDict):
    """What a callback is given after each step, in the dtype of ``x``; the tensors are reused: clone what you keep."""

    i: int
    """Index of the step, from ``start``."""
    t: float
    """Time the model was given in the step's first call."""
    x: Tensor
    """The state after the step. What is written into it in place (as torch counts writes: not through ``.data`` or
    numpy) is the state that the next step starts from; of 16 bits, elements that are as they were keep what 16 bits do
    not hold."""
    x0: Tensor | None
    """The x0 estimate of the step's last model call, to look at; 0 for a sample that waits for its start."""


class Sampled(NamedTuple):
    """Result of ``sample(..., trajectory=True)`` or ``sample(..., logprob=True)``."""

    x: Tensor
    """The final state, [B, ...]."""
    trajectory: Tensor | None = None
    """The state before the first step and after each step, [steps + 1, B, ...]."""
    logprob: Tensor | None = None
    """ln of the density of each step's new state given the one before, in nats, [steps, B]; 0 for a step that draws
    nothing. float32, float64 for float64 states."""


class LoopOptions(TypedDict, total=False):
    """Arguments of every sampling loop."""

    seeds: Seeds | None
    cond: Any
    noise: Iterable[Tensor] | None
    mask: Tensor | None
    known: Tensor | None
    callback: Callable[[StepInfo], object] | None
    progress: bool | str
    out_dtype: torch.dtype | None
    model_dtype: torch.dtype | None


class SampleOptions(LoopOptions, total=False):
    """Arguments of `sample` on which the kind of its result does not depend."""

    uncond: Any
    guidance: float | Sequence[float] | None
    mean_shift: Shift | None
    start: int | Tensor
    prepare: bool


class RowOptions(TypedDict, total=False):
    """Arguments that the rows of `predictor_corrector` and `pc_plan` are made of."""

    predictor: Predictor
    corrector_steps: int
    snr: float
    variance: ReverseVariance | None
    dt: float | None
    denoise: bool
    prediction: Prediction | None
    timesteps: Numbers | None
    spacing: Spacing


class PredictorCorrectorOptions(RowOptions, LoopOptions, total=False):
    """Arguments of `predictor_corrector` on which the kind of its result does not depend."""

    corrector: Corrector
    norm: Norm
