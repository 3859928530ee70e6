"""Read by mypy alone, with the package: what it infers of calls whose result depends on their arguments."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import assert_type

from diffkern import Diffusion, samplers
from diffkern.objectives import flow_matching, losses
from diffkern.plan import Plan
from diffkern.sampling import Sampled, predictor_corrector, sample
from diffkern.schedules import linear
from diffkern.simulate import likelihood


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


def typos(model: Any, network: nn.Module, x: Tensor, t: Tensor, plan: Plan) -> None:
    """Never run: a word that is none of an argument's own is an error of types."""
    assert_type(Diffusion(network, linear(), "v").loss(x), Tensor)
    assert_type(Diffusion(network, linear()).sample(4, "ddim", steps=3, seeds=0, guidance=2.0, eta=0.5), Tensor)
    assert_type(Diffusion(network, linear()).sample(4, plan, trajectory=True), Sampled)
    assert_type(Diffusion(network, linear()).plan("ddim"), Plan)
    Diffusion(network, linear(), "epsilon")  # type: ignore[arg-type]
    Diffusion(network, linear()).sample(4, "dimm")  # type: ignore[call-overload]
    Diffusion(network, linear(), weight="min-snr", times="uniform")  # type: ignore[arg-type]
    samplers.dpmpp_2m_sde(linear(), 4, solver="huen")  # type: ignore[arg-type]
    losses.simple_loss(model, x, 10, linear(), "v", target="x0", reduction="none")
    losses.simple_loss(model, x, t, linear(), "v_prediction")  # type: ignore[arg-type]
    losses.prediction_loss(x, x, t, linear(), reduction="avg")  # type: ignore[arg-type]
    flow_matching.flow_matching_loss(model, x, coupling="OT")  # type: ignore[arg-type]
    samplers.ddim(linear(), 10, spacing="trailing", prediction="v")
    samplers.ddim(linear(), 10, spacing="trail")  # type: ignore[arg-type]
    samplers.euler(linear(), 10, prediction="epsilon")  # type: ignore[arg-type]
    likelihood.log_likelihood(model, x, linear(), solver="dopri5")  # type: ignore[arg-type]
    predictor_corrector(model, x, linear(), 10, corrector="Langevin")  # type: ignore[call-overload]
    losses.noised(x, t, linear(), seeds=1.5)  # type: ignore[arg-type]
