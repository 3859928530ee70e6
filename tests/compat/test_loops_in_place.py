"""Loops of edm, score_sde, flow_matching and guided_diffusion: a model that writes into its input changes nothing."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import guided_diffusion_runs as guided
from torch import Tensor

from diffkern.compat.edm import edm_sampler
from diffkern.compat.flow_matching.solver import ODESolver
from diffkern.compat.score_sde import sampling, sde_lib

Result = Any
Model = Callable[..., Tensor]


def scribbling(model: Model, first: int) -> Model:
    """The model, which from some call on leaves nothing of the tensors that it was given."""
    calls = 0

    def scribble(*args: Any, **kwargs: Any) -> Tensor:
        nonlocal calls
        calls += 1
        m = model(*args, **kwargs)
        if calls >= first:
            for given in (*args, *kwargs.values()):
                given.fill_(math.nan if given.is_floating_point() else 0)
        return m

    return scribble


def of_edm(model: Model) -> Result:
    class Net:
        sigma_min, sigma_max = 0.0, math.inf

        def round_sigma(self, sigma: Any) -> Tensor:
            return torch.as_tensor(sigma)

        def __call__(self, x: Tensor, sigma: Tensor, labels: Any) -> Tensor:
            return model(x, sigma)

    return edm_sampler(Net(), x_of((2, 2, 4, 4)), num_steps=6, S_churn=10.0)


def of_score_sde(predictor: str, corrector: str, own: bool) -> Callable[[Model], Result]:
    class Own(sampling.get_predictor(predictor)):  # type: ignore[misc]
        """A class of the user's own: updates are not prepared."""

    class Net(torch.nn.Module):
        def __init__(self, model: Model) -> None:
            super().__init__()
            self.model = model

        def forward(self, x: Tensor, labels: Tensor) -> Tensor:
            return self.model(x, labels)

    def run(model: Model) -> Result:
        chosen = Own if own else sampling.get_predictor(predictor)
        sde = sde_lib.VPSDE(0.2, 8.0, 12)
        corrects = sampling.get_corrector(corrector)
        options: dict[str, Any] = {"n_steps": 2, "device": "cpu"}
        sampler = sampling.get_pc_sampler(sde, (2, 2, 4, 4), chosen, corrects, lambda x: x, 0.16, **options)
        return sampler(Net(model))[0]

    return run


def of_flow(method: str) -> Callable[[Model], Result]:
    def run(model: Model) -> Result:
        x = x_of((2, 3))
        before = x.clone()
        grid = torch.linspace(0, 1, 7 if method != "dopri5" else 3, dtype=torch.float64)
        options: dict[str, Any] = {"method": method, "time_grid": grid, "return_intermediates": True}
        found = ODESolver(model).sample(x, None, **options)
        assert torch.equal(x, before)
        return found

    return run


def of_guided(loop: str, variance: str) -> Callable[[Model], Result]:
    def run(model: Model) -> Result:
        diffusion = guided.spaced(variance=variance)
        x = guided.state()
        before = x.clone()
        options: dict[str, Any] = {"noise": x, "cond_fn": guided_by(model), "device": "cpu"}
        found = [out["sample"] for out in getattr(diffusion, loop)(model, guided.SHAPE, **options)]
        assert torch.equal(x, before)
        return torch.stack(found)

    return run


def guided_by(model: Model) -> Model:
    """A cond_fn that writes where the model does."""
    return scribbling(guided.classifier, 1) if model.__name__ == "scribble" else guided.classifier


def x_of(shape: tuple[int, ...]) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def elementwise(x: Tensor, t: Tensor) -> Tensor:
    time = torch.as_tensor(t).to(x.dtype).reshape(-1, *(1,) * (x.dim() - 1))
    return 0.5 * torch.tanh(x) + 0.1 * torch.sin(0.01 * time + x)


RUNS: dict[str, tuple[Callable[[Model], Result], Model]] = {
    "edm": (of_edm, elementwise),
    **{
        f"score_sde {own}": (of_score_sde("euler_maruyama", "ald", own == "own"), elementwise)
        for own in ("own", "ours")
    },
    "score_sde langevin": (of_score_sde("ancestral_sampling", "langevin", False), elementwise),
    **{f"flow {m}": (of_flow(m), elementwise) for m in ("euler", "midpoint", "rk4", "explicit_adams", "dopri5")},
    **{
        f"guided {loop} {variance}": (of_guided(f"{loop}_sample_loop_progressive", variance), guided.network(variance))
        for loop in ("p", "ddim")
        for variance in ("FIXED_SMALL", "LEARNED_RANGE")
    },
}


@pytest.mark.parametrize("first", [1, 4])
@pytest.mark.parametrize("name", RUNS)
def test_what_a_model_writes_changes_nothing(name: str, first: int) -> None:
    run, model = RUNS[name]
    torch.manual_seed(7)
    want = run(model)
    torch.manual_seed(7)
    assert torch.equal(run(scribbling(model, first)), want)


@pytest.mark.parametrize("variance", ["FIXED_SMALL", "LEARNED_RANGE"])
def test_what_is_given_to_one_step_of_guided_diffusion(variance: str) -> None:
    """The state and the times are the caller's."""
    diffusion = guided.spaced(variance=variance)
    x, t = guided.state(), torch.tensor([9, 5, 2, 1])
    before = x.clone(), t.clone()
    model = guided.network(variance)
    for name in ("p_sample", "ddim_sample", "ddim_reverse_sample", "p_mean_variance"):
        found = []
        for each in (model, scribbling(model, 1)):
            torch.manual_seed(7)
            found.append(getattr(diffusion, name)(each, x, t))
        assert all(torch.equal(found[0][key], found[1][key]) for key in found[0])
    assert torch.equal(x, before[0])
    assert torch.equal(t, before[1])


# --- 16 bits ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("steps", [10, 100, 1000])
@pytest.mark.parametrize("method", ["euler", "midpoint"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_many_small_steps_of_a_flow_add_up(dtype: torch.dtype, method: str, steps: int) -> None:
    """u = x: x(1) = (1 + h)^N x(0) by Euler; with states of 16 bits every step of 1000 is lost."""
    x = x_of((4, 50)).to(dtype)
    found = ODESolver(lambda x, t: x).sample(x, 1 / steps, method=method)
    h = 1 / steps
    growth = (1 + h if method == "euler" else 1 + h + h * h / 2) ** steps
    want = growth * x.double()
    unit = 2.0**-8 if dtype is torch.bfloat16 else 2.0**-11
    assert isinstance(found, Tensor)
    assert found.dtype == dtype
    assert float((found.double() - want).abs().max() / want.abs().max()) < 2.0 * unit
