"""compat.score_sde with what users bring: SDEs with methods of their own, score modules, networks of any habits."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers.score_sde_algorithms import pc_sample
from helpers.score_sde_runs import Net, both, difference
from torch import Tensor

from diffkern.compat.score_sde import sampling, sde_lib

SHAPE = (3, 2, 5, 4)
N = 20
CORRECTORS = ("langevin", "ald", "none")


def run(sde: Any, predictor: str, corrector: str, net: Any, **options: Any) -> Tensor:
    torch.manual_seed(2)
    classes = sampling.get_predictor(predictor), sampling.get_corrector(corrector)
    options = {"continuous": True, "device": "cpu", **options}
    found: Tensor = sampling.get_pc_sampler(sde, SHAPE, *classes, lambda x: x, 0.16, **options)(net)[0]
    return found


class Steeper(sde_lib.VPSDE):
    """An SDE with a reverse process of its own: twice the score's pull."""

    def reverse(self, score_fn: Any, probability_flow: bool = False) -> Any:
        return super().reverse(lambda x, t: 2.0 * score_fn(x, t), probability_flow)


class Outer(sde_lib.VPSDE):
    """An SDE whose `reverse` is none of `sde_lib`'s."""

    def reverse(self, score_fn: Any, probability_flow: bool = False) -> Any:
        made = Steeper(self.beta_0, self.beta_1, self.N).reverse(score_fn, probability_flow)
        return SimpleNamespace(N=self.N, T=1, sde=made.sde, discretize=made.discretize)


@pytest.mark.parametrize("predictor", ["euler_maruyama", "reverse_diffusion"])
@pytest.mark.parametrize("own", [Steeper, Outer])
def test_an_sde_with_a_reverse_of_its_own(own: type, predictor: str) -> None:
    sde, net = both("vp", N)[0], Net()
    found = run(own(0.2, 15.0, N), predictor, "none", net)
    made = sampling.get_predictor(predictor)
    torch.manual_seed(2)
    x = mean = sde.prior_sampling(SHAPE)
    score = sampling.get_score_fn(sde, net, continuous=True)
    with torch.no_grad():
        for t in torch.linspace(1, 1e-3, N):
            x, mean = made(sde, lambda x, t: 2.0 * score(x, t)).update_fn(x, t.expand(3))
    assert difference(found, mean) <= 2e-6 * N


def test_methods_put_in_place_in_an_sde() -> None:
    """A method that one SDE is given instead of its class's need not be linear, nor know states of another shape."""
    sde = both("vp", N)[0]
    sde.discretize = lambda x, t: (0.1 * x.mean((1, 2, 3), keepdim=True).expand_as(x), 0.0 * t)
    x = torch.randn(SHAPE)
    found = sampling.ReverseDiffusionPredictor(sde, lambda x, t: x).update_fn(x, torch.full([3], 0.5))[0]
    assert difference(found, x - 0.1 * x.mean((1, 2, 3), keepdim=True)) <= 1e-6
    assert run(sde, "reverse_diffusion", "none", Net()).shape == SHAPE


class Wrapped:
    """An SDE within another object, with a drift that is not linear."""

    def __init__(self, inner: Any) -> None:
        self.inner = inner

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)


class Sine(sde_lib.VPSDE):
    def sde(self, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        drift, g = super().sde(x, t)
        return drift + torch.sin(x), g


def test_an_sde_within_another_object() -> None:
    x, t = torch.randn(SHAPE), torch.tensor([0.9, 0.31, 0.01])
    results = []
    for sde in (Sine(N=N), Wrapped(Sine(N=N))):
        torch.manual_seed(2)
        results.append(sampling.EulerMaruyamaPredictor(sde, lambda x, t: -x).update_fn(x, t)[0])
    assert torch.equal(*results)


class Images(sde_lib.VESDE):
    """Its marginals are known for images alone."""

    def marginal_prob(self, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        b, _, _, _ = x.shape
        return super().marginal_prob(x, t)[0], super().marginal_prob(x, t)[1] * torch.ones(b)


@pytest.mark.parametrize("corrector", CORRECTORS)
@pytest.mark.parametrize("continuous", [True, False])
def test_marginals_that_look_at_the_state(corrector: str, continuous: bool) -> None:
    _, process = both("ve", N)
    net = Net(ve=True)
    torch.manual_seed(2)
    want = pc_sample(process, net, SHAPE, "reverse_diffusion", corrector, continuous=continuous)
    found = run(Images(0.02, 30.0, N), "reverse_diffusion", corrector, net, continuous=continuous)
    assert difference(found, want) <= 2e-6 * 2 * N


def test_a_score_function_may_have_a_network() -> None:
    """A module of the user's own is called as a whole, whatever its parts are called."""

    class Score(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.network = torch.nn.Linear(4, 4)

        def forward(self, x: Tensor, t: Tensor) -> Tensor:
            return -x

    sde, x, t = both("vp", N)[0], torch.randn(SHAPE), torch.tensor([0.9, 0.31, 0.01])
    found = sampling.ReverseDiffusionPredictor(sde, Score(), True).update_fn(x, t)[0]
    want = sampling.ReverseDiffusionPredictor(sde, lambda x, t: -x, True).update_fn(x, t)[0]
    assert torch.equal(found, want)


@pytest.mark.parametrize("predictor", ["reverse_diffusion", "none"])
@pytest.mark.parametrize("corrector", CORRECTORS)
def test_a_network_may_change_its_labels(predictor: str, corrector: str) -> None:
    class Scaling(Net):
        def forward(self, x: Tensor, labels: Tensor) -> Tensor:
            out = super().forward(x, labels)
            labels *= 1000
            return out

    _, process = both("vp", N)
    net = Net()
    images = [run(both("vp", N)[0], predictor, corrector, net, n_steps=2) for net in (net, Scaling())]
    assert torch.equal(*images)
    torch.manual_seed(2)
    assert difference(images[0], pc_sample(process, net, SHAPE, predictor, corrector, steps=2)) <= 2e-6 * 3 * N
