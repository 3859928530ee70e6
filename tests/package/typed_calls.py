"""Read by mypy alone, with the package: what it infers of calls whose result depends on their arguments."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from typing_extensions import assert_type

from diffkern import samplers
from diffkern.plan import Plan
from diffkern.sampling import Sampled, predictor_corrector, sample
from diffkern.schedules import linear


def calls(model: Any, x: Tensor, plan: Plan, either: bool) -> None:
    """Never run."""
    assert_type(sample(model, x, plan), Tensor)
    assert_type(sample(model, x, plan, seeds=0, guidance=2.0, start=3, out_dtype=torch.float16), Tensor)
    assert_type(sample(model, x, plan, seeds=0, trajectory=False, logprob=False), Tensor)
    assert_type(sample(model, x, plan, trajectory=True), Sampled)
    assert_type(sample(model, x, plan, seeds=0, logprob=True), Sampled)
    assert_type(sample(model, x, plan, trajectory=either, logprob=True), Sampled)
    assert_type(predictor_corrector(model, x, linear(), 10, snr=0.1, seeds=0), Tensor)
    assert_type(predictor_corrector(model, x, linear(), 10, trajectory=True, norm="batch"), Sampled)
    sample(model, x, plan, seed=0)  # type: ignore[call-overload]
    sample(model, x, plan, start="first")  # type: ignore[call-overload]
    predictor_corrector(model, x, linear(), 10, snr="high")  # type: ignore[call-overload]
    assert_type(samplers.midpoint(linear(), 10, spacing="karras", clip=1.0), Plan)
    samplers.midpoint(linear(), 10, spacing=1.0)  # type: ignore[arg-type]
    samplers.midpoint(linear(), 10, nodes=3)  # type: ignore[call-arg]
